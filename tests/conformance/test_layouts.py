"""Proves that no layout changes a bit: 10 layouts of the input × 12 of the incoming gradient × 4 dtypes × both casting
modes × 19 numbers of columns, forward, dx and dw, through autograd, in every CPU target.

Contiguous results meet the fp64 oracle; every other layout of the same values must have the same bits. Sizes sit on
both sides of what the kernels are made of: 16 lanes, 32 or 64 columns per step, blocks of 4096 columns; 20 rows are one
full batch of 16 and a part of another. Chunks of dw (more than 32 rows), other offsets and weights are
test_backward.py's subject; torch has no negative strides.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from oracle import (
    DTYPES,
    EPS,
    HALVES,
    LAYOUTS,
    MODES,
    Truth,
    alike,
    bound,
    gains,
    heads,
    incoming,
    lay_out,
    same_bits,
    sample,
)
from thinned import heavy_but
from torch import Tensor

from rmsnorm import rms_norm

USUAL = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 127, 129, 576, 1027, 5137)
COLUMNS = (*USUAL, 4096, 8191, 8192)  # a third of the time for three more widths that are no awkward ones


def _overlapping(x: Tensor) -> Tensor:
    """Every row starts one element after the one before it, in the same memory."""
    return x.flatten()[: len(x) + x.shape[1] - 1].clone().unfold(0, x.shape[1], 1)


def _one_head(x: Tensor) -> Tensor:
    """One head for all: stride 0 in the middle, as grouped-query attention expands keys."""
    shape = heads(len(x))
    return x.view(*shape, -1)[:, :1].clone().expand(*shape, -1)


# More layouts than oracle.LAYOUTS has; their values are not the input's, as with "expanded".
REPEATING = {"overlapping": _overlapping, "one head": _one_head}
# What autograd makes of y.sum() and y.sum(-1): strides of 0 everywhere, or along the row.
REDUCTIONS = ("sum", "sums of rows")
INPUTS = [*LAYOUTS, *REPEATING]
GRADS = [*INPUTS, *REDUCTIONS]


def placed(x: Tensor, layout: str) -> Tensor:
    """The rows ``x`` as [batch, heads, sequence, columns] in a layout."""
    view = REPEATING[layout](x) if layout in REPEATING else lay_out(x, layout)
    return alike(view, x.view(*heads(len(x)), -1))[0]


def values(layout: str) -> str:
    """Layouts of the same name here hold the same values."""
    return layout if layout in (*REPEATING, *REDUCTIONS, "expanded") else "contiguous"


def start(y: Tensor, layout: str, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    """The output of a graph and its gradient, so that a gradient of this layout arrives at ``y``."""
    if layout == "sum":
        return y.sum(), None
    if layout == "sums of rows":
        return y.sum(-1), grad.view(y.shape)[..., 0]
    return y, placed(grad, layout)


@pytest.mark.parametrize("columns", heavy_but(USUAL, COLUMNS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grid(native_target, dtype, columns):
    """The weight has the input's type, and for half types also fp32, which under "llama" makes output and gradient
    wider than the input."""
    rows = 20 if columns < 4096 else 6
    x, grad = sample(rows, columns, dtype), incoming(rows, columns)
    inputs = {layout: placed(x, layout).requires_grad_() for layout in INPUTS}
    before = {layout: tensor.detach().clone(memory_format=torch.contiguous_format) for layout, tensor in inputs.items()}
    assert sum(not tensor.is_contiguous() for tensor in inputs.values()) >= (7 if columns > 1 else 5)
    truths = {kind: Truth(before[kind].view(rows, columns), EPS) for kind in set(map(values, INPUTS))}
    for kind, mode in product((dtype, torch.float32) if dtype in HALVES else (dtype,), MODES):
        weight = gains(columns, dtype=kind).requires_grad_()
        outputs, gradients = {}, {}
        for layout in INPUTS:
            what = f"{layout} x, weight {kind}, {mode}"
            y = rms_norm(inputs[layout], columns, weight, EPS, casting_mode=mode)
            assert y.is_contiguous(), what
            arrived: list[Tensor] = []
            y.register_hook(arrived.append)
            if values(layout) not in outputs:
                assert inputs[layout].is_contiguous() or layout == values(layout)
                truths[layout].forward(weight, 0.0, mode, bound(native_target, dtype)).check(y, what)
            assert same_bits(y, outputs.setdefault(values(layout), y)), f"{what}: other bits of y"
            for grad_layout in GRADS:
                what = f"{layout} x, {grad_layout} gradient, weight {kind}, {mode}"
                end, g = start(y, grad_layout, grad.to(y.dtype))
                dx, dw = torch.autograd.grad(end, (inputs[layout], weight), g, retain_graph=True)
                assert (dx.shape, dx.dtype, dw.shape, dw.dtype) == (y.shape, dtype, weight.shape, kind), what
                assert g is None or grad_layout in REDUCTIONS or arrived[-1].stride() == g.stride(), what
                pair = values(layout), values(grad_layout)
                if pair not in gradients:
                    gradients[pair] = dx, dw
                    sent = arrived[-1].contiguous().view(rows, columns)
                    dx_bounds, dw_bounds = truths[values(layout)].backward(sent, weight, 0.0)
                    dx_bounds.check(dx, f"dx, {what}")
                    dw_bounds.check(dw, f"dw, {what}")
                assert same_bits(dx, gradients[pair][0]), f"{what}: other bits of dx"
                assert same_bits(dw, gradients[pair][1]), f"{what}: other bits of dw"
    for layout, tensor in inputs.items():
        assert same_bits(tensor.detach(), before[layout]), f"{layout}: the input changed"
