"""Proves that the gated norm is what the models that have one compute: values against a float64 oracle and against the
classes of transformers, gradients and transforms against the formula, for every order, activation, group and rounding.
"""

from __future__ import annotations

import copy
import importlib
import pickle
import re
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from gated_oracle import Form, formula
from oracle import DTYPES, HALVES, LAYOUTS, MODES, exact, gains, incoming, lay_out, rows_of, same_bits, sample
from torch import Tensor

from rmsnorm import GatedRMSNorm, gated_rms_norm, rms_norm
from rmsnorm.forms import gated_ops

FORMS = [
    Form(silu=silu, norm_before_gate=before, mode=mode)
    for silu, before, mode in product((True, False), (True, False), MODES)
]
# The order, the activation and the rounding of each meaning of transformers' classes, with their groups of 32.
MEANINGS = {
    "F1": Form(norm_before_gate=False, mode="llama", group_size=32),
    "F2": Form(mode="llama"),
    "F3": Form(silu=False),
    "F4, norm first": Form(group_size=32),
    "F4, gate first": Form(norm_before_gate=False, group_size=32),
}
# In ulps of the output. Native: the contract (docs/numerics.md). The reference computes in the accumulation type: 5 as
# in oracle.py, plus one each for the activation (torch's own is within 2), its product and what that moves in the mean.
ULPS = {torch.float32: 0.6, torch.float64: 6.0, torch.bfloat16: 0.51, torch.float16: 0.51}
REFERENCE_ULPS = ULPS | {torch.float32: 10.0, torch.float64: 10.0}


def bound(target: str, dtype: torch.dtype) -> float:
    return (REFERENCE_ULPS if target == "reference" else ULPS)[dtype]


def gates(rows: int, columns: int, dtype: torch.dtype = torch.float64, seed: int = 5) -> Tensor:
    """Gates of usual sizes, and a few columns of large ones, whose activation is nearly linear or nearly 0."""
    generator = torch.Generator().manual_seed(seed + columns)
    gate = 3 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    gate[:, 7::29] *= 10
    return gate.clamp(-60, 60).to(dtype)


def call(form: Form, x: Tensor, gate: Tensor | None, weight: Tensor | None) -> Tensor:
    return gated_rms_norm(x, gate, x.shape[-1:], weight, **form.options())


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(target, dtype, form):
    """Awkward widths, groups, weights and gates of each type, an offset."""
    for columns, group in ((1, 1), (31, None), (96, 32), (129, 3), (576, None), (1027, 13)):
        x = sample(7, columns, dtype)
        kinds = [t for t in DTYPES if t is not torch.float64 or dtype is torch.float64]
        for kind in (dtype, *(k for k in kinds if columns in (31, 96))):
            for weight in (None, gains(columns, dtype=dtype), gains(columns, dtype=kind)):
                f = replace(form, group_size=group)
                gate = gates(7, columns, kind)
                y = call(f, x, gate, weight)
                wide = not form.norm_before_gate and form.mode == "llama" and weight is not None
                assert y.dtype is (torch.promote_types(dtype, weight.dtype) if wide else dtype)
                f.bounds(x, gate, weight, bound(target, dtype)).check(y, (columns, group, kind))
        f = replace(form, offset=1.0)
        weight = gains(columns, dtype=dtype)
        f.bounds(x, gate, weight, bound(target, dtype)).check(call(f, x, gate, weight), (columns, "offset"))


