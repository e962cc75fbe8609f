"""The only file that says what surgery did to a model: plain data, and a table of it."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..models.report import MOST_NAMES, shortened

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

BAR = 1e-12
"""What outputs may differ by in fp64, relative to the largest: the algebra is right, or it isn't."""


@dataclass(frozen=True)
class Fate:
    """One norm."""

    name: str
    """Its path in the model."""
    cls: str
    """The name of its class, before."""
    done: str = ""
    """What was done; empty if nothing was."""
    reason: str = ""
    """Why nothing was done; empty if something was."""
    eps_share: float | None = None
    """The largest part that eps has in a row's mean square + eps, on the inputs that were traced: 1 is all of it."""
    largest: float | None = None
    """The largest number of its input before,"""
    largest_after: float | None = None
    """and after."""


@dataclass(frozen=True)
class Difference:
    """What the model says before and after, in one type."""

    dtype: str
    outputs: dict[str, float]
    """Of each output the largest difference, relative to its largest element."""
    own: dict[str, float] = field(default_factory=dict)
    """For scale: the same between the unchanged model in this type and in float64."""
    loss: float | None = None
    """Of a language model's loss on the text, after less before, relative;"""
    own_loss: float | None = None
    """of the unchanged model's in this type, less its own in float64;"""
    same_tokens: int | None = None
    """of the tokens that it writes greedily, how many are the same before the first that isn't,"""
    tokens: int | None = None
    """and how many were written."""

    @property
    def worst(self) -> float:
        """The largest difference, of an output or of the loss."""
        return max([*self.outputs.values(), abs(self.loss or 0.0)])


@dataclass
class SurgeryReport:
    """What :func:`rmsnorm.fold`, :func:`rmsnorm.to_rms` or :func:`rmsnorm.rotate` did to a model, and the proof.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.RMSNorm(8), torch.nn.Linear(8, 4))
        >>> torch.nn.init.normal_(model[0].weight).shape
        torch.Size([8])
        >>> report = fold(model, inputs=torch.randn(3, 8))
        >>> report.done[0].name, report.done[0].done, report.differences["float64"].worst < 1e-12
        ('0', 'into 1.weight', True)
    """

    operation: str
    """``fold``, ``to_rms`` or ``rotate``."""
    done: list[Fate] = field(default_factory=list)
    """Norms that were changed."""
    left: list[Fate] = field(default_factory=list)
    """Norms that were left as they are, each with the reason."""
    notes: list[str] = field(default_factory=list)
    """What else the model is now: untied, with biases that it didn't have, …"""
    unused: list[str] = field(default_factory=list)
    """Weights that never ran on the inputs: calls that reach them weren't looked at."""
    differences: dict[str, Difference] = field(default_factory=dict)
    """By type: ``float64``, which proves the algebra, the model's own, and ``bfloat16``."""
    not_measured: dict[str, str] = field(default_factory=dict)
    """Types in which the model can't run, and why."""
    kept: int = 0
    """Bytes that are kept for the way back."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def summary(self) -> str:
        """One sentence."""
        if not self.done and not self.left:
            return f"{self.operation}: this model has no norm."
        if not self.done:
            return f"{self.operation}: nothing was changed; {self.left[0].name or 'the model'}: {self.left[0].reason}."
        left = f"; {len(self.left)} left as they are" if self.left else ""
        proof = self.differences.get("float64")
        proven = f"; in float64 the outputs differ by {proof.worst:.1e}, relative" if proof else ""
        return f"{self.operation}: {len(self.done)} norms changed{left}{proven}."

    def rows(self) -> list[list[str]]:
        """Norms of one class with one fate in one row: number, class, places, fate."""
        groups: dict[tuple[str, str], list[Fate]] = {}
        for fate in [*self.done, *self.left]:
            words = _pattern(fate.done) if fate.done else f"left: {_pattern(fate.reason)}"
            groups.setdefault((fate.cls, words), []).append(fate)
        return [[str(len(group)), cls, ", ".join(_places(group)), words] for (cls, words), group in groups.items()]

    def proofs(self) -> list[list[str]]:
        """One row a type: the largest differences, beside what the type itself costs the unchanged model."""
        return [
            [
                one.dtype,
                f"{one.worst:.1e}",
                f"{max(one.own.values()):.1e}" if one.own else "",
                "" if one.loss is None else f"{one.loss:+.1e}",
                "" if one.own_loss is None else f"{one.own_loss:+.1e}",
                "" if one.tokens is None else f"{one.same_tokens} of {one.tokens}",
            ]
            for one in self.differences.values()
        ]

    def remarks(self) -> list[str]:
        """What the tables don't say, a line each; the last is the summary."""
        lines = [f"{name}: not measured: {why}" for name, why in self.not_measured.items()]
        if sizes := [(fate.largest, fate.largest_after) for fate in self.done if fate.largest and fate.largest_after]:
            before, after = (max(side) for side in zip(*sizes, strict=True))
            lines.append(f"the largest number that a norm gets: {before:.4g} before, {after:.4g} after")
        return [*lines, *self.notes, self.summary()]

    def __str__(self) -> str:
        lines = _aligned([list(TITLES), *self.rows()]) if self.rows() else []
        if self.differences:
            lines += ["", *_aligned([list(PROOF), *self.proofs()]), ""]
        return "\n".join([*lines, *self.remarks()])

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        tables = [(TITLES, self.rows()), (PROOF, self.proofs())]
        return Group(
            *(_table(titles, rows) for titles, rows in tables if rows), *(Text(line) for line in self.remarks())
        )


TITLES = ("norms", "class", "modules", "what")
PROOF = ("type", "outputs", "the type itself", "loss", "its own", "same tokens")
"""Differences are relative: of the outputs to the largest, of the loss to itself; "the type itself" and "its own" are
what the type costs the unchanged model."""


def _table(titles: tuple[str, ...], rows: list[list[str]]) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    columns = zip(titles, *rows, strict=True)
    kept = [i for i, column in enumerate(columns) if any(column[1:])]
    for i in kept:
        table.add_column(titles[i], overflow="fold", no_wrap=titles[i] in ("norms", "class", "type", "outputs"))
    for row in rows:
        table.add_row(*(escape(row[i]) for i in kept))
    return table


def _places(fates: list[Fate]) -> list[str]:
    """With stars for layer numbers, each once."""
    names = list(dict.fromkeys(shortened(re.sub(r"\b\d+\b", "*", one.name) or "(the model)") for one in fates))
    more = len(names) - MOST_NAMES
    return [*names[:MOST_NAMES], f"and {more} more"] if more > 0 else names


def _pattern(text: str) -> str:
    return re.sub(r"\b\d+(?=\.)", "*", text)


def _aligned(rows: list[list[str]]) -> list[str]:
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    return [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in zip(*columns, strict=True)
    ]
