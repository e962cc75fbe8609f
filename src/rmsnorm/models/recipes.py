"""The only file that knows what the norms of other people's models mean: one table, and one way to compute a row of it.

A meaning is an algebra and a place for the roundings. In the formulas ``r = 1/sqrt(mean(x²) + eps)``, ``f`` is "to
float32" and ``rd`` "rounded to the type of x". Names of attributes are no part of a meaning: ``probe.py`` finds them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._layer_norm import layer_norm
from ..functional import rms_norm


@dataclass(frozen=True)
class Recipe:
    """One meaning, and the options of our functions that reproduce it."""

    meaning: str
    formula: str
    output: str
    """The type of the output."""
    casting_mode: str = "torch"
    offset: float = 0.0
    weight: bool = True
    own_gain: bool = False
    """1 + weight is formed in the weight's type, where half precision loses bits of it."""
    centred: bool = False
    """LayerNorm: the mean is subtracted, and there may be a bias."""

    def __call__(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None, shape: torch.Size
    ) -> Tensor:
        """The norm of ``x`` over its last dimensions, which have the sizes ``shape``."""
        if self.centred:
            return layer_norm(x, shape, weight, bias, eps)
        if self.own_gain:
            assert weight is not None
            weight = 1.0 + weight
        return rms_norm(x, shape, weight, eps, offset=self.offset, casting_mode=self.casting_mode)

    def __reduce__(self) -> tuple[Callable[[str], Recipe], tuple[str]]:
        return named, (self.meaning,)  # a pickled model takes the row of the version that reads it


RECIPES = {
    recipe.meaning: recipe
    for recipe in (
        Recipe("round, then weight", "w · rd(f(x)·r)", "promote(w, x)", casting_mode="llama"),
        Recipe("weight, then round", "rd(f(w) · f(x)·r)", "x"),
        Recipe("1 + weight", "rd((1 + f(w)) · f(x)·r)", "x", offset=1.0),
        Recipe("1 + weight in its type", "rd(f(1 + w) · f(x)·r)", "x", own_gain=True),
        Recipe("no weight", "rd(f(x)·r)", "x", weight=False),
        Recipe("LayerNorm", "rd(f(w) · (f(x) - mean)/sqrt(var + eps) + f(b))", "x", weight=False, centred=True),
    )
}


def named(meaning: str) -> Recipe:
    """The row of the table."""
    return RECIPES[meaning]
