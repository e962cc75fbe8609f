"""The only file that shows the package to someone who sees it for the first time; every number is computed here."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from . import _smollm
from .bench import cases, console, contenders, race
from .bench.fitting import Fitted
from .bench.results import Result, verdict
from .module import RMSNorm

ROW_COLOURS = ("cyan", "magenta", "yellow")
COLUMN_COLOURS = ("green", "blue", "red", "yellow")
MODEL_WIDTH = 576
MODEL_ROWS = (1, 128, 2048)
SECONDS_PER_RACE = 0.4


def show(console: Console, prompt: str, tokens: int, model: bool) -> None:
    """The whole demo: the formula, its relatives, a real model, the clock."""
    console.rule("[bold]1 · The formula, by hand")
    _by_hand(console)
    console.rule("[bold]2 · BatchNorm, LayerNorm, RMSNorm: who shares a ruler?")
    _side_by_side(console)
    console.rule(f"[bold]3 · A real model: {_smollm.NAME}")
    if not model:
        console.print("Left out, as --no-model asks.\n")
    elif absent := _smollm.missing():
        console.print(f"Left out, {absent}\n", soft_wrap=True, markup=False)
    else:
        _real_model(console, prompt, tokens)
    console.rule("[bold]4 · The clock")
    _clock(console)


def _by_hand(console: Console) -> None:
    """The four-number example of the tutorial: our layer against arithmetic that fits in one's head."""
    x = [0.1, 0.1, 0.2, 0.3]
    squares = [value * value for value in x]
    mean_square = sum(squares) / len(x)
    rms = mean_square**0.5
    by_hand = [value / rms for value in x]
    layer = RMSNorm(len(x), eps=0.0)
    output = layer(torch.tensor(x)).tolist()
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(style="bold")
    for _ in x:
        table.add_column(justify="right")
    for name, values in (
        ("x", x),
        ("squares x²", squares),
        ("mean square", [mean_square]),
        ("rms = √(mean square)", [rms]),
        ("x ÷ rms", by_hand),
        ("rmsnorm.RMSNorm(4, eps=0)(x)", output),
    ):
        table.add_row(name, *(f"{value:.4f}" for value in values))
    console.print(table)
    difference = max(abs(mine - hand) for mine, hand in zip(output, by_hand, strict=True))
    after = statistics.fmean(value * value for value in output) ** 0.5
    console.print(
        f"The layer and the arithmetic differ by at most {difference:.0e}. The output has rms {after:.4f}: the row now "
        "has a standard size, and its proportions are what they were.\n"
    )


def _side_by_side(console: Console) -> None:
    """One small matrix through the three fresh layers: gains of 1, so that only the idea differs."""
    eps = 1e-12  # vanishes beside these numbers; torch's BatchNorm refuses 0
    a = torch.tensor([1.0, 2.0, 3.0, 6.0])
    x = torch.stack([a, 10 * a, a + 5])
    norms: dict[str, nn.Module] = {
        "BatchNorm": nn.BatchNorm1d(4, eps).train(),
        "LayerNorm": nn.LayerNorm(4, eps),
        "RMSNorm": RMSNorm(4, eps),
    }
    outputs = {name: norm(x).detach() for name, norm in norms.items()}
    console.print(
        "\nThree samples (rows) of four features (columns). Sample a is plain, b is ten times a, c is a plus five. "
        "Arrows point along the numbers that a statistic is taken over: → a row, ↓ a column. In the outputs, a colour "
        "marks what was measured with one ruler.\n"
    )
    console.print(_matrix("input x", x, rulers="none"))
    for name, rulers, idea in (
        (
            "BatchNorm",
            "columns",
            "has a ruler per feature, made from the batch (training mode): each column loses its mean, "
            "then is divided by its std.",
        ),
        ("LayerNorm", "rows", "has a ruler per sample: each row loses its mean, then is divided by its std."),
        ("RMSNorm", "rows", "has a ruler per sample and only divides: each row by its root mean square."),
    ):
        console.print(f"[bold]{name}[/] {idea}\n")
        console.print(_matrix(f"{name}(x)", outputs[name], rulers))

    questions: dict[str, Callable[[str], bool]] = {
        "scale: b = 10·a comes out like a": lambda name: _same(outputs[name][1], outputs[name][0]),
        "shift: c = a + 5 comes out like a": lambda name: _same(outputs[name][2], outputs[name][0]),
        "batch: a comes out the same without b": lambda name: _same(norms[name](x[[0, 2]])[0], outputs[name][0]),
    }
    console.print("[bold]What does each one ignore?[/] Checked on these numbers:")
    table = Table("", *norms, box=box.SIMPLE_HEAD)
    for question, answer in questions.items():
        table.add_row(question, *("[green]yes[/]" if answer(name) else "[red]no[/]" for name in norms))
    console.print(table)


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-5)


