"""The only file that assembles the command line. Rooms with commands of their own register them here.

The app is built inside a function because typer and rich are an extra: ``main`` runs without them, and says so.
Annotations are evaluated there too, hence no ``from __future__ import annotations`` in this file.
"""

import runpy
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from .models import command as models_command
from .tutorial import command as tutorial_command

if TYPE_CHECKING:
    import typer


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
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from . import demo
    from ._info import info
    from .bench import command as bench_command
    from .study import command as study_command

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

    bench_command.register(app)
    study_command.register(app)
    tutorial_command.register(app)
    return models_command.register(app)


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
