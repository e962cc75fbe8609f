"""The only file that knows what is kept of a study: all in memory, as JSON, as CSV."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bench.export import csv_of
from .plan import Setting
from .training import Outcome

CURVE_POINTS = 60
"""Steps of a curve that are kept for readers: each is the mean of those since the one before."""


@dataclass
class Study:
    """Everything that one study measured."""

    setting: Setting
    machine: dict[str, Any]
    outcomes: list[Outcome]
    letters: float
    """Nats per byte of a model that knows how frequent each byte is, and no more."""
    timing: dict[str, Any] | None = None
    complete: bool = True

    def to_json(self) -> str:
        """All but the loss of every single step, which runs.csv and curves.csv have thinned."""
        plain = {
            "setting": self.setting.to_json(),
            "machine": self.machine,
            "letters": self.letters,
            "complete": self.complete,
            "timing": self.timing,
            "outcomes": [_thinned(one) for one in self.outcomes],
        }
        return json.dumps(plain, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def load(cls, file: Path) -> Study:
        """Reads what ``to_json`` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        try:
            plain = json.loads(file.read_text())
            plain["setting"] = Setting.from_json(plain["setting"])
            plain["outcomes"] = [Outcome(**one) for one in plain["outcomes"]]
            return cls(**plain)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is not a result of `rmsnorm study`: {error!r}") from error


def thin(values: list[float], points: int = CURVE_POINTS) -> list[tuple[int, float]]:
    """A curve in at most so many points: the last step of each piece, and the mean of the piece."""
    size = max(1, -(-len(values) // points))
    pieces = [(start, values[start : start + size]) for start in range(0, len(values), size)]
    return [(start + len(piece), sum(piece) / len(piece)) for start, piece in pieces]


def _thinned(outcome: Outcome) -> dict[str, Any]:
    plain = outcome.to_json()
    for name in ("losses", "gradient_norms"):
        plain[name] = [float(f"{value:.6g}") for value in plain[name]]
    for look in plain["layers"]:
        for name in ("activation", "gradient"):
            look[name] = [float(f"{value:.6g}") for value in look[name]]
    return plain


def runs_csv(study: Study) -> str:
    """A line for each run."""
    return csv_of(
        [
            {
                "arm": one.arm,
                "rate": one.rate,
                "seed": one.seed,
                "stable": one.stable,
                "diverged_at": one.diverged_at,
                "train_loss": one.train_loss,
                "held_out": one.held_out,
                **{f"held_out_{name}": (one.statistics or {}).get(name) for name in ("running", "estimated", "batch")},
                **{f"leak_{name}": (one.leak or {}).get(name) for name in ("future", "others", "itself")},
            }
            for one in study.outcomes
        ]
    )


def curves_csv(study: Study) -> str:
    """A line for each run and point of its curve."""
    lines = []
    for one in study.outcomes:
        losses, norms = thin(one.losses), thin(one.gradient_norms)
        for (step, loss), (_, norm) in zip(losses, norms, strict=True):
            about = {"arm": one.arm, "rate": one.rate, "seed": one.seed, "step": step}
            lines.append({**about, "train_loss": f"{loss:.5g}", "gradient_norm": f"{norm:.5g}"})
    return csv_of(lines)
