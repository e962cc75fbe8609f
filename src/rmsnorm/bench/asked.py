"""The only file that says what ``--json`` means, the same for each command: a file, or standard output for itself.

Imported when the command line is built, as typer is an extra.
"""

from __future__ import annotations

import os.path
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from . import export

STDOUT = Path("-")
METAVAR = "[FILE]"
HELP = "Without FILE, or with -, to standard output, and everything else to standard error."


class Command(TyperCommand):
    """A command whose ``--json`` may stand alone, before another option or at the end: then it is ``--json -``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        for at in reversed(range(end)):
            if args[at] == "--json" and (at + 1 >= end or (args[at + 1].startswith("-") and args[at + 1] != "-")):
                args.insert(at + 1, "-")
        return super().parse_args(ctx, args)


def screen(file: Path | None) -> Console:
    """Where everything but the JSON goes."""
    return Console(stderr=file == STDOUT)


def check(file: Path | None) -> None:
    """Refuses a file that can't be written, before anything is done."""
    if file is None or file == STDOUT:
        return
    reason = f"{file} is a directory; give a file" if os.path.isdir(file) else export.closed(file)
    if reason:
        raise typer.BadParameter(reason, param_hint="--json")


def put(file: Path, content: str) -> None:
    """Writes the JSON."""
    if file == STDOUT:
        typer.echo(content)
    else:
        export.replace(file, content)
