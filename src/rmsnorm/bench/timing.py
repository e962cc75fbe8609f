"""The only file that reads a clock: contenders take turns in one run, and are compared round by round.

A shared machine drifts and hiccups. So every round gives each contender one sample, in a new random order: what
slows one slows its neighbours, quotients are formed within a round, and medians drop the rounds that were hit. The
fastest sample says what the machine can do when nobody else uses it.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import repeat
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

Call = Callable[[], object]
Around = Callable[[], AbstractContextManager[object]]

SHORTEST_SAMPLE = 1e-3
"""Seconds: far above the clock's resolution, and several calls where the data fits into a cache, so that a contender
finds there what its own last call left, not what the others' did."""
FEWEST_ROUNDS, MOST_ROUNDS = 7, 1000


@dataclass(frozen=True)
class Timing:
    """The samples of one contender, one per round."""

    seconds: tuple[float, ...]
    """Per call."""
    calls: int
    """Calls in one sample."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """A quarter of the samples is faster than the first, a quarter slower than the second."""
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    @property
    def fastest(self) -> float:
        return min(self.seconds)

    def ratio(self, other: Timing) -> float:
        """This time ÷ the other's: the median over the rounds that they shared."""
        return statistics.median(self.quotients(other))

    def quotients(self, other: Timing) -> list[float]:
        """This time ÷ the other's, round by round."""
        return [mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True)]


def measure(
    contenders: Mapping[str, Call],
    seconds: float,
    around: Mapping[str, Around] | None = None,
    settle: float = 0.0,
    finish: Call | None = None,
) -> dict[str, Timing]:
    """Times the contenders against each other for about so many seconds, but for no fewer than 7 rounds each.

    Args:
        contenders: what to call, by name.
        seconds: for all of them together.
        around: what a contender's samples run inside of; entered and left off the clock.
        settle: seconds of calls before each sample, off the clock, but at least one call. A contender then has its own
            data in the caches, and the threads of the one before it have gone to sleep.
        finish: waits until what was called is done, where calls only queue work; a sample begins and ends with it.
    """
    within = {name: (around or {}).get(name, nullcontext) for name in contenders}
    with _garbage_stays():
        calls = {name: _calls_per_sample(call, within[name], finish) for name, call in contenders.items()}
        samples: dict[str, list[float]] = {name: [] for name in contenders}
        order, shuffle = list(contenders), random.Random(0).shuffle
        end = perf_counter() + seconds
        for done in range(MOST_ROUNDS):
            if done >= FEWEST_ROUNDS and perf_counter() > end:
                break
            shuffle(order)
            for name in order:
                with within[name]():
                    ready = perf_counter() + settle
                    contenders[name]()
                    while perf_counter() < ready:
                        contenders[name]()
                    samples[name].append(_sample(contenders[name], calls[name], finish) / calls[name])
    return {name: Timing(tuple(samples[name]), calls[name]) for name in contenders}


def quickest(calls: Sequence[Call]) -> Call:
    """The one that is fastest in the best of five tries: how a contender chooses among its own ways."""
    for call in calls:
        call()
    return min(calls, key=lambda call: min(_sample(call, 1) for _ in range(5)))


def human(*seconds: float) -> str:
    """Three digits and a unit, ``3.14 µs``; several times share one unit, ``3.14–3.92 µs``."""
    units = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}
    unit = next((name for name, size in units.items() if min(seconds) >= size), "µs")
    values = [time / units[unit] for time in seconds]
    return "–".join(f"{v:.{2 if v < 10 else 1 if v < 100 else 0}f}" for v in values) + f" {unit}"


def _sample(call: Call, times: int, finish: Call | None = None) -> float:
    if finish:
        finish()
    start = perf_counter()
    for _ in repeat(None, times):
        call()
    if finish:
        finish()
    return perf_counter() - start


def _calls_per_sample(call: Call, around: Around, finish: Call | None) -> int:
    """How many calls make a sample long enough; also warms up. The best of three: one hiccup must not decide."""
    with around():
        call()
        times = 1
        while (best := min(_sample(call, times, finish) for _ in range(3))) < SHORTEST_SAMPLE:
            times = max(times + 1, math.ceil(times * min(10.0, 1.2 * SHORTEST_SAMPLE / best)))
    return times


@contextmanager
def _garbage_stays() -> Iterator[None]:
    """A collection in the middle of a sample would be charged to whoever happened to be running."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
