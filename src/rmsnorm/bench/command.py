"""The only file that reads the options of `bench`, `bars`, `graph` and `report`: it parses, calls, and prints.

Imported when the command line is built, as typer and rich are an extra. Annotations are evaluated then, hence no
``from __future__ import annotations`` in this file.
"""

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from . import asked, bars, cases, console, contenders, export, memory, race, worker
from .results import Report, Result, verdict

SECONDS_PER_RACE = 1.5
FILES = {"--json": (".json",), "--csv": (".csv",), "--report": (".html", ".png")}
AGAINST = ", ".join(contenders.CHOICES)

Threads = Annotated[str, typer.Option(help="Thread counts, separated by commas; each gets a process of its own.")]
Seconds = Annotated[float, typer.Option(min=0.001, help="For each race; at least 7 rounds are run.")]
JSON = f"Write the results here, as JSON; in a directory, named after the machine. {asked.HELP}"
Json = Annotated[Path | None, typer.Option(metavar=asked.METAVAR, help=JSON)]


def register(app: typer.Typer) -> None:
    """Adds the commands to the app."""
    app.command(name="bench", cls=asked.Command)(run_bench)
    app.command(name="report")(redraw)
    app.command(name="bars", cls=asked.Command)(run_bars)
    app.command(name="graph")(run_graph)


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


def run_graph(
    rows: Annotated[str, typer.Option(help="Rows, separated by commas.")] = "1,512,4096",
    cols: Annotated[str, typer.Option(help="Columns, separated by commas.")] = "4096",
    seconds: Seconds = SECONDS_PER_RACE,
) -> None:
    """Inside torch.compile: our operator against the code that Inductor makes of the formula."""
    todo = cases.grid([(r, c) for r in sizes("--rows", rows) for c in sizes("--cols", cols)])
    out = Console()
    out.print(console.header(console.machine()))
    for form, pair in contenders.IN_GRAPH.items():
        done: list[Result] = []
        complete = console.watch(todo, (race.race(case, pair, seconds) for case in todo), done)
        out.print(form, console.tables(done), verdict(done, pair[1].name), sep="\n")
        if not complete:
            raise typer.Exit(130)


def one_of(option: str, text: str, known: Collection[str]) -> list[str]:
    """A list of names as the command line gives it."""
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(known)}", param_hint=option)
    return names


def sizes(option: str, text: str) -> list[int]:
    """A list of sizes as the command line gives it."""
    numbers = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if 0 in numbers:
        good = "whole numbers from 1 up, separated by commas, like 1,512,4096"
        raise typer.BadParameter(f"{text!r} is not a list of sizes; give {good}", param_hint=option)
    return numbers


def thread_counts(text: str) -> list[int] | None:
    """A list of thread counts, or None: what torch would take."""
    if not text:
        return None
    counts, most = sizes("--threads", text), os.cpu_count() or 1
    if max(counts) > most:
        raise typer.BadParameter(f"{max(counts)} threads on {most} cores can't be timed", param_hint="--threads")
    return counts


def check_device(name: str) -> None:
    """Refuses a device that isn't here, in one line."""
    try:
        there = name == "cpu" or torch.get_device_module(name).is_available()
        reason = f"torch {torch.__version__} finds no such device on this machine, so nothing was timed"
    except RuntimeError:
        there, reason = False, "not a device that torch knows; give cpu, cuda or xpu"
    if not there:
        Console(stderr=True).print(f"--device {name}: {reason}", markup=False, soft_wrap=True)
        raise typer.Exit(2)


def check_file(option: str, file: Path | None, *suffixes: str) -> None:
    """Refuses a file that can't be written, before anything is measured."""
    if option == "--json" and file == asked.STDOUT:
        return
    if file and (reason := export.refusal(file, *(suffixes or FILES[option]))):
        Console(stderr=True).print(f"{option}: {reason}", markup=False, soft_wrap=True)
        raise typer.Exit(2)
