"""The only file that reads the options of `bench`, `bars` and `report`: it parses, calls, and prints.

Imported when the command line is built, as typer and rich are an extra. Annotations are evaluated then, hence no
``from __future__ import annotations`` in this file.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from . import asked, bars, cases, console, contenders, export, graph, memory, race, worker
from .options import SECONDS_PER_RACE, Seconds, Threads, check_device, check_file, one_of, sizes, thread_counts
from .results import Report, Result

AGAINST = ", ".join(contenders.CHOICES)

JSON = f"Write the results here, as JSON; in a directory, named after the machine. {asked.HELP}"
Json = Annotated[Path | None, typer.Option(metavar=asked.METAVAR, help=JSON)]


def register(app: typer.Typer) -> None:
    """Adds the commands to the app."""
    app.command(name="bench", cls=asked.Command)(run_bench)
    app.command(name="report")(redraw)
    app.command(name="bars", cls=asked.Command)(run_bars)
    app.command(name="graph")(graph.run)


def run_bench(
    preset: Annotated[str, typer.Option(help=f"The cases: {', '.join(cases.PRESETS)}.")] = "",
    rows: Annotated[str, typer.Option(help="Instead of the preset's: rows, separated by commas.")] = "",
    cols: Annotated[str, typer.Option(help="Instead of the preset's: columns. Every pair is a shape.")] = "",
    dtype: Annotated[str, typer.Option(help=f"Of {', '.join(cases.DTYPES)}.")] = "",
    direction: Annotated[str, typer.Option(help=f"Of {', '.join(cases.DIRECTIONS)}.")] = "",
    output: Annotated[
        str, typer.Option("--memory", help="The output: fresh, or warm: into memory that is given.")
    ] = "",
    threads: Threads = "",
    device: Annotated[str, typer.Option(help="cpu, or cuda, xpu: there, ours is Triton's. See --preset gpu.")] = "cpu",
    against: Annotated[str, typer.Option(help=f"Of {AGAINST}.")] = "",
    footprint: Annotated[bool | None, typer.Option(help="Measure peak and kept memory too.")] = None,
    seconds: Seconds = SECONDS_PER_RACE,
    json: Json = None,
    csv: Annotated[
        Path | None, typer.Option(help="Write the results here, a line for each contender and case.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write a report with figures here: .html, or .png.")] = None,
) -> None:
    """Ours against torch's norms and other libraries', taking turns. Ctrl-C keeps what was measured."""
    check_device(device)
    default = "readme" if device == "cpu" else "gpu"
    chosen = cases.PRESETS[one_of("--preset", preset or default, cases.PRESETS)[0]]
    shapes = chosen.shapes
    if rows or cols:
        shapes = tuple((r, c) for c in sizes("--cols", cols or "4096") for r in sizes("--rows", rows or "1,512,4096"))
    todo = cases.grid(
        shapes,
        one_of("--dtype", dtype or ",".join(chosen.dtypes), cases.DTYPES),
        one_of("--direction", direction or ",".join(chosen.directions), cases.DIRECTIONS),
        one_of("--memory", output or ",".join(chosen.memories), cases.MEMORIES),
        thread_counts(threads),
        device,
    )
    if not todo:
        typed = {"--preset": preset, "--memory": output, "--direction": direction}
        hint = " and ".join(option for option, value in typed.items() if value)
        raise typer.BadParameter("warm memory is for the direction forward only", param_hint=hint)
    try:
        names = [one.name for one in contenders.named(against or chosen.against)]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--against") from error
    files = {"--json": json, "--csv": csv, "--report": report}
    for option, file in files.items():
        check_file(option, file)
    out, found = asked.screen(json), Report(console.machine())
    if device != "cpu":
        found.machine["device"] = torch.get_device_module(device).get_device_name()
        out.print(f"device: {found.machine['device']}", markup=False)
    out.print(console.header(found.machine))
    failure = ""
    try:
        found.complete = measure(todo, names, seconds, found.results)
        if found.complete and device == "cpu" and (chosen.footprint if footprint is None else footprint):
            found.complete = console.watch(["memory"] * 12, memory.measure(), found.footprints)
    except (ArithmeticError, RuntimeError) as error:
        found.complete, failure = False, str(error)
    out.print(console.tables(found.results))
    if found.footprints:
        out.print(console.footprints(found))
    for reason in console.skipped(found.results):
        out.print(f"skipped {reason}", markup=False)
    for file in filter(None, files.values()):
        wrote(found, file, out)
    out.print(console.summary(found.results), markup=False)
    if not found.complete:
        out.print(failure or "Ctrl-C:", f"stopped after {len(found.results)} of {len(todo)} cases.", markup=False)
        raise typer.Exit(1 if failure else 130)


def wrote(found: Report, file: Path, out: Console) -> None:
    """Writes the report, and says where."""
    if file == asked.STDOUT:
        return asked.put(file, found.to_json())
    return out.print(f"wrote {export.write(found, file)}", markup=False, soft_wrap=True)


def measure(todo: list[cases.Case], names: list[str], seconds: float, done: list[Result]) -> bool:
    """Runs the races, one process for each thread count; False if Ctrl-C cut them short."""

    def results() -> Iterator[Result]:
        for count in dict.fromkeys(case.threads for case in todo):
            mine = [case for case in todo if case.threads == count]
            variables = {} if mine[0].device == "cpu" else {"RMSNORM_CUDA": "triton"}
            yield from worker.apart(count, race.races, mine, names, seconds, variables=variables)

    return console.watch(todo, results(), done)


def redraw(
    results: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="What `bench --json` wrote.")],
    file: Annotated[Path, typer.Argument(help="Where to: .html, .png or .csv.")],
) -> None:
    """Make a report of results that were measured before."""
    check_file("FILE", file, ".html", ".png", ".csv")
    try:
        found = Report.load(results)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="RESULTS") from error
    wrote(found, file, Console())


def run_bars(
    threads: Threads = "1,2",
    runs: Annotated[int, typer.Option(min=1, help="How often everything is measured.")] = 3,
    only: Annotated[str, typer.Option(help="Bars whose cell has this in its name.")] = "",
    seconds: Seconds = SECONDS_PER_RACE,
    json: Json = None,
    strict: Annotated[bool, typer.Option(help="Exit with 1 if a bar is missed.")] = False,
) -> None:
    """Check the performance contract: every bar, in several runs, each in a process of its own."""
    check_file("--json", json)
    chosen = [bar for bar in bars.BARS if only in bar.cell]
    if not chosen:
        names = ", ".join(dict.fromkeys(bar.cell for bar in bars.BARS))
        raise typer.BadParameter(f"{only!r} is in none of {names}", param_hint="--only")
    wanted = thread_counts(threads) or [torch.get_num_threads()]
    out, here, groups = asked.screen(json), console.machine(), bars.groups(chosen)
    out.print(console.header(here))
    outcomes = {(bar, count): bars.Outcome(bar, count) for count in wanted for bar in chosen}
    counts = [count for _ in range(runs) for count in dict.fromkeys(count for _, count in outcomes)]
    labels = [f"{group[0].cell}, {count} threads" for count in counts for group in groups]

    def measured() -> Iterator[None]:
        for count in counts:
            for ratios in worker.apart(count, bars.run, groups, seconds):
                for bar, median, fastest in ratios:
                    outcomes[bar, count].medians.append(median)
                    outcomes[bar, count].minima.append(fastest)
                yield

    complete = console.watch(labels, measured(), [])
    found = [one for one in outcomes.values() if one.medians]
    out.print(console.bars(found))
    if json:
        file = export.in_directory(json, here, "-bars.json")
        asked.put(file, bars.to_json(here, found, complete))
        out.print(f"wrote {file}", markup=False, soft_wrap=True)
    verdicts = [one.verdict for one in found]
    out.print(", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts)))
    if not complete or (strict and {"missed", "not measured"} & {*verdicts}):
        raise typer.Exit(1 if complete else 130)
