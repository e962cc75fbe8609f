"""Times each fused form beside the same steps one after the other, ours and other libraries': ratios, in one process.

    python benchmarks/neighbours.py [FORM ...] [--threads 1,2] [--seconds 1.0]

Contenders take turns, a block of calls each; what is printed is the median of the ratios of neighbouring blocks, the
ratio of the minima, and the bytes that must move at the speed of `Tensor.copy_` of the same run. Outputs are compared
before. One row of CASES is one case: the fused call, then the separate steps by name.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import rmsnorm

Calls = dict[str, Callable[[], Any]]
EPS = 1e-6


def noise(*sizes: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantised(rows: int, columns: int, dtype: torch.dtype, residual: bool) -> tuple[Calls, int]:
    """int8 behind the norm: torchao's quantiser behind ours."""
    from torchao.quantization.granularity import PerRow
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor

    x, r = noise(rows, columns, dtype=dtype), noise(rows, columns, dtype=dtype, seed=1)
    w = 1 + noise(columns, dtype=dtype, seed=2) / 4

    def fused() -> Any:
        return rmsnorm.quantised_rms_norm(x, (columns,), w, EPS, residual=r if residual else None)

    def separate() -> Any:
        if residual:
            y, sum = rmsnorm.add_rms_norm(x, r, (columns,), w, EPS)
        else:
            y = rmsnorm.rms_norm(x, (columns,), w, EPS)
        q = Int8Tensor.from_hp(y, granularity=PerRow())
        return (q.qdata, q.scale, sum) if residual else (q.qdata, q.scale)

    moved = x.nbytes * (3 if residual else 1) + x.numel()
    return {"fused": fused, "ours + torchao": separate}, moved


