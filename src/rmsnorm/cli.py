"""The only file that assembles the command line. Rooms with commands of their own register them here.

The app is built inside a function because typer and rich are an extra: ``main`` runs without them, and says so; ``run``
and ``--version`` do without. Annotations are evaluated there too, hence no ``from __future__ import annotations``.
"""

import json as json_format
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from . import _run
from ._extras import extra_line, hush
from ._info import info, version
from .models import command as models_command
from .tutorial import command as tutorial_command

if TYPE_CHECKING:
    import typer


def main() -> None:
    """The command ``rmsnorm``."""
    if sys.argv[1:2] == ["run"]:
        return _run.command(sys.argv[2:])
    if sys.argv[1:] == ["--version"]:
        return print(version())
    try:
        app = build()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich"):
            raise
        print(f"The command rmsnorm needs two more packages: {extra_line('cli')}", file=sys.stderr)
        sys.exit(2)
    hush()
    return app()


def build() -> "typer.Typer":
    """The typer app with its commands."""
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from . import demo
    from .bench import asked
    from .bench import command as bench_command
    from .study import command as study_command
    from .surgery import command as surgery_command

    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def say_version(wanted: bool) -> None:
        if wanted:
            typer.echo(version())
            raise typer.Exit

    @app.callback()
    def root(
        version: Annotated[
            bool, typer.Option("--version", callback=say_version, is_eager=True, help="Say which, and end.")
        ] = False,
    ) -> None:
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

    @app.command(name="info", cls=asked.Command)
    def show_info(
        json: Annotated[Path | None, typer.Option(metavar=asked.METAVAR, help=f"As JSON. {asked.HELP}")] = None,
    ) -> None:
        """Versions, and whether the native kernels are in use; if not, why not."""
        asked.check(json)
        values = vars(info())
        if json:
            asked.put(json, json_format.dumps(values, indent=1))
            return None
        table = Table("what", "value", title="rmsnorm.info()")
        for name, value in values.items():
            table.add_row(name, escape(", ".join(value) if isinstance(value, list) else str(value)))
        return Console().print(table)

    models_command.register(app)
    surgery_command.register(app)

    @app.command(name="run", context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
    def run_script(
        script: Annotated[str, typer.Argument(help="A Python program.")],
        arguments: Annotated[list[str] | None, typer.Argument(help="What the program gets as its own.")] = None,
    ) -> None:
        """Run an unmodified program with torch's own F.rms_norm and nn.RMSNorm on our kernels.

        All output is the program's: nothing is said of the norms. `rmsnorm run -h` says which are served.
        """
        _run.command([script, *(arguments or [])])

    bench_command.register(app)
    study_command.register(app)
    return tutorial_command.register(app)


if __name__ == "__main__":
    main()
