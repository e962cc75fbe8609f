"""Proves the Triton kernels of the other forms on the way of test_values.py, from the public function to the launch.

Bits are those of our separate steps, each by its own kernel: so the steps' bounds, which test_values.py proves, hold
for the whole. What has no such steps is held to an oracle. In the interpreter a sum is numpy's, whichever kernel asks
for it; on a GPU, kernels of one width might add up in two orders, which these tests would show.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from crossed import BOUNDS, CELLS
from heads_oracle import Form, formula
from oracle import (
    DTYPES,
    EPS,
    HALVES,
    LAYOUTS,
    MODES,
    Bounds,
    Truth,
    alike,
    exact,
    gains,
    incoming,
    lay_out,
    rows_of,
    same_bits,
    sample,
    ulp,
)
from test_heads import angle_types, angles, heads
from test_quantised import CODES, values
from test_quantised import oracle as quantised_oracle
from torch import Tensor

from rmsnorm import (
    add_rms_norm,
    heads_rms_norm_rope,
    quantised_rms_norm,
    rms_norm,
    rms_norm_add,
    rope,
    sandwich_rms_norm,
)
from rmsnorm.forms import heads_ops

pytestmark = pytest.mark.usefixtures("on_triton", "nothing_falls_back")

NEXT_EPS = 1e-3


def problems(types: tuple[torch.dtype, ...], blocks: tuple[torch.dtype, ...]) -> list[Any]:
    """As those of test_values.py: in the interpreter blocks of most types, and most widths, take minutes."""
    quick = [(dtype, "held", 129) for dtype in types[:2]] + [(dtype, "blocks", 129) for dtype in blocks]
    return [
        pytest.param(*cell, marks=[] if cell in quick else pytest.mark.heavy, id="{}-{}-{}".format(*cell))
        for cell in ((dtype, *cell) for dtype, cell in product(types, CELLS))
    ]


def pair(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return sample(rows, columns, dtype), (sample(rows, columns, seed=2) * 1.37).to(dtype)


def steps(x: Tensor, residual: Tensor, w: Tensor | None, v: Tensor | None, **options: object) -> tuple[Tensor, Tensor]:
    """The sandwich by other kernels of ours, with the roundings of its backward: ``(output, sum)``."""
    columns = x.shape[-1]
    return add_rms_norm(rms_norm(x, columns, w, EPS, **options), residual, columns, v, NEXT_EPS, **options)


def sandwich(x: Tensor, residual: Tensor, w: Tensor | None, v: Tensor | None, **options: object) -> tuple[Tensor, ...]:
    return sandwich_rms_norm(x, residual, x.shape[-1], w, v, EPS, next_eps=NEXT_EPS, **options)


def gradients(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor | None, **options: object) -> list[Tensor]:
    """The outputs, then the gradient of each tensor that is there, which keeps its strides."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in tensors]
    outputs = function(*leaves, **options)
    grads = [
        incoming(y.numel() // y.shape[-1], y.shape[-1], y.dtype).view(y.shape) / (i + 1) for i, y in enumerate(outputs)
    ]
    return [*outputs, *torch.autograd.grad(outputs, [t for t in leaves if t is not None], grads)]


@pytest.mark.parametrize(("dtype", "form", "columns"), problems(DTYPES, DTYPES[1:2]), indirect=["form"])
def test_sandwich(form, dtype, columns):
    """Weights × offset × mode × rows, the outputs and all gradients: the bits of the steps. Then layouts of both."""
    own, other = gains(columns, dtype=dtype), gains(columns, dtype=dtype, seed=3)
    mixed = gains(columns, dtype=torch.float32 if dtype in HALVES else torch.bfloat16)
    weights = (None, None), (own, other), (None, mixed), (mixed, own)
    for rows, (w, v) in [*product((0, 1, 3), weights), (9, (own, other))]:
        x, residual = pair(rows, columns, dtype)
        for offset, mode in product((0.0, 1.0), MODES) if rows == 3 else [(1.0, "torch")]:
            if mode == "llama" and dtype in HALVES and (w is mixed or v is mixed):
                continue  # the sum is wider than the input
            what, options = f"{rows} rows, {offset=}, {mode}", {"offset": offset, "casting_mode": mode}
            if rows == 3 and mode == "torch":
                got, wanted = (gradients(f, x, residual, w, v, **options) for f in (sandwich, steps))
            else:
                got, wanted = (f(x, residual, w, v, **options) for f in (sandwich, steps))
            assert all(t.is_contiguous() for t in got[:2]), what
            for one, two in zip(got, wanted, strict=True):
                assert same_bits(one, two), what
            assert same_bits(rms_norm_add(x, residual, columns, w, EPS, **options), got[1]), what
    x, residual = pair(6, columns, dtype)
    for layout, more in zip(LAYOUTS, reversed(LAYOUTS), strict=True) if columns == 129 else []:
        results = []
        for arrange in (lay_out, rows_of):
            a, b = alike(arrange(x, layout), arrange(residual, more))
            results.append([t.reshape(6, 129) for t in sandwich(a, b, own, other)])
        assert all(map(same_bits, *results)), (layout, more)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sandwich_values(form, dtype):
    """Against the oracle: the first norm's bounds, one rounding more; the second norm of the sum that came out."""
    for offset, mode in product((0.0, 1.0), MODES):
        x, residual = pair(7, 129, dtype)
        w, v = gains(129, dtype=dtype), gains(129, dtype=dtype, seed=3)
        output, total = sandwich(x, residual, w, v, offset=offset, casting_mode=mode)
        normed = Truth(x, EPS).forward(w, offset, mode, BOUNDS[dtype])
        unit = ulp(normed.low, dtype) / 2
        low, high = exact(residual) + normed.low - unit, exact(residual) + normed.high + unit
        Bounds(low - ulp(low, dtype) / 2, high + ulp(high, dtype) / 2).check(total, "sum")
        Truth(total, NEXT_EPS).forward(v, offset, mode, BOUNDS[dtype]).check(output, "output")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_and_add_backward(dtype):
    """The residual's gradient is the sum's, as it is; the rest is the norm's."""
    x, residual = pair(9, 129, dtype)
    w = gains(129, dtype=dtype)
    total, dx, dresidual, dw = gradients(lambda x, y, w: (rms_norm_add(x, y, 129, w, EPS),), x, residual, w)
    y, wanted_dx, wanted_dw = gradients(lambda x, w: (rms_norm(x, 129, w, EPS),), x, w)
    assert same_bits(total, residual + y)
    assert same_bits(dresidual, incoming(9, 129, dtype))
    assert same_bits(dx, wanted_dx)
    assert same_bits(dw, wanted_dw)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_range_of_the_sandwich(form, dtype):
    """Rows of either norm whose squares over- or underflow, a NaN, an infinity, zeros; the other rows don't notice."""
    huge, tiny = torch.finfo(dtype).max / 2, torch.finfo(dtype).tiny * 3
    x, residual = pair(12, 129, dtype)
    clean = sandwich(x, residual, None, None)
    x[1], x[3], x[5, 7], x[7, 8] = x[1].sign() * huge, x[3].sign() * tiny, torch.nan, torch.inf
    residual[8], residual[10, 3] = residual[8].sign() * huge, torch.inf
    x[11], residual[11] = 0.0, 0.0
    for eps in (EPS, 0.0):
        got = sandwich_rms_norm(x, residual, 129, None, None, eps, next_eps=NEXT_EPS)
        for one, two in zip(got, add_rms_norm(rms_norm(x, 129, None, eps), residual, 129, None, NEXT_EPS), strict=True):
            assert torch.equal(one.nan_to_num(5.0), two.nan_to_num(5.0)), eps
    got = sandwich(x, residual, None, None)
    for one, two in zip(got, clean, strict=True):
        assert same_bits(one[[0, 2, 4, 6, 9]], two[[0, 2, 4, 6, 9]])
    assert got[0][11].count_nonzero() == 0
    assert got[0][8].isfinite().all()
    assert got[0][8].abs().min() > 0.5


@pytest.mark.parametrize(("dtype", "form", "columns"), problems(DTYPES[:3], DTYPES[1:2]), indirect=["form"])
def test_quantised(form, dtype, columns):
    """Codes and scales are those of the rounded output of our own norm, by numpy's rounding; and the sum is torch's."""
    for codes, mode, kind, added in product(CODES, MODES, (None, dtype, torch.float32), (False, True)):
        weight = None if kind is None else gains(columns, dtype=kind)
        for rows in (0, 1, 5) if added else (3,):
            x, other = pair(rows, columns, dtype)
            options = {"offset": 1.0, "casting_mode": mode}
            y = rms_norm(x + other if added else x, columns, weight, EPS, **options)
            got = quantised_rms_norm(x, columns, weight, EPS, residual=other if added else None, dtype=codes, **options)
            what = f"{codes}, {mode}, weight {kind}, {rows} rows, {added=}"
            assert got[0].dtype is codes, what
            assert got[1].dtype is torch.float32, what
            assert got[1].shape == (rows, 1), what
            assert len(got) == 2 + added, what
            assert not added or same_bits(got[2], x + other), what
            if rows:
                wanted, scale = quantised_oracle(y, codes)
                assert np.array_equal(got[1].numpy(), scale), what
                assert np.array_equal(values(got[0]), wanted), what


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_special_rows_quantised(form, dtype, codes):
    """Zeros, NaN, infinity, overflow, subnormals and ties, each in a row of its own, which alone it changes."""
    x = torch.randn(12, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    clean = quantised_rms_norm(x, 40, None, 0.0, dtype=codes)
    x[1], x[3, 5], x[5, 7] = 0.0, torch.nan, torch.inf
    x[7], x[9] = x[7] * torch.finfo(dtype).tiny, x[9].sign() * torch.finfo(dtype).max
    x[11] = (torch.arange(40) - 20.5).to(dtype)
    for eps in (0.0, EPS):
        got, scale = quantised_rms_norm(x, 40, None, eps, dtype=codes)
        wanted, scales = quantised_oracle(rms_norm(x, 40, None, eps), codes)
        assert np.array_equal(values(got), wanted, equal_nan=True)
        assert np.array_equal(scale.numpy(), scales, equal_nan=True)
        for row in (0, 2, 4, 6, 8) if eps == 0 else ():
            assert torch.equal(got[row].view(torch.uint8), clean[0][row].view(torch.uint8))


def test_every_byte_of_float8():
    """Each e4m3 number, the middles between two, and their neighbours."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    middles = (numbers[1:] + numbers[:-1]) / 2
    y = torch.cat([numbers, *(middles * (1 + step) for step in (-(2.0**-23), 0, 2.0**-23))]).float()
    y = torch.cat([y, -y])
    mean = y.double().square().mean()
    power = 2.0 ** torch.ceil(mean.log2() / 2 + 1)  # with four times as many columns more, the rms is a power of two
    rest = (power.square() + (power.square() - mean) / 4).sqrt()
    row = torch.cat([y, rest.float().expand(4 * len(y))])
    got, scale = quantised_rms_norm(row, len(row), None, 0.0, dtype=torch.float8_e4m3fn)
    wanted, scales = quantised_oracle(rms_norm(row, len(row), None, 0.0)[None], torch.float8_e4m3fn)
    assert np.array_equal(values(got)[None], wanted)
    assert scale == scales[0, 0]
    assert len(set(got.view(torch.uint8).tolist())) >= 253


# head_dim and the columns that are turned: up to 4096 columns, as wider heads are the definition's.
WIDTHS = [(1, 0), (3, 2), (64, 64), (129, 64), (2, 2), (127, 126), (576, 288), (1027, 74), (4095, 4094)]
QUICK = [*product(DTYPES[:2], WIDTHS[:3]), (torch.bfloat16, WIDTHS[3]), (torch.float16, WIDTHS[1])]
FORMS = [Form(mode=mode, interleaved=interleaved) for mode, interleaved in product(MODES, (False, True))]


@pytest.mark.parametrize(
    ("dtype", "columns"),
    [
        pytest.param(dtype, w, marks=[] if (dtype, w) in QUICK else pytest.mark.heavy)
        for dtype, w in product(DTYPES, WIDTHS)
    ],
    ids=str,
)
def test_heads(dtype, columns):
    """rope against the oracle, and the lines of models, to the bit; the whole against the norm, then rope, to the bit,
    and the oracle. Gradients of both: the norm's, of the gradient that is turned back."""
    columns, turned = columns
    both = heads(2, 2, 3, columns, dtype), heads(2, 1, 3, columns, dtype, 7)
    own = gains(columns, dtype=dtype)
    for form, kind, batch in product((*FORMS, Form(1.0)), angle_types(dtype), ((), (1,), (2,))):
        if (batch and form is not FORMS[0]) or (kind is not dtype and form not in FORMS[1:3]):
            continue
        what, cos_sin = f"{form}, {kind}, {batch}", angles(3, turned, kind, batch)
        leaves = [t.detach().requires_grad_() for t in (*both, own, own.flip(0))]
        whole = heads_rms_norm_rope(*leaves[:2], *cos_sin, *leaves[2:], **form.options())
        normed = [
            rms_norm(x, columns, w, form.eps, offset=form.offset, casting_mode=form.mode)
            for x, w in zip(both, (own, own.flip(0)), strict=True)
        ]
        for x in normed:
            x.requires_grad_()
        steps = rope(*normed, *cos_sin, interleaved=form.interleaved)
        lines = heads_ops.rope(*normed, *cos_sin, form.interleaved)
        for x, w, a, b, c in zip(both, (own, own.flip(0)), whole, steps, lines, strict=True):
            assert a.transpose(-3, -2).is_contiguous(), what
            assert same_bits(a, b), what
            assert same_bits(b, c), what
            form.bounds(x, w, *cos_sin, BOUNDS[dtype]).check(a.detach(), what)
        grads = [
            incoming(12, columns, dtype).view(2, 2, 3, columns),
            incoming(6, columns, dtype).view(2, 1, 3, columns),
        ]
        back = torch.autograd.grad(steps, normed, grads)
        wide = [heads_ops.turn_back(grad, *cos_sin, form.interleaved) for grad in grads]
        for got, wanted in zip(back, wide, strict=True):
            assert same_bits(got, wanted.to(dtype)), what
            assert got.transpose(-3, -2).is_contiguous(), what
        found = torch.autograd.grad(whole, leaves, grads)
        for x, w, grad, dx, dw in zip(both, (own, own.flip(0)), wide, found[:2], found[2:], strict=True):
            rows = x.transpose(1, 2).reshape(-1, columns)
            # Turning back costs 1.5 units on a pair, which dx may add up from: see docs/numerics.md.
            dx_bounds, dw_bounds = Truth(rows, form.eps).backward(
                grad.transpose(1, 2).reshape(-1, columns), w, form.offset
            )
            dx_bounds.check(dx.transpose(1, 2).reshape(-1, columns), f"dx, {what}")
            dw_bounds.check(dw, f"dw, {what}")


def test_widest_heads():
    """4096 columns are held in registers; what is wider goes to the definition, which nothing_falls_back tells."""
    for columns in (4096, 4097):
        x, cos_sin = heads(1, 1, 2, columns, torch.bfloat16), angles(2, 64, torch.bfloat16)
        call = partial(heads_rms_norm_rope, x, x, *cos_sin, gains(columns, dtype=torch.bfloat16), None, EPS)
        if columns == 4096:
            assert call()[0].shape == x.shape
        else:
            with pytest.raises(AssertionError, match="heads_rms_norm_rope is not served by Triton"):
                call()


@pytest.mark.parametrize("columns", [64, 129])
def test_layouts_of_heads(columns):
    """Wherever heads, cosines and gradients lie: the bits of contiguous ones; and only what is asked for is found."""
    dtype = torch.bfloat16
    x, grad = sample(12, columns, dtype).view(2, 2, 3, columns), incoming(12, columns, dtype).view(2, 2, 3, columns)
    weight, cos_sin = gains(columns, dtype=dtype), angles(3, 32, dtype)
    ways = {
        "contiguous": lambda t: t,
        "projected": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "sliced": lambda t: lay_out(t.reshape(12, columns), "sliced").view(t.shape),
        "tokens first": lambda t: t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
        "strided columns": lambda t: t.mT.contiguous().mT,
        "misaligned": lambda t: lay_out(t.reshape(12, columns), "misaligned").view(t.shape),
    }
    wanted = None
    for name, grad_name in zip(ways, reversed(ways), strict=True):
        leaves = [ways[name](x).detach().requires_grad_(), weight.clone().requires_grad_()]
        z, k = heads_rms_norm_rope(leaves[0], x[:, :1], *cos_sin, leaves[1], None, EPS)
        got = [z, k, *torch.autograd.grad(z, leaves, ways[grad_name](grad))]
        wanted = wanted or got
        assert all(map(same_bits, got, wanted)), (name, grad_name)
        assert same_bits(rope(ways[name](x), x[:, :1], *cos_sin)[0], rope(x, x[:, :1], *cos_sin)[0]), name
    strided = [lay_out(t, "sliced") for t in cos_sin]
    assert same_bits(heads_rms_norm_rope(x, x[:, :1], *strided, weight, None, EPS)[0], wanted[0])
    alone = heads_rms_norm_rope(x[1:, :, :1], x[1:, :1, :1], *(t[:1] for t in cos_sin), weight, None, EPS)
    assert same_bits(alone[0], wanted[0][1:, :, :1]), "the batch was seen"


def test_derivatives_of_heads():
    """dx and dw of fp64 against torch's own derivative of the formula."""
    both = [t.requires_grad_() for t in (heads(2, 3, 4, 20, torch.float64), heads(2, 1, 4, 20, torch.float64, 7))]
    weight, cos_sin = gains(20).requires_grad_(), angles(4, 12, torch.float64)
    for form in FORMS:
        got = heads_rms_norm_rope(*both, *cos_sin, weight, None, **form.options())
        wanted = [formula(form, x, *cos_sin, w) for x, w in zip(both, (weight, None), strict=True)]
        grads = [torch.randn(t.shape, generator=torch.Generator().manual_seed(0), dtype=t.dtype) for t in got]
        leaves = [*both, weight]
        for a, b in zip(
            torch.autograd.grad(got, leaves, grads), torch.autograd.grad(wanted, leaves, grads), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
