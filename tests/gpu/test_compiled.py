"""Proves, from the compilers' own output for five GPUs, that the kernels move no byte twice: rows that are aligned are
read and written 128 bits at a time, x once, the weight once, the output once, and no register is spilled.

The arguments are those of real launches, the compilers those of Triton's wheel; no GPU is needed, and nothing runs.
"""

from __future__ import annotations

import re
from itertools import product

import offline
import pytest
import torch
from offline import (
    DTYPES,
    TARGETS,
    WIDTHS,
    Compiled,
    compiling,
    launch_all,
    launch_forms,
    launch_heads,
    launch_neighbours,
)
from oracle import GRADS, LAYOUTS, alike, lay_out, lay_out_grad
from thinned import heavy_but

from rmsnorm.gpu import backward, launch, neighbours

# Types of which `make test` has one: half a minute for two.
ONE_TYPE = heavy_but([torch.bfloat16], DTYPES)
SOME = heavy_but(["sm_90"], TARGETS)


def share(one: Compiled, rows: int, itemsize: int) -> int:
    """The bytes that a thread has of so many rows of its program's tile."""
    return rows * one.constants["BLOCK"] * itemsize // one.threads


def moved(one: Compiled, added: bool, itemsize: int) -> tuple[int, int, int]:
    """How many tensors the code of a thread loads its part of, how many rows of the weight, and how many tensors it
    stores. Backward's has its loads twice where the next tile is on its way. Rows that 1024 threads hold are loaded
    once but for the gradient, which comes again from the cache with the weight (a thread of AMD's has the registers to
    keep both); of wider ones the means come first."""
    block = one.constants["BLOCK"]
    if one.kernel == "forward":
        return 1 + added, 1, 1 + added
    if one.kernel == "wide_means":
        return 2, 1, 0
    if block > 8192 and "amdgcn" not in one.assembly:
        return 3, 2, 1
    return 4 if 8 * itemsize * block <= 2**17 else 2, 1, 1


@pytest.mark.parametrize("dtype", ONE_TYPE, ids=str)
@pytest.mark.parametrize("name", SOME)
def test_the_floor(name, dtype, monkeypatch):
    """In bytes a thread, in pieces of 16 (up to 2048 half numbers may be 8 for each of AMD's threads), and 4 for the
    1/rms or the mean of each row. The partial sums of dW are fp32: written, and read where there are more than 32
    tiles."""
    with compiling(TARGETS[name], monkeypatch) as found:
        for columns in WIDTHS:
            found.clear()
            launch_all(columns, dtype)
            means = ["wide_means"] if columns > launch.WIDEST["backward"] else []
            assert [one.kernel for one in found] == ["forward", "forward", *means, "backward", "fold"]
            for one in found[0 if columns <= launch.WIDEST["forward"] else 2 : -1]:
                backwards = one.kernel == "backward"
                # Two to four of the 64 registers that a thread of 1024 has at most.
                full = backwards and one.threads == 1024 and name.startswith("sm")
                what = f"{one.kernel} of {columns} columns: {one.spills}, {one.loads}, {one.stores}"
                assert one.spills <= (16 if full else 0), what
                tensors, weights, written = moved(one, one is found[1], dtype.itemsize)
                rows, partial = one.constants.get("ROWS", 1), share(one, 1, 4) if backwards else 0
                loaded = tensors * share(one, rows, dtype.itemsize) + weights * share(one, 1, dtype.itemsize)
                assert sum(size for size in one.loads if size > 4) == loaded + partial, what
                stored = written * share(one, rows, dtype.itemsize) + partial
                assert sum(size for size in one.stores if size > 4) == stored, what
                assert {*one.loads} - {4} <= ({16, 8} if name == "gfx942" and columns <= 2048 else {16}), what
                assert {*one.stores} - {4} <= {16}, what
                assert one.loads.count(4) <= (4 * rows if backwards else one.kernel == "wide_means"), what
                assert one.stores.count(4) <= (one is found[0] or one.kernel == "wide_means"), what


