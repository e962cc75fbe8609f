"""Proves that the forward is right to the stated bound for every dtype, mode, offset, weight, layout and size, in
every CPU target: the axes are crossed, not sampled, but for one corner (130 rows of 1027 columns, and 33 of more, are
contiguous, with offset 1 only: strides reach the kernels row by row, and 3 such rows come in all forms). Then range,
special values, the eps rule, and properties.

Native kernels must give the same bits for every layout, so there the contiguous result meets the bound and the other
layouts must equal it; the reference definition meets the bound in each.
"""

from __future__ import annotations

import shutil
import subprocess
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
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

from rmsnorm import _native, add_rms_norm, info, layer_norm, rms_norm

OFFSETS = (0.0, 1.0, 0.5)
NATIVE = bool(_native.cpu_targets())


@pytest.mark.parametrize("columns", COLUMNS)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_outputs_have_the_bits_of_small_ones(native_target, everything_is_large, dtype):
    """Streamed rows (aligned to 32 bytes), rows beside them that can't be, and outputs in huge pages."""

    def results():
        for columns, rows, mode in product(COLUMNS, (0, 1, 3, 70), MODES):
            x = sample(rows, columns, dtype)
            for weight in weights(columns, dtype):
                yield rms_norm(x, columns, weight, EPS, casting_mode=mode)
                yield from add_rms_norm(x, x.flip(0), columns, weight, EPS, casting_mode=mode)
                rare = x.clone()
                rare[1::3] *= torch.finfo(dtype).max / 2**6  # squares beyond the type, but in fp16
                yield from add_rms_norm(rare, x, columns, weight, EPS, casting_mode=mode)
                place = torch.full((rows, columns + 7), 5.0)
                for start in (0, 1):  # rows at every alignment
                    y = place.to(rms_norm(x[:0], columns, weight, EPS, casting_mode=mode).dtype, copy=True)
                    rms_norm(x, columns, weight, EPS, casting_mode=mode, out=y[:, start : start + columns])
                    yield y

    small = list(results())
    everything_is_large()
    for expected, y in zip(small, results(), strict=True):
        assert same_bits(y, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_outgrow_the_first_cache_have_the_bits_of_a_row_alone(native_target, everything_is_large, dtype):
    """Rows to come are asked for then, where a thread's share fills half of the last cache, or is streamed."""
    rows, columns = 33, 43712  # more than a third of any L1 in two bytes
    x, w = sample(rows, columns, dtype), sample(1, columns, dtype)[0]

    def results(x, other):
        return (
            rms_norm(x, columns, w, EPS),
            layer_norm(x, columns, w, w, EPS),
            *add_rms_norm(x, other, columns, w, EPS),
        )

    expected = [torch.cat(of_rows) for of_rows in zip(*map(results, x.split(1), x.flip(0).split(1)), strict=True)]
    # add asks at the first, and streams at the next, where norms ask
    for least in (x.nbytes * 7, x.nbytes * 7 // 2, 1):
        everything_is_large(least)
        for y, of_rows in zip(results(x, x.flip(0)), expected, strict=True):
            assert same_bits(y, of_rows)
        for y, of_rows in zip(results(x[::2], x.flip(0)[::2]), expected, strict=True):
            assert same_bits(y, of_rows[::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_share_the_last_cache_with_the_bits_of_one(native_target, everything_is_large, threads, dtype):
    """Short rows that just fit in it are not streamed by several threads, but stay there, asked for into L2 where L1
    has no room for the rows to come; nor is what add writes streamed, but its sum."""
    for columns, rows in product((1, 127, 128, 576, 1027), (1025, 2051)):
        x, w = sample(rows, columns, dtype), sample(1, columns, dtype)[0]

        def results(x=x, w=w, columns=columns):
            yield rms_norm(x, columns, w, EPS)
            yield layer_norm(x, columns, w, w, EPS)
            yield from add_rms_norm(x, x.flip(0), columns, w, EPS)

        threads(1)
        everything_is_large(2**60)
        expected = list(results())
        threads(2)
        for least in (x.nbytes * 2, x.nbytes * 4, 1):  # all that norms, and that add, read and write
            everything_is_large(least)
            for y, of_one in zip(results(), expected, strict=True):
                assert same_bits(y, of_one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [32, 127, 128, 576, 1027])
def test_rows_that_lie_evenly_have_the_bits_of_others(native_target, everything_is_large, threads, columns, dtype):
    """Short ones, in a cache, past it, and shared by two threads; with rows that are rescued among them."""
    rows = 2 * 171  # no whole number of blocks
    x, w = sample(rows, columns, dtype), sample(1, columns, dtype)[0]
    x[::7] *= 2.0**100
    x[1::11] *= 2.0**-140
    x[2::13] = 0.0
    x[4, 0], x[-1, -1], x[-3, 0] = float("nan"), float("inf"), float("nan")
    apart = torch.zeros(2, rows // 2 + 1, columns, dtype=dtype)[:, :-1].copy_(
        x.view(2, -1, columns)
    )  # no single distance

    def results(x):
        given = x.detach().requires_grad_()
        y = rms_norm(given, columns, w, EPS)
        y.backward(torch.ones_like(y))  # by 1/rms as it was kept
        out = torch.full((rows * columns + 3,), 5.0, dtype=dtype)[3:].view(x.shape)  # begins with no line
        yield from (y, given.grad, rms_norm(x, columns, w, EPS, out=out), rms_norm(x, columns, w, 0.0))

    everything_is_large(2**60)
    threads(1)
    expected = [y.reshape(rows, columns) for y in results(apart)]
    for count, least in product((1, 2), (2**60, 2 * x.nbytes, 1)):
        threads(count)
        everything_is_large(least)
        for y, wanted in zip(results(x), expected, strict=True):
            assert same_bits(y, wanted), (count, least)


@pytest.mark.parametrize("columns", [32, 128, 576])
def test_short_rows_in_a_cache_beyond_the_second_have_the_bits_of_others(
    native_target, everything_is_large, second_cache, threads, columns
):
    """Where that is large, they are stored in the loop that sums others, by two threads as by one."""
    second_cache(second := 2 * 2**20)
    rows = 4 * second // (8 * columns) // 2 * 2 + 342  # a thread of two has twice the second cache
    x, w = sample(rows, columns, torch.float32), sample(1, columns, torch.float32)[0]
    x[::7] *= 2.0**100
    x[1::11] *= 2.0**-140
    x[-1, -1], x[-3, 0] = float("inf"), float("nan")
    apart = torch.zeros(2, rows // 2 + 1, columns)[:, :-1].copy_(x.view(2, -1, columns))  # no single distance

    def results(x):
        given = x.detach().requires_grad_()
        y = rms_norm(given, columns, w, EPS)
        y.backward(torch.ones_like(y))  # by 1/rms as it was kept
        yield from (y, given.grad, rms_norm(x, columns, w, 0.0))

    everything_is_large(2**60)
    threads(1)
    expected = [y.reshape(rows, columns) for y in results(apart)]
    for count in (1, 2):
        threads(count)
        for y, wanted in zip(results(x), expected, strict=True):
            assert same_bits(y, wanted), count


def test_a_large_output_is_taken_for_one(native_target, everything_is_large):
    assert 8 * 2**20 <= _native.large_bytes() <= 32 * 2**20
    everything_is_large()
    assert _native.large_bytes() == 1


@pytest.mark.skipif(shutil.which("getconf") is None or not NATIVE, reason="needs getconf and the native library")
def test_caches_are_what_the_system_says_within_bounds():
    bounds = {"LEVEL1_DCACHE": (2**15, 2**17), "LEVEL2_CACHE": (2**18, 2**22), "LEVEL3_CACHE": (2**23, 2**25)}
    for (name, (least, most)), found in zip(bounds.items(), _native.cache_bytes(), strict=True):
        said = subprocess.run(["getconf", f"{name}_SIZE"], capture_output=True, text=True, check=False).stdout.strip()
        assert found == min(max(int(said) if said.isdecimal() else 0, least), most), name
    assert [size.split()[1] for size in info().caches][1:] in (["KiB", "MiB"], ["MiB", "MiB"])


@pytest.mark.skipif(not NATIVE, reason="the native library is off")
def test_which_kernels_are_faster_is_asked_where_no_target_is_named(python):
    """What is timed may end either way; the rest of the list is CPUID's. The bits are the same (test_backward.py)."""
    found = [
        python("import rmsnorm; print(*rmsnorm.info().cpu_targets)", **named)
        for named in ({}, {"RMSNORM_CPU_TARGET": "avx2"})
    ]
    free, named = (result.stdout.split() for result in found)
    assert [name for name in free if "+" not in name] == named
    mixed = [name for name in free if "+" in name]
    assert mixed in ([], *([f"{named[0]}+avx2({types})"] for types in ("fp32", "fp16", "fp32,fp16")))
    assert not mixed or (free[0] == mixed[0] and named[0].startswith("avx512"))
