"""Proves that what caches and threads decide changes no bit of the forward: rows that go past the caches, outgrow one,
lie evenly, or are stored while others are summed. And that caches are taken for what they are.
"""

from __future__ import annotations

import shutil
import subprocess
from itertools import product

import pytest
import torch
from oracle import COLUMNS, DTYPES, EPS, MODES, same_bits, sample, weights
from thinned import heavy_but

from rmsnorm import _native, add_rms_norm, info, layer_norm, rms_norm

NATIVE = bool(_native.cpu_targets())
# The types that have ways of their own past a cache; the others repeat one of them.
LARGE = heavy_but((torch.float32, torch.bfloat16), DTYPES)


@pytest.mark.parametrize("dtype", LARGE, ids=str)
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


@pytest.mark.parametrize("dtype", LARGE, ids=str)
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


@pytest.mark.parametrize("dtype", LARGE, ids=str)
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
