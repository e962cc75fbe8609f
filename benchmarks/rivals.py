"""Times our forms beside zentorch's and sglang's CPU kernels: the only file that knows how those are called.

    python benchmarks/rivals.py [--sglang LIBRARY.so] [--runs 3] [--seconds 2] [--only WORD] [--write]

zentorch takes part where it is installed, sglang where a library of its CPU kernels, built from its source, is named.
Where they have no kernel for a form, their shortest way to it takes part: WAYS says which. Outputs are compared first.
Each run is a process for each number of threads, with the allocator settled as `rmsnorm bench` has it.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from neighbour_forms import EPS, noise
from processes import say, tensors_of, what_they_say, where
from torch import Tensor

import rmsnorm
from rmsnorm.bench import pages, timing

Calls = dict[str, Callable[[], Any]]
RIVALS = ("zentorch", "sglang")
LONG = 2e-3
"""Seconds: a call that a scheduler interrupts."""
WAYS = {  # what stands for a form: zentorch's calls, sglang's calls
    "norm": ("zentorch_rms_norm", "rmsnorm_cpu"),
    "add + norm": ("zentorch_add_rms_norm_, in place", "fused_add_rmsnorm_cpu, in place"),
    "norm + add": ("zentorch_rms_norm, add_", "rmsnorm_cpu, add_"),
    "sandwich": ("zentorch_rms_norm, zentorch_add_rms_norm_", "rmsnorm_cpu, fused_add_rmsnorm_cpu"),
    "norm + int8": ("no quantiser", "rmsnorm_cpu, per_token_quant_int8_cpu"),
    "add + norm + int8": ("no quantiser", "fused_add_rmsnorm_cpu, per_token_quant_int8_cpu"),
    "heads": ("no rotary embedding", "rmsnorm_cpu twice, rotary_embedding_cpu in place"),
    "rope": ("no rotary embedding", "rotary_embedding_cpu in place"),
}


def norms(rows: int, columns: int, dtype: torch.dtype, form: str) -> Calls:
    """What reads rows of a residual stream. In place means theirs: the sum grows from call to call, as in a model."""
    x, r = noise(rows, columns, dtype=dtype), noise(rows, columns, dtype=dtype, seed=1)
    w, v = (1 + noise(columns, dtype=dtype, seed=seed) / 4 for seed in (2, 3))
    size = (columns,)
    ours: Calls = {
        "norm": lambda: rmsnorm.rms_norm(x, size, w, EPS),
        "add + norm": lambda: rmsnorm.add_rms_norm(x, r, size, w, EPS),
        "norm + add": lambda: rmsnorm.rms_norm_add(x, r, size, w, EPS),
        "sandwich": lambda: rmsnorm.sandwich_rms_norm(x, r, size, w, v, EPS),
        "norm + int8": lambda: rmsnorm.quantised_rms_norm(x, size, w, EPS),
        "add + norm + int8": lambda: rmsnorm.quantised_rms_norm(x, size, w, EPS, residual=r),
    }
    calls = {"rmsnorm": ours[form]}
    if found("zentorch") and "int8" not in form:
        ops = torch.ops.zentorch
        calls["zentorch"] = stream(form, x, r, w, v, ops.zentorch_rms_norm, ops.zentorch_add_rms_norm_, middle=True)
    if found("sgl_kernel") and dtype != torch.float32:
        ops = torch.ops.sgl_kernel
        calls["sglang"] = stream(form, x, r, w, v, ops.rmsnorm_cpu, ops.fused_add_rmsnorm_cpu, middle=False)
    return calls


def stream(
    form: str, x: Tensor, r: Tensor, w: Tensor, v: Tensor, norm: Any, add: Any, middle: bool
) -> Callable[[], Any]:
    """The form by a library that has a norm and an add + norm in place, whose weight stands in the middle or behind."""
    x, r = x.clone(), r.clone()

    def add_norm(y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        add(y, *((weight, r) if middle else (r, weight)), EPS)
        return y, r

    def quantised() -> Any:
        return torch.ops.sgl_kernel.per_token_quant_int8_cpu(norm(x, w, EPS))

    def added_quantised() -> Any:
        add_norm(x, w)
        return (*torch.ops.sgl_kernel.per_token_quant_int8_cpu(x), r)

    return {
        "norm": lambda: norm(x, w, EPS),
        "add + norm": lambda: add_norm(x, w),
        "norm + add": lambda: norm(x, w, EPS).add_(r),
        "sandwich": lambda: add_norm(norm(x, w, EPS), v),
        "norm + int8": quantised,
        "add + norm + int8": added_quantised,
    }[form]


def heads(tokens: int, dtype: torch.dtype, normed: bool) -> Calls:
    """32 query heads and 8 key heads of 128, as projections leave them; attention there reads [tokens, heads, 128]."""
    width = 128
    q, k = (noise(tokens, n * width, dtype=dtype, seed=n) for n in (32, 8))
    angle = torch.outer(torch.arange(tokens) + 1.0, 1e4 ** -(torch.arange(width // 2) * 2 / width))
    cos, sin = (torch.cat([part, part], -1)[None].to(dtype) for part in (angle.cos(), angle.sin()))
    weights = [1 + noise(width, dtype=dtype, seed=seed) / 4 for seed in (2, 3)]

    def split(x: Tensor) -> Tensor:
        return x.view(1, tokens, -1, width).transpose(1, 2)

    def ours() -> Any:
        if normed:
            return rmsnorm.heads_rms_norm_rope(split(q), split(k), cos, sin, *weights, EPS)
        return rmsnorm.rope(split(q), split(k), cos, sin)

    calls: Calls = {"rmsnorm": ours}
    if found("sgl_kernel") and dtype != torch.float32:
        ops, places, cache = torch.ops.sgl_kernel, torch.arange(tokens), torch.cat([angle.cos(), angle.sin()], -1)
        both, cache = [q.clone(), k.clone()], cache.to(dtype)

        def theirs() -> Any:
            turned = both
            if normed:
                rows = (ops.rmsnorm_cpu(x.view(-1, width), w, EPS) for x, w in zip(both, weights, strict=True))
                turned = [x.view(tokens, -1) for x in rows]
            return ops.rotary_embedding_cpu(places, *turned, width, cache, True)

        calls["sglang"] = theirs
    return calls


def cases() -> Iterator[tuple[str, Callable[[], Calls]]]:
    for dtype in (torch.bfloat16, torch.float32):
        kind = str(dtype)[6:]
        for form in ("norm", "add + norm", "norm + add", "sandwich"):
            for rows, columns in ((1, 4096), (512, 4096), (4096, 4096), *([(20480, 128)] if form == "norm" else [])):
                yield f"{form} {rows}×{columns} {kind}", lambda r=rows, c=columns, d=dtype, f=form: norms(r, c, d, f)
    for form in ("norm + int8", "add + norm + int8"):
        for rows in (1, 512):
            yield f"{form} {rows}×4096 bfloat16", lambda r=rows, f=form: norms(r, 4096, torch.bfloat16, f)
    for form in ("heads", "rope"):
        for tokens in (1, 512):
            yield f"{form} {tokens} tokens bfloat16", lambda t=tokens, f=form: heads(t, torch.bfloat16, f == "heads")


def found(library: str) -> bool:
    """Whether its operators are there."""
    needed = {"zentorch": "zentorch_rms_norm", "sgl_kernel": "rmsnorm_cpu"}[library]
    return hasattr(getattr(torch.ops, library), needed)


def seen(name: str, result: Any) -> list[Tensor]:
    """What is compared: [heads, tokens, 128], and numbers for codes. sglang's are 128 more, in uint8."""
    first, *rest = tensors_of(result)
    if first.dtype in (torch.int8, torch.uint8):
        first = (first.float() - (128 if first.dtype == torch.uint8 else 0)) * rest[0].float().view(-1, 1)
        return [first, *rest[1:]]
    if name == "sglang" and rest and rest[0].shape != first.shape:  # query and key
        return [x.view(x.shape[0], -1, 128).transpose(0, 1)[None] for x in (first, *rest)]
    return [first, *rest]


