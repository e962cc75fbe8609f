"""The only file that knows what is kept of a measurement, in memory and in a JSON file, and what follows from it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .cases import COPY_TENSORS, Case
from .timing import Timing

OURS, FLOOR = "rmsnorm", "copy_"


@dataclass(frozen=True)
class Line:
    """What one contender took for one case. Seconds are per call; GB are 10⁹ bytes."""

    median_s: float
    quartiles_s: tuple[float, float]
    min_s: float
    rounds: int
    calls_per_sample: int
    gb_per_s: float
    """The bytes that must move (cases.py) ÷ the median time."""
    share_of_copy: float | None
    """That ÷ what copy_ reached in the same race; above 1 where a cache serves one and not the other."""
    ours_over_this: float
    """Median over the rounds of the first contender's time ÷ this one's; below 1, the first is faster."""
    ours_over_this_min: float
    """The same quotient of the fastest samples."""
    is_rms_norm: bool


@dataclass(frozen=True)
class Result:
    """What one case gave, the first contender first."""

    case: Case
    contenders: dict[str, Line]
    skipped: dict[str, str] = field(default_factory=dict)

    def ratios(self) -> dict[str, float]:
        """The first contender's time ÷ each other's."""
        return {name: line.ours_over_this for name, line in list(self.contenders.items())[1:]}

    def rivals(self) -> dict[str, float]:
        """Those ratios, of the others that compute RMSNorm."""
        return {name: ratio for name, ratio in self.ratios().items() if self.contenders[name].is_rms_norm}


@dataclass(frozen=True)
class Footprint:
    """The bytes that one forward and backward needs, beside its input, weight and incoming gradient."""

    contender: str
    rows: int
    cols: int
    dtype: str
    tensor_bytes: int
    peak_bytes: int
    kept_bytes: int
    kept: list[str]
    """What is kept for backward beside input and weight: dtype and shape of each tensor."""


@dataclass
class Report:
    """Everything that one command measured."""

    machine: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    footprints: list[Footprint] = field(default_factory=list)
    complete: bool = True

    def to_json(self) -> str:
        return json.dumps(
            {
                "machine": self.machine,
                "complete": self.complete,
                "results": [
                    {**asdict(one.case), "contenders": asdict(one)["contenders"], "skipped": one.skipped}
                    for one in self.results
                ],
                "footprints": [asdict(one) for one in self.footprints],
            },
            indent=1,
            ensure_ascii=False,
        )

    @classmethod
    def load(cls, file: Path) -> Report:
        """Reads what ``to_json`` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        try:
            plain = json.loads(file.read_text())
            results = []
            for one in plain["results"]:
                lines = one.pop("contenders"), one.pop("skipped")
                contenders = {
                    name: Line(**{**line, "quartiles_s": tuple(line["quartiles_s"])}) for name, line in lines[0].items()
                }
                results.append(Result(Case(**one), contenders, lines[1]))
            footprints = [Footprint(**one) for one in plain["footprints"]]
            return cls(plain["machine"], results, footprints, plain["complete"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{file} is not a result of `rmsnorm bench --json`: {type(error).__name__}: {error}"
            ) from error

    def threads(self) -> list[int]:
        return list(dict.fromkeys(result.case.threads for result in self.results))

    def contenders(self) -> list[str]:
        """Everybody who was timed, in the order of the first case with all of them."""
        names = dict.fromkeys(name for result in self.results for name in result.contenders)
        return [name for name in names if name != FLOOR] + [FLOOR] * (FLOOR in names)


def lines(case: Case, timings: Mapping[str, Timing], rms_norms: Iterable[str]) -> dict[str, Line]:
    """The samples of one race, condensed."""
    ours = next(iter(timings.values()), None)
    moved = dict.fromkeys(timings, case.moved_bytes) | {FLOOR: COPY_TENSORS * case.tensor_bytes}
    speed = {name: moved[name] / timing.median / 1e9 for name, timing in timings.items()}
    rms_norms = set(rms_norms)
    return {
        name: Line(
            median_s=timing.median,
            quartiles_s=timing.quartiles,
            min_s=timing.fastest,
            rounds=len(timing.seconds),
            calls_per_sample=timing.calls,
            gb_per_s=speed[name],
            share_of_copy=speed[name] / speed[FLOOR] if FLOOR in speed else None,
            ours_over_this=ours.ratio(timing) if ours and timing is not ours else 1.0,
            ours_over_this_min=ours.fastest / timing.fastest if ours else 1.0,
            is_rms_norm=name in rms_norms,
        )
        for name, timing in timings.items()
    }


def first(results: Iterable[Result]) -> tuple[int, int, list[tuple[Case, str, float]]]:
    """In how many cases the first contender is the fastest RMSNorm, of how many; and where it is not: who is, by what
    ratio."""
    contested = [result for result in results if result.rivals()]
    lost = []
    for result in contested:
        name, ratio = max(result.rivals().items(), key=lambda item: item[1])
        if ratio > 1:
            lost.append((result.case, name, ratio))
    return len(contested) - len(lost), len(contested), lost


def verdict(results: Iterable[Result], rival: str) -> str:
    """One plain sentence about the first contender against one other."""
    ratios = [result.ratios()[rival] for result in results if rival in result.ratios()]
    if not ratios:
        return f"Nothing was measured against {rival}."
    faster = sum(ratio < 1 for ratio in ratios)
    return (
        f"The results agree, and rmsnorm was faster than {rival} in {faster} of {len(ratios)} cases: it took "
        f"{statistics.geometric_mean(ratios):.2f} times as long (geometric mean; best {min(ratios):.2f}, worst "
        f"{max(ratios):.2f})."
    )
