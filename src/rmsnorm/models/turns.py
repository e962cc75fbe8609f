"""The only file that knows how models write a rotary embedding: a table, and which row computes what a function does.

    q_embed = q · cos + rotate_half(q) · sin

in which the pairs are columns of two halves or neighbours, the tables have a number for each column or count in their
first half alone, the products are rounded or are fp32, and a head may be wider than what is turned.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from itertools import product
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ..forms.heads import rope
from . import looks, reads
from .binding import TYPES
from .modes import undisturbed


@dataclass(frozen=True)
class Turn:
    """A way to write it, in words of ``rmsnorm.rope``."""

    interleaved: bool
    halves: bool
    """Of the tables the first half counts: a number for each pair of neighbours."""
    wide: bool
    """Products and sum are fp32 in all types."""
    partial: bool = False
    """Tables may have fewer columns than a head,"""
    mixed: bool = False
    """and be fp32 beside heads of a half type."""

    def angle(self, table: Tensor) -> Tensor:
        """A table of cosines or sines as ``rmsnorm.rope`` takes it."""
        if self.halves:
            table = table[..., : table.shape[-1] // 2].repeat_interleave(2, -1)
        return table.float() if self.wide and table.dtype in (torch.bfloat16, torch.float16) else table

    def takes(self, table: Tensor, heads: Tensor) -> bool:
        turned, columns = table.shape[-1], heads.shape[-1]
        fits = turned == columns or (self.partial and turned % 2 == 0 and turned < columns)
        return fits and (table.dtype is heads.dtype or (self.mixed and table.dtype is torch.float32))


# Llama and most others; ESM, ModernBERT; GLM, Helium; Ernie 4.5; GLM-4V, BLT; Cohere.
TURNS = [
    Turn(interleaved, halves, wide)
    for interleaved, halves, wide in product((False, True), (False, True), (False, True))
    if interleaved or not halves
]


@functools.cache
def turn_of(rotate: Any) -> Turn | None:
    """The row that is a function, bit for bit, for angles of no pattern; it is called as attention does."""
    with undisturbed():  # models are built on the meta device, too
        for turn in TURNS:
            if _is(turn, rotate, Trial(), watched=True) and all(_is(turn, rotate, trial) for trial in _OTHERS):
                partial, mixed = Trial(turned=8), Trial(tables=torch.float32)
                return replace(turn, partial=_is(turn, rotate, partial), mixed=_is(turn, rotate, mixed))
    return None


@dataclass(frozen=True)
class Trial:
    """What a function is tried with: [2, 3 and 1, tokens, 16] and tables of as many texts."""

    turned: int = 16
    tables: torch.dtype | None = None
    texts: int = 1
    tokens: int = 5
    size: float = 1.0


# A table for each text; numbers that a clamp would meet, and near to none (float16 ends at 65504, and at 2^-24).
_OTHERS = [Trial(texts=2), Trial(tokens=1), Trial(tokens=130, texts=2), Trial(size=2.0**10), Trial(size=2.0**-10)]


def _is(turn: Turn, rotate: Any, trial: Trial, watched: bool = False) -> bool:
    """``watched``: it must not look at what it is given, nor at what may change outside of it."""
    generator = torch.Generator().manual_seed(0)
    try:
        for dtype in TYPES:
            q, k = (torch.randn(2, heads, trial.tokens, 16, generator=generator).to(dtype) for heads in (3, 1))
            q, k = q * trial.size, k * trial.size
            angles = torch.randn(2, trial.texts, trial.tokens, trial.turned, generator=generator)
            cos, sin = angles.to(trial.tables or dtype)
            ours = rope(q, k, turn.angle(cos), turn.angle(sin), interleaved=turn.interleaved)
            theirs = rotate(q, k, cos, sin)
            if not all(a.dtype is b.dtype and torch.equal(a, b) for a, b in zip(theirs, ours, strict=True)):
                return False
        if watched:
            _, read = reads.watch(lambda: rotate(q, k, cos, sin), rotate)
            with looks.Looks((16,)) as seen:
                rotate(q, k, cos, sin)
            return not (seen.seen or read.outside.keys() - _constants(rotate))
    except Exception:  # whatever a stranger says to such tensors
        return False
    return True


def _constants(function: Any) -> set[str]:
    """Numbers and words in a function's closure: those of who made it."""
    if not isinstance(function, FunctionType):
        return set()
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name for name, cell in cells if reads.is_plain(cell.cell_contents)}