def heads(tokens: int, dtype: torch.dtype, normed: bool, back: bool) -> tuple[Calls, int]:
    """32 query heads and 8 key heads of 128, as projections leave them: Qwen3's lines, or Llama's without the norm."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    width = 128
    both = [noise(1, tokens, n * width, dtype=dtype, seed=n).requires_grad_(back) for n in (32, 8)]
    angle = torch.outer(torch.arange(tokens) + 1.0, 1e4 ** -(torch.arange(width // 2) * 2 / width)).repeat(1, 2)[None]
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    norms = [Qwen3RMSNorm(width, EPS).to(dtype).requires_grad_(back) for _ in both]
    weights = [norm.weight for norm in norms]
    grads = [noise(1, n, tokens, width, dtype=dtype, seed=n) for n in (32, 8)]

    def split(norm: Callable[[Tensor, int], Tensor]) -> list[Tensor]:
        return [norm(x.view(1, tokens, -1, width), i).transpose(1, 2) for i, x in enumerate(both)]

    def ours(x: Tensor, i: int) -> Tensor:
        return rmsnorm.rms_norm(x, (width,), weights[i], EPS, casting_mode="llama")

    def fused() -> Any:
        q, k = split(lambda x, i: x)
        if not normed:
            return rmsnorm.rope(q, k, cos, sin)
        return rmsnorm.heads_rms_norm_rope(q, k, cos, sin, *weights, EPS, casting_mode="llama")

    calls: Calls = {"fused": fused}
    if normed:
        calls["Qwen3's"] = lambda: apply_rotary_pos_emb(*split(lambda x, i: norms[i](x)), cos, sin)
        calls["ours + Qwen3's"] = lambda: apply_rotary_pos_emb(*split(ours), cos, sin)
    else:
        calls["Llama's"] = lambda: apply_rotary_pos_emb(*split(lambda x, i: x), cos, sin)
    moved = sum(x.nbytes for x in both) * (3 if back and normed else 2)
    if back:
        leaves = both + weights if normed else both
        with torch.enable_grad():
            calls = {name: gradient(call(), leaves, grads) for name, call in calls.items()}
    return calls, moved


def gradient(outputs: Any, leaves: list[Tensor], grads: list[Tensor]) -> Callable[[], Any]:
    """Backward alone, of a graph that is kept."""
    return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)


def norm_add(rows: int, columns: int, dtype: torch.dtype) -> tuple[Calls, int]:
    """The first half of the sandwich alone."""
    x, r = noise(rows, columns, dtype=dtype), noise(rows, columns, dtype=dtype, seed=1)
    w = 1 + noise(columns, dtype=dtype, seed=2) / 4
    return {
        "fused": lambda: rmsnorm.rms_norm_add(x, r, (columns,), w, EPS),
        "rms_norm, +": lambda: r + rmsnorm.rms_norm(x, (columns,), w, EPS),
        "torch's": lambda: r + F.rms_norm(x, (columns,), w, EPS),
    }, 3 * x.nbytes


def sandwich(rows: int, columns: int, dtype: torch.dtype, backward: bool) -> tuple[Calls, int]:
    """Norm, add, norm: as Gemma 2 and 3 have them, by our own calls and by torch's."""
    x, r, dy, ds = (noise(rows, columns, dtype=dtype, seed=seed).requires_grad_(backward) for seed in range(4))
    w, v = (1 + noise(columns, dtype=dtype, seed=seed) / 4 for seed in (4, 5))
    leaves = [x, r, w.requires_grad_(backward), v.requires_grad_(backward)]

    def steps(norm: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        s = r + norm(x, (columns,), w, EPS)
        return norm(s, (columns,), v, EPS), s

    def ours() -> tuple[Tensor, Tensor]:
        return rmsnorm.add_rms_norm(rmsnorm.rms_norm(x, (columns,), w, EPS), r, (columns,), v, EPS)

    calls: Calls = {
        "fused": lambda: rmsnorm.sandwich_rms_norm(x, r, (columns,), w, v, EPS),
        "rms_norm, +, rms_norm": lambda: steps(rmsnorm.rms_norm),
        "rms_norm, add_rms_norm": ours,
        "torch's": lambda: steps(F.rms_norm),
    }
    if not backward:
        return calls, 4 * x.nbytes

    return {name: gradient(call(), leaves, [dy, ds]) for name, call in calls.items()}, 6 * x.nbytes


def small(rows: int, columns: int, dtype: torch.dtype) -> Iterator[tuple[str, Calls, int]]:
    """What can be asked for beyond the plain norm, beside the same by our other calls and by torch's lines."""
    x, r, dy = (noise(rows, columns, dtype=dtype, seed=seed) for seed in range(3))
    w, b = (1 + noise(columns, dtype=dtype, seed=seed) / 4 for seed in (4, 5))
    shape, wide, size, half = (columns,), torch.float32, x.nbytes, torch.bfloat16
    norm, add = rmsnorm.rms_norm, rmsnorm.add_rms_norm

    def factor(t: Tensor, part: int = columns) -> Tensor:
        return torch.rsqrt(t[:, :part].float().square().mean(-1, keepdim=True) + EPS)

    yield (
        "bias",
        {
            "fused": lambda: norm(x, shape, w, EPS, bias=b),
            "rms_norm, +": lambda: norm(x, shape, w, EPS) + b,
            "torch's": lambda: F.rms_norm(x, shape, w, EPS) + b,
        },
        2 * size,
    )
    yield (
        "partial",
        {
            "fused": lambda: norm(x, shape, w, EPS, partial=0.125),
            "torch's": lambda: (x * factor(x, columns // 8)).to(dtype) * w,
        },
        2 * size,
    )
    yield (
        "rstd",
        {
            "fused": lambda: norm(x, shape, w, EPS, return_rstd=True),
            "rms_norm, torch's": lambda: (norm(x, shape, w, EPS), factor(x)),
        },
        2 * size,
    )
    yield "factor", {"fused": lambda: rmsnorm.inverse_rms(x, shape, EPS), "torch's": lambda: factor(x)}, size
    yield "l2", {"fused": lambda: rmsnorm.l2_norm(x, shape), "torch's": lambda: F.normalize(x, dim=-1)}, 2 * size
    # Both with the copies that put back what is overwritten: a half of what moves.
    a, s, c, t = x.clone(), r.clone(), x.clone(), r.clone()
    yield (
        "add in place",
        {
            "fused": lambda: rmsnorm.add_rms_norm_(a.copy_(x), s.copy_(r), w, EPS),
            "add_rms_norm": lambda: add(c.copy_(x), t.copy_(r), shape, w, EPS),
        },
        8 * size,
    )
    if dtype is wide:
        yield (
            "fp32 in, bf16 out",
            {
                "fused": lambda: norm(x, shape, w, EPS, out_dtype=half),
                "rms_norm, to": lambda: norm(x, shape, w, EPS).to(half),
                "torch's": lambda: F.rms_norm(x, shape, w, EPS).to(half),
            },
            size * 3 // 2,
        )
        leaves, g = [x.requires_grad_(), w.requires_grad_()], [dy.to(half)]
        with torch.enable_grad():
            outputs = norm(x, shape, w, EPS, out_dtype=half), norm(x, shape, w, EPS).to(half)
        names = ("fused", "rms_norm, to")
        yield (
            "fp32 in, bf16 out, backward",
            {n: gradient(y, leaves, g) for n, y in zip(names, outputs, strict=True)},
            size * 5 // 2,
        )
        return
    stream, gain = r.float(), w.float()

    def steps(norm: Callable[..., Tensor], first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        total = first + second
        return norm(total, shape, gain, EPS).to(dtype), total

    def unrounded(norm: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        y, total = steps(norm, x.float(), r.float())
        return y, total.to(dtype)

    yield (
        "fp32 residual",
        {
            "fused": lambda: add(x, stream, shape, w, EPS, out_dtype=dtype),
            "+, rms_norm, to": lambda: steps(norm, x, stream),
            "torch's": lambda: steps(F.rms_norm, x, stream),
        },
        size * 6,
    )
    yield (
        "unrounded sum",
        {
            "fused": lambda: add(x, r, shape, w, EPS, round_sum=False),
            "add_rms_norm, rounded": lambda: add(x, r, shape, w, EPS),
            "torch's": lambda: unrounded(F.rms_norm),
        },
        4 * size,
    )


def modulated(sizes: tuple[int, ...], dtype: torch.dtype, layer: bool, added: bool, back: bool) -> tuple[Calls, int]:
    """AdaLN of samples, with or without the gated add before it: diffusers' lines, with torch's norms and with ours."""
    x, r = (noise(*sizes, dtype=dtype, seed=seed).requires_grad_(back) for seed in (0, 1))
    width = sizes[-1:]
    both = noise(sizes[0], 3 * width[0], dtype=dtype, seed=2).requires_grad_(back)
    shift, scale, gate = both.chunk(3, 1)
    mode = "torch" if dtype is torch.float32 else "llama"
    statistic = "layer" if layer else "rms"

    def torchs(x: Tensor) -> Tensor:
        return F.layer_norm(x, width, None, None, EPS) if layer else F.rms_norm(x, width, None, EPS)

    def ours(x: Tensor) -> Tensor:
        return rmsnorm.layer_norm(x, width, None, None, EPS) if layer else rmsnorm.rms_norm(x, width, None, EPS)

    def lines(norm: Callable[[Tensor], Tensor]) -> Any:
        s = r + gate.unsqueeze(1) * x if added else x
        y = norm(s) * (1 + scale[:, None]) + shift[:, None]
        return (y, s) if added else y

    def fused() -> Any:
        options: dict[str, Any] = {"statistic": statistic, "casting_mode": mode, "scale": scale, "shift": shift}
        if added:
            options |= {"residual": r, "gate": gate}
        return rmsnorm.modulated_norm(x, width, None, EPS, **options)

    calls: Calls = {"fused": fused, "torch's": lambda: lines(torchs), "ours, separate": lambda: lines(ours)}
    if not back:
        return calls, x.nbytes * (4 if added else 2)
    grads = [noise(*sizes, dtype=dtype, seed=seed) for seed in (3, 4)][: 1 + added]
    leaves = [x, r, both] if added else [x, both]
    with torch.enable_grad():
        calls = {name: gradient(call(), leaves, grads) for name, call in calls.items()}
    return calls, x.nbytes * (6 if added else 3)


FORMS = ("quantised", "sandwich", "heads", "modulated", "small")


def cases(wanted: list[str]) -> Iterator[tuple[str, Calls, int]]:
    for dtype in (torch.float32, torch.bfloat16):
        kind = str(dtype)[6:]
        for rows, columns in ((1, 4096), (512, 4096), (512, 576)):
            for residual in (False, True) if "quantised" in wanted else ():
                name = "add + norm + int8" if residual else "norm + int8"
                yield f"{name} {rows}x{columns} {kind}", *quantised(rows, columns, dtype, residual)
        for rows, columns in ((1, 4096), (512, 4096), (4096, 4096)) if "sandwich" in wanted else ():
            what = f"{rows}x{columns} {kind}"
            yield f"norm + add {what}", *norm_add(rows, columns, dtype)
            yield f"sandwich {what}", *sandwich(rows, columns, dtype, backward=False)
            yield f"sandwich backward {what}", *sandwich(rows, columns, dtype, backward=True)
        for rows, columns in ((1, 4096), (512, 4096), (4096, 4096)) if "small" in wanted else ():
            for name, calls, moved in small(rows, columns, dtype):
                yield f"{name} {rows}x{columns} {kind}", calls, moved
        for sizes in ((1, 512, 4096), (1, 4096, 4096), (2, 1024, 1152)) if "modulated" in wanted else ():
            for layer, added, back in product((True, False), (False, True), (False, True)):
                said = f"{'gated add + ' if added else ''}{'layer' if layer else 'rms'} {'backward ' if back else ''}"
                name = f"modulated {said}{'x'.join(map(str, sizes))} {kind}"
                yield name, *modulated(sizes, dtype, layer, added, back)
        for tokens in (1, 512) if "heads" in wanted else ():
            for normed, back in product((True, False), (False, True)):
                name = f"{'heads' if normed else 'rope'} {'backward ' if back else ''}{tokens} tokens {kind}"
                yield name, *heads(tokens, dtype, normed, back)


def tensors_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for one in result for t in tensors_of(one)]


def check(calls: Calls) -> None:
    """All results alike: to 2^-6 of the largest, as some round less; bit for bit is the tests' business."""
    first, *others = (tensors_of(call()) for call in calls.values())
    for other in others:
        for a, b in zip(first, other, strict=True):
            apart = (a.double() - b.double()).abs().max()
            assert apart <= 2**-6 * b.double().abs().max() + 1e-6, (a, b)


def block(call: Callable[[], Any], count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - begin) / count


def race(calls: Calls, seconds: float) -> dict[str, list[float]]:
    counts = {}
    for name, call in calls.items():
        call()
        counts[name] = max(1, int(0.02 / max(block(call, 3), 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end or len(times["fused"]) < 5:
        for name, call in calls.items():
            times[name].append(block(call, counts[name]))
    return times


def copy_speed() -> float:
    """Bytes a second, read and written, of a copy beyond the caches."""
    a, b = torch.zeros(2**25), torch.zeros(2**25)
    return 2 * a.nbytes / min(block(lambda: b.copy_(a), 1) for _ in range(5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("forms", nargs="*", help=", ".join(FORMS))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each contender of a case")
    given = parser.parse_args()
    print(f"torch {torch.__version__}, {rmsnorm.info().cpu_target}; fused time, ÷ separate (median of turns, minima)")
    for threads in map(int, given.threads.split(",")):
        torch.set_num_threads(threads)
        speed = copy_speed()
        for name, calls, moved in cases(given.forms or list(FORMS)):
            with torch.no_grad():
                check(calls)
                times = race(calls, given.seconds)
            own = times.pop("fused")
            said = [f"{threads} thread{'s' * (threads > 1)}", f"{name:52}", f"{min(own) * 1e6:9.1f} µs"]
            for other, taken in times.items():
                ratios = statistics.median(a / b for a, b in zip(own, taken, strict=True))
                said.append(f"÷ {other} {ratios:.2f} ({min(own) / min(taken):.2f})")
            said.append(f"÷ copy {min(own) / (moved / speed):.2f}")
            print("  ".join(said), flush=True)


if __name__ == "__main__":
    main()
