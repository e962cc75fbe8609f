"""The only file with the command ``rmsnorm study``: it reads options, carries the study out, and prints.

Annotations are evaluated by typer, hence no ``from __future__ import annotations`` in this file.
"""

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .._extras import extra_line
from .._info import info
from ..bench import console as machines
from ..models.loading import missing
from . import arms as table
from . import corpus as texts
from . import findings, plan, preface, stopwatch, workers
from .checkpoint import Refused
from .folder import Folder
from .results import Study
from .training import Outcome

NEEDED = ("transformers", "safetensors", "matplotlib")
SECONDS = {"quick": 8.0, "full": 40.0}
SUSPENDED = "what is finished is kept; the same command with --resume goes on"


def register(app: typer.Typer) -> typer.Typer:
    """Adds the command to the app; returns the app."""
    app.command(name="study")(run)
    return app


def run(
    quick: Annotated[
        bool, typer.Option("--quick", help="A rehearsal: a small model, few steps, a minute; no finding.")
    ] = False,
    out: Annotated[Path, typer.Option(help="The folder of the results.")] = Path("rmsnorm-study"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in --out.")] = False,
    arms: Annotated[str, typer.Option(help=f"Of {', '.join(table.ARMS)}, separated by commas; nothing: all.")] = "",
    corpus: Annotated[str, typer.Option(help=f"A file of text, or {' or '.join(texts.SOURCES)}.")] = "",
    jobs: Annotated[int, typer.Option(min=0, help="Worker processes, a core each; 0: 2 here, 1 under torchrun.")] = 0,
    seeds: Annotated[int, typer.Option(min=0, max=16, help="Runs at each arm's best rate; 0: 5, or 2 if quick.")] = 0,
    steps: Annotated[int, typer.Option(min=0, help="Of each run; 0: what the size has.")] = 0,
    timing: Annotated[
        float, typer.Option(min=-1.0, help="Seconds of timing steps, afterwards; given with --resume: again.")
    ] = -1.0,
) -> None:
    """Is RMSNorm "less computation, more stable training"? A small LLaMA with each norm, trained and compared."""
    if absent := missing(*NEEDED):
        stop(f"{', '.join(absent)} missing: {extra_line('study')}")
    setting, text = settle(plan.QUICK if quick else plan.FULL, arms, corpus, seeds, steps)
    seconds = SECONDS["quick" if quick else "full"] if timing < 0 else timing
    try:
        with workers.Ranks() as ranks:
            folder = opened(out, setting, resume, ranks)
            if text.name == "python" and not corpus and not ranks.rank:
                hint = f"for the Bible's 4 million bytes: {extra_line('study')}"
                typer.echo(f"the text is Python's documentation; {hint}", err=True)
            processes = jobs or (1 if ranks.count > 1 else min(2, os.cpu_count() or 1))
            study = carried_out(folder, text, processes, ranks)
        if study:
            finish(study, folder, text, seconds, again=timing >= 0)
    except (Refused, workers.Lost) as reason:
        stop(str(reason), 2 if isinstance(reason, Refused) else 1)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            stop(f"no room left in {out} ({os.strerror(error.errno)}): free some; {SUSPENDED}", 1)
        stop(f"{error.filename or out} can't be used: {error.strerror}; give another --out", 1)
    except KeyboardInterrupt:
        stop(f"Ctrl-C: {SUSPENDED}", 130)


def begin(setting: plan.Setting) -> None:
    """Says what is done, and what the words mean, before anything is."""
    screen = Console()
    for paragraph in preface.preface(setting):
        screen.print(paragraph, markup=False, highlight=False)
    screen.print()


def finish(study: Study, folder: Folder, text: texts.Corpus, seconds: float, *, again: bool) -> None:
    """Times the steps, writes the results, and prints the conclusions."""
    from . import report  # brings matplotlib, which the other commands don't need

    if study.complete and seconds and (again or study.timing is None):
        typer.echo(f"timing steps for {seconds:.0f} s", err=True)
        folder.keep_timing(stopwatch.measure(study.setting, text, seconds) | {"machine": machines.machine()})
    study.timing = folder.timing()
    written = report.write(study, folder.path)
    screen = Console()
    for line in findings.conclusions(study):
        screen.print(f"• {line}", markup=False, soft_wrap=True)
    screen.print(f"wrote {', '.join(written)} in {folder.path}", markup=False, soft_wrap=True)
    if not study.complete:
        stop(f"Ctrl-C after {len(study.outcomes)} runs: {SUSPENDED}", 130)


def stop(reason: str, status: int = 2) -> NoReturn:
    """Ends the command with one line."""
    typer.echo(f"rmsnorm study: {reason}", err=True)
    raise typer.Exit(status)


def settle(size: plan.Setting, arms: str, corpus: str, seeds: int, steps: int) -> tuple[plan.Setting, texts.Corpus]:
    """The setting that the options ask for, and its text."""
    try:
        names = table.chosen(arms)
    except ValueError as error:
        stop(f"--arms: {error}")
    try:
        text = texts.load(corpus)
        text.check(size.context, size.windows)
    except texts.Unusable as reason:
        stop(f"--corpus: {reason}")
    here = info()
    setting = replace(
        size,
        arms=names,
        seeds=seeds or size.seeds,
        steps=steps or size.steps,
        corpus=text.name,
        digest=text.digest,
        torch=here.torch,
        rmsnorm=f"{here.rmsnorm}, {'native' if here.native else 'reference'}",
    )
    return setting, text


def opened(out: Path, setting: plan.Setting, resume: bool, ranks: workers.Ranks) -> Folder:
    """The folder, opened by rank 0 first; the others may share it or have their own."""
    refusal, folder = "", None
    if ranks.rank == 0:
        try:
            folder = Folder(out, setting, resume=resume)
        except Refused as reason:
            refusal = str(reason)
    answers = ranks.gather((refusal, setting))
    if answers[0][0]:
        if ranks.rank == 0:
            raise Refused(answers[0][0])
        raise typer.Exit(2)
    if difference := setting.differs(answers[0][1].to_json()):
        raise Refused(f"rank 0 has another configuration: {difference}")
    return folder or Folder(out, setting, resume=True)


def carried_out(folder: Folder, text: texts.Corpus, jobs: int, ranks: workers.Ranks) -> Study | None:
    """All runs that the study needs; None on other ranks than the first. Ctrl-C keeps what is finished."""
    mine = ranks.share(folder.setting.arms)
    done = [outcome for outcome in folder.outcomes() if outcome.arm in mine]
    complete = True
    folder.timing()  # a damaged one is refused now
    if not ranks.rank:
        begin(folder.setting)
    try:
        with watch(folder.setting, mine, done, quiet=ranks.rank > 0) as hear:
            workers.carry_out(folder, mine, text, jobs, done, hear)
    except KeyboardInterrupt:
        if ranks.count > 1:
            raise
        complete = False
    everybody = [outcome for some in ranks.gather(done) for outcome in some]
    if ranks.rank:
        return None
    everybody.sort(key=lambda one: (folder.setting.arms.index(one.arm), one.seed, one.rate))
    return Study(folder.setting, machines.machine(), everybody, text.letters(), folder.timing(), complete)


class watch:
    """A progress bar over the steps of all runs, and a line for each run that is over."""

    def __init__(self, setting: plan.Setting, arms: list[str], done: list[Outcome], *, quiet: bool) -> None:
        self.setting, self.arms, self.done, self.quiet = setting, arms, done, quiet
        self.running: dict[plan.Run, int] = {}
        self.known = len(done)
        columns = TextColumn("{task.description:<28}"), BarColumn(bar_width=20), TimeElapsedColumn(), TextColumn("left")
        screen = Console(stderr=True, quiet=quiet)
        self.progress = Progress(
            *columns,
            TimeRemainingColumn(),
            console=screen,
            transient=True,
            refresh_per_second=2,
            disable=not screen.is_terminal,  # into a file it would write an empty line
        )
        self.task = self.progress.add_task("starting", total=None)

    def __enter__(self) -> workers.Hear:
        self.progress.start()
        return self.hear

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def hear(self, run: plan.Run, steps: int) -> None:
        """Moves the bar; runs that end early count in full."""
        self.running[run] = steps
        for outcome in self.done[self.known :]:
            self.running.pop(outcome.trained.run, None)
            loss = "diverged" if outcome.held_out is None else f"{outcome.held_out:.4f} nats per byte"
            ended = table.run_name(outcome.arm, outcome.rate, outcome.seed)
            self.progress.console.print(f"{ended}: {loss}", markup=False, highlight=False)
        self.known = len(self.done)
        trained = [outcome.trained for outcome in self.done]
        total = plan.expected(self.setting, self.arms, trained) * self.setting.steps
        completed = self.known * self.setting.steps + sum(self.running.values())
        self.progress.update(
            self.task, description=table.run_name(run.arm, run.rate, run.seed), total=total, completed=completed
        )