@pytest.mark.heavy
@pytest.mark.parametrize("name", TARGETS)
def test_every_option_compiles(name, monkeypatch):
    """What the interpreter is too lenient to refuse: types, missing weights, rounding first, strides, blocks."""
    with compiling(TARGETS[name], monkeypatch) as found:
        for dtype in (torch.float16, torch.float64, torch.bfloat16):
            for columns in (3, 129, 20000):
                x = torch.zeros(columns, 6, dtype=dtype).t()  # columns are strided
                weight = torch.zeros(columns, dtype=torch.float32)
                _, _, rstd = launch.forward(x, None, None, 1, 1e-5, 0.0, False, True)
                launch.forward(x, x, weight, 1, 1e-5, 1.0, True, False)
                backward.backward(x, x, x, rstd, weight.expand(3, columns), 1, 1e-5, 1.0, True, True)
    assert {one.kernel for one in found} == {"forward", "backward", "wide_means", "fold"}


WRITTEN = {4: {"fma.rn.f32", "fma.rn.f32x2"}, 8: {"fma.rn.f64"}}
"""The multiply-adds of a type of so many bytes, where the source has them; from sm_100 on two of fp32 are one."""


def apart(assembly: str) -> str:
    """Without what is no contraction: sm_80 multiplies bf16 by ``a · b - 0``, and adds by ``a · 1 + b``."""
    ones = set(re.findall(r"mov\.b\d+\s+(%\w+), (?:0x3F80|1065369472);", assembly))
    zeros = set(re.findall(r"mov\.b\d+\s+(%\w+), (?:0x8000|-2147450880);", assembly))
    lines = re.finditer(r"fma\.rn\.bf16(?:x2)?\s+%\w+, %\w+, (%\w+), (%\w+);", assembly)
    for line in [one[0] for one in lines if one[1] in ones or one[2] in zeros]:
        assembly = assembly.replace(line, "")
    return assembly


@pytest.mark.parametrize("dtype", heavy_but([torch.bfloat16], [*DTYPES, torch.float64]), ids=str)
@pytest.mark.parametrize("name", SOME)
def test_forms_compile(name, dtype, monkeypatch):
    """Those of the other forms: no spills but in fp64, rows read and written 16 bytes at a time; nothing contracted,
    nothing divided but by IEEE's rule."""
    with compiling(TARGETS[name], monkeypatch) as found:
        for columns in (16384, 20000):
            launch_forms(columns, dtype)
        rows = len(found)
        for columns, interleaved in ((128, False), (64, True)):
            launch_heads(columns, dtype, interleaved)
    assert {one.kernel for one in found[:rows]} == {"sandwich"} | ({"quantised"} if dtype.itemsize < 8 else set())
    assert {one.kernel for one in found[rows:]} == {"turn", "backward", "fold"}
    for one in found:
        what = f"{one.kernel}, {one.constants}: {one.loads}, {one.stores}"
        # sm_120 keeps four registers of the sandwich's loop over wide rows in memory.
        assert dtype is torch.float64 or one.spills <= (16 if name == "sm_120" else 0), what
        assert set(re.findall(r"\bfma\.\S+", apart(one.assembly))) <= WRITTEN.get(dtype.itemsize, set()), what
        assert not re.search(r"\bdiv\.(full|approx)", one.assembly), what
        if one in found[:rows]:
            assert set(one.loads) <= {16, 4}, what


@pytest.mark.parametrize(
    ("name", "dtype", "columns"),
    [
        pytest.param(*cell, marks=[] if cell == ("sm_90", torch.bfloat16, 4096) else pytest.mark.heavy)
        for cell in [*product(TARGETS, DTYPES, (4096,)), *product(("sm_90",), DTYPES, (2048, 20000))]
    ],
    ids=str,
)
def test_neighbours_compile(name, dtype, columns, monkeypatch):
    """Gated, modulated, general and lean norms: no spills but in fp64 (a backward is given 64 registers, two more in
    memory on some GPUs), and no contraction: of half numbers, whose squares are exact, only exponentials and deviations
    have a multiply-add, where it is written."""
    with compiling(TARGETS[name], monkeypatch) as found:
        launch_neighbours(columns, dtype)
    held = columns <= launch.WIDEST["backward, more"]
    assert {one.kernel for one in found} == {"forward", "add", "backward", "fold"} | (set() if held else {"wide_means"})
    for one in found:
        what = f"{one.kernel}, {one.constants}: {one.registers} registers, {one.loads}, {one.stores}"
        assert dtype is torch.float64 or one.spills <= (8 if one.kernel == "backward" else 0), what
        assert not re.search(r"\bdiv\.(full|approx)", one.assembly), what
        assert set(re.findall(r"\bfma\.\S+", apart(one.assembly))) <= WRITTEN[4] | WRITTEN[8], what
        plain = (
            one.constants.get("LOAD") == "" and not one.constants["LAYER"] and one.constants["STORE"] in ("", "each")
        )
        if dtype is torch.bfloat16 and plain:
            assert "fma.rn" not in apart(one.assembly), what
        if name.startswith("sm"):
            assert max(one.loads) == 16, what


