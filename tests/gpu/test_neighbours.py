"""Proves the Triton kernels of gated and modulated norms, of what a call may ask for beyond the norm, and of the lean
backward, on the way of test_values.py: by the oracles and the bounds of the CPU's tests.

A gated norm of fp32 computes in fp32 where the CPU has fp64: within 6 ulp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import test_gated as gated
import test_general as general
import test_general_gradients as general_gradients
import test_lean as lean
import test_modulated as modulated
import torch
from crossed import BOUNDS, types
from gated_oracle import Form
from general_oracle import Formula, counted
from oracle import (
    DTYPES,
    EPS,
    HALVES,
    LAYOUTS,
    MODES,
    alike,
    exact,
    gains,
    incoming,
    lay_out,
    rows_of,
    same_bits,
    sample,
)
from test_forms import problems
from test_gated import FORMS, call, gates
from test_modulated import SHARED, fused, inputs, modulations, only, steps
from test_quantised import CODES, values
from test_quantised import oracle as quantised_oracle
from torch import Tensor
from torch._subclasses import FakeTensorMode

from rmsnorm import (
    add_rms_norm,
    add_rms_norm_,
    gated_add,
    gated_rms_norm,
    inverse_rms,
    l2_norm,
    modulated_norm,
    quantised_rms_norm,
    rms_norm,
)
from rmsnorm.forms import general_ops, modulated_ops
from rmsnorm.gpu import backward, launch

pytestmark = pytest.mark.usefixtures("on_triton", "nothing_falls_back")

GATED = BOUNDS | {torch.float32: 6.0, torch.float64: 10.0}
PROBLEMS = pytest.mark.parametrize(("dtype", "form", "columns"), problems(DTYPES, DTYPES[1:2]), indirect=["form"])
Tensors = list[Tensor]


@PROBLEMS
def test_gated(form, dtype, columns):
    """Order × activation × rounding × weight, an offset; groups; gradients."""
    x, gate = sample(3, columns, dtype), gates(3, columns, dtype)
    kinds = None, dtype, *([torch.float32] if dtype in HALVES else [])
    for f, kind in product(FORMS, kinds):
        f = replace(f, offset=1.0 if kind is dtype else 0.0)  # noqa: PLW2901
        weight = None if kind is None else gains(columns, dtype=kind)
        f.bounds(x, gate, weight, GATED[dtype]).check(call(f, x, gate, weight), (f, kind))
    groups = [None, 43] if columns == 129 else [None]
    for f, group in product(FORMS[::3], groups):
        if columns > 3:  # dx of one column is what cancels, and the oracle's bound is relative to it
            gated.check_gradients(dtype, replace(f, group_size=group), columns)
        y = call(replace(f, group_size=group), x, gate, gains(columns, dtype=dtype))
        replace(f, group_size=group).bounds(x, gate, gains(columns, dtype=dtype), GATED[dtype]).check(y, (f, group))
    assert call(FORMS[0], x[:0], gate[:0], None).shape == (0, columns)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_of_any_size(dtype):
    """From -inf to inf, subnormal activations, and a NaN."""
    for f in (Form(), Form(silu=False)):
        gated.test_gates_of_any_size("reference", dtype, f)
    if dtype in HALVES:
        gated.test_every_gate_of_a_half_type(None, dtype, Form(eps=0.0))


@PROBLEMS
def test_modulated(form, dtype, columns):
    """Llama's rounding has the bits of the steps, whose norm is Triton's; the rest is held to longdouble's truth."""
    for shared, tokens in (*product(SHARED, (3,)), ("sample", 0), ("sample", 1)):
        x, residual = inputs(tokens, columns, dtype)
        m = modulations(shared, tokens, columns, dtype)
        for names, other in (("scale", None), ("scale shift", residual), ("scale shift gate", residual)):
            got = fused(x, other, only(m, names), "rms")
            assert all(map(same_bits, got, steps(x, other, only(m, names), "rms"))), (shared, tokens, names)
        assert same_bits(gated_add(x, residual, m["gate"], casting_mode="llama"), residual + m["gate"] * x)
    (modulated.check_rounded_once if dtype in HALVES else modulated.check_values)(dtype, columns)
    for shared in SHARED if columns == 129 and dtype is torch.float32 else ["sample"]:
        modulated.check_gradients(dtype, shared, columns, 3)


def test_wide_rows_have_the_gradients_of_held_ones(monkeypatch):
    """Their means are found by another kernel, in another order: float32 shows what bounds of half types forgive."""
    x, residual = inputs(3, 129, torch.float32)
    given = only(modulations("sample", 3, 129, torch.float32), "scale shift gate")
    held = modulated.differentiate(fused, x, residual, given, "layer")
    monkeypatch.setattr(launch, "WIDEST", dict.fromkeys(launch.WIDEST, 0))
    monkeypatch.setattr(launch, "LOOP_BLOCK", dict.fromkeys(launch.WIDEST, 128))
    wide = modulated.differentiate(fused, x, residual, given, "layer")
    for name, grad in held.items():
        torch.testing.assert_close(wide[name], grad, rtol=1e-5, atol=1e-5)


