"""The only file with the sandwich: a norm whose output is added to the residual, and the norm of that sum.

    s = residual + norm(x; weight)        y = norm(s; next_weight)

Both are made of whole norms, so whatever has no kernel here (other devices and types, a transform, a graph for
elsewhere) is the plain norm, called as often: with its kernels and its rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import _arguments, _form, reference
from . import calls
from .served import Served


def _add(input: Tensor, residual: Tensor, *arguments: Any, normalise: Any = reference.rms_norm) -> tuple[Tensor, Any]:
    """The first half: ``(sum, rstd)``."""
    normed, rstd = normalise(input, *arguments)
    return (residual + normed).contiguous(), rstd


def _sandwich(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    next_weight: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    round_first: bool,
    next_eps: float | None,
    normalise: Any = reference.rms_norm,
) -> tuple[Tensor, Tensor, Any, Any]:
    sum, rstd = _add(input, residual, weight, dims, eps, offset, round_first, normalise=normalise)
    last = eps if next_eps is None else next_eps
    output, next_rstd = normalise(sum, next_weight, dims, last, offset, round_first)
    return output, sum, rstd, next_rstd


def _gradients(
    grads: tuple[Tensor, Tensor | None],
    saved: tuple[Tensor, Tensor],
    weights: tuple[Tensor | None, Tensor | None],
    options: tuple[int, float, float, float | None],
) -> tuple[Tensor | None, ...]:
    dims, eps, offset, next_eps = options
    last = eps if next_eps is None else next_eps
    ds, dnext = reference.rms_norm_backward(grads[0], saved[1], weights[1], dims, last, offset)
    ds = ds if grads[1] is None else ds + grads[1]
    dx, dw = reference.rms_norm_backward(ds, saved[0], weights[0], dims, eps, offset)
    return dx, ds, dw, dnext


def _fits(input: Tensor, *weights: Tensor | None, round_first: bool) -> bool:
    """Whether there are kernels, which know one type of input, residual and sum."""
    return input.device.type in ("cpu", "cuda", "xpu") and all(
        reference.result_dtype(input, w, round_first) is input.dtype for w in weights
    )


ADD = _form.register(
    _form.Form(
        name="rms_norm_add",
        rows=("input", "residual"),
        weights=("weight",),
        options="int dims, float eps, float offset, bool round_first",
        outputs=("sum",),
        kept=("rstd",),
        define=_add,
        like=lambda x, residual, weight, dims, *_: (_form.like(x), reference.empty_rstd(x, dims)),
        saved=("input",),
        straight=("residual",),
        gradients=lambda grads, saved, weights, options: reference.rms_norm_backward(
            *grads, *saved, *weights, *options
        ),
        fits=lambda x, residual, weight, dims, eps, offset, first: _fits(x, weight, round_first=first),
    )
)
SANDWICH = _form.register(
    _form.Form(
        name="sandwich_rms_norm",
        rows=("input", "residual"),
        weights=("weight", "next_weight"),
        options="int dims, float eps, float offset, bool round_first, float? next_eps",
        outputs=("output", "sum"),
        follows={"sum": ("input", "residual", "weight")},
        kept=("rstd", "next_rstd"),
        define=_sandwich,
        like=lambda x, residual, w, v, dims, *_: (
            *(_form.like(x), _form.like(x)),
            *(reference.empty_rstd(x, dims), reference.empty_rstd(x, dims)),
        ),
        saved=("input", "sum"),
        grads="Tensor grad, Tensor? grad_sum",
        gradients=_gradients,
        fits=lambda x, residual, w, v, dims, eps, offset, first, _: _fits(x, w, v, round_first=first),
    )
)
_served_add = Served(ADD, calls.plain_norm)
_served = Served(SANDWICH, calls.plain_norm, _served_add)


def rms_norm_add(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,  # torch.jit.script stops here, and shows this line: record with torch.jit.trace instead
    offset: float = 0.0,
    casting_mode: str = "torch",
) -> Tensor:
    r"""RMS normalisation and residual add in one pass: ``s = residual + rms_norm(input)``.

    The norm's output is rounded to its dtype, and so is the sum: the bits are those of the two steps. The first half of
    :func:`rmsnorm.sandwich_rms_norm`, for where no norm follows, as at the end of a layer of Gemma 2 and 3, OLMo 2 and
    GLM-4.

    Args:
        input, residual: tensors of one shape ``[*, *normalized_shape]``, of real floating types. Of two, the sum has
            the promoted one.
        normalized_shape, weight, eps, offset, casting_mode: as in :func:`rmsnorm.rms_norm`; eps must not be negative.

    Returns:
        The sum, contiguous.

    Raises:
        RuntimeError: as :func:`rmsnorm.rms_norm`, and for a residual of another shape (it is not broadcast) or device.
        ValueError: an unknown casting mode, a negative eps.

    Examples:
        >>> rms_norm_add(torch.tensor([0.1, 0.1, 0.2, 0.3]), torch.ones(4), 4, eps=0.0)
        tensor([1.5164, 1.5164, 2.0328, 2.5492])

    Source: Zhang & Sennrich 2019, arXiv 1910.07467; Gemma 2, arXiv 2408.00118, section 2.
    """
    found = calls.everyday_norm(_served_add, (input, residual, weight), normalized_shape, eps, offset, casting_mode)
    if found is not None:
        return found
    rows: calls.Named = {"input": input, "residual": residual}
    weights: calls.Named = {"weight": weight}
    options = {"offset": (offset, 0.0), "casting_mode": (casting_mode, "torch")}
    return calls.call(_served_add, rms_norm_add, rows, normalized_shape, weights, eps, options)


def sandwich_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    next_weight: Tensor | None = None,
    eps: float | None = None,
    *,  # torch.jit.script stops here, and shows this line: record with torch.jit.trace instead
    next_eps: float | None = None,
    offset: float = 0.0,
    casting_mode: str = "torch",
) -> tuple[Tensor, Tensor]:
    r"""Norm, residual add, norm, in one pass: what stands between two blocks of Gemma 2 and 3, OLMo 2 and GLM-4.

        s = residual + rms_norm(input; weight)        y = rms_norm(s; next_weight)

    The first norm's output is rounded to its dtype, then the sum, and the rounded sum is normalised: the bits are those
    of the three steps.

    Args:
        input, residual: tensors of one shape ``[*, *normalized_shape]``, of real floating types. Of two, the sum has
            the promoted one.
        weight, next_weight: the first norm's and the second one's, each as in :func:`rmsnorm.rms_norm`.
        next_eps: the second norm's eps; None means ``eps``.
        normalized_shape, eps, offset, casting_mode: as in :func:`rmsnorm.rms_norm`, for both norms; no eps may be
            negative.

    Returns:
        ``(output, sum)``, both contiguous. Either, both or none may be used in a loss.

    Raises:
        RuntimeError: as :func:`rmsnorm.rms_norm`, and for a residual of another shape (it is not broadcast) or device.
        ValueError: an unknown casting mode, a negative eps.

    Examples:
        >>> y, s = sandwich_rms_norm(torch.tensor([3.0, 4.0]), torch.tensor([2.0, 3.0]), 2, eps=0.0)
        >>> s
        tensor([2.8485, 4.1314])
        >>> y
        tensor([0.8028, 1.1643])

    Source: Zhang & Sennrich 2019, arXiv 1910.07467; Gemma 2, arXiv 2408.00118, section 2.
    """
    if next_eps is not None and not (type(next_eps) is float and next_eps >= 0):
        next_eps = _arguments.as_number("sandwich_rms_norm", "next_eps", next_eps)
        if next_eps < 0:
            raise ValueError(f"sandwich_rms_norm: next_eps must be 0 or more, but is {next_eps}")
    tensors = input, residual, weight, next_weight
    found = calls.everyday_norm(_served, tensors, normalized_shape, eps, offset, casting_mode, next_eps)
    if found is not None:
        return found
    rows: calls.Named = {"input": input, "residual": residual}
    weights: calls.Named = {"weight": weight, "next_weight": next_weight}
    options = {"next_eps": (next_eps, None), "offset": (offset, 0.0), "casting_mode": (casting_mode, "torch")}
    return calls.call(_served, sandwich_rms_norm, rows, normalized_shape, weights, eps, options, (next_eps,))