@pytest.mark.parametrize("columns", heavy_but((129, 4096), (1, 3, 129, 1032, 4096)))
def test_layouts_share_one_code(columns, monkeypatch):
    """The compiler's vectors, and with them the order of a sum, follow from strides and addresses: whatever they are,
    each kernel has one code. Seen on an H200 before there was this test: other bits for a row whose neighbours were
    144 elements away instead of 129, or whose columns were apart."""
    weight = torch.zeros(columns + 1, dtype=torch.bfloat16)
    with compiling(TARGETS["sm_90"], monkeypatch) as found:
        for rows, layout, grad_layout, w in product((1, 30), LAYOUTS, GRADS, (weight[1:], weight[:-1])):
            if "contiguous" in (layout, grad_layout):
                x = torch.zeros(rows, columns, dtype=torch.bfloat16)
                x, grad = alike(lay_out(x, layout), lay_out_grad(x, grad_layout))
                _, _, rstd = launch.forward(x, None, w, 1, 1e-5, 0.0, False, True)
                backward.backward(grad, None, x, rstd, w, 1, 1e-5, 0.0, True, True)
    assert len({one.assembly for one in found}) == len({one.kernel for one in found}) == 3


def test_multiplications_and_additions_stay_apart(monkeypatch):
    """The exact sums of fp32 need each rounding where it is written: no contraction, and none of PTX's flushing of
    subnormals but in the first guess of 1/rms, which is of normal numbers."""
    for dtype in DTYPES:
        with compiling(TARGETS["sm_90"], monkeypatch) as found:
            launch_all(4096, dtype)
        for one in found:
            fused = re.findall(r"\bfma\.\S+", one.assembly)
            exact = one.kernel == "forward" and dtype is torch.float32
            assert set(fused) == ({"fma.rn.f32"} if exact else set()), one.kernel
            flushed = set(re.findall(r"\S+\.ftz\S*", one.assembly))
            assert flushed <= {"rsqrt.approx.ftz.f32"}, one.kernel


def test_the_reader_sees_spills(monkeypatch):
    """Rows of 32768 columns held through a backward don't fit: why WIDEST says 16384, and proof that a spill shows."""
    monkeypatch.setitem(launch.WIDEST, "backward", 32768)
    with compiling(TARGETS["sm_90"], monkeypatch) as found:
        launch_all(32768, torch.float32)
    assert next(one for one in found if one.kernel == "backward").spills > 0


def test_the_page_has_the_table_of_this_compiler():
    text = (offline.ROOT / "docs/gpu.md").read_text()
    assert f"Triton {offline.triton.__version__}," in text
    assert text.count("| sm_100 forward |") == len(WIDTHS) * len(DTYPES)


@pytest.mark.parametrize("columns", [pytest.param(129, marks=pytest.mark.heavy), 1024])
def test_layouts_of_neighbours_share_one_code(columns, monkeypatch):
    """The same of what stands beside a norm: a gate of each row, and a modulation that rows share."""
    weight = torch.zeros(columns, dtype=torch.bfloat16)
    with compiling(TARGETS["sm_90"], monkeypatch) as found:
        for layout in LAYOUTS:
            x = torch.zeros(8, columns, dtype=torch.bfloat16)
            first, second = alike(lay_out(x, "row-strided"), lay_out(x, layout))
            rstd = torch.ones(*first.shape[:-1], 1)
            neighbours.gated_rms_norm(True, first, second, weight, 1, 1e-5, 0.0, False, True, True)
            neighbours.gated_rms_norm_backward(
                *(first, first, second, rstd, weight, 1, 1e-5, 0.0, True, True), *(True, True, True)
            )
            neighbours.gated_add(True, first, second, second, False)
    assert len({one.assembly for one in found}) == len({one.kernel for one in found}) == 4