def _matrix(title: str, x: Tensor, rulers: str) -> Fitted:
    """The matrix with the statistics of its rulers, "rows" or "columns"; of both for the input, "none"."""
    return Fitted(partial(_table, title, x, rulers), ("→ std", "→ mean", "→ rms"), "widen the terminal")


def _table(title: str, x: Tensor, rulers: str, gone: Collection[str]) -> Table:
    palettes: dict[str, Sequence[Sequence[str]]] = {
        "rows": [[colour] * x.shape[1] for colour in ROW_COLOURS],
        "columns": [COLUMN_COLOURS] * x.shape[0],
        "none": [["default"] * x.shape[1]] * x.shape[0],
    }
    across = _statistics(x, 1) if rulers != "columns" else {}
    across = {name: values for name, values in across.items() if f"→ {name}" not in gone}
    down = _statistics(x, 0) if rulers != "rows" else {}
    table = Table(
        title, "f1", "f2", "f3", "f4", *(f"→ {name}" for name in across), box=box.SIMPLE_HEAD, show_edge=False
    )
    for column in table.columns:
        column.justify, column.no_wrap = "right" if column is not table.columns[0] else "left", True
    for i, label in enumerate("abc"):
        statistics_of_row = (_number(values[i], "dim") for values in across.values())
        table.add_row(label, *map(_number, x[i], palettes[rulers][i]), *statistics_of_row)
    if down:
        table.add_section()
    for name, values in down.items():
        table.add_row(f"↓ {name}", *(_number(value, "dim") for value in values))
    table.add_row()
    return table


def _number(value: Tensor, colour: str) -> str:
    return f"[{colour}]{round(value.item(), 3) + 0.0:.3f}[/]"  # + 0.0, or else some zeros read -0.000


def _statistics(x: Tensor, dim: int) -> dict[str, Tensor]:
    return {"mean": x.mean(dim), "std": x.std(dim, correction=0), "rms": x.square().mean(dim).sqrt()}


def _real_model(console: Console, prompt: str, tokens: int) -> None:
    columns = SpinnerColumn(), TextColumn("{task.description:<36}"), BarColumn(bar_width=20), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(_smollm.STEPS))

        def step(name: str) -> None:
            progress.update(task, description=name, completed=_smollm.STEPS.index(name))

        proof = _smollm.prove(prompt, tokens, step)

    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("prompt", escape(proof.prompt))
    table.add_row("its own norms", escape(proof.text_before))
    table.add_row("rmsnorm", escape(proof.text_after))
    console.print(table)
    share = proof.identical / proof.compared
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    colour = "green" if proof.same_text else "red"
    table.add_row("norms swapped", f"{proof.norms}, each on the same weight Parameter")
    table.add_row("same greedy text", f"[{colour}]{proof.same_text}[/], token by token ({proof.tokens} tokens)")
    table.add_row(
        "largest logit difference",
        f"{proof.logit_difference:.1e} in float32, among logits up to {proof.logit_size:.0f}",
    )
    table.add_row(
        "identical bfloat16 outputs", f"{share:.4%} of {proof.compared:,}, the norms alone on their real inputs"
    )
    console.print(table)


def _clock(screen: Console) -> None:
    """Our layer against torch's at the shapes of the model: decoding one token, a short prompt, a training batch."""
    layers = [contenders.BY_NAME[name] for name in ("rmsnorm.RMSNorm", "nn.RMSNorm")]
    todo = cases.grid([(rows, MODEL_WIDTH) for rows in MODEL_ROWS])
    screen.print(console.header(console.machine()))
    results: list[Result] = []
    console.watch(todo, (race.race(case, layers, SECONDS_PER_RACE) for case in todo), results)
    screen.print()
    screen.print(console.tables(results))
    screen.print()
    screen.print(verdict(results, layers[1].name))
