"""The only file that says what ``patch`` did: plain data, and a table of it."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType


@dataclass(frozen=True)
class Entry:
    """One module."""

    name: str
    """Its path in the model."""
    cls: str
    meaning: str = ""
    """Which recipe it follows; empty if it was skipped."""
    reason: str = ""
    """Why it was left as it is; empty if it was not."""
    errors: dict[str, float] = field(default_factory=dict)
    """The differences from the module's own forward that the proof saw."""
    types: tuple[str, ...] = ()
    """The input types that run on our kernels; others run on the module's own forward."""


@dataclass
class PatchReport:
    """What :func:`rmsnorm.patch` did to each norm of a model.

    ``errors`` of an entry: ``float32`` is the largest difference in steps between neighbouring numbers;
    ``bfloat16`` and ``float16`` are the share of outputs that are not identical (they differ by one rounding);
    ``gradient`` is the largest difference of a gradient, relative to the largest gradient, in float32.
    """

    patched: list[Entry] = field(default_factory=list)
    """Norms that run on our kernels now."""
    skipped: list[Entry] = field(default_factory=list)
    """Norms that were left as they are, each with the reason."""
    fused: list[Entry] = field(default_factory=list)
    """Layers whose residual add runs together with the norm behind it."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """What the table shows: ``(count, class, names, what, errors)``, alike modules in one row."""
        groups: dict[tuple[str, str, str], list[Entry]] = {}
        for title, entries in (("patched", self.patched), ("fused", self.fused), ("skipped", self.skipped)):
            for entry in entries:
                what = f"{title}: {entry.meaning or entry.reason}"
                groups.setdefault((entry.cls, _pattern(entry.name), what), []).append(entry)
        return [
            (str(len(group)), cls, names, what, _worst(group)) for (cls, names, what), group in groups.items()
        ]

    def summary(self) -> str:
        """One sentence."""
        if not self.patched and not self.skipped:
            return "Nothing to patch: this model has no norm."
        left = f"; {len(self.skipped)} left as they are" if self.skipped else ""
        fused = f"; {len(self.fused)} residual adds fused" if self.fused else ""
        return f"{len(self.patched)} norms run on rmsnorm{fused}{left}."

    def __str__(self) -> str:
        return "\n".join([*("  ".join(filter(None, row)) for row in self.rows()), self.summary()])

    def __rich__(self) -> RenderableType:
        from rich import box
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Table

        table = Table("", "class", "modules", "what", "largest differences", box=box.SIMPLE_HEAD, show_edge=False)
        for row in self.rows():
            table.add_row(*map(escape, row))
        return Group(table, self.summary()) if table.row_count else self.summary()


def _pattern(name: str) -> str:
    """The name with its layer numbers as stars."""
    return re.sub(r"\b\d+\b", "*", name)


def _worst(entries: Sequence[Entry]) -> str:
    largest: dict[str, float] = {}
    for entry in entries:
        for what, error in entry.errors.items():
            largest[what] = max(error, largest.get(what, 0.0))
    return ", ".join(f"{what} {error:.2g}" for what, error in largest.items())
