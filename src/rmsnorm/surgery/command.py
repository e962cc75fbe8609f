"""The only file with the command ``rmsnorm convert``: it reads the options, and prints the JSON.

Annotations are evaluated by typer, hence no ``from __future__ import annotations`` in this file.
"""

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..models import loading
from ..models.command import DTYPES
from .rotation import KINDS

if TYPE_CHECKING:
    import typer


def register(app: "typer.Typer") -> "typer.Typer":
    """Adds the command to the app; returns the app."""
    import typer

    from ..bench import asked
    from ..models import screen
    from .convert import OPERATIONS, Conversion, Options, Unconvertible

    @app.command(name="convert", cls=asked.Command)
    def run(
        model: Annotated[str, typer.Argument(help=f"{loading.GOOD[0].upper()}{loading.GOOD[1:]}.")],
        out: Annotated[Path, typer.Option(help="The directory that is made.")],
        to_rms: Annotated[bool, typer.Option("--to-rms", help="Make RMSNorms of LayerNorms.")] = False,
        fold: Annotated[bool, typer.Option("--fold", help="Put gains into the weights behind them.")] = False,
        rotate: Annotated[
            bool, typer.Option("--rotate", help="Spread large channels by an orthogonal matrix.")
        ] = False,
        dtype: Annotated[str, typer.Option(help=f"Of the weights: {', '.join(DTYPES)}; else as saved.")] = "",
        untie: Annotated[bool, typer.Option("--untie/--no-untie", help="Give a tied head a weight of its own.")] = True,
        kind: Annotated[str, typer.Option(help=f"Of the matrix: {', '.join(KINDS)}.")] = "hadamard",
        seed: Annotated[int, typer.Option(help="Of the matrix.")] = 0,
        force: Annotated[bool, typer.Option("--force", help="Replace a directory that this command wrote.")] = False,
        json: Annotated[
            Path | None,
            typer.Option(dir_okay=False, metavar=asked.METAVAR, help=f"Also write the results as JSON. {asked.HELP}"),
        ] = None,
    ) -> None:
        """Change a model's norms and not what it computes, prove it, and write it as a directory.

        Stock transformers loads the directory where the model is still one of its class; else it says what does.
        Nothing is downloaded, and nothing half-written is left. docs/surgery.md has the algebra.
        """
        wanted = {"to_rms": to_rms, "fold": fold, "rotate": rotate}
        operations = tuple(name for name in OPERATIONS if wanted[name])
        if not operations:
            raise typer.BadParameter("nothing to do; give one or more", param_hint="--to-rms, --fold, --rotate")
        if dtype and dtype not in DTYPES:
            raise typer.BadParameter(f"{dtype!r} is not one of {', '.join(DTYPES)}", param_hint="--dtype")
        if kind not in KINDS:
            raise typer.BadParameter(f"{kind!r} is not one of {', '.join(KINDS)}", param_hint="--kind")
        asked.check(json)
        out = out.expanduser().absolute()
        options = Options(model, out, operations, DTYPES.get(dtype), untie, kind, seed, force)
        printer, doing = asked.screen(json), screen.Doing()

        def show(what: Any) -> None:
            doing.done()
            printer.print(what, markup=False, highlight=False, soft_wrap=isinstance(what, str))

        conversion = Conversion(options, show, doing)
        try:
            conversion.run()
        except (loading.Unusable, Unconvertible) as reason:
            doing.done()
            typer.echo(f"rmsnorm convert: {reason}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            doing.done()
            typer.echo("rmsnorm convert: Ctrl-C: nothing was written", err=True)
            raise typer.Exit(130) from None
        finally:
            doing.done()
        if json:
            asked.put(json, json_format.dumps(conversion.found, indent=1))

    return app
