"""The only file that reads the command line: it parses, calls, and prints.

The app is built inside a function because typer and rich are an extra: ``main`` runs without them, and says so.
Annotations are evaluated there too, hence no ``from __future__ import annotations`` in this file.
"""

import os
import runpy
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from .models import command

if TYPE_CHECKING:
    import typer

    from . import bench

SECONDS_PER_RACE = 3.0


def main() -> None:
    """The command ``rmsnorm``."""
    try:
        app = build()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich"):
            raise
        print("The command rmsnorm needs two more packages: pip install 'rmsnorm[cli]'", file=sys.stderr)
        sys.exit(2)
    app()


def build() -> "typer.Typer":
    """The typer app with its commands."""
    import torch
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from . import _report, bench, demo
    from ._info import info

    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

    @app.callback()
    def root() -> None:
        """RMS normalisation for PyTorch: see it, check the set-up, measure it."""
        # Every command says in its own output whether the native kernels are on; once is enough.
        warnings.filterwarnings("ignore", message="rmsnorm runs without its native CPU kernels")

    @app.command(name="demo")
    def show_demo(
        prompt: Annotated[str, typer.Option(help="What to ask the model.")] = "Why is the sky blue?",
        tokens: Annotated[int, typer.Option(min=1, max=512, help="The longest answer.")] = 32,
        model: Annotated[bool, typer.Option("--model/--no-model", help="Load SmolLM2, swap its norms.")] = True,
    ) -> None:
        """The formula by hand, its relatives, a real model before and after, and the clock; under a minute."""
        demo.show(Console(), prompt, tokens, model)

    @app.command(name="info")
    def show_info() -> None:
        """Versions, and whether the native kernels are in use; if not, why not."""
        table = Table("what", "value", title="rmsnorm.info()")
        for name, value in vars(info()).items():
            table.add_row(name, escape(", ".join(value) if isinstance(value, list) else str(value)))
        Console().print(table)

    @app.command(name="run", context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
    def run_script(
        script: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A Python program.")],
        arguments: Annotated[list[str] | None, typer.Argument(help="What the program gets as its own.")] = None,
    ) -> None:
        """Run an unmodified program with torch's own F.rms_norm and nn.RMSNorm on our kernels."""
        run_program(script, arguments or [])

    @app.command(name="bench")
    def run_bench(
        rows: Annotated[str, typer.Option(help="Rows, separated by commas.")] = "1,512,4096",
        cols: Annotated[str, typer.Option(help="Columns, separated by commas.")] = "4096",
        dtype: Annotated[str, typer.Option(help=f"Of {', '.join(bench.DTYPES)}.")] = "float32,bfloat16",
        threads: Annotated[int | None, typer.Option(min=1, max=os.cpu_count(), help="How many torch may use.")] = None,
        json: Annotated[Path | None, typer.Option(dir_okay=False, help="Also write the results to this file.")] = None,
        compile: Annotated[bool, typer.Option("--compile/--no-compile", help="Race torch.compile too.")] = True,
        against: Annotated[
            str, typer.Option(help=f"Race these too: all, or of {', '.join(one.name for one in bench.PEERS)}.")
        ] = "",
    ) -> None:
        """Ours against torch's norms, forward and backward, taking turns. Ctrl-C keeps what was measured."""
        dtypes = dtype.split(",")
        if unknown := [name for name in dtypes if name not in bench.DTYPES]:
            good = ", ".join(bench.DTYPES)
            raise typer.BadParameter(f"{unknown[0]!r} is not one of {good}", param_hint="--dtype")
        if json and not json.parent.is_dir():
            raise typer.BadParameter(f"{json.parent} is not a directory; make it first", param_hint="--json")
        cases = bench.grid(sizes("--rows", rows), sizes("--cols", cols), dtypes)
        contenders = [one for one in bench.CONTENDERS if compile or not one.may_fail] + peers(against)
        if threads:
            torch.set_num_threads(threads)
        console = Console()
        here = _report.machine()
        console.print(_report.header(here))
        results, complete = _report.race_all(cases, contenders, SECONDS_PER_RACE)
        console.print(_report.table(results))
        for reason in _report.skipped(results):
            console.print(escape(f"skipped {reason}"))
        if json:
            _report.write_json(json, here, results, complete)
        console.print(_report.verdict(results, "F.rms_norm"))
        if not complete:
            console.print(f"Stopped after {len(results)} of {len(cases)} cases.")
            raise typer.Exit(130)

    @app.command(name="graph")
    def run_graph(
        rows: Annotated[str, typer.Option(help="Rows, separated by commas.")] = "1,512,4096",
        cols: Annotated[str, typer.Option(help="Columns, separated by commas.")] = "4096",
    ) -> None:
        """Inside torch.compile: our operator against the code that Inductor makes of the formula."""
        race_in_graph(bench.grid(sizes("--rows", rows), sizes("--cols", cols), ("float32", "bfloat16")))

    return command.register(app)


def peers(against: str) -> "list[bench.Contender]":
    """The contenders that an option names."""
    import typer

    from . import bench

    known = {one.name: one for one in bench.PEERS}
    names = list(known) if against == "all" else [name for name in against.split(",") if name]
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(known)} (or all)", param_hint="--against")
    return [known[name] for name in names]


def race_in_graph(cases: "list[bench.Case]") -> None:
    """Prints one table for each form of ``bench.IN_GRAPH``."""
    from rich.console import Console

    from . import _report, bench

    console, here = Console(), _report.machine()
    console.print(_report.header(here))
    for form, contenders in bench.IN_GRAPH.items():
        results, complete = _report.race_all(cases, contenders, SECONDS_PER_RACE)
        console.print(form, _report.table(results), _report.verdict(results, "Inductor's code"), sep="\n")
        if not complete:
            sys.exit(130)


def sizes(option: str, text: str) -> list[int]:
    """A list of sizes as the command line gives it."""
    import typer

    numbers = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if 0 in numbers:
        good = "whole numbers from 1 up, separated by commas, like 1,512,4096"
        raise typer.BadParameter(f"{text!r} is not a list of sizes; give {good}", param_hint=option)
    return numbers


def run_program(script: Path, arguments: list[str]) -> None:
    """Runs a Python program as ``python script.py`` would, after ``rmsnorm.install()``."""
    from ._install import install

    try:
        install()
    except RuntimeError as refused:
        print(refused, file=sys.stderr)
        sys.exit(2)
    sys.argv = [str(script), *arguments]
    sys.path[0] = str(script.resolve().parent)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
