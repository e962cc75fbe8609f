"""The only file that decides what is run: the sizes, the learning rates, and which runs the outcomes so far ask for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Setting:
    """Everything that the results depend on. Two folders with the same setting hold the same numbers."""

    arms: tuple[str, ...] = ()
    seeds: int = 5
    """Runs of each arm at its own best rate, with seeds 1, 2, …; the sweep has seed 0, and no say in the result."""
    steps: int = 240
    layers: int = 4
    width: int = 128
    heads: int = 4
    context: int = 128
    """Bytes that are read to predict the next, at most."""
    batch: int = 16
    windows: int = 320
    """Held-out windows that are scored."""
    lowest: float = 1e-3
    """The first learning rate of the sweep."""
    rates: int = 6
    ratio: float = 2.0
    """From one to the next."""
    extra: int = 3
    """Rates that may be added at the ends: down or up if the best is the last one, up if the highest still trains."""
    corpus: str = ""
    digest: str = ""
    torch: str = ""
    rmsnorm: str = ""

    @property
    def tokens(self) -> int:
        """Bytes that a run is trained on."""
        return self.steps * self.batch * self.context

    @property
    def rehearsal(self) -> bool:
        """Whether it is smaller than the study in a way that its results can't be trusted for."""
        sizes = "steps", "layers", "width", "context", "batch", "windows", "rates"
        return self.seeds < 3 or any(getattr(self, name) < getattr(FULL, name) for name in sizes)

    def grid(self) -> list[float]:
        """The sweep's rates, before any is added."""
        return [self.lowest * self.ratio**i for i in range(self.rates)]

    def differs(self, other: Mapping[str, Any]) -> str:
        """The first field in which another setting is different, in words, or nothing."""
        for name, value in self.to_json().items():
            if other.get(name) != value:
                return f"{name} {other.get(name)!r}, not {value!r}"
        return ""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "arms": list(self.arms)}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Setting:
        return cls(**{**plain, "arms": tuple(plain["arms"])})


FULL = Setting()
QUICK = replace(
    FULL, seeds=2, steps=80, layers=2, width=64, context=64, batch=8, windows=80, rates=4, ratio=4.0, extra=0
)


@dataclass(frozen=True)
class Run:
    """One training."""

    arm: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """A file name."""
        return f"{self.arm}-{self.rate:.6g}-seed{self.seed}"


@dataclass(frozen=True)
class Trained:
    """What the plan must know of a run that is over."""

    run: Run
    loss: float | None
    """Held-out; None if the run diverged."""
    stable: bool


def best(sweep: Mapping[float, Trained]) -> float | None:
    """The rate with the lowest held-out loss, or None if none was stable."""
    losses = {rate: one.loss for rate, one in sweep.items() if one.stable and one.loss is not None}
    return min(losses, key=lambda rate: losses[rate]) if losses else None


def sweep_of(arm: str, done: Iterable[Trained]) -> dict[float, Trained]:
    """The runs of the sweep, by rate, from low to high."""
    found = {one.run.rate: one for one in done if one.run.arm == arm and one.run.seed == 0}
    return dict(sorted(found.items()))


def wanted(setting: Setting, arm: str, done: Collection[Trained]) -> list[Run]:
    """The runs of an arm that can be started now: those of the sweep, then of its ends, then the seeds.

    It depends on the outcomes alone, not on their order: whoever asks, however often, the same runs are made.
    """
    have = {one.run for one in done}
    sweep = sweep_of(arm, done)
    missing = [Run(arm, rate, 0) for rate in setting.grid() if Run(arm, rate, 0) not in have]
    if missing:
        return missing
    top = max(sweep)
    winner = best(sweep)
    if len(sweep) < setting.rates + setting.extra:
        if winner is None or winner == min(sweep):
            return [Run(arm, min(sweep) / setting.ratio, 0)]
        if winner == top or sweep[top].stable:
            return [Run(arm, top * setting.ratio, 0)]
    if winner is None:
        return []
    seeds = [Run(arm, winner, seed) for seed in range(1, setting.seeds + 1)]
    return [run for run in seeds if run not in have]


def expected(setting: Setting, arms: Collection[str], done: Collection[Trained]) -> int:
    """How many runs there will be, as far as one can know now: what the progress bar counts to."""
    total = 0
    for arm in arms:
        have = sum(one.run.arm == arm for one in done)
        asked = wanted(setting, arm, done)
        seeds = 0 if any(run.seed for run in asked) or (have and not asked) else setting.seeds
        total += have + len(asked) + seeds
    return total
