"""The only file with the command ``rmsnorm patch``: it reads the options, and writes the file.

Annotations are evaluated by typer, hence no ``from __future__ import annotations`` in this file.
"""

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch

from . import loading

if TYPE_CHECKING:
    import typer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def register(app: "typer.Typer") -> "typer.Typer":
    """Adds the command to the app; returns the app."""
    import typer

    from ..bench import asked
    from .course import Course, Options

    @app.command(name="patch", cls=asked.Command)
    def run(
        model: Annotated[str, typer.Argument(help=f"{loading.GOOD[0].upper()}{loading.GOOD[1:]}.")],
        prompt: Annotated[str, typer.Option(help="What the model continues.")] = "The sky is blue because",
        tokens: Annotated[int, typer.Option(min=1, help="How many it writes, greedily.")] = 64,
        text: Annotated[int, typer.Option(min=2, help="How many tokens of real text it scores.")] = 2000,
        dtype: Annotated[str, typer.Option(help=f"Of the weights: {', '.join(DTYPES)}.")] = "float32",
        fuse: Annotated[
            bool, typer.Option("--fuse", help="Also run what stands beside norms in one pass, where it can be proven.")
        ] = False,
        fuse_add: Annotated[bool, typer.Option("--fuse-add", help="The same for residual adds alone.")] = False,
        layer_norm: Annotated[bool, typer.Option("--layer-norm", help="Take LayerNorms too.")] = False,
        lean: Annotated[bool, typer.Option("--lean", help="Keep outputs for backward instead of inputs.")] = False,
        seconds: Annotated[float, typer.Option(min=0.0, help="Of timing for each kind of work; 0: none.")] = 10.0,
        json: Annotated[
            Path | None,
            typer.Option(dir_okay=False, metavar=asked.METAVAR, help=f"Also write the results as JSON. {asked.HELP}"),
        ] = None,
    ) -> None:
        """Run a model's norms on our kernels: a report; then what it says, its speed and its memory, before and after.

        Any architecture that transformers opens: what writes is compared by its text and loss too, others by their
        outputs. Nothing is downloaded.
        """
        if dtype not in DTYPES:
            raise typer.BadParameter(f"{dtype!r} is not one of {', '.join(DTYPES)}", param_hint="--dtype")
        asked.check(json)
        what = {"fuse": fuse, "fuse_add": fuse_add, "layer_norm": layer_norm, "lean": lean}
        course = Course(Options(model, prompt, tokens, text, DTYPES[dtype], seconds, what), out=asked.screen(json))
        try:
            status = course.run()
        except loading.Unusable as unusable:
            typer.echo(f"rmsnorm patch: {unusable}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("rmsnorm patch: Ctrl-C: the rest was not measured", err=True)
            status = 130
        if json:
            asked.put(json, json_format.dumps(course.found, indent=1))
        raise typer.Exit(status)

    return app
