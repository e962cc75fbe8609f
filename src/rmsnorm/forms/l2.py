"""The only file with the L2 norm: rows of length 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .. import _arguments, _handed, functional
from . import calls, general, general_ops

_GENERAL = general_ops.GENERAL
_straight = _handed.straight(_GENERAL.form.name, _GENERAL.schemas[""], eps="f")  # below 0 it is a floor

_LEAST = 2.0**-537  # whose square is the least number above 0


def l2_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float = 1e-12,
    *,  # torch.jit.script stops here, and shows this line: record with torch.jit.trace instead
    eps_inside: bool = False,
    offset: float = 0.0,
    casting_mode: str = "torch",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""L2 normalisation over the last dimensions: each row divided by its length.

        eps_inside=False    y = x / max(‖x‖, eps) · (offset + weight)             as torch's F.normalize
        eps_inside=True     y = x / sqrt(Σx² + eps) · (offset + weight)           as in gated delta nets

    Statistics are computed as in :func:`rmsnorm.rms_norm`, never in half precision, and rows whose squares over- or
    underflow are right, too.

    Args:
        input, normalized_shape, weight, offset, casting_mode: as in :func:`rmsnorm.rms_norm`.
        eps: the least length, or, inside the root, what is added to the sum of squares; 0 is allowed.
        eps_inside: which of the two. Qwen3-Next's query and key: ``eps=1e-6, eps_inside=True``.
        out_dtype: as in :func:`rmsnorm.rms_norm`.

    Returns:
        A contiguous tensor of the shape and dtype of ``input``, or of ``out_dtype``.

    Raises:
        RuntimeError: as :func:`rmsnorm.rms_norm`, and for complex types.
        ValueError: an unknown casting mode or ``out_dtype``, a negative eps.

    Examples:
        >>> l2_norm(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), 2)
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])

    Source: the rules are those of torch.nn.functional.normalize, and of Yang et al. 2024, arXiv 2412.06464.
    """
    general._check_dtype("l2_norm", out_dtype)
    more = -1, False, True, out_dtype
    tensors = input, weight, None
    try:
        if (eps >= _LEAST or eps == 0) and not is_dynamo_compiling():
            options = _of(eps, eps_inside), offset, functional.ROUND_FIRST[casting_mode], *more
            found = _straight(normalized_shape, *tensors, *options)
            if found is None:
                found = calls.by_operator(general._served, tensors, normalized_shape, eps, *options)
            if found is not None:
                return found[0]
    except (RuntimeError, KeyError, AttributeError, TypeError, ValueError):
        pass
    if eps is None:
        raise TypeError("l2_norm: eps must be a float, but is None; pass a number, e.g. 1e-12")
    if type(eps) is float and 0 < eps < _LEAST and not eps_inside and isinstance(input, Tensor):
        shape = _arguments.as_shape("l2_norm", normalized_shape)
        if input.dtype is torch.float64 and shape and input.shape[-len(shape) :] == shape and input.numel():
            further = {"offset": offset, "casting_mode": casting_mode, "out_dtype": out_dtype}
            return _of_tiny(input, shape, weight, eps, further)
    named = {"eps_inside": (eps_inside, False), "offset": (offset, 0.0), "casting_mode": (casting_mode, "torch")}
    named["out_dtype"] = (out_dtype, None)
    rows: calls.Named = {"input": input}
    weights: calls.Named = {"weight": weight, "bias": None}
    return calls.call(
        *(general._served, l2_norm, rows, normalized_shape, weights, eps, named, more, ("bias",), 0),
        of_eps=lambda eps: _of(eps, eps_inside),
    )


def _of(eps: float, inside: bool) -> float:
    """To the operators a negative eps is the floor of the sum of squares, and 0 is none, with rows of zeros that are
    0 / 0: so it is at least 5e-324, as no squares of types below float64 come near."""
    return eps if inside or not eps else min(-eps * eps, -5e-324)


def _of_tiny(input: Tensor, shape: tuple[int, ...], weight: Tensor | None, eps: float, named: dict[str, Any]) -> Tensor:
    """Of float64 and an eps that has no square: rows near it are multiplied, as is eps; others know no eps."""
    last, power = tuple(range(-len(shape), 0)), 2.0**500
    tiny = input.detach().abs().amax(last, keepdim=True) < 1 / power
    near = l2_norm(torch.where(tiny, input, 0.0) * power, shape, weight, eps * power, **named)
    return torch.where(tiny, near, l2_norm(torch.where(tiny, 1.0, input), shape, weight, 0.0, **named))
