"""The only file that talks to other ranks: norms of rows that lie on several, which tell each other a number per row.

Each rank has some columns of every row. What a row needs of the others is its sum of squares (LayerNorm: its sum too);
what its gradient needs is one sum (two) of the same shape. So there is one all-reduce forward, one backward, and never
a gather. The maths are those of ``reference.py`` and ``gated_ops.py``, given another mean.

The sums travel as fp32 (fp64 for fp64), LayerNorm's as fp64. Between the ranks fp32 rounds at most once per rank: up to
n/2 ulp of the output for n ranks, beside the one half of its own rounding. Sums that fp32 can't hold, and means that
hide a variance, are found after the fact, on all ranks alike, as all have received the same bits; such calls
reduce once more, with care. That needs a look at the values, so it is done on CPU and outside graphs only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

from .. import reference
from ..forms import gated_ops

# Between these bounds fp32 holds the sum of squares, and the squares that matter to it.
_LOWEST, _HIGHEST = 2.0**-60, 2.0**126
# How many squared deviations a squared mean may be, before the variance that fp64 leaves is worse than the output's
# type: 2^-52 times this, relative.
_SQUARED_MEAN = {torch.float64: 8.0, torch.float32: 2.0**20, torch.bfloat16: 2.0**30, torch.float16: 2.0**30}


class AllReduce(torch.autograd.Function):
    """The sum over the ranks of ``groups``, of fp64 numbers that travel as ``wire``; any number of derivatives.

    ``known`` is the result, where it is known already. ``squares`` says that all terms are positive: the gradient of
    their sum times the sum is then a number of the gradient's own size, however large or small the row is, and travels.
    """

    @staticmethod
    def forward(
        ctx: Any, terms: Tensor, known: Tensor | None, groups: tuple[Any, ...], wire: torch.dtype, squares: bool
    ) -> Tensor:
        total = terms.to(wire) if known is None else known
        if known is None and total.numel():
            for group in groups:
                total = collectives.wait_tensor(collectives.all_reduce(total.contiguous(), "sum", group))
        total = total.double() if known is None else known.view_as(known)
        ctx.groups, ctx.wire, ctx.squares = groups, wire, squares
        ctx.save_for_backward(total if squares else None)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (total,) = ctx.saved_tensors
        if not ctx.squares:
            return _all_reduce(grad, None, ctx.groups, torch.float64, False), None, None, None, None
        scale = total.detach().clamp_min(torch.finfo(torch.float64).tiny)
        return _all_reduce(grad * scale, None, ctx.groups, ctx.wire, False) / scale, None, None, None, None


_all_reduce: Callable[..., Tensor] = AllReduce.apply


@dataclass(frozen=True)
class Rows:
    """What the ranks share of the rows of one call.

    ``columns`` is the length of a whole row; ``dtype`` the type to compute in, ``wire`` the type that travels.
    ``total`` is what has been reduced already, and ``shift`` the number per row around which LayerNorm sums.
    """

    groups: tuple[Any, ...]
    columns: int
    dtype: torch.dtype
    wire: torch.dtype
    total: Tensor | None = None
    shift: Tensor | None = None

    def reduce(self, terms: Tensor, squares: bool) -> Tensor:
        """The sum of what the ranks have."""
        return _all_reduce(terms, self.total, self.groups, self.wire, squares)


# The names of the groups of ranks that rows lie on, and the length of a whole row.
Parts = tuple[tuple[Any, ...], int]
# A formula computes outputs from (rows, *tensors), and says what it has reduced. From that a doubt says which rows to
# compute with instead, if those weren't careful enough.
_Outputs = tuple[tuple[Tensor, ...], Tensor]
_Formula = Callable[..., _Outputs]
_Doubt = Callable[[Rows, Tensor], "Rows | None"]


def rms_norm(
    parts: Parts,
    input: Tensor,
    weight: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    round_first: bool,
    keep: bool = False,
) -> Any:
    """``reference.rms_norm`` of rows that lie on several ranks; ``input`` and ``weight`` are what this one has.

    With ``keep``, ``(output, input)``: gradients of the two are added before they are rounded.
    """

    def formula(rows: Rows, x: Tensor, w: Tensor | None) -> _Outputs:
        mean, wide = _Mean(rows), x.to(rows.dtype)
        normalised = reference.rms_norm(wide, None, dims, eps, 0.0, False, mean)[0]
        output = reference.apply_gain(normalised, x, w, offset, round_first)
        if not keep:
            return (output,), mean.total
        # With gradients the input as computed with, so that the two outputs' are added before they round; without,
        # as in _Normalised.forward, the input itself: it is kept for backward, and would be there twice.
        return (output, wide.to(x.dtype) if torch.is_grad_enabled() else x), mean.total

    outputs = _normalise(formula, _doubt_squares(eps), _rows(parts, input), input, weight)
    return outputs if keep else outputs[0]


def gated_rms_norm(
    parts: Parts,
    input: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    round_first: bool,
    norm_before_gate: bool,
    silu: bool,
) -> Tensor:
    """``gated_ops.gated_rms_norm``, likewise."""

    def formula(rows: Rows, x: Tensor, g: Tensor, w: Tensor | None) -> _Outputs:
        mean, gating = _Mean(rows), (norm_before_gate, silu)
        output, _ = gated_ops.gated_rms_norm(x, g, w, dims, eps, offset, round_first, *gating, mean, rows.dtype)
        return (output,), mean.total

    return _normalise(formula, _doubt_squares(eps), _rows(parts, input), input, gate, weight)[0]


def layer_norm(
    parts: Parts, input: Tensor, weight: Tensor | None, bias: Tensor | None, dims: int, eps: float
) -> Tensor:
    """LayerNorm, likewise.

    Each rank sums around the mean ``c`` of its own n columns and moves the sums to the common ``shift`` s: with
    d = x - c, Σ(x-s) = Σd + n(c-s) and Σ(x-s)² = Σd² + 2(c-s)Σd + n(c-s)².
    """
    last, count = tuple(range(-dims, 0)), prod(input.shape[input.dim() - dims :])

    def formula(rows: Rows, x: Tensor, w: Tensor | None, b: Tensor | None) -> _Outputs:
        wide = x.to(rows.dtype)
        centre = wide.detach().sum(last, keepdim=True) / max(count, 1)
        apart = centre.double() - (0.0 if rows.shift is None else rows.shift)
        near = wide - centre
        sum, squares = near.sum(last, keepdim=True).double(), near.square().sum(last, keepdim=True).double()
        sums = torch.stack((sum + count * apart, squares + 2 * apart * sum + count * apart.square()))
        total = rows.reduce(sums, False)
        mean, square = total / rows.columns
        variance = (square - mean.square()).clamp_min(0.0)
        output = (near - (mean - apart).to(wide.dtype)) * torch.rsqrt(variance + eps).to(wide.dtype)
        output = output if w is None else output * w
        return ((output if b is None else output + b).to(x.dtype),), total.detach()

    limit = _SQUARED_MEAN[input.dtype]

    def doubt(rows: Rows, total: Tensor) -> Rows | None:
        mean, square = total / rows.columns
        if rows.shift is None and bool((mean.square() > limit * (square - mean.square())).any()):
            return replace(rows, shift=mean)
        return None

    return _normalise(formula, doubt, replace(_rows(parts, input), wire=torch.float64), input, weight, bias)[0]


def _rows(parts: Parts, input: Tensor) -> Rows:
    # fp32 on CPU is computed in fp64, as in the kernels; elsewhere fp64 may be 64 times slower, and is not promised.
    dtype = reference.accumulation_dtype(input.dtype)
    wide = torch.float64 if input.dtype is torch.float32 and input.device.type == "cpu" else dtype
    return Rows(*parts, wide, dtype)


class _Mean:
    """The mean of squares over the ranks, in fp64, in the shape that ``reference.rms_norm`` asks for."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.total: Any = None

    def __call__(self, squares: Tensor, dims: tuple[int, ...]) -> Tensor:
        total = self.rows.reduce(squares.sum(dims, keepdim=True).double(), True)
        self.total = total.detach()
        return total / self.rows.columns


