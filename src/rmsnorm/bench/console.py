"""The only file that shows races in a terminal: a progress bar while they run, a header, tables."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .._info import info
from .bars import Outcome
from .fitting import Fitted, add_numbers, kept
from .neighbourhoods import Place
from .neighbourhoods import summary as of_neighbourhoods
from .results import OURS, Report, Result, first, verdict
from .timing import human

T = TypeVar("T")
COLUMNS = "time", "quartiles", "best", "GB/s", "copy", "ours ÷"
VERDICTS = {"holds": "green", "holds by minima": "yellow", "missed": "red", "not measured": "red"}


def watch(labels: Sequence[object], items: Iterable[T], done: list[T]) -> bool:
    """Collects items under a progress bar that says what is being measured; False if Ctrl-C cut them short."""
    columns = TextColumn("{task.description:<30}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn()
    # One refresh a second: the bar's thread must not take time from what is being timed.
    progress = Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=1)
    try:
        with progress:
            task = progress.add_task(escape(str(labels[0])) if labels else "", total=len(labels))
            for item in items:
                done.append(item)
                progress.update(task, advance=1, description=escape(str(labels[min(len(done), len(labels) - 1)])))
    except KeyboardInterrupt:
        return False
    return True


def machine() -> dict[str, Any]:
    """What a reader must know to judge the times. Ask before the races: they are load themselves."""
    here = info()
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "huge_pages": here.huge_pages,
        "torch": here.torch,
        "rmsnorm": here.rmsnorm,
        "cpu_target": here.cpu_target,
        "why_not_native": here.why_not_native,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def header(here: dict[str, Any]) -> str:
    """The machine in two lines, and a warning for whatever makes the times worth less than they seem."""
    lines = [
        f"{here['cpu']}, {here['cores']} cores, load {here['load']:.1f}, {here['date']}",
        f"torch {here['torch']}, rmsnorm {here['rmsnorm']}, CPU target {here['cpu_target']}, "
        f"huge pages: {here['huge_pages']}",
    ]
    if here["why_not_native"]:
        lines.append(f"[yellow]The native kernels are off:[/] {escape(here['why_not_native'])}")
    # A thread that waits for its turn on the CPU costs its contender a time slice of the scheduler, milliseconds
    # that hit fast and slow contenders alike: ratios then drift towards 1.
    if here["load"] > (os.cpu_count() or 1) / 2:
        lines.append(
            "[yellow]The last minute was busy here[/]; if it still is, neither times nor ratios can be trusted."
        )
    return "\n".join(lines)


def tables(results: Sequence[Result]) -> RenderableType:
    """One table for each thread count, one group of lines for each case; says in words what its columns are."""
    counts = list(dict.fromkeys(result.case.threads for result in results))
    parts: list[RenderableType] = []
    for count in counts:
        parts.append(Text(f"{count} thread{'s' * (count > 1)}", style="bold"))
        parts.append(_table([result for result in results if result.case.threads == count]))
    parts.append(
        Text(
            "time: median of one call · quartiles: half of the samples lie between · best: the fastest · GB/s: bytes "
            "that must move ÷ time · copy: that ÷ what a copy reaches · ours ÷: below 1, ours is faster",
            style="dim italic",
        )
    )
    return Group(*parts)


def _table(results: Sequence[Result]) -> Fitted:
    def make(gone: Collection[str]) -> Table:
        grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
        grid.add_column("case, contender", min_width=20)
        add_numbers(grid, COLUMNS, gone)
        for result in results:
            grid.add_row(f"[bold]{result.case}")
            ratios = {name: _ratio(ratio) for name, ratio in result.ratios().items()}
            for name, line in result.contenders.items():
                cells = (
                    human(line.median_s),
                    human(*line.quartiles_s),
                    human(line.min_s),
                    f"{line.gb_per_s:.{1 if line.gb_per_s < 100 else 0}f}",
                    "" if line.share_of_copy is None else f"{line.share_of_copy:.0%}",
                    ratios.get(name, ""),
                )
                grid.add_row(f"  {name}", *kept(COLUMNS, cells, gone))
            for name in result.skipped:
                grid.add_row(f"  {name}", "skipped")
            grid.add_section()
        return grid

    return Fitted(make, ("best", "quartiles", "copy", "GB/s"))


def _ratio(ratio: float) -> str:
    return f"[{'green' if ratio < 1 else 'red'}]{ratio:.2f}[/]"


def skipped(results: Sequence[Result]) -> list[str]:
    """Why contenders were left out, each reason once."""
    return list(dict.fromkeys(f"{name}: {why}" for result in results for name, why in result.skipped.items()))


def summary(results: Sequence[Result], rival: str = "F.rms_norm") -> str:
    """One sentence against one rival, one about all of them, and the cases that somebody else won."""
    won, contested, lost = first(results)
    lines = [verdict(results, rival)]
    if contested:
        ours = next(iter(results[0].contenders), OURS)
        lines.append(f"{ours} was the first of all RMSNorms in {won} of {contested} cases.")
        lines += [f"  not in {case}, {case.threads} threads: {name}, {ratio:.2f}" for case, name, ratio in lost]
    return "\n".join(lines)


def footprints(report: Report) -> Fitted:
    """The bytes of forward and backward, absolute and in tensors of the input's size."""
    titles = "peak", "peak ÷\ninput", "kept for\nbackward", "kept ÷\ninput"

    def make(gone: Collection[str]) -> Table:
        grid = Table(
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=(0, 1, 0, 0),
            title="Memory of forward and backward",
        )
        grid.add_column("case, contender", min_width=20)
        add_numbers(grid, titles, gone)
        case = ""
        for one in report.footprints:
            if case != (case := f"{one.rows}×{one.cols} {one.dtype}"):
                grid.add_row(f"[bold]{case}")
            sizes = (one.peak_bytes, one.kept_bytes)
            cells = [cell for size in sizes for cell in (mebibytes(size), f"{size / one.tensor_bytes:.2f}")]
            grid.add_row(f"  {one.contender}", *kept(titles, cells, gone))
        return grid

    return Fitted(make, (titles[1], titles[3], titles[0]))


