"""The only file that rewrites a block of a diffusion transformer: a norm, what modulates it, and the gated add before.

    x = self.norm(x) * (1 + scale[:, None]) + shift[:, None]    →   x = modulated(self.norm, x, scale[:, None], …)

    h = h + gate.unsqueeze(1) * y                               →   h = gated(h, gate.unsqueeze(1), y)

in one line or in two; and one call for both where they follow each other. ``fusion.py`` compares what comes out with
what the layer did before. A norm that isn't patched, tensors that broadcast otherwise: the lines as they were.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .. import _foreign
from ..forms import calls
from ..forms.modulated import gated_add, modulated_norm
from . import classes, neighbours, rewrite
from .binding import TYPES
from .modulating import GATED_ADD, MODULATING, modulate
from .numbers import under_autocast


class Modulated(rewrite.Remade):
    """The forward of a class whose norms are modulated in the same pass."""

    kind, what = "modulated", "modulation"

    def __init__(self, cls: type[nn.Module]) -> None:
        self.cls = cls
        self.function, found = _rewrite(cls.forward)
        self.norms = tuple(dict.fromkeys(name for name in found if name != GATED_ADD))

    def said(self, served: rewrite.Served) -> str:
        """What became one call each, of the lines that were served (``witness.py``)."""
        norms = dict.fromkeys(name for _, names in served for name in names)
        adds = sum(call != "modulated" for call, _ in served)
        said = [f"{name}, modulated" for name in norms]
        return "; ".join([*said, *([GATED_ADD if adds == 1 else f"{adds} gated adds"] if adds else [])])


classes.READERS["modulated"] = Modulated


@functools.cache
def _rewrite(original: rewrite.Forward) -> tuple[rewrite.Forward, tuple[str, ...]]:
    calls: dict[str, rewrite.Forward] = dict(zip(MODULATING, (modulated, gated, gated_modulated), strict=True))
    return rewrite.remade(original, modulate, calls, "modulated norms")


def is_modulated(layer: nn.Module) -> bool:
    """Whether its source modulates a norm of its own, or gates what it adds."""
    return bool(_found(classes.original(type(layer)).forward))


@functools.cache
def _found(original: rewrite.Forward) -> tuple[str, ...]:
    return rewrite.found_by(modulate, original, "scale", "gate")


def modulated(norm: Any, x: Any, scale: Any, shift: Any) -> Any:
    """``norm(x) * (1 + scale) + shift``."""
    if _serves(x, scale, shift) and (own := neighbours.unweighted(norm, x)):
        return modulated_norm(x, own.shape, None, own.eps, scale=scale, shift=shift, **own.options)
    return norm(x) * (1 + scale) + shift


def gated(residual: Any, one: Any, other: Any, gate_last: bool = False, product_first: bool = False) -> Any:
    """``residual + one * other``, one of which is the gate; or the product first, as lists are added, too."""
    gate, x = (other, one) if gate_last else (one, other)
    if _serves(x, gate, like=residual):
        return gated_add(x, residual, gate, casting_mode="llama")
    product = one * other
    return product + residual if product_first else residual + product


def gated_modulated(
    norm: Any, residual: Any, one: Any, other: Any, scale: Any, shift: Any, gate_last: bool = False, **orders: bool
) -> tuple[Any, Any]:
    """``modulated`` of the sum, and the sum, which is ``gated``."""
    gate, x = (other, one) if gate_last else (one, other)
    if _serves(x, gate, scale, shift, like=residual) and (own := neighbours.unweighted(norm, x)):
        named = {"scale": scale, "shift": shift, "gate": gate, "residual": residual}
        both: tuple[Any, Any] = modulated_norm(x, own.shape, None, own.eps, **named, **own.options)
        return both
    total = gated(residual, one, other, gate_last, **orders)
    return modulated(norm, total, scale, shift), total


def _serves(x: Any, *modulations: Any, like: Any = None) -> bool:
    """Whether these are ordinary tensors of one type, of which the modulations are broadcast to x's shape."""
    tensors = (x, *modulations) if like is None else (x, like, *modulations)
    if not all(isinstance(t, Tensor) and type(t) in _foreign.COMPILERS for t in tensors):
        return False  # a subclass sees what its module calls
    return (
        x.dtype in TYPES
        and x.dim() > 1
        and all(t.dtype is x.dtype and t.device == x.device for t in tensors)
        and (like is None or like.shape == x.shape)
        and all(_is_beside(t, x) for t in modulations)
        and not torch.compiler._is_exporting_flag
        and not under_autocast(x)
    )


def _is_beside(modulation: Tensor, x: Tensor) -> bool:
    if modulation.dim() != x.dim() or modulation.shape[-1] != x.shape[-1]:
        return False
    return calls.broadcasts(modulation.shape, x.shape)