def _doubt_squares(eps: float) -> _Doubt:
    def doubt(rows: Rows, total: Tensor) -> Rows | None:
        if rows.wire is torch.float64:
            return None
        good = (total + rows.columns * abs(eps) > _LOWEST) & (total < _HIGHEST)
        return None if bool(good.all()) else replace(rows, dtype=torch.float64, wire=torch.float64)

    return doubt


def _normalise(formula: _Formula, doubt: _Doubt, rows: Rows, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    if torch.compiler.is_compiling():  # the graph's own rules decide what is kept
        return formula(rows, *tensors)[0]
    return _normalised(formula, doubt, rows, *tensors)


class _Normalised(torch.autograd.Function):
    """Kept for backward: the tensors, and what the ranks have told each other. The rest is computed again."""

    @staticmethod
    def forward(ctx: Any, formula: _Formula, doubt: _Doubt, rows: Rows, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        outputs, total = formula(rows, *tensors)
        if total.device.type == "cpu" and (careful := doubt(rows, total)):
            rows = careful
            outputs, total = formula(rows, *tensors)
        ctx.formula, ctx.rows = formula, replace(rows, shift=None)
        ctx.save_for_backward(*tensors, total, rows.shift)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        used = [i for i, grad in enumerate(grads) if grad is not None]  # of the program, so of each rank
        if not used:
            return (None,) * len(ctx.needs_input_grad)
        *tensors, total, shift = ctx.saved_tensors
        needs, again = ctx.needs_input_grad[3:], torch.is_grad_enabled()
        with torch.enable_grad():
            # Aliases of their own: where one tensor was given twice, each place has a gradient of its own.
            own = [t if t is None else t.view_as(t) if again else t.detach() for t in tensors]
            wanted = [t.requires_grad_() for t, need in zip(own, needs, strict=True) if need and t is not None]
            outputs = ctx.formula(replace(ctx.rows, total=total, shift=shift), *own)[0]
            outputs, arrived = [outputs[i] for i in used], [grads[i] for i in used]
            found = iter(torch.autograd.grad(outputs, wanted, arrived, create_graph=again, allow_unused=True))
        return None, None, None, *(next(found) if need else None for need in needs)


_normalised: Callable[..., tuple[Tensor, ...]] = _Normalised.apply
