"""Times heads_rms_norm_rope and rope against the lines of Qwen3, and against our own separate calls.

OMP_NUM_THREADS=1 python benchmarks/heads.py     # and 2
python benchmarks/heads.py --tokens 1,512 --rounds 60

What is compared runs in turn in one process. Ratios are ours over theirs: median and least of the rounds' own ratios.
"copy" writes as many bytes as query and key have, and reads them; for backward, half as many again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

import rmsnorm

HEADS, KEY_HEADS, WIDTH, EPS = 32, 8, 128, 1e-6
Function = Callable[[], object]


def problem(tokens: int, dtype: torch.dtype, grad: bool) -> tuple[dict[str, Function], int]:
    """What is compared, by name, and the bytes of query and key."""
    query, key = (torch.randn(1, tokens, n * WIDTH, dtype=dtype, requires_grad=grad) for n in (HEADS, KEY_HEADS))
    angle = torch.outer(torch.arange(tokens) + 1.0, 1e4 ** -(torch.arange(WIDTH // 2) * 2 / WIDTH)).repeat(1, 2)[None]
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    norms = [Qwen3RMSNorm(WIDTH, EPS).to(dtype) for _ in range(2)]
    weights = [norm.weight for norm in norms]
    for weight in weights:
        weight.requires_grad_(grad)

    def split(x: Tensor) -> Tensor:
        return x.view(1, tokens, -1, WIDTH)

    def theirs() -> tuple[Tensor, Tensor]:
        q, k = (norm(split(x)).transpose(1, 2) for norm, x in zip(norms, (query, key), strict=True))
        return apply_rotary_pos_emb(q, k, cos, sin)

    def steps() -> tuple[Tensor, Tensor]:
        q, k = (
            rmsnorm.rms_norm(split(x), (WIDTH,), w, EPS, casting_mode="llama").transpose(1, 2)
            for w, x in zip(weights, (query, key), strict=True)
        )
        return apply_rotary_pos_emb(q, k, cos, sin)

    def ours() -> tuple[Tensor, Tensor]:
        q, k = (split(x).transpose(1, 2) for x in (query, key))
        return rmsnorm.heads_rms_norm_rope(q, k, cos, sin, *weights, EPS, casting_mode="llama")

    def lines() -> tuple[Tensor, Tensor]:
        return apply_rotary_pos_emb(*(split(x).transpose(1, 2) for x in (query, key)), cos, sin)

    def turned() -> tuple[Tensor, Tensor]:
        return rmsnorm.rope(*(split(x).transpose(1, 2) for x in (query, key)), cos, sin)

    functions: dict[str, Function] = {"ours": ours, "qwen3": theirs, "steps": steps, "rope": turned, "llama": lines}
    bytes = (query.numel() + key.numel()) * query.element_size()
    if grad:
        normed = ("ours", "qwen3", "steps")
        functions = {
            name: backward(function, [query, key, *(weights if name in normed else [])])
            for name, function in functions.items()
        }
    words = torch.empty(bytes * (3 if grad else 2) // 8, dtype=torch.float32)
    target = torch.empty_like(words)
    functions["copy"] = lambda: target.copy_(words)
    return functions, bytes


def backward(function: Function, leaves: list[Tensor]) -> Function:
    """Of a graph that is kept, with gradients as attention hands them over: contiguous."""
    q, k = function()  # type: ignore[misc]
    grads = torch.randn(q.shape, dtype=q.dtype), torch.randn(k.shape, dtype=k.dtype)
    return lambda: torch.autograd.grad((q, k), leaves, grads, retain_graph=True)


def race(functions: dict[str, Function], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in functions}
    counts = {}
    for name, function in functions.items():
        for _ in range(3):
            function()
        start = time.perf_counter()
        function()
        counts[name] = max(1, int(2e-3 / (time.perf_counter() - start)))
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(counts[name]):
                function()
            times[name].append((time.perf_counter() - start) / counts[name])
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,512")
    parser.add_argument("--rounds", type=int, default=40)
    asked = parser.parse_args()
    threads, target = torch.get_num_threads(), rmsnorm.info().cpu_target
    print(f"torch {torch.__version__}, {threads} threads, {target}, {HEADS} + {KEY_HEADS} heads of {WIDTH}")
    for grad in (False, True):
        for tokens in map(int, asked.tokens.split(",")):
            for dtype in (torch.float32, torch.bfloat16):
                with torch.set_grad_enabled(grad):
                    times = race(problem(tokens, dtype, grad)[0], asked.rounds)
                cells = []
                for ours, theirs in (("ours", "qwen3"), ("ours", "steps"), ("rope", "llama"), ("ours", "copy")):
                    ratios = [a / b for a, b in zip(times[ours], times[theirs], strict=True)]
                    cells.append(f"{ours}/{theirs} {statistics.median(ratios):.2f} ({min(ratios):.2f})")
                microseconds = statistics.median(times["ours"]) * 1e6
                what = "backward" if grad else "forward "
                print(
                    f"{what} {tokens:5} tokens {str(dtype)[6:]:9} {microseconds:9.1f} us  " + "  ".join(cells),
                    flush=True,
                )


if __name__ == "__main__":
    main()