def bars(outcomes: Sequence[Outcome]) -> RenderableType:
    """The performance contract: a table for each thread count, a line for each bar, a number for each run."""
    parts: list[RenderableType] = []
    for count in dict.fromkeys(one.threads for one in outcomes):
        mine = [one for one in outcomes if one.threads == count]
        parts.append(Text(f"{count} thread{'s' * (count > 1)}", style="bold"))
        parts.append(Fitted(partial(_bars, mine), ("minima", "medians")))
    return Group(*parts)


def _bars(outcomes: Sequence[Outcome], gone: Collection[str]) -> Table:
    titles = "bound", "medians", "minima"
    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    grid.add_column("ours ÷ other", min_width=26)
    add_numbers(grid, titles, gone)
    grid.add_column("", no_wrap=True)
    cell = ""
    for one in outcomes:
        if cell != (cell := f"{one.bar.cell}, {one.bar.case().shape} {one.bar.dtype}"):
            grid.add_section()
            grid.add_row(f"[bold]{cell}")
        runs = [" ".join(f"{value:.2f}" for value in values) for values in (one.medians, one.minima)]
        verdict = f"[{VERDICTS[one.verdict]}]{one.verdict}[/]"
        grid.add_row(f"÷ {one.bar.other}", *kept(titles, (f"{one.bar.bound:.2f}", *runs), gone), verdict)
    return grid


def neighbourhoods(places: Sequence[Place]) -> RenderableType:
    """Ours ÷ Inductor's in graphs: a table for each thread count and direction, a number for each run."""
    parts: list[RenderableType] = []
    for count, direction in dict.fromkeys((one.case.threads, one.case.direction) for one in places):
        mine = [one for one in places if (one.case.threads, one.case.direction) == (count, direction)]
        parts.append(Text(f"{direction}, {count} thread{'s' * (count > 1)}", style="bold"))
        grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        grid.add_column("ours ÷ Inductor's", min_width=24)
        for title in dict.fromkeys(f"{one.case.shape}\n{one.case.dtype}" for one in mine):
            grid.add_column(title, justify="right", no_wrap=True)
        for name in dict.fromkeys(one.name for one in mine):
            grid.add_row(name, *(" ".join(map(_ratio, one.ratios)) for one in mine if one.name == name))
        parts += [grid, Text(of_neighbourhoods(mine))]
    return Group(*parts, Text("all: " + of_neighbourhoods(places)))


def mebibytes(size: int) -> str:
    return f"{size / 2**20:.2f} MiB" if size >= 2**20 else f"{size / 2**10:.2f} KiB"


def _cpu_model() -> str:
    """The name, and what tells two generations apart that a virtual machine calls the same."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = said.get("model name") or platform.processor() or platform.machine()
    family, model = said.get("cpu family"), said.get("model")
    return f"{name} (family {family}, model {model})" if family and model else name