@PROBLEMS
def test_general(form, dtype, columns):
    """Part of the columns, a bias, an offset, other types of output, both rules of an L2 norm; gradients."""
    x, residual, w, b = general.rows(3, columns, dtype)
    outs = dtype, *(HALVES if dtype is torch.float32 else ()), *((torch.float32,) if dtype is torch.float64 else ())
    for part, (weight, bias, offset), out in product((0.5, 1.0), ((w, b, 1.0), (None, b, 0.0), (w, None, 0.0)), outs):
        y, r = rms_norm(
            x, columns, weight, EPS, partial=part, bias=bias, offset=offset, out_dtype=out, return_rstd=True
        )
        truth = Formula(exact(x), counted(columns, part))
        ulps = 0.51 if dtype is torch.float32 and out in HALVES else BOUNDS[out]
        truth.forward(weight, bias, offset, out, ulps + (bias is not None)).check(y, (part, offset, out))
        assert same_bits(r, inverse_rms(x, columns, EPS)) or part < 1
    for mode in MODES:
        options = {"casting_mode": mode}
        assert same_bits(
            rms_norm(x, columns, w, EPS, bias=-0.0 * b, **options), rms_norm(x, columns, w, EPS, **options)
        )
        y, total = add_rms_norm(x, residual, columns, w, EPS, round_sum=False, **options)
        assert same_bits(total, x + residual)
        if mode == "torch":
            unrounded = exact(x) + exact(residual) if dtype in HALVES else exact(total)
            Formula(unrounded, columns).forward(w, None, 0.0, dtype, BOUNDS[dtype]).check(y, "round_sum=False")
        for first, second in ((x, residual.float()), (x.float(), residual)) if dtype in HALVES else ():
            got = add_rms_norm(first, second, columns, w, EPS, out_dtype=dtype, **options)
            assert same_bits(got[1], first + second)
            assert same_bits(got[0], rms_norm(got[1], columns, w.float(), EPS, **options).to(dtype))
    length = float(np.median(np.sqrt(np.sum(exact(x) ** 2, -1))))
    for eps, inside in product((0.0, 1e-12, length), (False, True)):
        truth = Formula(exact(x), columns, eps if inside else 0.0, mean=False, floor=0.0 if inside else eps * eps)
        y = l2_norm(x, columns, w, eps, eps_inside=inside)
        truth.forward(w, None, 0.0, dtype, BOUNDS[dtype]).check(y, (eps, inside))
    general_gradients.check_gradients(dtype, columns, (4,), 400)  # of three rows one would lie on the floor
    if dtype in HALVES and columns == 129:
        general_gradients.check_gradients_of_sums(dtype, 3)


@PROBLEMS
def test_lean(form, dtype, columns):
    """dx and dw from the output, within the stated bound; the add's, with what arrives at the sum."""
    x, grad, weight = sample(3, columns, dtype), incoming(3, columns, dtype), gains(columns, dtype=dtype, seed=3)
    for w, (offset, mode) in product((None, weight), ((0.0, "torch"), (1.0, "llama"))):
        _, dx, *dw = lean.gradients(x, w, grad, offset=offset, casting_mode=mode)
        bounds = lean.lean_bounds(x, grad, w, offset, lean.off(dtype, mode, "reference"))
        bounds[0].check(dx, (offset, mode))
        if dw:
            bounds[1].check(dw[0], (offset, mode))


@pytest.mark.parametrize("dtype", types(torch.bfloat16))
def test_lean_add(dtype):
    lean.test_add("reference", dtype)


def test_quantised_behind_a_gate():
    """The codes of the rounded output of our own gated norm."""
    for dtype, codes, f in product(DTYPES[:3], CODES, FORMS):
        x, gate, weight = sample(3, 129, dtype), gates(3, 129, dtype), gains(129, dtype=torch.float32)
        options = {"norm_before_gate": f.norm_before_gate, "casting_mode": f.mode}
        options["activation"] = "silu" if f.silu else "sigmoid"
        got, scale = quantised_rms_norm(x, 129, weight, EPS, gate=gate, dtype=codes, **options)
        wanted, scales = quantised_oracle(gated_rms_norm(x, gate, 129, weight, EPS, **options), codes)
        assert np.array_equal(scale.numpy(), scales), (dtype, f)
        assert np.array_equal(values(got), wanted), (dtype, f)


