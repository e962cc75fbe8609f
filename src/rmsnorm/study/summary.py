"""The only file that does statistics: what the runs of an arm amount to, and how far two arms are apart."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from .arms import ARMS
from .network import WARM_UP
from .plan import best, sweep_of
from .results import Study
from .training import HOPELESS, Outcome

# Two-sided 95 % quantiles of Student's t, by degrees of freedom; the command allows 16 seeds.
STUDENT = (
    *(math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365),
    *(2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
)
NEAR = 0.1
"""Nats: a rate so close to the best one is as good in practice."""


@dataclass(frozen=True)
class Spread:
    """Several values of one quantity: their mean, and the half width of its 95 % band."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def band(self) -> float:
        """Student's t times the standard error; NaN for fewer than two values, which say nothing about noise."""
        count = len(self.values)
        return STUDENT[count - 1] * statistics.stdev(self.values) / count**0.5 if count > 1 else math.nan

    @property
    def noise(self) -> bool:
        """Zero is inside the band, or the band is unknown."""
        return not abs(self.mean) > self.band

    def overlaps(self, other: Spread) -> bool:
        """Their bands have a point in common, or one is unknown: neither can be put before the other."""
        return not abs(self.mean - other.mean) > self.band + other.band

    def __str__(self) -> str:
        band = "?" if math.isnan(self.band) else f"{self.band:.4f}"
        return f"{self.mean:.4f} ± {band}"

    @property
    def signed(self) -> str:
        """With its sign, for differences."""
        return f"{'+' if self.mean >= 0 else '−'}{str(self).lstrip('-')}"


class Arm:
    """The runs of one arm, and what follows from them."""

    def __init__(self, study: Study, name: str) -> None:
        self.name, self.title = name, ARMS[name].title
        self.steps = study.setting.steps
        runs = [one for one in study.outcomes if one.arm == name]
        self.sweep = {one.rate: one for one in sorted(runs, key=lambda one: one.rate) if one.seed == 0}
        self.best_rate = best(sweep_of(name, [one.trained for one in runs]))
        chosen = [one for one in runs if one.seed > 0 and one.rate == self.best_rate]
        self.seeds = {one.seed: one for one in sorted(chosen, key=lambda one: one.seed) if one.held_out is not None}
        self.failed = len(chosen) - len(self.seeds)

    def over_seeds(self, quantity: str) -> Spread:
        """The spread of a field of the outcomes, at the best rate."""
        values = (getattr(one, quantity) for one in self.seeds.values())
        return Spread(tuple(value for value in values if value is not None))

    @cached_property
    def held_out(self) -> Spread:
        return self.over_seeds("held_out")

    @property
    def edge(self) -> bool:
        """The best rate is the last that was tried at one end: a better one may lie beyond."""
        return self.best_rate in (min(self.sweep), max(self.sweep)) if self.sweep else False

    @property
    def largest_stable(self) -> float | None:
        """The highest rate below which no run of the sweep failed."""
        stable = None
        for rate, one in self.sweep.items():
            if not one.stable and stable is not None:
                break
            if one.stable:
                stable = rate
        return stable

    @property
    def open_end(self) -> bool:
        """No rate above the largest stable one was tried."""
        return bool(self.sweep) and self.largest_stable == max(self.sweep)

    @property
    def good_rates(self) -> list[float]:
        """Those of the sweep that end within 0.1 nats of the best."""
        losses = {rate: one.held_out for rate, one in self.sweep.items() if one.stable and one.held_out is not None}
        return [rate for rate, loss in losses.items() if loss <= min(losses.values()) + NEAR]

    def sensitivity(self, rates: Iterable[float]) -> float:
        """Mean loss above the best one over these rates, a failure counting as knowing nothing: Wortsman et al.'s
        learning-rate sensitivity (2023, arXiv 2309.14322)."""
        losses = [_capped(self.sweep[rate]) for rate in rates if rate in self.sweep]
        lowest = min((_capped(one) for one in self.sweep.values()), default=math.nan)
        return statistics.fmean(losses) - lowest if losses else math.nan

    @property
    def spikes(self) -> Spread:
        """The largest gradient norm ÷ the median one after the warm-up, at the best rate."""
        after = round(WARM_UP * self.steps)
        norms = [one.gradient_norms[after:] for one in self.seeds.values() if one.gradient_norms[after:]]
        return Spread(tuple(max(some) / statistics.median(some) for some in norms))

    def statistics(self, one: str, other: str = "") -> Spread:
        """BatchNorm's held-out loss with some statistics, or the difference of two."""
        found = [outcome.statistics for outcome in self.seeds.values() if outcome.statistics]
        return Spread(tuple(losses[one] - (losses[other] if other else 0.0) for losses in found))

    def leak(self, where: str) -> float:
        """The largest movement of a logit over the seeds, see :func:`probes.leak`; NaN if there is none."""
        return max((one.leak[where] for one in self.seeds.values() if one.leak), default=math.nan)


def arms_of(study: Study) -> dict[str, Arm]:
    """By name, in the order of the table."""
    return {name: Arm(study, name) for name in study.setting.arms}


def difference(one: Arm, other: Arm) -> Spread:
    """Held-out loss of one arm less the other's, seed by seed: the same seed has the same first weights and batches."""
    shared = [seed for seed in one.seeds if seed in other.seeds]
    pairs = [(one.seeds[seed].held_out, other.seeds[seed].held_out) for seed in shared]
    return Spread(tuple(mine - theirs for mine, theirs in pairs if mine is not None and theirs is not None))


def envelope(curves: Sequence[Sequence[float]]) -> tuple[list[float], list[float], list[float]]:
    """Mean, lowest and highest of several curves, as far as the shortest goes."""
    points = list(zip(*curves, strict=False))
    return [statistics.fmean(p) for p in points], [min(p) for p in points], [max(p) for p in points]


def _capped(outcome: Outcome) -> float:
    return min(HOPELESS, HOPELESS if outcome.held_out is None else outcome.held_out)
