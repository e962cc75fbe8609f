"""Proves that the forward is right to the stated bound for every dtype, mode, offset, weight, layout and size, in
every CPU target: the axes are crossed, not sampled, but for one corner (130 rows of 1027 columns, and 33 of more, are
contiguous, with offset 1 only: strides reach the kernels row by row, and 3 such rows come in all forms). Then range,
special values, the eps rule, and properties.

Native kernels must give the same bits for every layout, so there the contiguous result meets the bound and the other
layouts must equal it; the reference definition meets the bound in each.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    AWKWARD,
    COLUMNS,
    DTYPES,
    EPS,
    HALVES,
    LAYOUTS,
    MODES,
    WRITABLE,
    Truth,
    alike,
    bound,
    gains,
    lay_out,
    outside,
    rows_of,
    same_bits,
    sample,
    weights,
)
from thinned import heavy_but

from rmsnorm import _native, rms_norm

OFFSETS = (0.0, 1.0, 0.5)
NATIVE = bool(_native.cpu_targets())


@pytest.mark.parametrize("columns", heavy_but(AWKWARD, COLUMNS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_combination(target, dtype, columns):
    for rows in (0, 1, 3, 130 if columns <= 1027 else 33):
        x = sample(rows, columns, dtype)
        truths = {layout: Truth(rows_of(x, layout), EPS) for layout in ("contiguous", "expanded")}
        many = rows * columns > 10**5
        placed = {layout: lay_out(x, layout) for layout in (["contiguous"] if many else LAYOUTS)}
        for weight, offset, mode in product(weights(columns, dtype), (1.0,) if many else OFFSETS, MODES):
            what = f"{rows} rows, weight {weight if weight is None else weight.dtype}, {offset=}, {mode}"
            bounds = {k: t.forward(weight, offset, mode, bound(target, dtype)) for k, t in truths.items()}
            results = {}
            for layout, tensor in placed.items():
                y = rms_norm(tensor, columns, weight, EPS, offset=offset, casting_mode=mode)
                assert y.shape == tensor.shape, what
                assert y.is_contiguous(), what
                wide = mode == "llama" and weight is not None
                assert y.dtype is (torch.promote_types(dtype, weight.dtype) if wide else dtype), what
                kind = "expanded" if layout == "expanded" else "contiguous"
                if target == "reference" or kind not in results:
                    bounds[kind].check(y, f"{layout}, {what}")
                    results[kind] = y
                assert target == "reference" or same_bits(y.view(x.shape), results[kind]), f"{layout}, {what}"
        for layout, tensor in placed.items():
            assert same_bits(tensor.reshape(x.shape), rows_of(x, layout)), f"{layout}: the input changed"


@pytest.mark.parametrize("columns", [127, 129, 576])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_in_every_layout(target, dtype, columns):
    """``out=`` gets the bits of a fresh output; nothing beside it is touched; it may be the input itself."""
    x = sample(6, columns, dtype)
    for weight, offset, mode in product(weights(columns, dtype), (0.0, 1.0), MODES):
        options = {"offset": offset, "casting_mode": mode}
        for layout in LAYOUTS:
            expected = rms_norm(lay_out(x, layout), columns, weight, EPS, **options)
            for out_layout in WRITABLE:
                what = f"{layout} to {out_layout}, weight {weight if weight is None else weight.dtype}, {options}"
                tensor, out = alike(lay_out(x, layout), lay_out(torch.zeros(x.shape, dtype=expected.dtype), out_layout))
                assert rms_norm(tensor, columns, weight, EPS, out=out, **options) is out
                assert same_bits(out.reshape(x.shape), expected.view(x.shape)), what
                assert outside(out).isnan().all(), f"{what}: wrote outside of out"
            if expected.dtype is dtype and layout in WRITABLE:
                tensor = lay_out(x, layout)
                rms_norm(tensor, columns, weight, EPS, out=tensor, **options)
                assert same_bits(tensor.reshape(x.shape), expected.view(x.shape)), f"{layout} in place, {options}"
                assert outside(tensor).isnan().all(), f"{layout} in place: wrote outside"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 64), (3, 5, 7), (1, 129)], ids=str)
def test_several_normalised_dimensions(target, shape, dtype):
    """Rows that are themselves permuted, strided or all there is; a weight that is permuted, strided or expanded."""
    columns = torch.Size(shape).numel()
    x, weight = sample(6, columns, dtype), gains(columns, dtype=dtype)
    bounds = Truth(x, EPS).forward(weight, 1.0, "torch", bound(target, dtype))
    full = x.view(6, *shape)
    mixed = {
        "contiguous": full,
        "permuted": full.mT.contiguous().mT,
        "rows last": full.movedim(0, -1).contiguous().movedim(-1, 0),
        "strided": torch.full((6, *shape[:-1], 2 * shape[-1]), torch.nan, dtype=dtype)[..., ::2].copy_(full),
    }
    square = weight.view(shape)
    for layout, tensor in mixed.items():
        for name, w in {"contiguous": square, "permuted": square.mT.contiguous().mT}.items():
            bounds.check(rms_norm(tensor, shape, w, EPS, offset=1.0), f"{layout}, weight {name}")
        all_of_it = Truth(x[:1], EPS).forward(weight, 1.0, "torch", bound(target, dtype))
        all_of_it.check(rms_norm(tensor[0], shape, square, EPS, offset=1.0), f"{layout}, no other dimension")
    one = torch.tensor(1.5, dtype=dtype)
    expected = rms_norm(full, shape, one.expand(shape).contiguous(), EPS)
    assert same_bits(rms_norm(full, shape, one.expand(shape), EPS), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [2**17 + 1, 2**20 + 3])
def test_very_wide_rows(target, dtype, columns):
    """The bound does not grow with the columns: native sums are trees or wider than the input. The reference's fp32
    pairwise sum grows with log2(columns): 8 ulp."""
    x, weight = sample(3, columns, dtype), gains(columns, dtype=dtype)
    ulps = 8.0 if target == "reference" and dtype not in HALVES else bound(target, dtype)
    bounds = Truth(x, EPS).forward(weight, 0.0, "torch", ulps)
    bounds.check(rms_norm(x, columns, weight, EPS), "contiguous")
    bounds.check(rms_norm(lay_out(x, "transposed"), columns, weight, EPS), "transposed")


def test_all_columns_in_one_place(target):
    """A last dimension of stride 0: every element of a row is the same value."""
    for dtype in DTYPES:
        x = torch.tensor([[3.0], [-0.01]], dtype=dtype).expand(2, 577)
        Truth(x.contiguous(), EPS).forward(None, 0.0, "torch", bound(target, dtype)).check(
            rms_norm(x, 577, None, EPS), dtype
        )


@pytest.mark.parametrize("input_type", DTYPES[:3], ids=str)
def test_weight_of_float64(input_type):
    """fp64 gains for narrower inputs run in the reference definition, whatever the target."""
    x, weight = sample(6, 129, input_type), gains(129, dtype=torch.float64)
    for mode, offset in product(MODES, OFFSETS):
        y = rms_norm(x, 129, weight, EPS, offset=offset, casting_mode=mode)
        Truth(x, EPS).forward(weight, offset, mode, bound("reference", input_type)).check(y, f"{mode}, {offset=}")


def test_eps_rule(target):
    """None is the machine epsilon of the accumulation type, 0 is honoured; rows so small that either choice shows."""
    for dtype in DTYPES:
        eps = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps
        x = (sample(3, 64, seed=1) / 32 * eps**0.5).to(dtype)
        for given_eps, true_eps in ((None, eps), (0.0, 0.0), (0, 0.0), (3.0, 3.0)):
            y = rms_norm(x, 64, None, given_eps)
            Truth(x, true_eps).forward(None, 0.0, "torch", bound(target, dtype)).check(y, f"{dtype}, eps={given_eps}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_range(native_target, dtype):
    """Rows whose squares over- or underflow, beside ordinary ones, with eps nothing, ordinary, and as large as the
    mean square itself."""
    ordinary = sample(5, 576, dtype)
    largest = 3e38 if dtype is not torch.float64 else 1e308
    for size in [1e30, 1e37, 1e-30, 1e-37] if dtype is not torch.float64 else [1e300, 1e307, 1e-300, 1e-306]:
        extreme = (
            (torch.rand(5, 576, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5) * size * 10
        )
        extreme[0, 100] = largest if size > 1 else 0.0
        extreme[1] = torch.copysign(torch.tensor(size, dtype=torch.float64), extreme[1])
        x = torch.cat([ordinary, extreme.to(dtype), ordinary])
        for eps, weight in product(
            (0.0, EPS, *([size * size] if 0 < size * size < 1e300 else [])), (None, gains(576, dtype=dtype))
        ):
            y = rms_norm(x, 576, weight, eps)
            Truth(x, eps).forward(weight, 0.0, "torch", bound(native_target, dtype)).check(y, f"size {size}, {eps=}")
            assert same_bits(y[:5], rms_norm(ordinary, 576, weight, eps)), "a neighbour changed"
            assert same_bits(y, rms_norm(lay_out(x, "transposed"), 576, weight, eps)), "a layout changed the bits"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_subnormal_rows(native_target, dtype):
    """Rows of subnormal numbers, whose 1/rms is beyond the type, and the largest finite values."""
    info = torch.finfo(dtype)
    step = info.smallest_normal * info.eps
    x = torch.stack([torch.arange(1, 130).double() % 7 * step, torch.full((129,), info.max, dtype=torch.float64)]).to(
        dtype
    )
    assert x[0].count_nonzero() > 100
    for eps in (0.0, EPS):
        Truth(x, eps).forward(None, 0.0, "torch", bound(native_target, dtype)).check(
            rms_norm(x, 129, None, eps), f"{eps=}"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_stay_in_their_row(target, dtype):
    x, weight = sample(130, 129, dtype), gains(129, dtype=dtype)
    clean = rms_norm(x, 129, weight, EPS)
    poisoned = x.clone()
    poisoned[3, 7], poisoned[50, 128], poisoned[51, 0] = torch.nan, torch.inf, -torch.inf
    poisoned[60] = torch.inf
    poisoned[70, 5], poisoned[70, 6] = torch.inf, torch.nan
    poisoned[80] = 0.0
    touched = [3, 50, 51, 60, 70, 80]
    others = [i for i in range(130) if i not in touched]
    y = rms_norm(poisoned, 129, weight, EPS)
    assert same_bits(y[others], clean[others])
    assert y[[3, 60, 70]].isnan().all()
    for row, column in ((50, 128), (51, 0)):  # r = 0, so inf·0 is NaN and the rest is 0
        assert y[row].isnan().nonzero().tolist() == [[column]]
        assert y[row].nan_to_num().count_nonzero() == 0
    assert y[80].count_nonzero() == 0
    y = rms_norm(poisoned, 129, weight, 0.0)
    assert y[80].isnan().all(), "0·(1/sqrt(0)) is NaN"
    assert same_bits(y[others], rms_norm(x, 129, weight, 0.0)[others])


@st.composite
def problems(draw):
    """A dtype, a size, a layout and options; the values come from a seeded generator."""
    dtype, layout, mode = (draw(st.sampled_from(choices)) for choices in (DTYPES, list(LAYOUTS), MODES))
    x = sample(draw(st.integers(0, 40)), draw(st.integers(1, 700)), dtype, seed=draw(st.integers(2, 99)))
    weight = draw(st.sampled_from(list(weights(x.shape[1], dtype))))
    eps, offset = draw(st.sampled_from([0.0, 1e-12, EPS, 0.5])), draw(st.sampled_from([*OFFSETS, -0.25]))
    return x, layout, weight, eps, offset, mode


examples = settings(max_examples=150, deadline=None, derandomize=True, database=None)


@examples
@given(problems())
def test_any_problem_is_right_and_its_rows_are_independent(problem):
    x, layout, weight, eps, offset, mode = problem
    tensor, columns = lay_out(x, layout), x.shape[1]
    y = rms_norm(tensor, columns, weight, eps, offset=offset, casting_mode=mode).view(x.shape)
    ulps = bound("native" if NATIVE else "reference", x.dtype)
    Truth(rows_of(x, layout), eps).forward(weight, offset, mode, ulps).check(y, layout)
    if NATIVE:
        for row, alone in zip(rows_of(x, layout), y, strict=True):
            assert same_bits(rms_norm(row, columns, weight, eps, offset=offset, casting_mode=mode), alone)


@examples
@given(problems(), st.integers(-25, 25))
def test_powers_of_two_scale_out(problem, power):
    """With eps=0, scaling a row by a power of two changes no bit, as long as x stays normal in its type and the squares
    in fp32's range. (Rows beyond are rescued: rounded once where others are rounded twice; see test_range.)"""
    x, _, weight, _, offset, mode = problem
    power = power % 3 if x.dtype is torch.float16 else power
    expected = rms_norm(x, x.shape[1], weight, 0.0, offset=offset, casting_mode=mode)
    scaled = rms_norm(x * 2.0**power, x.shape[1], weight, 0.0, offset=offset, casting_mode=mode)
    assert same_bits(scaled, expected), f"2^{power}"
