"""Has results of a race that never was, and the command that makes real ones."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from rmsnorm import cli
from rmsnorm.bench import cases, contenders
from rmsnorm.bench.results import FLOOR, Footprint, Line, Report, Result

WIDE = {"COLUMNS": "200", "TERMINAL_WIDTH": "200"}
MACHINE = {
    "cpu": "A CPU (R) 9000",
    "cores": 2,
    "load": 0.0,
    "huge_pages": "madvise",
    "date": "2026-11-25T10:00:00+00:00",
    "torch": "2.13.0",
    "rmsnorm": "0.1.0",
    "cpu_target": "avx2",
    "why_not_native": None,
}


def invoke(*arguments: str) -> Any:
    """The command in this process, on a wide screen."""
    return CliRunner(env=WIDE).invoke(cli.build(), list(arguments))


def made_up(shapes: Any = cases.PRESETS["all"].shapes, ours: float = 1.0) -> Report:
    """A report with every contender: ours takes 1 ms, the others 2, 3, … ms."""

    def line(place: int, name: str) -> Line:
        took, ratio = 1e-3 * (place + 1), ours / (place + 1) if place else 1.0
        is_rms_norm = name not in ("F.layer_norm", "rmsnorm.layer_norm", FLOOR)
        return Line(took, (took, took), took, 7, 1, 10.0 / (place + 1), 0.5, ratio, ratio, is_rms_norm)

    grid = cases.grid(shapes, memories=("fresh", "warm"), threads=(1, 2))
    names = [one.name for one in contenders.named("all")]
    absent = {"mlx": "one thread"}
    timed = [Result(case, {name: line(place, name) for place, name in enumerate(names)}, absent) for case in grid]
    kept = [Footprint("rmsnorm", 512, 4096, "float32", 2**23, 2**24, 2048, ["float32[512, 1]"])]
    return Report(MACHINE, timed, kept)
