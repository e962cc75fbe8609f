"""The only file that reports races: a progress bar while they run, a header, a table, a sentence, a JSON file."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import bench
from ._info import info
from ._timing import human


def race_all(
    cases: Sequence[bench.Case], contenders: Sequence[bench.Contender], seconds: float
) -> tuple[list[bench.Result], bool]:
    """Runs the races under a progress bar; returns the results, and False if Ctrl-C cut them short."""
    results: list[bench.Result] = []
    columns = TextColumn("{task.description:<28}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn()
    # One refresh a second: the bar's thread must not take time from what is being timed.
    progress = Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=1)
    try:
        with progress:
            task = progress.add_task("", total=len(cases))
            for case in cases:
                progress.update(task, description=str(case))
                results.append(bench.race(case, contenders, seconds))
                progress.advance(task)
    except KeyboardInterrupt:
        return results, False
    return results, True


def machine() -> dict[str, Any]:
    """What a reader must know to judge the times. Ask before the races: they are load themselves."""
    here = info()
    return {
        "cpu": _cpu_model(),
        "threads": here.threads,
        "load": os.getloadavg()[0],
        "torch": here.torch,
        "rmsnorm": here.rmsnorm,
        "cpu_target": here.cpu_target,
        "why_not_native": here.why_not_native,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def header(here: dict[str, Any]) -> str:
    """The machine in two lines, and a warning for whatever makes the times worth less than they seem."""
    lines = [
        f"{here['cpu']}, {here['threads']} threads, load {here['load']:.1f}, {here['date']}",
        f"torch {here['torch']}, rmsnorm {here['rmsnorm']}, CPU target {here['cpu_target']}",
    ]
    if here["why_not_native"]:
        lines.append(f"[yellow]The native kernels are off:[/] {here['why_not_native']}")
    # A thread that waits for its turn on the CPU costs its contender a time slice of the scheduler, milliseconds
    # that hit fast and slow contenders alike: ratios then drift towards 1.
    if here["load"] > (os.cpu_count() or 1) / 2:
        lines.append(
            "[yellow]The last minute was busy here[/]; if it still is, neither times nor ratios can be trusted."
        )
    return "\n".join(lines)


def table(results: Sequence[bench.Result]) -> Table:
    """One line per contender, grouped by case; says in words what its columns are."""
    grid = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        caption="time: median of one call · quartiles: half of the samples lie between · ours ÷: below 1, faster",
    )
    for name in ("case", "contender"):
        grid.add_column(name, no_wrap=True)
    for name in ("time", "quartiles", "ours ÷"):
        grid.add_column(name, justify="right", no_wrap=True)
    for result in results:
        case = str(result.case)
        ratios = {name: f"{ratio:.2f}" for name, ratio in result.ratios().items()}
        for name, timing in result.timings.items():
            grid.add_row(case, name, human(timing.median), human(*timing.quartiles), ratios.get(name, ""))
            case = ""  # said once
        for name in result.skipped:
            grid.add_row(case, name, "skipped")
        grid.add_section()
    return grid


def skipped(results: Sequence[bench.Result]) -> list[str]:
    """Why contenders were left out, each reason once."""
    return list(dict.fromkeys(f"{name}: {why}" for result in results for name, why in result.skipped.items()))


def verdict(results: Sequence[bench.Result], rival: str) -> str:
    """One plain sentence about ours against one rival."""
    ratios = [result.ratios()[rival] for result in results if rival in result.timings]
    if not ratios:
        return "Nothing was measured."
    faster = sum(ratio < 1 for ratio in ratios)
    return (
        f"The results agree, and rmsnorm was faster than {rival} in {faster} of {len(ratios)} cases: it took "
        f"{statistics.geometric_mean(ratios):.2f} times as long (geometric mean; best {min(ratios):.2f}, worst "
        f"{max(ratios):.2f})."
    )


def write_json(file: Path, here: dict[str, Any], results: Sequence[bench.Result], complete: bool) -> None:
    """Writes the report beside its destination, then renames it: nobody ever reads half a file."""
    report = {"machine": here, "complete": complete, "results": [_plain(result) for result in results]}
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(report, indent=1))
    temporary.replace(file)


def _plain(result: bench.Result) -> dict[str, Any]:
    case, ratios = result.case, result.ratios()
    contenders = {
        name: {
            "median_s": timing.median,
            "quartiles_s": timing.quartiles,
            "rounds": len(timing.seconds),
            "calls_per_sample": timing.calls,
            "ours_over_this": ratios.get(name, 1.0),
        }
        for name, timing in result.timings.items()
    }
    labels = {"rows": case.rows, "cols": case.cols, "dtype": case.dtype_name, "pass": case.direction}
    return {**labels, "contenders": contenders, "skipped": result.skipped}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
