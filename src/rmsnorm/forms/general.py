"""The only file with what users may ask for beyond the plain norm and add + norm: further keywords of those two
functions, whose calls come here then, and ``inverse_rms``."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import has_torch_function_variadic

from .. import _arguments, functional
from .._shown import shown
from . import calls, everyday_ops, general_ops
from .served import Served

_served, _served_add = Served(general_ops.GENERAL), Served(general_ops.GENERAL_ADD)
_straight, _add_straight, NUMBERS = everyday_ops.straight, everyday_ops.add_straight, calls.NUMBERS
_TYPES = (None, torch.float32, torch.bfloat16, torch.float16, torch.float64)


def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    eps: float | None,
    offset: float,
    casting_mode: str,
    out: Tensor | None,
    memory: str | None,
    *,
    bias: Tensor | None = None,
    partial: float = 1.0,
    out_dtype: torch.dtype | None = None,
    return_rstd: bool = False,
) -> Any:
    """``rmsnorm.rms_norm``, called with at least one of the last four."""
    tensors = input, weight, bias
    plainly = out is None and memory is None and partial == 1.0 and offset == 0.0 and casting_mode == "torch"
    if plainly and weight is not None and not return_rstd and type(offset) in NUMBERS and not is_dynamo_compiling():
        found = _straight(normalized_shape, input, weight, bias, eps, out_dtype)
        if found is not None:
            return found
    if out is not None:
        raise RuntimeError("rms_norm: out= is for the plain norm alone; drop it, or the further keywords")
    _check_memory("rms_norm", memory)
    counted = _counted("rms_norm", normalized_shape, partial, tensors)
    _check_dtype("rms_norm", out_dtype)
    pick, more = slice(2) if return_rstd else 0, (counted, True, True, out_dtype)
    found = calls.everyday_norm(_served, tensors, normalized_shape, eps, offset, casting_mode, *more)
    if found is not None:
        return found[pick]
    named = _named(offset, casting_mode, partial, out_dtype, return_rstd)
    weights: calls.Named = {"weight": weight, "bias": bias}
    rows: calls.Named = {"input": input}
    public = functional.rms_norm
    return calls.call(_served, public, rows, normalized_shape, weights, eps, named, more, ("bias",), pick)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    eps: float | None,
    offset: float,
    casting_mode: str,
    memory: str | None,
    *,
    bias: Tensor | None = None,
    partial: float = 1.0,
    round_sum: bool = True,
    out_dtype: torch.dtype | None = None,
    return_rstd: bool = False,
) -> Any:
    """``rmsnorm.add_rms_norm``, the same."""
    tensors = input, residual, weight, bias
    plainly = memory is None and partial == 1.0 and offset == 0.0 and casting_mode == "torch"
    if plainly and weight is not None and not return_rstd and type(offset) in NUMBERS and not is_dynamo_compiling():
        found = _add_straight(normalized_shape, input, residual, weight, bias, eps, bool(round_sum), out_dtype)
        if found is not None:
            return found
    _check_memory("add_rms_norm", memory)
    counted = _counted("add_rms_norm", normalized_shape, partial, tensors)
    _check_dtype("add_rms_norm", out_dtype)
    pick, options = slice(3 if return_rstd else 2), (counted, bool(round_sum), out_dtype)
    found = calls.everyday_norm(_served_add, tensors, normalized_shape, eps, offset, casting_mode, *options)
    if found is not None:
        return found[pick]
    named = _named(offset, casting_mode, partial, out_dtype, return_rstd) | {"round_sum": (round_sum, True)}
    weights: calls.Named = {"weight": weight, "bias": bias}
    rows: calls.Named = {"input": input, "residual": residual}
    public = functional.add_rms_norm
    return calls.call(_served_add, public, rows, normalized_shape, weights, eps, named, options, ("bias",), pick)


functional.further.update(rms_norm=rms_norm, add_rms_norm=add_rms_norm)


def inverse_rms(
    input: Tensor,
    normalized_shape: int | Sequence[int],  # torch.jit.script stops here: record with torch.jit.trace instead
    eps: float | None = None,
) -> Tensor:
    r"""The factor of RMS normalisation alone, a number per row: ``1 / sqrt(mean(input²) + eps)``.

    The bits are those that :func:`rmsnorm.rms_norm` multiplies with, rounded to the type that is returned. A row is
    read once, and nothing else is written.

    Args:
        input, normalized_shape, eps: as in :func:`rmsnorm.rms_norm`; eps must not be negative.

    Returns:
        A tensor of the shape of ``input`` with the normalised sizes set to 1, in float32; in float64 for float64.

    Raises:
        RuntimeError: as :func:`rmsnorm.rms_norm`, and for complex types.
        ValueError: a negative eps.

    Examples:
        >>> inverse_rms(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), 2, eps=0.0)
        tensor([[0.2828],
                [0.7071]])

    Source: Zhang & Sennrich 2019, arXiv 1910.07467.
    """
    more = (-1, True, False, None)
    found = calls.everyday_norm(_served, (input, None, None), normalized_shape, eps, 0.0, "torch", *more)
    if found is not None:
        return found[1]
    rows: calls.Named = {"input": input}
    none: calls.Named = {"weight": None, "bias": None}
    return calls.call(_served, inverse_rms, rows, normalized_shape, none, eps, {}, more, ("weight", "bias"), 1)


def _named(offset: float, mode: str, partial: float, out_dtype: Any, return_rstd: bool) -> dict[str, tuple[Any, Any]]:
    """Those with names, beside their defaults."""
    named: dict[str, tuple[Any, Any]] = {"offset": (offset, 0.0), "casting_mode": (mode, "torch")}
    return named | {"partial": (partial, 1.0), "out_dtype": (out_dtype, None), "return_rstd": (return_rstd, False)}


def _counted(name: str, normalized_shape: Any, partial: float, tensors: tuple[Any, ...]) -> int:
    """How many elements of a row count; -1 for all, and where somebody else is asked, whose sizes may be no numbers."""
    if has_torch_function_variadic(*tensors) and _arguments.are_objects(*tensors):
        return -1
    if partial is not None and type(partial) is not float:
        partial = _arguments.as_number(name, "partial", partial)
    if partial is None or not 0 < partial <= 1:
        raise ValueError(f"{name}: partial must be above 0 and at most 1, a part of the columns, but is {partial}")
    if partial == 1:
        return -1
    size = 1
    for each in _arguments.as_shape(name, normalized_shape):
        size *= each
    return min(size, max(1, ceil(size * partial - 1e-9)))  # 100 · 0.07 is 7.000000000000001; a small part is a column


def _check_dtype(name: str, out_dtype: Any) -> None:
    if not isinstance(out_dtype, torch.fx.Proxy) and out_dtype not in _TYPES:  # of a graph: x.dtype, say
        raise ValueError(
            f"{name}: out_dtype must be one of {', '.join(map(str, _TYPES[1:]))}, but is {shown(out_dtype)}"
        )


def _check_memory(name: str, memory: str | None) -> None:
    if memory is not None:
        raise RuntimeError(f"{name}: memory= is for the plain norm alone; drop it, or the further keywords")
