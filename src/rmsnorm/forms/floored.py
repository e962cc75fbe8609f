"""The only file with the norm whose mean square has a floor instead of an eps, which is what others make of
``F.normalize``; for ``models/``, whose recipes call it."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

from .. import _arguments, _autograd, _eager, _everyday, _ops, _serve, functional

_operator = _ops.rms_norm._op  # OpOverload.__call__ adds 0.5 µs to what it calls


def floored_rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    floor: float | None = None,
    *,
    offset: float = 0.0,
    casting_mode: str = "torch",
) -> Tensor:
    r"""``F.normalize(x) · sqrt(n) · (offset + weight)``: RMSNorm whose mean square has a floor, and no eps.

        y = x / sqrt(max(mean(x²), floor)) · (offset + weight)

    Args:
        floor: in squared units of the input. None means 1e-24 / n for rows of n elements: what ``F.normalize`` does
            with its own eps of 1e-12.
        input, normalized_shape, weight, offset, casting_mode: as in :func:`rms_norm`; the input must be real.

    Raises:
        RuntimeError: as :func:`rms_norm`, and for complex inputs.
        ValueError: a floor below 0, and an unknown casting mode.
    """
    shape = _arguments.as_shape("floored_rms_norm", normalized_shape)
    if floor is None:
        floor = 1e-24 / max(prod(shape), 1)
    elif not floor >= 0:
        raise ValueError(f"floored_rms_norm: floor must be 0 or more, but is {floor}")
    if _everyday.ordinary(input, (input, weight)):
        try:  # as in rms_norm
            if shape == (input.shape[-len(shape) :] if weight is None else weight.shape):
                way = _eager.record if _autograd.needed(input, weight) else _operator
                return way(input, weight, len(shape), -floor, offset, functional.ROUND_FIRST[casting_mode])
        except (RuntimeError, KeyError, AttributeError):
            pass
    dims, eps, round_first, native = functional._resolve("floored_rms_norm", input, shape, weight, -floor, casting_mode)
    if input.is_complex() or (weight is not None and weight.is_complex()):
        raise RuntimeError("floored_rms_norm: input and weight must be real; normalise torch.view_as_real(input)")
    if ranks := _everyday.distributed(input, weight):
        return ranks.rms_norm(floored_rms_norm, input, weight, None, dims, eps, offset, casting_mode, floored=True)
    return _serve.rms_norm(input, weight, dims, eps, offset, round_first, native)
