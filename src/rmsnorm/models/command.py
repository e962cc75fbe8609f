"""The only file with the command ``rmsnorm patch``: it loads, compares, and prints.

Annotations are evaluated by typer, hence no ``from __future__ import annotations`` in this file.
"""

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor

from .._info import info
from ..bench import export
from ..study.corpus import documentation
from . import comparison, loading

if TYPE_CHECKING:
    import typer
    from rich.table import Table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def register(app: "typer.Typer") -> "typer.Typer":
    """Adds the command to the app; returns the app."""
    import typer
    from rich.console import Console

    @app.command(name="patch")
    def run(
        model: Annotated[str, typer.Argument(help="A directory with safetensors, a .gguf file, or smollm2.")],
        prompt: Annotated[str, typer.Option(help="What the model continues.")] = "The sky is blue because",
        tokens: Annotated[int, typer.Option(min=1, help="How many it writes, greedily.")] = 64,
        text: Annotated[int, typer.Option(min=2, help="How many tokens of real text it scores.")] = 2000,
        dtype: Annotated[str, typer.Option(help=f"Of the weights: {', '.join(DTYPES)}.")] = "float32",
        fuse_add: Annotated[
            bool, typer.Option("--fuse-add", help="Fuse residual adds where that can be proven.")
        ] = False,
        layer_norm: Annotated[bool, typer.Option("--layer-norm", help="Take LayerNorms too.")] = False,
        seconds: Annotated[float, typer.Option(min=0.0, help="Of timing for each kind of work; 0: none.")] = 10.0,
        json: Annotated[Path | None, typer.Option(dir_okay=False, help="Also write the results to this file.")] = None,
    ) -> None:
        """Run a model's norms on our kernels; compare what it says, its speed and its memory, before and after."""
        if dtype not in DTYPES:
            raise typer.BadParameter(f"{dtype!r} is not one of {', '.join(DTYPES)}", param_hint="--dtype")
        if json and not json.parent.is_dir():
            raise typer.BadParameter(f"{json.parent} is not a directory; make it first", param_hint="--json")
        try:
            tokenizer, loaded = loading.load(model, DTYPES[dtype])
        except loading.Unusable as reason:
            typer.echo(f"rmsnorm patch: {reason}", err=True)
            raise typer.Exit(2) from None
        vocabulary = loaded.get_input_embeddings().num_embeddings
        result = comparison.compare(
            loaded,
            tokens_of(tokenizer, prompt, vocabulary),
            tokens_of(tokenizer, documentation().decode()[: 12 * text], vocabulary)[:text],
            tokens,
            seconds,
            fuse_add=fuse_add,
            layer_norm=layer_norm,
        )
        console = Console()
        console.print(result.report)
        console.print(_table(result, tokenizer))
        if json:
            about = {"model": model, "dtype": dtype, "prompt": prompt, "rmsnorm": vars(info())}
            export.replace(json, json_format.dumps({**about, **result.to_dict()}, indent=1))

    return app


def tokens_of(tokenizer: Any, text: str, vocabulary: int) -> Tensor:
    """The text's tokens; without a tokenizer, its bytes in the vocabulary."""
    if tokenizer is None:
        return torch.tensor([byte % vocabulary for byte in text.encode()])
    ids: Tensor = tokenizer(text, return_tensors="pt")["input_ids"][0]
    return ids


def _table(result: comparison.Comparison, tokenizer: Any) -> "Table":
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    numbers = result.numbers()
    table = Table("", "before", "after", "", box=box.SIMPLE_HEAD, show_edge=False)
    sides = result.before, result.after
    texts = [side.written if tokenizer is None else tokenizer.decode(side.written) for side in sides]
    same = f"{numbers['same_tokens']} of {numbers['written_tokens']} tokens alike"
    table.add_row("writes", *(escape(str(text)) for text in texts), same)
    far, size = numbers["logit_difference"], numbers["logit_size"]
    table.add_row("largest logit", f"{size:.4g}", "", f"differ by at most {far:.1e}")
    losses = f"{numbers['loss_before']:.6f}", f"{numbers['loss_after']:.6f}"
    apart = abs(numbers["loss_after"] - numbers["loss_before"])
    table.add_row("loss per token", *losses, f"differ by {apart:.1e}, over {numbers['scored_tokens']} tokens")
    for name, speed in result.speeds.items():
        table.add_row(f"{name}, tokens/s", f"{speed.before:.1f}", f"{speed.after:.1f}", f"time × {speed.ratio:.3f}")
    for name, attribute in (("kept for backward, MiB", "kept"), ("peak of a training step, MiB", "peak")):
        if result.memory:
            sizes = [getattr(result.memory[when], attribute) for when in ("before", "after")]
            table.add_row(name, *(f"{size / 2**20:.1f}" for size in sizes), f"× {sizes[1] / sizes[0]:.3f}")
    return table
