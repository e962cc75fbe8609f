"""Proves the norm with quantised output: the codes are torchao's, of the rounded output of our other functions."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from oracle import LAYOUTS, lay_out, sample
from torch import Tensor

from rmsnorm import add_rms_norm, gated_rms_norm, quantised_rms_norm, rms_norm

EPS = 1e-6
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODES = (torch.int8, torch.float8_e4m3fn)
COLUMNS = (1, 3, 31, 32, 127, 129, 576, 1027, 5137)
FORMS = {
    "plain": (lambda x, o, w, **k: (rms_norm(x, x.shape[-1], w, EPS, **k),), ()),
    "add": (lambda x, o, w, **k: add_rms_norm(x, o, x.shape[-1], w, EPS, **k), ("residual",)),
    "gate behind": (lambda x, o, w, **k: (gated_rms_norm(x, o, x.shape[-1], w, EPS, **k),), ("gate",)),
    "gate first": (
        lambda x, o, w, **k: (gated_rms_norm(x, o, x.shape[-1], w, EPS, norm_before_gate=False, **k),),
        ("gate", "first"),
    ),
}


def oracle(y: Tensor, codes: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Codes, as integers for int8 and values for float8, and scales, by numpy alone; ties to even by its own rint."""
    rows = y.float().numpy()
    most = np.abs(rows).max(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = most / np.float32(127.5 if codes is torch.int8 else 448.0)
        scale = torch.from_numpy(scale).to(y.dtype).float().numpy()
        if codes is torch.int8:
            scale = np.maximum(scale, np.float32(2**-23))
            wanted = np.clip(np.rint(rows * (np.float32(1) / scale)), -128, 127)
            return np.nan_to_num(wanted, nan=0.0), scale  # infinity · 0 is one, too
        values = np.clip(rows / scale, -448, 448).astype(np.float64)
    exponent = np.maximum(np.frexp(values)[1] - 1, -6)  # e4m3: three bits behind the point, subnormals below 2^-6
    step = np.ldexp(1.0, exponent - 3)
    return np.rint(values / step) * step, scale


def call(form: str, x: Tensor, other: Tensor, w: Tensor | None, codes: torch.dtype, **options) -> tuple[Tensor, ...]:
    named = dict.fromkeys(FORMS[form][1][:1], other)
    if "first" in FORMS[form][1]:
        named["norm_before_gate"] = False
    return quantised_rms_norm(x, x.shape[-1], w, EPS, dtype=codes, **named, **options)


def values(codes: Tensor) -> np.ndarray:
    return codes.float().double().numpy()


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("codes", CODES, ids=str)
def test_codes(target, codes, form, columns):
    """Every type, weight and casting mode, on every CPU target, and by the definition."""
    for dtype, mode, weighted in product(DTYPES, ("torch", "llama"), ("same", "wide", None)):
        x, other = sample(5, columns, dtype), sample(5, columns, dtype, seed=7)
        w = None if weighted is None else (1 + sample(1, columns, torch.float32, seed=3)[0] / 4)
        w = w.to(dtype) if weighted == "same" else w
        y, *sums = FORMS[form][0](x, other, w, casting_mode=mode)
        got = call(form, x, other, w, codes, casting_mode=mode)
        wanted, scale = oracle(y, codes)
        assert len(got) == 2 + len(sums)
        assert got[0].dtype is codes
        assert np.array_equal(values(got[0]), wanted, equal_nan=True), (dtype, mode, weighted)
        assert np.array_equal(got[1].numpy(), scale, equal_nan=True)
        assert not sums or torch.equal(got[2], sums[0])


@pytest.mark.parametrize("codes", CODES, ids=str)
def test_torchaos_own(codes):
    """The rule's source: every byte but NaN's sign, which is the CPU's."""
    pytest.importorskip("torchao")
    from torchao.quantization.granularity import PerRow
    from torchao.quantization.quantize_.workflows.float8.float8_tensor import Float8Tensor
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor

    for dtype, columns in product(DTYPES, COLUMNS[1:]):  # torchao 0.18 has no rows of one column
        x, w = sample(33, columns, dtype), (1 + sample(1, columns, torch.float32, seed=3)[0] / 4).to(dtype)
        y = rms_norm(x, columns, w, EPS)
        theirs = (
            Int8Tensor.from_hp(y, granularity=PerRow())
            if codes is torch.int8
            else Float8Tensor.from_hp(y, codes, granularity=PerRow())
        )
        got, scale = quantised_rms_norm(x, columns, w, EPS, dtype=codes)
        assert torch.equal(got.view(torch.uint8), theirs.qdata.view(torch.uint8))
        assert torch.equal(scale, theirs.scale)


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_rows(target, dtype, codes):
    """Zeros, NaN, infinity, overflow, subnormals and ties, each in a row of its own, which alone it changes."""
    x = torch.randn(12, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[1], x[3, 5], x[5, 7] = 0.0, torch.nan, torch.inf
    x[7], x[9] = x[7] * torch.finfo(dtype).tiny, x[9].sign() * torch.finfo(dtype).max
    x[11] = (torch.arange(40) - 20.5).to(dtype)
    y = rms_norm(x, 40, None, 0.0)
    got, scale = quantised_rms_norm(x, 40, None, 0.0, dtype=codes)
    wanted, scales = oracle(y, codes)
    assert np.array_equal(values(got), wanted, equal_nan=True)
    assert np.array_equal(scale.numpy(), scales, equal_nan=True)
    for row in (0, 2, 4, 6, 8):
        alone = quantised_rms_norm(x[row], 40, None, 0.0, dtype=codes)
        assert torch.equal(got[row].view(torch.uint8), alone[0].view(torch.uint8))


def test_every_byte_of_float8(target):
    """Each e4m3 number, the middles between two, and their neighbours."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    middles = (numbers[1:] + numbers[:-1]) / 2
    near = torch.cat([middles * (1 + step) for step in (-(2.0**-23), 0, 2.0**-23)])
    y = torch.cat([numbers, near]).float()
    y = torch.cat([y, -y])
    mean = y.double().square().mean()
    # A row whose rms is a power of two stays as it is: four times as many columns more make it so.
    power = 2.0 ** torch.ceil(mean.log2() / 2 + 1)
    rest = (power.square() + (power.square() - mean) / 4).sqrt()
    assert rest < 448  # the largest of the others, which are then codes times the scale
    row = torch.cat([y, rest.float().expand(4 * len(y))])
    normalised = rms_norm(row, len(row), None, 0.0)
    got, scale = quantised_rms_norm(row, len(row), None, 0.0, dtype=torch.float8_e4m3fn)
    wanted, scales = oracle(normalised[None], torch.float8_e4m3fn)
    assert np.array_equal(values(got)[None], wanted)
    assert scale == scales[0, 0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_batches_and_threads(layout, threads):
    x = lay_out(sample(65, 129, torch.bfloat16), layout)
    outer, columns = x.shape[:-1], x.shape[-1]
    for codes in CODES:
        threads(1)
        got, scale = quantised_rms_norm(x, columns, None, EPS, dtype=codes)
        wanted, scales = oracle(rms_norm(x, columns, None, EPS).reshape(-1, columns), codes)
        assert got.is_contiguous()
        assert got.shape == x.shape
        assert scale.shape == (*outer, 1)
        assert np.array_equal(values(got).reshape(wanted.shape), wanted)
        assert np.array_equal(scale.reshape(-1, 1).numpy(), scales)
        threads(2)
        again, _ = quantised_rms_norm(x, columns, None, EPS, dtype=codes)
        assert torch.equal(got.view(torch.uint8), again.view(torch.uint8))


@pytest.mark.parametrize("rows", [0, 1, 3, 1025])
def test_rows(target, rows):
    x, r = sample(rows, 129, torch.float32), sample(rows, 129, torch.float32, seed=1)
    codes, scale, sum = quantised_rms_norm(x, 129, None, EPS, residual=r)
    assert codes.shape == sum.shape == (rows, 129)
    assert scale.shape == (rows, 1)
    assert torch.equal(sum, x + r)
    assert quantised_rms_norm(torch.ones(3, 0), 0, None, EPS)[0].shape == (3, 0)


def assert_near(got, wanted):
    """One step of int8, or the widest of e4m3."""
    step = 1 if wanted[0].dtype is torch.int8 else 32
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype is b.dtype
        assert (a.float() - b.float()).abs().max() <= step


@pytest.mark.parametrize("mode", ["torch", "llama"])
def test_mapped_codes_are_those_of_the_mapped_norm(target, mode):
    """Bit for bit, also of rows whose squares no float32 holds; with a gate too, which is a form of its own."""
    x, other, w = (sample(n, 130, torch.float32, seed=n) for n in (40, 40, 1))
    options = {"offset": 1.0, "casting_mode": mode}
    for form, size in (("plain", 1.0), ("plain", 1e25), ("add", 1.0), ("add", 1e25), ("gate behind", 1.0)):
        given = x * size, other * (size if form == "add" else 1.0)
        got = torch.vmap(lambda x, o, form=form: call(form, x, o, w[0], torch.int8, **options)[:2])(*given)
        y = torch.vmap(lambda x, o, form=form: FORMS[form][0](x, o, w[0], **options)[0])(*given)
        wanted, scale = oracle(y, torch.int8)
        assert np.array_equal(values(got[0]), wanted), (form, size)
        assert np.array_equal(got[1].numpy(), scale), (form, size)
        assert wanted.any() or (target, size) == ("reference", 1e25), (form, size)


@pytest.mark.parametrize("codes", CODES, ids=str)
def test_compiled_exported_and_mapped(codes):
    x, r, w = (sample(n, 32, torch.float32, seed=n) for n in (6, 6, 1))

    def fn(x, r, w):
        return quantised_rms_norm(x, 32, w, EPS, residual=r, dtype=codes)

    wanted = fn(x, r, w[0])
    torch._dynamo.reset()
    got = torch.compile(fn, fullgraph=True, backend="aot_eager")(x, r, w[0])
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(got, wanted, strict=True))

    class Layer(torch.nn.Module):
        def forward(self, x, r, w):
            return fn(x, r, w)

    program = torch.export.export(Layer(), (x, r, w[0]))
    assert all("rmsnorm" not in str(node.target) for node in program.graph.nodes)
    exported = program.module()(x, r, w[0])  # the definition's fp32 may be an ulp, and so a code, beside the kernels'
    assert_near(exported, wanted)
    if codes is torch.int8:  # torch 2.13 has no batching rule for conversions to float8
        mapped = torch.vmap(fn, (0, 0, None))(x, r, w[0])
        assert_near(mapped, wanted)


X = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"dtype": torch.int32}, ValueError, "dtype must be torch.int8 or torch.float8_e4m3fn, but is torch.int32"),
        ({"residual": X, "gate": X}, RuntimeError, "only one can be"),
        ({"input": X.double()}, RuntimeError, "input must be float32, bfloat16 or float16, but is torch.float64"),
        ({"residual": X[0]}, RuntimeError, r"residual must have the shape and device of input, \(2, 4\)"),
        ({"gate": X[:, :2]}, RuntimeError, r"gate must have the shape and device of input, \(2, 4\)"),
        ({"residual": [1.0]}, TypeError, "residual must be a torch.Tensor, but is a list"),
        ({"weight": torch.ones(3)}, RuntimeError, "weight"),
        ({"input": X.clone().requires_grad_()}, RuntimeError, "have no derivative.*under torch.no_grad"),
        ({"weight": torch.ones(4, requires_grad=True)}, RuntimeError, "have no derivative"),
        ({"eps": -1.0}, ValueError, "eps must be 0 or more, but is -1.0"),
        ({"casting_mode": "Llama"}, ValueError, "unknown casting_mode 'Llama'"),
        ({"activation": "relu", "gate": X}, ValueError, "unknown activation 'relu'"),
        ({"normalized_shape": 3}, RuntimeError, "normalized_shape"),
    ],
)
def test_errors(arguments, error, words):
    named = {"input": X, "normalized_shape": 4} | arguments
    with pytest.raises(error, match=words):
        quantised_rms_norm(**named)