def check(calls: Calls) -> dict[str, float]:
    """The largest difference of each ÷ the largest number: 2^-6 at most, as codes and roundings of theirs differ."""
    ours, *others = (seen(name, call()) for name, call in calls.items())
    apart = {}
    for name, other in zip(list(calls)[1:], others, strict=True):
        pairs = list(zip(ours, other, strict=True))
        apart[name] = max(((a.double() - b.double()).abs().max() / b.double().abs().max()).item() for a, b in pairs)
        assert apart[name] <= 2**-6, (name, apart)
    return apart


def race(given: argparse.Namespace) -> None:
    """One process: prints a line of JSON for each case."""
    for name, make in cases():
        if given.only in name:
            with torch.no_grad():
                calls = make()
                if len(calls) < 2:
                    continue
                apart = check(calls)
                times = timing.measure(calls, given.seconds)
            medians = {rival: times["rmsnorm"].ratio(times[rival]) for rival in apart}
            say(name, {who: time.fastest for who, time in times.items()}, medians, apart)


def ways() -> str:
    return pages.table(["", *RIVALS], [[form, *theirs] for form, theirs in WAYS.items()])


def results(runs: list[tuple[int, list[Any]]], threads: list[int]) -> str:
    """A row for each case: the fastest samples of all runs, as medians say how busy the machine was.

    Long calls are never undisturbed then: of those the quotients round by round, and the middle one of the runs.
    """
    titles, rows = [""], []
    for count in threads:
        titles += [f"{count} thread{'s' * (count > 1)}", *(f"÷ {rival}" for rival in RIVALS)]
    for name in dict.fromkeys(line[0] for _, line in runs):
        row = [name]
        for count in threads:
            mine = [line for ran, line in runs if ran == count and line[0] == name]
            fastest = {who: min(times[who] for _, times, *_ in mine) for who in mine[0][1]}
            own = fastest.pop("rmsnorm")
            ratios = {who: own / time for who, time in fastest.items()}
            if own > LONG:
                ratios = {who: statistics.median(line[2][who] for line in mine) for who in fastest}
            row += [timing.human(own), *(f"{ratios[who]:.2f}" if who in ratios else "" for who in RIVALS)]
        rows.append(row)
    return pages.table(titles, rows)


