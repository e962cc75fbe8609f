"""Proves that what is written in place has the bits of new tensors, touches nothing else, and is known to autograd."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from general_oracle import COLUMNS, rows
from oracle import (
    DTYPES,
    EPS,
    HALVES,
    MODES,
    WRITABLE,
    lay_out,
    outside,
    same_bits,
    sample,
)

from rmsnorm import add_rms_norm, add_rms_norm_, rms_norm


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(target, dtype):
    """The bits of the function that returns new tensors; both tensors change, and nothing beside them."""
    for columns, count in product(COLUMNS, (0, 1, 3, 70)):
        x, residual, w, _ = rows(count, columns, dtype)
        for weight, mode, rounded in product((w, None), MODES, (True, False)):
            options = {"casting_mode": mode, "round_sum": rounded}
            a, r = x.clone(), residual.clone()
            got = add_rms_norm_(a, r, weight, EPS, **options)
            assert got[0] is a
            assert got[1] is r
            if target != "reference":
                assert all(map(same_bits, got, add_rms_norm(x, residual, columns, weight, EPS, **options)))
    for layout in WRITABLE:
        x, residual, w, _ = rows(10, 129, dtype)
        a, r = lay_out(x, layout), lay_out(residual, layout)
        add_rms_norm_(a, r, w, EPS)
        wanted = add_rms_norm(x, residual, 129, w, EPS)
        if target != "reference":
            assert same_bits(a.reshape(x.shape), wanted[0]), layout
            assert same_bits(r.reshape(x.shape), wanted[1])
        assert all(outside(t).isnan().all() for t in (a, r))
    if dtype in HALVES:
        x, residual, w, _ = rows(5, 129, dtype)
        stream = residual.float()
        a, r = x.clone(), stream.clone()
        wanted = add_rms_norm(x, stream, 129, w, EPS, out_dtype=dtype)
        if target != "reference":
            assert all(map(same_bits, add_rms_norm_(a, r, w, EPS), wanted))


def test_in_place_of_one_projection(native_target):
    """Two parts of one tensor lie between each other and share nothing; one that overlaps is refused."""
    whole = sample(6, 300, torch.float32)
    parts = whole[:, :129], whole[:, 150:279]
    wanted = add_rms_norm(*parts, 129, None, 1e-6)
    add_rms_norm_(*parts)
    assert all(map(same_bits, parts, wanted))
    for a, r in (
        (whole[:, :129], whole[:, 100:229]),
        (whole, whole),
        (whole[:3], whole[1:4]),
        (whole[:1].expand(6, 300), whole.clone()),
        (whole.clone(), whole[:1].expand(6, 300)),
        (torch.randn(20).as_strided((4, 8), (2, 1)), torch.randn(4, 8)),
        (torch.randn(4, 8), torch.randn(20).as_strided((4, 8), (2, 1))),
        (torch.randn(4, 8), torch.randn(20).as_strided((4, 8), (1, 2))),
    ):
        with pytest.raises(RuntimeError, match="must not share memory"):
            add_rms_norm_(a, r)
    x, r = torch.randn(2, 4, 8)
    for weight in (x[1], r[2]):
        with pytest.raises(RuntimeError, match="must not share memory: within themselves, with each other or with the"):
            add_rms_norm_(x, r, weight)
    apart = torch.randn(30).as_strided((3, 2, 2), (9, 4, 1))  # gaps, and none of these elements twice
    add_rms_norm_(apart, torch.randn(3, 2, 2))


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@pytest.mark.parametrize("way", ["out=", "out=, with an offset", "in place", "in place, unrounded", "in place, sum"])
def test_autograd_knows_what_is_written_to(target, way, layout):
    """A backward that kept what was there before raises, as after torch's own operators, in a graph too."""

    def write(h):
        x, w = torch.randn(4, 64), torch.ones(64)
        with torch.no_grad():
            if way.startswith("out"):
                rms_norm(x, 64, w, EPS, out=h, offset=float("offset" in way))
            elif way.endswith("sum"):
                add_rms_norm_(x, h, w, EPS)
            else:
                add_rms_norm_(h, x, w, EPS, round_sum="un" not in way)

    for call in (write, torch.compile(write, backend="aot_eager")):
        h = lay_out(torch.randn(4, 64), layout).requires_grad_()
        y = (h * h).sum()
        before = h._version
        call(h)
        assert h._version > before
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


@pytest.mark.parametrize("frozen", ["out", "out, with an offset", "input", "residual"])
def test_inference_tensors_are_not_written_to_outside_their_mode(target, frozen):
    """A backward that kept one has no version to see the change by: torch's own operators raise, too."""
    with torch.inference_mode():
        kept = torch.randn(4, 8)
    before, x, w = kept.clone(), torch.randn(4, 8), torch.rand(8)

    def write():
        if frozen.startswith("out"):
            return rms_norm(x, 8, w, EPS, offset=float("offset" in frozen), out=kept)
        return add_rms_norm_(*((kept, x) if frozen == "input" else (x, kept)), w, EPS)[frozen == "residual"]

    with pytest.raises(RuntimeError, match=r"was made under torch\.inference_mode\(\).*\.clone\(\), or call it under"):
        write()
    assert torch.equal(kept, before)
    with torch.inference_mode():
        assert write() is kept
        assert not torch.equal(kept, before)


def test_negated_views():
    """Their memory holds other numbers than they show."""
    view = torch.randn(4, 8, dtype=torch.complex64).conj().imag
    for a, r in ((view, torch.randn(4, 8)), (torch.randn(4, 8), view)):
        for weight in (None, torch.ones(8)):
            with pytest.raises(RuntimeError, match=r"is a negated view.*call rmsnorm\.add_rms_norm"):
                add_rms_norm_(a, r, weight)
