"""The only file that reads the options of `graph`, and prints what neighbourhoods take in graphs of torch.compile.

Imported when the command line is built, as typer and rich are an extra. Annotations are evaluated then, hence no
``from __future__ import annotations`` in this file.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from . import cases, console, neighbourhoods, pages, worker
from .options import SECONDS_PER_RACE, Seconds, Threads, one_of, sizes, thread_counts

BLOCK = "graph: made by `rmsnorm graph --write`"


def run(
    rows: Annotated[str, typer.Option(help="Rows, separated by commas.")] = "1,512",
    cols: Annotated[str, typer.Option(help="Columns, separated by commas.")] = "4096",
    dtype: Annotated[str, typer.Option(help=f"Of {', '.join(cases.DTYPES)}.")] = "float32,bfloat16",
    direction: Annotated[str, typer.Option(help="Of forward, backward.")] = "forward,backward",
    only: Annotated[str, typer.Option(help="Neighbourhoods with this in their names.")] = "",
    threads: Threads = "1,2",
    runs: Annotated[int, typer.Option(min=1, help="How often everything is measured.")] = 3,
    seconds: Seconds = SECONDS_PER_RACE,
    write: Annotated[Path | None, typer.Option(help="Put the table into this page, between its two comments.")] = None,
) -> None:
    """Inside torch.compile: what stands beside a norm in models, around ours and around the formula."""
    shapes = [(r, c) for r in sizes("--rows", rows) for c in sizes("--cols", cols)]
    dtypes, directions = (
        one_of("--dtype", dtype, cases.DTYPES),
        one_of("--direction", direction, ("forward", "backward")),
    )
    counts = thread_counts(threads) or [torch.get_num_threads()]
    chosen = [name for name in neighbourhoods.NAMES if only in name]
    if not chosen:
        raise typer.BadParameter(f"{only!r} is in none of {', '.join(neighbourhoods.NAMES)}", param_hint="--only")
    if write and f"<!-- {BLOCK} -->" not in (write.read_text() if write.is_file() else ""):
        raise typer.BadParameter(f"{write} has no comment {BLOCK!r}", param_hint="--write")
    out, here = Console(), console.machine()
    out.print(console.header(here))
    found = neighbourhoods.places(chosen, cases.grid(shapes, dtypes, directions, threads=counts))
    mine = {count: [place for place in found if place.case.threads == count] for count in counts}
    order = [place for _ in range(runs) for count in counts for place in mine[count]]

    def measured() -> Iterator[None]:
        for _ in range(runs):
            for count in counts:
                results = worker.apart(count, neighbourhoods.races, mine[count], seconds)
                for place, (ratio, seconds_of_theirs) in zip(mine[count], results, strict=True):
                    place.ratios.append(ratio)
                    place.seconds = seconds_of_theirs
                    yield

    complete = console.watch([f"{place.name}, {place.case}" for place in order], measured(), [])
    done = [place for place in found if place.ratios]
    out.print(console.neighbourhoods(done))
    if write and complete:
        from . import published  # draws, with what not everybody has

        pages.replace_block(write, BLOCK, published.graph(here, done))
    if not complete:
        raise typer.Exit(130)