def theirs(meaning: str, columns: int) -> torch.nn.Module:
    path, name, *options = {
        "F1": ("zamba2", "Zamba2RMSNormGated", 32),
        "F2": ("qwen3_next", "Qwen3NextRMSNormGated"),
        "F3": ("kimi_linear", "KimiLinearRMSNormGated"),
        "F4, norm first": ("falcon_h1", "FalconH1RMSNormGated", 1e-6, columns // 32, True),
        "F4, gate first": ("falcon_h1", "FalconH1RMSNormGated", 1e-6, columns // 32, False),
    }[meaning]
    module = importlib.import_module(f"transformers.models.{path}.modeling_{path}")
    norm = getattr(module, name)(columns, *options)
    norm.variance_epsilon = 1e-5
    return norm


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("meaning", MEANINGS)
def test_classes_of_transformers(target, dtype, meaning):
    """Mixed types of input, gate and weight, strided inputs. Half types: at least 99.9 % of the bits, the rest one
    unit (two, where a second rounding carries on). float32: each side within its own bound of the truth."""
    pytest.importorskip("transformers")
    norm, form = theirs(meaning, 96), MEANINGS[meaning]
    for weight_dtype, gate_dtype in product((torch.float32, *HALVES), repeat=2):
        norm.weight.data = gains(96, dtype=weight_dtype)
        x, gate = sample(60, 96, dtype).view(5, 12, 96), gates(60, 96, gate_dtype).view(12, 5, 96).transpose(0, 1)
        wanted, got = norm(x, gate), call(form, x, gate, norm.weight)
        assert got.dtype is wanted.dtype
        eps = torch.finfo(dtype).eps
        if dtype is torch.float32:
            assert ((got - wanted).abs() <= 8 * eps * wanted.abs()).all()
            continue
        different = got != wanted
        assert different.double().mean() <= 1e-3
        step = 4 * torch.finfo(dtype).smallest_normal * eps  # of subnormals, times a weight
        assert ((got.double() - wanted.double()).abs() <= 2 * eps * wanted.double().abs() + step).all()
    if meaning not in ("F2", "F3"):
        assert torch.equal(call(form, x, None, norm.weight), norm(x)) or dtype is torch.float32
        torch.testing.assert_close(call(form, x, None, norm.weight), norm(x))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("meaning", MEANINGS)
def test_gradients_of_transformers(target, dtype, meaning):
    """Those of the classes, which round every step to a half type: up to six of them, each half an eps, on values that
    don't cancel on average; so 4 eps of the norm of each gradient."""
    pytest.importorskip("transformers")
    norm, form = theirs(meaning, 96), MEANINGS[meaning]
    for weight_dtype in {dtype, torch.float32}:
        norm.weight.data = gains(96, dtype=weight_dtype)
        leaves = sample(60, 96, dtype).requires_grad_(), gates(60, 96, dtype).requires_grad_(), norm.weight
        results = []
        for function in (norm, lambda x, g: call(form, x, g, norm.weight)):
            y = function(*leaves[:2])
            results.append(torch.autograd.grad(y, leaves, incoming(60, 96, y.dtype)))
        for wanted, got in zip(*results, strict=True):
            assert got.dtype is wanted.dtype
            error = (got.double() - wanted.double()).norm() / wanted.double().norm()
            assert error <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(target, dtype, form):
    """Against autograd of the formula in float64: errors are those of the arithmetic, on the size of what is summed."""
    for columns, group in ((31, None), (96, 32), (1027, None)):
        check_gradients(dtype, replace(form, group_size=group), columns)


def check_gradients(dtype: torch.dtype, f: Form, columns: int) -> None:
    weight_dtype = torch.float32 if dtype in HALVES and columns == 31 else dtype
    leaves = [sample(6, columns, dtype), gates(6, columns, dtype), gains(columns, dtype=weight_dtype)]
    grad = incoming(6, columns, call(f, *leaves).dtype)
    results = []
    for function, kind in ((call, None), (formula, torch.float64)):
        inputs = [(t if kind is None else t.to(kind)).clone().requires_grad_() for t in leaves]
        y = function(f, *inputs)
        results.append(torch.autograd.grad(y, inputs, grad.to(y.dtype)))
    for name, got, wanted, leaf in zip(("input", "gate", "weight"), *results, leaves, strict=True):
        assert got.dtype is leaf.dtype
        unit = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        # dx cancels within a row, dw and dgate don't; rows differ in size by powers of two.
        size = wanted.abs().amax(-1, keepdim=True)
        margin = 0.51 * torch.finfo(leaf.dtype).eps * wanted.abs() + 64 * unit * size
        margin += 2 * torch.finfo(leaf.dtype).smallest_normal * torch.finfo(leaf.dtype).eps
        assert ((got.double() - wanted).abs() <= margin).all(), (name, columns)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(target, layout):
    """The bits of contiguous tensors, for input, gate and incoming gradient, and no neighbour of theirs is read."""
    for dtype, form in product((torch.float32, torch.bfloat16), (MEANINGS["F1"], MEANINGS["F2"])):
        tensors = sample(10, 96, dtype), gates(10, 96, dtype), incoming(10, 96, dtype)
        results = []
        for arrange in (lambda t: rows_of(t, layout), lambda t: lay_out(t, layout)):
            x, gate, grad = (arrange(t) for t in tensors)
            shape = max((t.shape for t in (x, gate, grad)), key=len)
            x, gate = x.view(shape).requires_grad_(), gate.view(shape).requires_grad_()
            weight = gains(96, dtype=dtype).requires_grad_()
            y = call(form, x, gate, weight)
            assert y.is_contiguous()
            results.append([y.detach(), *torch.autograd.grad(y, (x, gate, weight), grad.view(shape))])
        for a, b in zip(*results, strict=True):
            if target != "reference":
                assert same_bits(a.reshape(b.shape), b)
            torch.testing.assert_close(a.reshape(b.shape), b)  # torch sums strided rows in another order


def test_a_row_is_its_own(target):
    """A row's bits don't depend on the others; a NaN or infinity stays in its row."""
    for form, dtype in product(MEANINGS.values(), (torch.float32, torch.bfloat16)):
        x, gate, weight = sample(40, 96, dtype), gates(40, 96, dtype), gains(96, dtype=dtype)
        whole = call(form, x, gate, weight)
        assert same_bits(whole[17:18], call(form, x[17:18], gate[17:18], weight))
        x[3, 5], gate[9, 50], gate[11, 2] = torch.nan, torch.nan, torch.inf
        spoiled = call(form, x, gate, weight)
        others = [i for i in range(40) if i not in (3, 9, 11)]
        assert same_bits(spoiled[others], whole[others])
        assert spoiled[3].isnan().any()
        assert spoiled[9].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [Form(), Form(silu=False)], ids=["silu", "sigmoid"])
def test_gates_of_any_size(target, dtype, form):
    """From -inf to inf: where the activation of the formula overflows or is subnormal, where it is 0, 1, or NaN."""
    steps = torch.tensor([0.0, 1e-30, 1e-6, 0.5, 1.278, 15.0, 16.7, 50.0, 87.0, 88.8, 90.0, 104.0, 200.0, 744.0, 3e4])
    gate = torch.cat((steps, -steps, torch.tensor([torch.inf, -torch.inf, torch.nan]))).to(dtype).expand(2, -1)
    x = sample(2, gate.shape[-1], dtype)
    y = call(form, x, gate, None)
    truth = form.bounds(x, gate, None, bound(target, dtype))
    finite = np.isfinite(truth.low)
    assert (exact(y).astype(truth.low.dtype)[~finite].astype(str) == truth.low[~finite].astype(str)).all()
    # exp(-|g|) may be subnormal, off by half a step, which g multiplies (only fp64 sees it). torch's sigmoid and silu
    # overflow: below -88 (-709) the reference gives 0.
    lost = 1e-320 if dtype is torch.float64 else 0.0
    if target == "reference":
        lost = 1e-300 if dtype is torch.float64 else 1e-30
    got, low, high = (values[finite] for values in (exact(y).astype(truth.low.dtype), truth.low, truth.high))
    assert ((low - lost <= got) & (got <= high + lost)).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("form", [Form(eps=0.0), Form(silu=False, eps=0.0)], ids=["silu", "sigmoid"])
def test_every_gate_of_a_half_type(native_target, dtype, form):
    """All 65536, beside an x̂ of exactly 1: the activation alone, rounded once."""
    gate = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(256, 256)
    finite = gate.isfinite()
    y = call(form, torch.ones_like(gate), gate, None)
    assert y[gate.isnan()].isnan().all()
    gate, y = gate[finite].view(-1, 1), y[finite].view(-1, 1)
    form.bounds(torch.ones_like(gate), gate, None, ULPS[dtype]).check(y, dtype)


def test_no_rows_and_no_columns(target):
    for shape in ((0, 32), (3, 0), (2, 0, 32)):
        x, weight = torch.zeros(shape, requires_grad=True), torch.ones(shape[-1:], requires_grad=True)
        for form in (Form(), Form(norm_before_gate=False)):
            y = call(form, x, torch.zeros(shape), weight)
            assert y.shape == shape
            dx, dw = torch.autograd.grad(y.sum(), (x, weight))
            assert dx.shape == shape
            assert (dw == 0).all()


@pytest.mark.parametrize("form", [*FORMS[::2], Form(group_size=2, offset=1.0)], ids=str)
def test_derivatives_of_first_and_second_order(target, form):
    x, gate, weight = ((t / s).requires_grad_() for t, s in ((sample(3, 4), 8), (gates(3, 4), 3), (gains(4), 1)))
    form = replace(form, eps=0.1)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda *a: call(form, *a), (x, gate, weight))
        assert check(lambda *a: call(form, *a, None), (x, gate))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's forward AD, about itself
