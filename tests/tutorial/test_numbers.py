"""What the lesson computes norms with, against PyTorch and the library: 1e-12 in float64, bit for bit in 16 bits."""

from __future__ import annotations

import math
import struct

import pytest
import torch
import torch.nn.functional as F
from closeness import DTYPES, F64, near

import rmsnorm
from rmsnorm.tutorial import ulp

pytestmark = pytest.mark.xdist_group("browser")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_norms_are_the_librarys(script, eps):
    x = noise(5, 7) + 2
    near(script("numbers.normRows", "rms", x.tolist(), eps), rmsnorm.rms_norm(x, (7,), eps=eps))
    near(script("numbers.normRows", "layer", x.tolist(), eps), F.layer_norm(x, (7,), eps=eps))
    batch = x - x.mean(0)
    near(script("numbers.normRows", "batch", x.tolist(), eps), batch / (batch.square().mean(0) + eps).sqrt())
    near(script("numbers.std", x[0].tolist()), x[0].std(correction=0))


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_backward_is_autograds(script, eps):
    x, h = noise(9).requires_grad_(), noise(9, seed=1)
    (dx,) = torch.autograd.grad(rmsnorm.rms_norm(x, (9,), eps=eps), x, h)
    near(script("numbers.rmsBackward", x.tolist(), h.tolist(), eps), dx)


def awkward() -> list[float]:
    """float32 numbers of every size: random bits, and what lies around the borders of the 16-bit types."""
    bits = torch.randint(-(2**31), 2**31, (4000,), generator=torch.Generator().manual_seed(2)).tolist()
    values = [struct.unpack("f", struct.pack("i", one))[0] for one in bits]
    values += [
        65504.0,
        65519.99609375,
        65520.0,
        2**-24,
        2**-25,
        1.5 * 2**-25,
        2**-14,
        1.00390625,
        1.01171875,
        3.3895e38,
    ]
    values += [struct.unpack("f", struct.pack("i", one))[0] for one in (0x3F808000, 0x3F818000, 0x3F80FFFF, 0x7F7FFFFF)]
    return [sign * v for v in values if math.isfinite(v) for sign in (1, -1)] + [0.0, -0.0]


@pytest.mark.parametrize("name", DTYPES)
def test_rounding_is_torchs_bit_for_bit(script, name):
    values = awkward()
    expected = torch.tensor(values, dtype=torch.float32).to(DTYPES[name]).double().tolist()
    found = script("a.map(v => lesson.numbers.round(v, b))", values, name)
    assert [struct.pack("d", v) for v in found] == [struct.pack("d", v) for v in expected]


@pytest.mark.parametrize("name", DTYPES)
def test_ulps_are_the_gaps(script, name):
    exact = torch.tensor([0.0, 1.0, 1.9999, -3.0, 1e-30, 6e-5, 1e-7, 500.0, 60000.0], dtype=F64)
    assert (
        script("a.map(v => lesson.numbers.ulp(v, b))", exact.tolist(), name) == ulp.gaps(exact, DTYPES[name]).tolist()
    )


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize(("order", "mode"), [("once", "torch"), ("twice", "llama")])
def test_the_layer_in_sixteen_bits_has_the_kernels_bits(script, name, order, mode):
    x, w = noise(16, 64).to(DTYPES[name]), (1 + 0.2 * noise(64, seed=1)).to(DTYPES[name])
    expected = rmsnorm.rms_norm(x, (64,), w, 1e-6, casting_mode=mode).double().tolist()
    found = [script("numbers.layerIn", name, order, row.double().tolist(), w.double().tolist(), 1e-6) for row in x]
    assert found == expected


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("size", [0.01, 4, 300])
def test_sums_one_by_one_are_torchs(script, name, size):
    x = (size * noise(200)).to(DTYPES[name])
    total = torch.zeros((), dtype=DTYPES[name])
    for square in x * x:
        total = total + square
    found = script("numbers.meanSquare", x.double().tolist(), name)
    assert found == (total / 200).double().item() or math.isinf(found)
    assert math.isinf(found) == (name == "float16" and size == 300)
