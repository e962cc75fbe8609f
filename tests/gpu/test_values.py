"""Proves the Triton kernels against the fp64 oracle and on the axes of the C++ ones: in Triton's interpreter, or, with
RMSNORM_TEST_DEVICE=cuda, on a GPU.

Every call goes the way that a GPU's goes: public function, autograd, dispatcher, route, launch. Sizes are small where
axes are crossed, and awkward widths come once each. ``held`` keeps rows in registers; ``blocks`` is what rows of more
than 16384 columns get, forced upon narrow ones. The interpreter's sums are numpy's, other trees than a
GPU's: bounds that depend on the tree are argued in src/rmsnorm/triton_forward.py.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from calls import asked_for, forward, gradients
from oracle import (
    DTYPES,
    EPS,
    GRADS,
    HALVES,
    LAYOUTS,
    MODES,
    REFERENCE_ULPS,
    ULPS,
    WRITABLE,
    Bounds,
    Truth,
    alike,
    exact,
    gains,
    grad_rows,
    incoming,
    lay_out,
    lay_out_grad,
    outside,
    rows_of,
    same_bits,
    sample,
    weights,
)
from torch import Tensor

from rmsnorm import add_rms_norm, rms_norm
from rmsnorm.gpu import backward, launch, route

pytestmark = pytest.mark.usefixtures("on_triton")

CELLS = [*(("held", n) for n in (1, 3, 127, 129, 576, 1027, 5137)), ("blocks", 129), ("blocks", 5137)]
QUICK = [*product([torch.float32], [cell for cell in CELLS if cell[1] < 5000]), (torch.bfloat16, ("blocks", 129))]
# In the interpreter all types at all widths take minutes: fp32 comes at most widths, and the others at one.
PROBLEMS = [
    pytest.param(
        dtype,
        *cell,
        marks=[] if cell == ("held", 129) or (dtype, cell) in QUICK else pytest.mark.heavy,
        id=f"{dtype}-{cell[0]}-{cell[1]}",
    )
    for dtype, cell in product(DTYPES, CELLS)
]
# The contract of the native kernels, but for fp64, whose 1/rms is one number here: 5 ulp, as the reference.
BOUNDS = ULPS | {torch.float64: REFERENCE_ULPS[torch.float64]}


def types(*quick: torch.dtype) -> list[object]:
    """All types, of which the rest is heavy."""
    return [pytest.param(t, marks=[] if t in quick else pytest.mark.heavy, id=str(t)) for t in DTYPES]


TWO = types(torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def _nothing_falls_back(monkeypatch):
    """What isn't Triton's, but for empty tensors, fails here."""

    def unless_empty(default):
        def serve(*arguments):
            assert not arguments[0].numel(), "not served by Triton"
            return default(*arguments)

        return serve

    monkeypatch.setattr(route.reference, "rms_norm", unless_empty(route.reference.rms_norm))
    monkeypatch.setattr(route._ops, "_rms_norm_backward", unless_empty(route._ops._rms_norm_backward))


@pytest.mark.parametrize(("dtype", "form", "columns"), PROBLEMS, indirect=["form"])
def test_forward(form, dtype, columns):
    """dtype × columns × rows × weight type × offset × casting mode; then, up to 129 columns, layouts.
    They must not change a bit."""
    for rows in (0, 1, 3, 33 if columns < 500 else 5):
        x = sample(rows, columns, dtype)
        truth = Truth(x, EPS)
        offsets = (0.0, 1.0) if rows == 3 else (1.0,)
        for weight, offset, mode in product(weights(columns, dtype), offsets, MODES):
            what = f"{rows} rows, weight {getattr(weight, 'dtype', None)}, {offset=}, {mode}"
            y = rms_norm(x, columns, weight, EPS, offset=offset, casting_mode=mode)
            wide = mode == "llama" and weight is not None
            assert y.dtype is (torch.promote_types(dtype, weight.dtype) if wide else dtype), what
            assert y.is_contiguous(), what
            truth.forward(weight, offset, mode, BOUNDS[dtype]).check(y, what)
    weight = gains(columns, dtype=dtype)
    for layout in LAYOUTS if columns < 500 else []:
        tensor = lay_out(x, layout)
        y = rms_norm(tensor, columns, weight, EPS, offset=1.0)
        assert same_bits(y.view(x.shape), rms_norm(rows_of(x, layout), columns, weight, EPS, offset=1.0)), layout
        assert same_bits(tensor.reshape(x.shape), rows_of(x, layout)), f"{layout}: the input changed"


@pytest.mark.parametrize(("dtype", "form", "columns"), PROBLEMS, indirect=["form"])
def test_backward(form, dtype, columns):
    """dtype × columns × rows × weight type × offset × mode, against the oracle; then layouts of x × of the gradient, in
    full for bf16 in 129 columns that are held and else one side at a time, which must not change a bit."""

    for rows in (0, 1, 3, 33 if columns < 500 else 5):
        x, wide_grad = sample(rows, columns, dtype), incoming(rows, columns)
        truth = Truth(x, EPS)
        crossed = rows == 3 and columns < 500
        options = product((0.0, 1.0), MODES) if crossed else [(1.0, "torch")]
        for weight, (offset, mode) in product(weights(columns, dtype), list(options)):
            what = f"{rows} rows, weight {getattr(weight, 'dtype', None)}, {offset=}, {mode}"
            y, leaves = forward(x, weight, offset=offset, casting_mode=mode)
            got = torch.autograd.grad(y, leaves, wide_grad.to(y.dtype))
            assert [(t.dtype, t.shape) for t in got] == [(t.dtype, t.shape) for t in leaves], what
            bounds = truth.backward(wide_grad.to(y.dtype), weight, offset)
            for name, t, bound in zip(("dx", "dw"), got, bounds, strict=False):
                bound.check(t, f"{name}, {what}")
    x, grad = sample(6, columns, dtype), incoming(6, columns, dtype)
    weight, shape = gains(columns, dtype=dtype), lay_out(x, "heads")
    wanted = {}
    for layout, grad_layout in product(LAYOUTS, GRADS):
        full = columns == 129 and form == "held" and dtype is torch.bfloat16
        if full or (columns in (3, 129) and "contiguous" in (layout, grad_layout)):
            tensor, g, _ = alike(lay_out(x, layout), lay_out_grad(grad, grad_layout), shape)
            key = layout == "expanded", grad_layout if grad_layout in ("expanded", "scalar") else ""
            if key not in wanted:
                wanted[key] = gradients(rows_of(x, layout), weight, grad_rows(grad, grad_layout))
            for name, t, right in zip(("y", "dx", "dw"), gradients(tensor, weight, g), wanted[key], strict=True):
                assert same_bits(t.reshape(right.shape), right), f"{name}: {layout} x, {grad_layout} gradient"


@pytest.mark.parametrize("dtype", TWO)
def test_add(form, dtype):
    """The sum is torch's, the output that of the sum, and the gradient what comes by both ways."""
    for columns, mode, layout in (*product((129,), MODES, LAYOUTS), *product((576,), MODES, ("contiguous",))):
        x, other = alike(
            lay_out(sample(5, columns, dtype), layout), lay_out(sample(5, columns, dtype, 1), "row-strided")
        )
        weight, what = gains(columns, dtype=dtype), f"{columns} columns, {mode}, {layout}"
        y, total = add_rms_norm(x, other, columns, weight, EPS, casting_mode=mode)
        assert same_bits(total, (x + other).contiguous()), what
        assert same_bits(y, rms_norm(total, columns, weight, EPS, casting_mode=mode)), what
    leaves = [t.detach().requires_grad_() for t in (sample(5, 129, dtype), sample(5, 129, dtype, 1))]
    grad, grad_sum = incoming(5, 129, dtype), incoming(5, 129, dtype).flip(0)
    y, total = add_rms_norm(*leaves, 129, None, EPS)
    for both in ((grad, grad_sum), (grad, torch.zeros_like(grad)), (torch.zeros_like(grad), grad_sum)):
        dx, d_other = torch.autograd.grad((y, total), leaves, both, retain_graph=True)
        assert same_bits(dx, d_other)
        bounds, _ = Truth(total, EPS).backward(both[0], None, 0.0)
        low, high = (side + exact(both[1]) for side in (bounds.low, bounds.high))
        margin = 0.51 * torch.finfo(dtype).eps * np.maximum(np.abs(low), np.abs(high))  # the sum's own rounding
        Bounds(low - margin, high + margin).check(dx, "dx")