@pytest.mark.parametrize("form", [Form(), Form(norm_before_gate=False, silu=False, offset=1.0, mode="llama")], ids=str)
def test_transforms_are_those_of_the_formula(form):
    x, gate, w = sample(4, 5) / 8, gates(4, 5), gains(5)
    ours, truth = (lambda *a: call(form, *a)), (lambda *a: formula(form, *a))
    scalar = lambda f: lambda *a: f(*a).square().sum()  # noqa: E731
    for transform in (
        lambda f: torch.func.jvp(f, (x, gate, w), (x, gate, w)),
        lambda f: torch.func.jacrev(f, (0, 1, 2))(x, gate, w),
        lambda f: torch.func.hessian(scalar(f), (0, 1, 2))(x, gate, w),
        lambda f: torch.func.vmap(f, (0, 0, None))(x, gate, w),
        lambda f: torch.func.vmap(torch.func.grad(scalar(f), (0, 1, 2)), (0, 0, None))(x, gate, w),
        lambda f: torch.autograd.functional.jacobian(f, (x, gate, w), vectorize=True),
        lambda f: torch.autograd.functional.hvp(scalar(f), (x, gate, w), (x, gate, w)),
    ):
        torch.testing.assert_close(transform(ours), transform(truth), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("meaning", ["F1", "F2"])
def test_compiled_equals_eager(meaning):
    """One graph for all numbers of rows, forward and backward, with the bits of eager mode."""
    torch.compiler.reset()
    form = MEANINGS[meaning]
    eager = lambda *a: call(form, *a)  # noqa: E731
    compiled = torch.compile(eager, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, dtype in ((6, torch.bfloat16), (17, torch.bfloat16)):
        results = []
        for function in (compiled, eager):
            leaves = [
                t.requires_grad_() for t in (sample(rows, 96, dtype), gates(rows, 96, dtype), gains(96, dtype=dtype))
            ]
            y = function(*leaves)
            results.append([y.detach(), *torch.autograd.grad(y, leaves, incoming(rows, 96, dtype))])
            with torch.no_grad():
                results[-1].append(function(*leaves))
        assert all(map(same_bits, *results))


@pytest.mark.parametrize("before", [True, False])
def test_operators_keep_torchs_rules(before):
    for dtype, first in ((torch.float32, False), (torch.bfloat16, True)):
        x, gate, weight = sample(6, 12, dtype), gates(6, 12, dtype), gains(12)
        for w in (None, weight.float(), weight.float().view(3, 4)):
            shaped = [t if w is None or w.dim() == 1 else t.view(6, 3, 4) for t in (x, gate)]
            options = w, 1, 1e-5, 1.0
            rstd = torch.ones(*shaped[0].shape[:-1], 1)
            samples = {
                "rms_norm": (*shaped, *options, first, before, True),
                "forward": (*shaped, *options, first, before, False),
                "backward": (shaped[0], *shaped, rstd, *options, before, True, True, True, w is not None),
            }
            for name, arguments in samples.items():
                result = torch.library.opcheck(getattr(gated_ops, name), arguments)
                assert set(result.values()) == {"SUCCESS"}


X = torch.ones(2, 3, 6)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, X, 5), {}, RuntimeError, "Given normalized_shape=[5], expected input with shape [*, 5], but got input"),
        ((X, X, 6, torch.ones(5)), {}, RuntimeError, "weight of shape [5] and normalized_shape = [6]"),
        (
            (X, X[0], 6),
            {},
            RuntimeError,
            "gate must have the shape and device of input, (2, 3, 6) on cpu, but is (3, 6)",
        ),
        ((X, X.to("meta"), 6), {}, RuntimeError, "but is (2, 3, 6) on meta; expand it first"),
        ((X, X.int(), 6), {}, RuntimeError, "of a real floating type, but are torch.float32 and torch.int32"),
        ((X.cfloat(), X, 6), {}, RuntimeError, "of a real floating type, but are torch.complex64 and torch.float32"),
        ((X, X, 6), {"group_size": 4}, RuntimeError, "group_size must divide the last dimension of input, 6, which"),
        ((X, X, 6), {"group_size": 0}, RuntimeError, "but is 0, with normalized_shape = [6]"),
        ((X, X, (3, 6)), {"group_size": 3}, RuntimeError, "but is 3, with normalized_shape = [3, 6]"),
        ((X, X, 6), {"activation": "gelu"}, ValueError, "unknown activation 'gelu'; choose one of 'silu', 'sigmoid'"),
        ((X, X, 6), {"casting_mode": "fla"}, ValueError, "unknown casting_mode 'fla'; choose one of 'torch', 'llama'"),
    ],
)
def test_arguments_that_do_not_fit(arguments, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        gated_rms_norm(*arguments, **options)


def test_the_layer():
    """State, copies, text; no gate is the plain norm, in groups too; bad options are refused at once."""
    layer = GatedRMSNorm(12, 1e-3, norm_before_gate=False, group_size=4, offset=1.0, casting_mode="llama")
    assert torch.equal(layer.weight, torch.zeros(12))
    layer.weight.data = gains(12).float()
    x, gate = sample(5, 12, torch.float32), gates(5, 12, torch.float32)
    y = layer(x, gate)
    form = Form(norm_before_gate=False, group_size=4, offset=1.0, mode="llama", eps=1e-3)
    assert torch.equal(y, call(form, x, gate, layer.weight))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x, gate), y)
    assert list(layer.state_dict()) == ["weight"]
    plain = rms_norm(x.view(5, 3, 4), 4, layer.weight.view(3, 4), 1e-3, offset=1.0, casting_mode="llama")
    assert torch.equal(layer(x), plain.view(5, 12))
    assert str(layer) == (
        "GatedRMSNorm((12,), eps=0.001, elementwise_affine=True, offset=1.0, casting_mode='llama', "
        "activation='silu', norm_before_gate=False, group_size=4)"
    )
    assert GatedRMSNorm(12, elementwise_affine=False)(x, gate).shape == x.shape
    with pytest.raises(ValueError, match="GatedRMSNorm: unknown activation 'relu'"):
        GatedRMSNorm(12, activation="relu")