def versions(library: str | None) -> str:
    zentorch = importlib.metadata.version("zentorch") if found("zentorch") else "not installed"
    sglang = os.environ.get("SGLANG_SOURCE", "of an unnamed source") if library else "not given"
    return f"zentorch {zentorch}, sglang's kernels {sglang}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sglang", help="a library of sglang's CPU kernels; SGLANG_SOURCE says of which source")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each case of a run")
    parser.add_argument("--only", default="", help="cases whose names have this in them")
    parser.add_argument("--write", action="store_true", help="write the tables of docs/performance/tables.md")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    try:
        importlib.import_module("zentorch")  # it brings operators
    except ImportError:
        print("zentorch is not installed", file=sys.stderr)
    if given.sglang:
        torch.ops.load_library(given.sglang)
    if given.one:
        race(given)
        return
    threads = [int(count) for count in given.threads.split(",")]
    head = f"{where()}, {versions(given.sglang)}, {given.runs} runs."
    runs = list(what_they_say(__file__, given.runs, threads))
    content = f"{head}\n\n{ways()}\n{results(runs, threads)}"
    print(content)
    if given.write:
        page = Path(__file__).parents[1] / "docs/performance/tables.md"
        pages.replace_block(page, "rivals: made by `python benchmarks/rivals.py --write`", content)


if __name__ == "__main__":
    main()
