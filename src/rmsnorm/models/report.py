"""The only file that says what ``patch`` did: plain data, and a table of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType


ERRORS = {"float32": "fp32 (eps)", "bfloat16": "bf16 (share)", "float16": "fp16 (share)", "gradient": "grad (eps)"}
"""The keys of ``errors``, and how the table heads them, with their units."""
TITLES = ("norms", "class", "modules", *ERRORS.values(), "what")
NOTE = "eps: the largest difference, in eps · share: of outputs that are not identical, from 0 to 1"
WHOLE = "whole names"
"""What gives way last on a narrow screen."""
MOST_NAMES = 8
"""Module names in a row; the others are counted."""


@dataclass(frozen=True)
class Entry:
    """One module."""

    name: str
    """Its path in the model."""
    cls: str
    """The name of its class."""
    meaning: str = ""
    """Which recipe it follows; empty if it was skipped."""
    reason: str = ""
    """Why it was left as it is; empty if it was not."""
    errors: dict[str, float] = field(default_factory=dict)
    """The differences from the module's own forward that the proof saw."""
    types: tuple[str, ...] = ()
    """The input types that run on our kernels; others run on the module's own forward."""
    kept: str = ""
    """With ``memory="lean"``, what is kept for backward: its output, or its input and why; of a product, how much."""
    counts: dict[str, int] = field(default_factory=dict)
    """Of a fused layer, how many lines of each kind became one call: ``{"residual adds": 1}``."""


@dataclass
class PatchReport:
    """What :func:`rmsnorm.patch` did to each norm of a model.

    ``errors`` of an entry, compared with the module's own forward on random rows: ``float32`` is the largest relative
    difference of an output, in eps (1.2e-7); ``bfloat16`` and ``float16`` are the share of outputs that are not
    identical, but one rounding apart; ``gradient`` is the largest difference of a gradient, in eps of the coarsest type
    and relative to the row's largest.

    Examples:
        >>> report = patch(torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.RMSNorm(8)))
        >>> [entry.name for entry in report.patched], [entry.name for entry in report.skipped]
        (['1'], ['0'])
        >>> report.to_dict()["patched"][0]["meaning"]
        'weight, then round'
    """

    patched: list[Entry] = field(default_factory=list)
    """Norms that run on our kernels now."""
    skipped: list[Entry] = field(default_factory=list)
    """Norms that were left as they are, each with the reason."""
    fused: list[Entry] = field(default_factory=list)
    """Layers whose residual add runs together with the norm behind it, and other lines that were rewritten."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def rows(self) -> list[list[str]]:
        """What the table shows below ``TITLES``: modules of one class with one fate in one row."""
        groups: dict[tuple[str, str], list[Entry]] = {}
        for title, entries in (("patched", self.patched), ("fused", self.fused), ("skipped", self.skipped)):
            for entry in entries:
                kept = f"; keeps its {entry.kept}" if entry.kept else ""
                fate = f"{title}: {entry.meaning or entry.reason}{limits(entry.types)}{kept}"
                groups.setdefault((fate, entry.cls), []).append(entry)
        return [
            [str(len(group)), cls, ", ".join(_names(group)), *_worst(group), fate]
            for (fate, cls), group in groups.items()
        ]

    def summary(self) -> str:
        """One sentence."""
        if not (self.patched or self.skipped or self.fused):
            return "Nothing to patch: this model has no norm."
        left = f"; {len(self.skipped)} left as they are" if self.skipped else ""
        gates = sum(bool(entry.kept) for entry in self.fused)
        counts = sum((Counter(entry.counts) for entry in self.fused), Counter[str]())
        fused = f"; {', '.join(f'{count} {kind}' for kind, count in counts.items())} fused" if counts else ""
        fused += f"; {gates} gated products keep less for backward" if gates else ""
        lean = ""
        if any(entry.kept for entry in self.patched):
            lean = f", {sum(entry.kept == 'output' for entry in self.patched)} of them keep no input for backward"
        return f"{len(self.patched)} norms run on rmsnorm{lean}{fused}{left}."

    def __str__(self) -> str:
        if not (rows := self.rows()):
            return self.summary()
        columns = [column for column in zip(TITLES, *rows, strict=True) if any(column[1:])]
        titles, widths = [column[0] for column in columns], [max(map(len, column)) for column in columns]
        lines = []
        for row in zip(*columns, strict=True):
            aligned = zip(titles, row, widths, strict=True)
            cells = (cell.rjust(width) if _is_number(title) else cell.ljust(width) for title, cell, width in aligned)
            lines.append("  ".join(cells).rstrip())
        note = [NOTE] if any(entry.errors for entry in [*self.patched, *self.fused]) else []
        return "\n".join([*lines, *note, self.summary()])

    def __rich__(self) -> RenderableType:
        from rich import box
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Table

        from ..bench.fitting import HINT, Fitted

        rows = self.rows()
        empty = [title for title, *cells in zip(TITLES, *rows, strict=True) if not any(cells)]

        def make(gone: Collection[str]) -> Table:
            gone = {*gone, *empty}
            caption = None if {*ERRORS.values()} <= gone else NOTE
            table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), caption=caption)
            for title in (title for title in TITLES if title not in gone):
                justify: Literal["left", "right"] = "right" if _is_number(title) else "left"
                head = title.replace(" (", "\n(")
                table.add_column(head, justify=justify, no_wrap=title != "what", min_width=16 * (title == "what"))
            for row in rows:
                cells = dict(zip(TITLES, row, strict=True))
                names = cells["modules"].split(", ")
                cells["modules"] = "\n".join(shortened(name, 26) if WHOLE in gone else name for name in names)
                table.add_row(*(escape(cell) for title, cell in cells.items() if title not in gone))
            return table

        hint = f"{HINT}, or to_dict()"
        table = Fitted(make, ("|".join(ERRORS.values()), "class", WHOLE), hint)
        return Group(table, self.summary()) if rows else self.summary()


def limits(types: Sequence[str]) -> str:
    """Of a norm that doesn't run on our kernels in each type: in which it does, with other weights where only so."""
    if not types or {"float32", "bfloat16", "float16"} <= {*types}:
        return ""
    named = [name for name in types if "×" not in name or name.partition(" ")[0] not in types]
    return f" (in {' and '.join(named)} only)"


def _is_number(title: str) -> bool:
    return title == "norms" or title in ERRORS.values()


def _names(entries: Sequence[Entry]) -> list[str]:
    """The places of a row: with stars for layer numbers, each once, shortened."""
    names = list(dict.fromkeys(shortened(_pattern(entry.name)) for entry in entries))
    more = len(names) - MOST_NAMES
    return [*names[:MOST_NAMES], f"and {more} more"] if more > 0 else names


def _pattern(name: str) -> str:
    """The name with its layer numbers as stars."""
    return re.sub(r"\b\d+\b", "*", name) or "(the model)"


def shortened(name: str, width: int = 40) -> str:
    """A dotted name of about so many characters at most: parts in its middle give way to one ``…``, none is cut.

    The last part always stays: it tells one norm of a layer from another.
    """
    parts = name.split(".")
    for gone in range(1, len(parts)):
        if len(name) <= width:
            break
        left = (len(parts) - gone) // 2
        name = ".".join([*parts[:left], "…", *parts[left + gone :]])
    return name


def _worst(entries: Sequence[Entry]) -> list[str]:
    found = ([entry.errors[name] for entry in entries if name in entry.errors] for name in ERRORS)
    return [f"{max(errors):.2g}" if errors else "" for errors in found]