# What takes rows, some of which others share, and is differentiated: by name the function and its number of rows.
CASES: dict[str, tuple[Callable[..., Any], int]] = {
    "gate behind": (lambda x, g: gated_rms_norm(x, g, 129, WEIGHT.to(x.dtype), EPS), 2),
    "gate ahead": (lambda x, g: gated_rms_norm(x, g, 129, None, EPS, norm_before_gate=False), 2),
    "modulated": (lambda *t: modulated_norm(t[0], 129, residual=t[1], gate=t[2], scale=t[3], shift=t[4]), 5),
    "layer": (lambda x, s: modulated_norm(x, 129, scale=s, statistic="layer", casting_mode="llama"), 2),
    "gated add": (gated_add, 3),
    "partial": (lambda x: rms_norm(x, 129, WEIGHT.to(x.dtype), EPS, bias=WEIGHT.to(x.dtype), partial=0.5), 1),
    "unrounded": (lambda x, r: add_rms_norm(x, r, 129, None, EPS, round_sum=False, return_rstd=True), 2),
    "l2": (lambda x: l2_norm(x, 129), 1),
    "lean": (lambda x, r: add_rms_norm(x, r, 129, WEIGHT.to(x.dtype), EPS, memory="lean"), 2),
}
WEIGHT = gains(129, seed=3).abs() + 0.5


def outcome(function: Callable[..., Any], tensors: Tensors) -> Tensors:
    """The outputs, then the gradients."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*outputs, *torch.autograd.grad(outputs, leaves, [(y.detach() / 3).to(y.dtype) for y in outputs])]


@pytest.mark.parametrize("name", CASES)
def test_layouts(name):
    """The bits of contiguous tensors; one row alone has those of the batch."""
    function, count = CASES[name]
    for dtype, layout in zip((*DTYPES, *DTYPES, *DTYPES), LAYOUTS, strict=False):
        tensors = [sample(6, 129, dtype, seed) for seed in range(count)]
        both = []
        for arrange in (lay_out, rows_of):
            given = alike(*(arrange(t, layout if i % 2 == 0 else "row-strided") for i, t in enumerate(tensors)))
            both.append([t.reshape(-1, t.shape[-1]) for t in outcome(function, given)])
        assert all(map(same_bits, *both)), (dtype, layout)
    whole, alone = (outcome(function, [t[at].contiguous() for t in tensors]) for at in (slice(None), slice(3, 4)))
    assert all(same_bits(a[3:4], b) for a, b in zip(whole, alone, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_special_values_stay_in_their_row(form, name):
    """Rows that over- or underflow, a NaN, an infinity, zeros: no other row notices; against the definition's."""
    function, count = CASES[name]
    for dtype in DTYPES[: 1 if form == "blocks" else 2]:
        tensors = [sample(8, 129, dtype, seed) for seed in range(count)]
        clean = outcome(function, tensors)
        tensors[0][1] = tensors[0][1].sign() * torch.finfo(dtype).max / 4
        tensors[0][2] = tensors[0][2].sign() * torch.finfo(dtype).smallest_normal
        tensors[0][3, 5], tensors[0][4, 6], tensors[0][6] = torch.nan, torch.inf, 0.0
        got = outcome(function, tensors)
        for one, two in zip(got, clean, strict=True):
            assert same_bits(one[[0, 5, 7]], two[[0, 5, 7]])
        assert got[0][3].isnan().any()
        assert got[0][[0, 5, 6, 7]].isfinite().all()


def test_a_row_of_any_size():
    """Where squares over- and underflow: the partial, the L2 and the gated norm against the oracle."""
    general.test_range(None, torch.float32)
    general.test_a_wide_sum_is_rescued(None)


@pytest.mark.parametrize(("dtype", "chunks"), [(torch.float32, 64), (torch.bfloat16, 2)], ids=str)
def test_sums_over_many_rows(monkeypatch, dtype, chunks):
    """Chunks of a group's tiles, of 16 rows each here, are folded; with two chunks at most they take more tiles than
    are added up in fp32. A sample's gradients are those of the sample alone."""
    monkeypatch.setitem(launch.TILE, "backward, more", (64, 64))
    monkeypatch.setattr(backward, "GROUP_PARTIALS", (2, chunks))
    monkeypatch.setattr(backward, "STEPS", 2)
    monkeypatch.setattr(backward, "FEWEST_STEPS", 2)
    x, residual = inputs(100, 3, dtype)
    m = modulations("sample", 100, 3, dtype)
    both = []
    for at in (slice(None), slice(1, 2)):
        leaves = [m[n][at].clone().requires_grad_() for n in ("scale", "shift", "gate")]
        named = dict(zip(("scale", "shift", "gate"), leaves, strict=True))
        y, _ = modulated_norm(x[at], 3, residual=residual[at], **named)
        both.append(torch.autograd.grad(y, leaves, (x[at] / 8).contiguous()))
    assert all(same_bits(whole[1:], alone) for whole, alone in zip(*both, strict=True))
    modulated.check_gradients(dtype, "sample", 3, 100)


