"""The only file that knows the performance contract: what must be how fast, and whether it is.

Every bar is a ratio of two times of one run, so it holds on any machine or on none. A bar holds if the median over the
rounds is within its bound in every run; "by minima", if in some runs only the quotient of the fastest samples is: then
something else wanted the machine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from . import memory
from .cases import Case
from .contenders import BY_NAME
from .race import race

HALF_AND_FULL = ("float32", "bfloat16")
KEPT = "rows · 4 bytes"


@dataclass(frozen=True)
class Bar:
    """``ours`` must take at most ``bound`` times what ``other`` takes."""

    cell: str
    rows: int
    cols: int
    dtype: str
    direction: str
    memory: str
    ours: str
    other: str
    bound: float

    def case(self) -> Case:
        return Case(self.rows, self.cols, self.dtype, self.direction, self.memory)


def _bars(
    cell: str,
    shape: tuple[int, int],
    bounds: dict[str, float],
    dtypes: Iterable[str] = HALF_AND_FULL,
    direction: str = "forward",
    memory: str = "fresh",
    ours: str = "rmsnorm",
) -> list[Bar]:
    return [
        Bar(cell, *shape, dtype, direction, memory, ours, other, bound)
        for dtype in dtypes
        for other, bound in bounds.items()
    ]


ROW, CACHED, LARGE, HEADS = (1, 4096), (512, 4096), (8192, 4096), (32768, 128)
FP32, BF16 = ("float32",), ("bfloat16",)
BARS = (
    *_bars("decode, a function call", ROW, {"F.layer_norm, no bias": 1.0, "F.rms_norm": 0.4}, FP32),
    *_bars("decode, a layer", ROW, {"nn.RMSNorm": 0.5}, FP32, ours="rmsnorm.RMSNorm"),
    *_bars("a layer, recorded", ROW, {"F.rms_norm": 0.8}, FP32, "recorded", ours="rmsnorm.RMSNorm"),
    *_bars("decode, after install()", ROW, {"nn.RMSNorm": 0.55}, FP32, ours="nn.RMSNorm, installed"),
    *_bars("recorded, after install()", ROW, {"nn.RMSNorm": 0.55}, FP32, "recorded", ours="nn.RMSNorm, installed"),
    *_bars("in cache", CACHED, {"copy_": 1.6, "F.rms_norm": 0.35, "torch.compile": 0.75}),
    *_bars("beyond the caches, out=", LARGE, {"copy_": 1.1}, memory="warm"),
    *_bars("beyond the caches", LARGE, {"torch.neg": 0.35, "F.rms_norm": 0.12}, FP32),
    *_bars("short rows, out=", HEADS, {"copy_": 1.4}, FP32, memory="warm"),
    *_bars("short rows, out=", HEADS, {"copy_": 2.0}, BF16, memory="warm"),
    *_bars("short rows", HEADS, {"F.rms_norm": 0.3}),
    *_bars("dx and dw", CACHED, {"F.rms_norm": 0.15, "torch.compile": 0.7, "F.layer_norm": 0.9}, direction="backward"),
    *_bars("add + norm", CACHED, {"add, then rmsnorm": 0.85}, direction="add"),
    *_bars("kept for backward", CACHED, {KEPT: 1.0}, direction="recorded"),
)


@dataclass
class Outcome:
    """What a bar gave with one number of threads: a ratio for each run."""

    bar: Bar
    threads: int
    medians: list[float] = field(default_factory=list)
    minima: list[float] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        bound = self.bar.bound
        if any(map(math.isnan, self.medians)):
            return "not measured"
        if all(median <= bound for median in self.medians):
            return "holds"
        if all(min(pair) <= bound for pair in zip(self.medians, self.minima, strict=True)):
            return "holds by minima"
        return "missed"

    def to_plain(self) -> dict[str, Any]:
        return {
            **asdict(self.bar),
            "threads": self.threads,
            "medians": self.medians,
            "minima": self.minima,
            "verdict": self.verdict,
        }


def to_json(machine: dict[str, Any], outcomes: Iterable[Outcome], complete: bool) -> str:
    return json.dumps(
        {"machine": machine, "complete": complete, "bars": [one.to_plain() for one in outcomes]},
        indent=1,
        ensure_ascii=False,
    )


def groups(bars: Iterable[Bar]) -> list[list[Bar]]:
    """Bars that are settled by one race."""
    found: dict[tuple[Case, str], list[Bar]] = {}
    for bar in bars:
        found.setdefault((bar.case(), bar.ours), []).append(bar)
    return list(found.values())


def run(together: list[list[Bar]], seconds: float) -> Iterator[list[tuple[Bar, float, float]]]:
    """For each group of bars their ratios, of medians and of minima. For a process of its own."""
    for group in together:
        yield list(_settle(group, seconds))


def _settle(group: list[Bar], seconds: float) -> Iterator[tuple[Bar, float, float]]:
    case, (ours, *_) = group[0].case(), (bar.ours for bar in group)
    if group[0].other == KEPT:
        needed = memory.footprint(BY_NAME[ours], case).kept_bytes / (4 * case.rows)
        yield group[0], needed, needed
        return
    result = race(case, [BY_NAME[ours], *(BY_NAME[bar.other] for bar in group)], seconds)
    for bar in group:
        line = result.contenders.get(bar.other)
        yield (bar, line.ours_over_this, line.ours_over_this_min) if line else (bar, math.nan, math.nan)
