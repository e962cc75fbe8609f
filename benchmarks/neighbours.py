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
from typing import Any

import torch
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


def cases() -> Iterator[tuple[str, str, Calls, int]]:
    for normed, back in ((True, False), (True, True), (False, False), (False, True)):
        for tokens in (1, 512):
            for dtype in (torch.float32, torch.bfloat16):
                name = f"{'heads' if normed else 'rope'} {tokens} tokens {str(dtype)[6:]}{' backward' if back else ''}"
                yield "heads", name, *heads(tokens, dtype, normed, back)
    for dtype in (torch.float32, torch.bfloat16):
        for rows, columns in ((1, 4096), (512, 4096), (512, 576)):
            for residual in (False, True):
                name = "add + norm + int8" if residual else "norm + int8"
                calls, moved = quantised(rows, columns, dtype, residual)
                yield "quantised", f"{name} {rows}x{columns} {str(dtype)[6:]}", calls, moved


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
    parser.add_argument("forms", nargs="*")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each contender of a case")
    given = parser.parse_args()
    print(f"torch {torch.__version__}, {rmsnorm.info().cpu_target}; fused time, ÷ separate (median of turns, minima)")
    for threads in map(int, given.threads.split(",")):
        torch.set_num_threads(threads)
        speed = copy_speed()
        for form, name, calls, moved in cases():
            if given.forms and form not in given.forms:
                continue
            with torch.no_grad():
                check(calls)
                times = race(calls, given.seconds)
            own = times.pop("fused")
            said = [f"{threads} thread{'s' * (threads > 1)}", f"{name:36}", f"{min(own) * 1e6:9.1f} µs"]
            for other, taken in times.items():
                ratios = statistics.median(a / b for a, b in zip(own, taken, strict=True))
                said.append(f"÷ {other} {ratios:.2f} ({min(own) / min(taken):.2f})")
            said.append(f"÷ copy {min(own) / (moved / speed):.2f}")
            print("  ".join(said), flush=True)


if __name__ == "__main__":
    main()