@pytest.mark.parametrize("dtype", TWO)
def test_a_weight_for_each_head(form, dtype):
    """Weights of [heads, columns] give each head the bits that it has alone, and dW is each head's own."""
    x, grad = sample(30, 129, dtype).view(2, 5, 3, 129), incoming(30, 129, dtype).view(2, 5, 3, 129)
    for kind in {dtype, torch.float32}:
        weight = gains(3, 129, dtype=kind)
        y, dx, dw = gradients_spanning(x, weight, grad)
        for head in range(3):
            alone = gradients(x[:, :, head], weight[head], grad[:, :, head], offset=1.0)
            assert same_bits(y[:, :, head].contiguous(), alone[0]), head
            assert same_bits(dx[:, :, head].contiguous(), alone[1]), head
            assert same_bits(dw[head], alone[2]), head


def gradients_spanning(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    y = rms_norm(leaves[0], x.shape[-1], leaves[1], EPS, offset=1.0)
    return y.detach(), *torch.autograd.grad(y, leaves, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_normalised_dimensions(dtype):
    x, grad, weight = sample(6, 315, dtype), incoming(6, 315, dtype), gains(315, dtype=dtype)
    dx_bounds, dw_bounds = Truth(x, EPS).backward(grad, weight, 1.0)
    for turned in (lambda t: t, lambda t: t.mT.contiguous().mT, lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0)):
        leaves = [turned(x.view(6, 3, 5, 21)).requires_grad_(), turned(weight.view(3, 5, 21)).requires_grad_()]
        y = rms_norm(leaves[0], (3, 5, 21), leaves[1], EPS, offset=1.0)
        Truth(x, EPS).forward(weight, 1.0, "torch", BOUNDS[dtype]).check(y, "y")
        dx, dw = torch.autograd.grad(y, leaves, turned(grad.view(6, 3, 5, 21)))
        dx_bounds.check(dx, "dx")
        dw_bounds.check(dw, "dw")


@pytest.mark.parametrize("dtype", TWO)
def test_out(form, dtype):
    """``out=`` gets the bits of a fresh output, and nothing beside it is touched; it may be the input itself."""
    x = sample(6, 129, dtype)
    for mode, weight in product(MODES, (None, gains(129, dtype=torch.float32))):
        expected = rms_norm(x, 129, weight, EPS, casting_mode=mode)
        for layout in WRITABLE:
            tensor, out = alike(x, lay_out(torch.zeros(x.shape, dtype=expected.dtype), layout))
            assert rms_norm(tensor, 129, weight, EPS, casting_mode=mode, out=out) is out
            assert same_bits(out.reshape(x.shape), expected), layout
            assert outside(out).isnan().all(), f"{layout}: wrote outside of out"
            if expected.dtype is dtype:
                tensor = lay_out(x, layout)
                rms_norm(tensor, 129, weight, EPS, casting_mode=mode, out=tensor)
                assert same_bits(tensor.reshape(x.shape), expected), f"{layout} in place"
                assert outside(tensor).isnan().all(), f"{layout} in place: wrote outside"


WIDE = (16384, 16385, *(pytest.param(n, marks=pytest.mark.heavy) for n in (8193, 20000, 32768, 2**16 + 1)))
"""Those that a program of 1024 threads has backward, those that it hasn't, and the error bound for 2^16."""


@pytest.mark.parametrize("dtype", types(torch.bfloat16))
@pytest.mark.parametrize("columns", WIDE)
def test_very_wide_rows(dtype, columns):
    """As they come, without forcing; a row's gradient is its own, and that of the weight doesn't ask for the others."""
    x, weight, grad = sample(3, columns, dtype), gains(columns, dtype=dtype), incoming(3, columns, dtype)
    y, dx, dw = gradients(x, weight, grad)
    Truth(x, EPS).forward(weight, 0.0, "torch", BOUNDS[dtype]).check(y, columns)
    dx_bounds, dw_bounds = Truth(x, EPS).backward(grad, weight, 0.0)
    dx_bounds.check(dx, f"dx, {columns}")
    dw_bounds.check(dw, f"dw, {columns}")
    assert same_bits(dx[1:2], gradients(x[1:2], weight, grad[1:2])[1])
    rstd = launch.forward(x, None, weight, 1, EPS, 0.0, False, True)[2]
    given = grad, None, x, rstd, weight, 1, EPS, 0.0
    assert same_bits(dw, backward.backward(*given, False, True)[1])
    assert same_bits(dx, backward.backward(*given, True, False)[0])


def test_two_ulp_in_fp32_need_a_reciprocal_in_two_parts():
    """With 1/rms rounded to fp32 some of 160,000 elements are off by up to 2.5 ulp: the other tests have too few."""
    x, weight = sample(40, 4096, torch.float32), gains(4096, dtype=torch.float32)
    Truth(x, EPS).forward(weight, 0.0, "torch", 2.0).check(rms_norm(x, 4096, weight, EPS), "y")


def test_what_squaring_loses_is_kept():
    """Equal values make errors of equal sign. Without the squares' own errors 1/rms would be off by half a unit more:
    1.33 ulp were seen for these rows then, and 1.15 with them."""
    x = sample(20000, 3, torch.float32)[:, :1].expand(20000, 3).contiguous()
    weight = gains(3, dtype=torch.float32)
    Truth(x, EPS).forward(weight, 0.0, "torch", 1.25).check(rms_norm(x, 3, weight, EPS), "y")


def test_which_rows_are_held():
    assert [launch.tile_of(n, "forward")[:2] for n in (1, 100, 4096, 16384, 16385)] == [
        (1, 1024),
        (128, 8),
        (4096, 1),
        (16384, 1),
        (4096, 1),
    ]
    tiles = [launch.tile_of(n, "backward") for n in (4096, 8192, 8193, 16384, 16385)]
    assert [(block, warps) for block, _, warps in tiles] == [
        (4096, 8),
        (8192, 16),
        (16384, 32),
        (16384, 32),
        (8192, 16),
    ]


def test_eps_rule():
    for dtype in DTYPES:
        eps = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps
        x = (sample(3, 64, seed=1) / 32 * eps**0.5).to(dtype)
        for given, true in ((None, eps), (0.0, 0.0), (3.0, 3.0), (1e-45, 1e-45), (1e200, 1e200)):
            y = rms_norm(x, 64, None, given)
            Truth(x, true).forward(None, 0.0, "torch", BOUNDS[dtype]).check(y, f"{dtype}, eps={given}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e37, 1e-37, *(pytest.param(s, marks=pytest.mark.heavy) for s in (1e30, 1e-30))])
def test_range(form, dtype, size):
    """Rows whose squares over- or underflow, beside ordinary ones, which don't notice; dx ~ grad/size, and dw doesn't
    see the size. fp64's own range is not rescued."""
    ordinary, columns = sample(5, 300, dtype), 300
    extreme = (torch.rand(5, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5) * size * 8
    extreme[0, 100] = 3e38 if size > 1 else 0.0
    x = torch.cat([ordinary, extreme.to(dtype), ordinary])
    grad = incoming(15, 300, dtype) * (1e8 if size > 1 else 1e-8)
    for eps, weight in product((0.0, EPS, *([size * size] if size < 1 else [])), (None, gains(300, dtype=dtype))):
        y, dx, *dw = gradients(x, weight, grad, eps=eps)
        Truth(x, eps).forward(weight, 0.0, "torch", BOUNDS[dtype]).check(y, f"{eps=}")
        assert same_bits(y[:5], rms_norm(ordinary, columns, weight, eps)), "a neighbour changed"
        dx_bounds, dw_bounds = Truth(x, eps).backward(grad, weight, 0.0)
        dx_bounds.check(dx, f"dx, {eps=}")
        if dw:
            dw_bounds.check(dw[0], f"dw, {eps=}")


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_subnormal_rows(form, dtype):
    """Rows of subnormal numbers, whose 1/rms is beyond fp32, and the largest finite values."""
    info = torch.finfo(dtype)
    small = torch.arange(1, 130).double() % 7 * (info.smallest_normal * info.eps)
    x = torch.stack([small, torch.full((129,), info.max, dtype=torch.float64), small * 300]).to(dtype)
    assert x[0].count_nonzero() > 100
    for eps in (0.0, EPS):
        y = rms_norm(x, 129, None, eps)
        Truth(x, eps).forward(None, 0.0, "torch", BOUNDS[dtype]).check(y, f"{eps=}")


@pytest.mark.parametrize("dtype", TWO)
def test_special_values_stay_in_their_row(form, dtype):
    x, weight, grad = sample(65, 129, dtype), gains(129, dtype=dtype), incoming(65, 129, dtype)
    clean_y, clean_dx, _ = gradients(x, weight, grad)
    poisoned = x.clone()
    poisoned[3, 7], poisoned[50, 128], poisoned[51, 0] = torch.nan, torch.inf, -torch.inf
    poisoned[60] = torch.inf
    poisoned[30] = 0.0
    touched = [3, 30, 50, 51, 60]
    others = [i for i in range(65) if i not in touched]
    y, dx, dw = gradients(poisoned, weight, grad)
    assert same_bits(y[others], clean_y[others])
    assert same_bits(dx[others], clean_dx[others])
    assert y[[3, 60]].isnan().all()
    assert dw.isnan().all()
    for row, column in ((50, 128), (51, 0)):  # r = 0, so inf·0 is NaN and the rest is 0
        assert y[row].isnan().nonzero().tolist() == [[column]]
        assert y[row].nan_to_num().count_nonzero() == 0
    assert y[30].count_nonzero() == 0
    Truth(poisoned[30:31], EPS).backward(grad[30:31], weight, 0.0)[0].check(dx[30:31], "dx of a zero row")
    y = rms_norm(poisoned, 129, weight, 0.0)
    assert y[30].isnan().all(), "0·(1/sqrt(0)) is NaN"
    assert same_bits(y[others], rms_norm(x, 129, weight, 0.0)[others])


@pytest.mark.parametrize("dtype", TWO)
def test_a_row_does_not_see_the_batch(dtype):
    """y and dx of a row alone and in a batch, at widths with tiles of many rows and of one."""
    for columns, rows in ((3, 700), (127, 20), (1027, 5), (5137, 2)):
        x, weight, grad = sample(rows, columns, dtype), gains(columns, dtype=dtype), incoming(rows, columns, dtype)
        together = gradients(x, weight, grad)[:2]
        for i in (0, rows // 2, rows - 1):
            alone = gradients(x[i], weight, grad[i])[:2]
            assert all(same_bits(a, t[i]) for a, t in zip(alone, together, strict=True)), (columns, i)


@pytest.mark.parametrize("dtype", types(torch.bfloat16, torch.float64))
@pytest.mark.parametrize("partials", [384, 2])
@pytest.mark.parametrize("rows", [2**12, pytest.param(2**15, marks=pytest.mark.heavy)])
def test_dw_over_many_rows(monkeypatch, dtype, partials, rows):
    """Terms of one sign: a running sum in a half type would stop growing, one in fp32 would drift with the rows. With
    384 partial sums at most, 256 tiles, of 128 rows of 16 columns or here of 16, are four to a partial sum; with 2, a
    partial takes 128 tiles, 32 of them in fp32, then fp64. Beside a half type's own rounding, a sum of 32 in fp32 may
    be off by sqrt(32)/2 u and a tile of 128 by about as much: 6u, at any number of rows. fp64: sums of 128 and 128,
    32u."""
    monkeypatch.setattr(backward, "PARTIALS", (partials, partials))
    if rows < 2**15:
        monkeypatch.setitem(launch.TILE, "backward", (256, 256))
        monkeypatch.setitem(launch.TILE, "forward", (8192, 8192))
    weight = gains(16, dtype=dtype)
    rounding = 0.51 * torch.finfo(dtype).eps if dtype in HALVES else 0.0
    allowed = rounding + (32 * 2.0**-53 if dtype is torch.float64 else 6 * 2.0**-24)
    x = sample(rows, 16, dtype)
    grad = torch.sign(x) * incoming(rows, 16, dtype).abs()
    grad = grad / 64 if dtype is torch.float16 else grad  # the sums are below its largest number
    dw = exact(gradients(x, weight, grad)[2])
    truth = (exact(grad) * Truth(x, EPS).normalised).sum(0)
    worst = np.max(np.abs(dw - truth) / truth)
    assert worst <= allowed, f"{rows} rows: relative error {worst:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("rows", [1, 100, 5000, 10**6])
@pytest.mark.parametrize(("columns", "most"), [(128, 384), (4096, 256)])
def test_partial_sums_are_bounded(monkeypatch, rows, columns, most):
    """However many rows, dW is folded from at most 384 rows of partial sums, of wide ones 256."""
    seen = {}
    monkeypatch.setattr(
        launch, "_launch", lambda kernel, grid, arguments, *_: seen.update({kernel.__name__: arguments})
    )
    x = torch.empty(1, columns).expand(rows, columns)
    backward.backward(x, None, x, torch.empty(rows), x[0], 1, EPS, 0.0, False, True)
    assert 1 <= len(seen["fold"][0]) <= most


@pytest.mark.parametrize("dtype", TWO)
def test_only_what_is_asked_for(form, dtype):
    x, weight, grad = sample(17, 129, dtype), gains(129, dtype=dtype), incoming(17, 129, dtype)
    _, dx, dw = gradients(x, weight, grad)
    for ask_x, ask_w in ((True, False), (False, True)):
        got_x, got_w = asked_for(x, weight, grad, (ask_x, ask_w))
        assert same_bits(got_x, dx) if ask_x else got_x is None
        assert same_bits(got_w, dw) if ask_w else got_w is None


def test_nothing_but_x_the_weight_and_one_number_per_row_is_kept():
    for dtype in DTYPES:
        x, weight = sample(37, 576, dtype).requires_grad_(), gains(576, dtype=dtype).requires_grad_()
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            rms_norm(x, 576, weight, EPS)
        others = [t for t in kept if t.data_ptr() not in (x.data_ptr(), weight.data_ptr())]
        assert len(kept) == 3
        assert [t.untyped_storage().nbytes() for t in others] == [37 * (8 if dtype is torch.float64 else 4)]
