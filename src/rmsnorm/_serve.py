"""The only file that decides what computes a checked call of the plain norm or of add + norm, when no short way was
found."""

from __future__ import annotations

from torch import Tensor

from . import _autograd, _foreign, _ops, reference
from .forms import lean


def rms_norm(
    input: Tensor,
    weight: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    round_first: bool,
    native: bool,
    memory: str | None = None,
) -> Tensor:
    """The output. ``native`` is False for types that no kernel has; with ``memory`` the output is kept for backward, if
    it can be, and not the input."""
    options = dims, eps, offset, round_first
    if _foreign.wanted_by(input, weight):
        return _foreign.rms_norm(input, weight, *options)
    if not native or _autograd.refused():
        return reference.rms_norm(input, weight, *options)[0]
    if _autograd.needed(input, weight):
        if _foreign.not_to_be_kept(input, weight):
            return reference.rms_norm(input, weight, *options)[0]
        if memory is not None and (output := lean.rms_norm(input, weight, *options)) is not None:
            return output
        return _autograd.rms_norm(input, weight, *options)[0]
    return _ops.rms_norm(input, weight, *options)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    round_first: bool,
    native: bool,
    memory: str | None = None,
) -> tuple[Tensor, Tensor] | None:
    """``(output, sum)``, or None where the two steps are done one after the other."""
    options = dims, eps, offset, round_first
    recorded = _autograd.needed(input, weight, residual)
    if (
        not native
        or (recorded and _foreign.not_to_be_kept(input, residual, weight))
        or _foreign.wanted_by(input, residual, weight)
        or _autograd.refused()
    ):
        return None
    if not recorded:
        return _ops.add_rms_norm(input, residual, weight, *options)
    if memory is not None and (both := lean.add_rms_norm(input, residual, weight, *options)):
        return both
    return _autograd.add_rms_norm(input, residual, weight, *options)[:2]