def test_only_what_is_asked_for():
    """Each gradient alone has the bits that it has among all."""
    for name, (function, count) in CASES.items():
        tensors = [sample(5, 129, torch.float32, seed) for seed in range(count)]
        all = outcome(function, tensors)[-count:]
        for i in range(count):
            leaves = [t.clone().requires_grad_(i == j) for j, t in enumerate(tensors)]
            outputs = function(*leaves)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            grads = [(y.detach() / 3).to(y.dtype) for y in outputs]
            some = [(y, g) for y, g in zip(outputs, grads, strict=True) if y.requires_grad]
            (found,) = torch.autograd.grad([y for y, _ in some], [leaves[i]], [g for _, g in some])
            assert same_bits(found, all[i]), (name, i)


def test_second_derivatives():
    """Through the definitions, on what the kernels kept."""
    x, r, g = (sample(4, 3, seed=seed).view(2, 2, 3) / 8 for seed in range(3))
    shared = [torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3)]
    w = gains(3).abs() + 0.5
    for function, tensors in (
        *((lambda x, g, w, f=f: call(replace(f, eps=0.1), x, g, w), (x, g, w)) for f in FORMS[:4:3]),
        (lambda x, r, g, s, h: modulated_norm(x, 3, None, 0.1, residual=r, gate=g, scale=s, shift=h), (x, r, *shared)),
        (lambda x, s: modulated_norm(x, 3, None, 0.1, scale=s, statistic="layer"), (x, shared[0])),
        (gated_add, (x, r, shared[0])),
        (lambda x, w, b: rms_norm(x, 3, w, 0.1, bias=b, partial=0.5, return_rstd=True), (x, w, w)),
        (lambda x, r: add_rms_norm(x, r, 3, None, 0.1, partial=0.5, return_rstd=True), (x, r)),
        (lambda x: l2_norm(x, 3), (g,)),
        (lambda x, w: rms_norm(x, 3, w, 0.1, memory="lean"), (x, w)),
    ):
        leaves = [t.clone().requires_grad_() for t in tensors]
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_in_place(monkeypatch, form):
    """The bits of the other function; tensors that lie as a kernel writes are written to by one launch, and rows that
    are read twice, or lie elsewhere, are copied."""
    launched = []
    real = launch._launch
    monkeypatch.setattr(launch, "_launch", lambda *a: (launched.append(a), real(*a)))
    for dtype, (mode, wider) in product(DTYPES, zip(MODES, (True, False), strict=True)):
        x, residual, w, _ = general.rows(5, 129, dtype)
        residual = residual.float() if wider and dtype in HALVES else residual
        for layout in ("contiguous", "sliced"):
            a, b = (lay_out(t, layout).clone(memory_format=torch.preserve_format) for t in (x, residual))
            options = {"casting_mode": mode, "round_sum": False}
            y, total = add_rms_norm(a, b, 129, w, EPS, out_dtype=dtype, **options)
            launched.clear()
            got = add_rms_norm_(a, b, w, EPS, **options)
            assert got[0] is a
            assert got[1] is b
            assert same_bits(a.contiguous(), y), (dtype, mode, layout)
            assert same_bits(b.contiguous(), total), (dtype, mode, layout)
            outputs = {t.data_ptr() for t in launched[0][2][3:5]}
            assert (outputs == {a.data_ptr(), b.data_ptr()}) is (form == "held" and a.is_contiguous())
    x = torch.ones(2, 8)
    with pytest.raises(RuntimeError, match="must not share memory"):
        torch.ops.rmsnorm.add_rms_norm_(x, x, None, 1, EPS, 0.0, False, True)


def test_what_goes_to_the_operators():
    """On a GPU general and modulated norms are operators', as on the CPU; on other devices the definition's."""
    with FakeTensorMode():
        for device, served in (("cuda", True), ("xpu", True), ("mps", False), ("meta", False)):
            x, m = torch.empty(2, 3, 8, device=device), torch.empty(2, 1, 8, device=device)
            options = 1, EPS, 0.0, False
            assert general_ops.GENERAL.form.fits(x, None, None, *options, -1, True, True, None) is served
            assert general_ops.GENERAL_ADD.form.fits(x, x, None, None, *options, -1, True, None) is served
            assert modulated_ops.MODULATED_NORM.form.fits(x, x, m, m, m, None, *options, False) is served
            assert modulated_ops.GATED_ADD.form.fits(x, x, m, False) is served
