"""Everyday calls that pass torch's dispatcher by (src/rmsnorm/_handed.py): the operators' bits, and nobody is left out
who would have been asked there."""

import ctypes
import gc
import sys
import threading
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from watching import Trace, Watch, bits

import rmsnorm
from rmsnorm import _called, _handed, _native, _ops, reference

pytestmark = pytest.mark.skipif(not rmsnorm.info().native, reason="the native library is off: nothing is handed to it")
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
X = torch.linspace(-2.0, 3.0, 12).view(3, 4)
WEIGHT = torch.tensor([1.0, 0.5, -2.0, 3.0])


@pytest.mark.parametrize("casting_mode", ["torch", "llama"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", [(1,), (3,), (1, 127), (3, 129), (16, 4096), (1, 5137), (2, 3, 576), (65, 1027)])
@pytest.mark.parametrize("dtype", TYPES)
def test_bits_are_the_operators(handed, dtype, shape, weighted, offset, casting_mode):
    torch.manual_seed(0)
    x, residual = torch.randn(2, *shape).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype) if weighted else None
    options = {"offset": offset, "casting_mode": casting_mode}
    first = casting_mode == "llama"
    want = _ops.rms_norm(x, weight, 1, 1e-6, offset, first)
    sums = _ops.add_rms_norm(x, residual, weight, 1, 1e-6, offset, first)
    calls = [
        rmsnorm.rms_norm(x, shape[-1], weight, 1e-6, **options),
        rmsnorm.rms_norm(x, shape[-1], weight, 1e-6, out=torch.empty_like(x), **options),
        rmsnorm.add_rms_norm(x, residual, shape[-1], weight, 1e-6, **options),
        rmsnorm.rms_norm(x.clone(), shape[-1], weight, 1e-6, out=x, **options),  # the very elements
    ]
    assert handed == [True] * 4
    for got, expected in zip((calls[0], calls[1], *calls[2], calls[3]), (want, want, *sums, want), strict=True):
        assert torch.equal(bits(got), bits(expected))
        assert got.dtype is expected.dtype
        assert got.stride() == expected.stride()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("weighted", [True, False])
def test_in_place(handed, dtype, weighted):
    torch.manual_seed(0)
    x, residual = torch.randn(2, 3, 129).to(dtype)
    weight = torch.randn(129).to(dtype) if weighted else None
    want = _ops.add_rms_norm(x, residual, weight, 1, 1e-6, 0.0, False)
    got = rmsnorm.add_rms_norm_(x, residual, weight, 1e-6)
    assert handed == [True]
    assert got[0] is x
    assert got[1] is residual
    assert torch.equal(bits(x), bits(want[0]))
    assert torch.equal(bits(residual), bits(want[1]))


# Forms with a residual, and LayerNorm: what is called, and the operator.
FORMS = {
    "rms_norm_add": (rmsnorm.rms_norm_add, torch.ops.rmsnorm.rms_norm_add),
    "sandwich": (rmsnorm.sandwich_rms_norm, torch.ops.rmsnorm.sandwich_rms_norm),
}


@pytest.mark.parametrize("casting_mode", ["torch", "llama"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("weighted", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("shape", [(1,), (1, 127), (7, 129), (8, 129), (16, 4096), (2, 3, 576)])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", [*FORMS, "layer_norm"])
def test_bits_of_forms_are_the_operators(handed, name, dtype, shape, weighted, offset, casting_mode):
    torch.manual_seed(0)
    x, residual = torch.randn(2, *shape).to(dtype)
    weight, second = (torch.randn(shape[-1]).to(dtype) if given else None for given in weighted)
    first = casting_mode == "llama"
    if name == "layer_norm":
        got = rmsnorm.layer_norm(x, shape[-1:], weight, second, 1e-5)
        want = torch.ops.rmsnorm.layer_norm(x, weight, second, 1, 1e-5)
    else:
        form, operator = FORMS[name]
        sandwich = name == "sandwich"
        weights, last, more = ((weight, second), (1e-3,), {"next_eps": 1e-3}) if sandwich else ((weight,), (), {})
        got = form(x, residual, shape[-1], *weights, 1e-6, offset=offset, casting_mode=casting_mode, **more)
        want = operator(x, residual, *weights, 1, 1e-6, offset, first, *last)
    assert handed == [True]
    for one, expected in zip(*(t if isinstance(t, tuple) else (t,) for t in (got, want)), strict=True):
        assert torch.equal(bits(one), bits(expected))
        assert (one.dtype, one.stride()) == (expected.dtype, expected.stride())


def test_numbers_are_the_operators():
    """``csrc/called.h`` has them once, Python for two callers."""
    assert _called.ROWS.kinds.items() & _handed.KINDS.items() == {*_handed.KINDS.items()} - {("layer_norm", 6)}


@pytest.mark.parametrize("shape", [4, (4,), [4], torch.Size([4])])
def test_shapes(handed, shape):
    assert torch.equal(rmsnorm.rms_norm(X, shape, WEIGHT, 1e-6), _ops.rms_norm(X, WEIGHT, 1, 1e-6, 0.0, False))
    assert handed == [True]


@pytest.mark.parametrize("eps", [None, 0, 0.0, 1e-6, torch.tensor(1e-6)])
@pytest.mark.parametrize("dtype", TYPES)
def test_eps(handed, dtype, eps):
    x, weight = X.to(dtype), WEIGHT.to(dtype)
    default = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps
    want = _ops.rms_norm(x, weight, 1, default if eps is None else float(eps), 0.0, False)
    assert torch.equal(rmsnorm.rms_norm(x, 4, weight, eps), want)
    assert handed == [not isinstance(eps, torch.Tensor)]  # which may have a gradient, as is asked the long way


def test_modes_see_the_operator(handed):
    with Watch() as watch:
        rmsnorm.rms_norm(X, 4, WEIGHT)
        rmsnorm.add_rms_norm(X, X, 4, WEIGHT, 1e-6)
        rmsnorm.add_rms_norm_(X.clone(), X.clone(), WEIGHT)
        rmsnorm.rms_norm_add(X, X, 4, WEIGHT)
        rmsnorm.sandwich_rms_norm(X, X, 4, WEIGHT)
        rmsnorm.layer_norm(X, 4, WEIGHT)
    assert {f"rmsnorm.{name}.default" for name in ("rms_norm_add", "sandwich_rms_norm", "layer_norm")} <= {*watch.seen}
    assert {"rmsnorm.rms_norm.default", "rmsnorm.add_rms_norm.default"} <= {*watch.seen}
    assert any("add_rms_norm_" in name for name in watch.seen)
    with FlopCounterMode(display=False):
        rmsnorm.rms_norm(X, 4, WEIGHT)
    assert not any(handed)


@pytest.mark.parametrize("profile", [torch.profiler.profile, torch.autograd.profiler.profile])
def test_profilers_see_the_operator(handed, profile):
    with profile() as seen:
        rmsnorm.rms_norm(X, 4, WEIGHT)
    events = seen.events() if hasattr(seen, "events") else seen.function_events
    assert any("rmsnorm::rms_norm" in event.name for event in events)
    assert not any(handed)


def test_observers_see_the_operator(handed):
    """Without a profiler: what has asked torch's C++ to hear of operators."""
    with Trace() as trace:
        rmsnorm.rms_norm(X, 4, WEIGHT)
        rmsnorm.layer_norm(X, 4, WEIGHT)
    assert {"rmsnorm::rms_norm_weighted", "rmsnorm::layer_norm"} <= {*trace.seen}
    assert not any(handed)


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace's: it is deprecated, and sizes become constants
def test_tracers_see_the_operator(handed):
    traced = torch.jit.trace(lambda x: rmsnorm.rms_norm(x, 4, WEIGHT), X, check_trace=False)
    assert "rms_norm" in str(traced.inlined_graph)
    assert not any(handed)
    torch.testing.assert_close(traced(X + 1), rmsnorm.rms_norm(X + 1, 4, WEIGHT))


# What shows other values than its memory holds, or has no memory, or other elements in it. The function: of a copy.
REFUSED = {
    "negated": torch._neg_view,
    "negated, a column": lambda t: torch.complex(t, t).conj().imag.as_strided((3, 4), (8, 1)),
    "transposed": lambda t: t.t().contiguous().t(),
    "expanded": lambda t: t[:1].expand(3, 4),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "zeros without memory": lambda t: torch._efficientzerotensor(t.shape),
    "functional": torch._to_functional_tensor,
    "empty": lambda t: t[:0],
    "integers": lambda t: t.int(),
    "complex": lambda t: t.to(torch.complex64),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(handed, name):
    x = REFUSED[name](X.clone())
    if name == "functional":
        assert _handed.norm(0, 4, 1e-6, 0.0, False, None, None, None, x, None, WEIGHT) is None
        return
    if name == "integers":
        with pytest.raises(RuntimeError, match="rms_norm"):
            rmsnorm.rms_norm(x, 4, WEIGHT)
    else:
        plain = torch.zeros(3, 4) if "zeros" in name else x.clone().contiguous()
        want = reference.rms_norm(plain, WEIGHT, 1, 1e-6, 0.0, False)[0]  # negated, it would be another number
        torch.testing.assert_close(rmsnorm.rms_norm(x, 4, WEIGHT, 1e-6), want)
    assert not any(handed)


@pytest.mark.parametrize("which", ["weight", "residual", "out"])
def test_other_tensors_that_are_negated(handed, which):
    given = {"weight": WEIGHT.clone(), "residual": X.clone(), "out": torch.zeros_like(X)}
    given[which] = torch._neg_view(given[which])
    want = rmsnorm.add_rms_norm(X, given["residual"].clone(), 4, given["weight"].clone())[0]
    handed.clear()
    if which == "out":
        with pytest.raises(RuntimeError, match="negated"):
            rmsnorm.rms_norm(X, 4, WEIGHT, out=given["out"])
    else:
        assert torch.equal(rmsnorm.add_rms_norm(X, given["residual"], 4, given["weight"])[0], want)
    assert not any(handed)


def test_what_shares_memory(handed):
    memory = torch.randn(64)
    x, behind, weight = memory[:12].view(3, 4), memory[4:16].view(3, 4), memory[4:8]
    want = rmsnorm.rms_norm(x.clone(), 4, WEIGHT)
    handed.clear()
    assert torch.equal(rmsnorm.rms_norm(x, 4, WEIGHT, out=behind), want)
    memory.copy_(torch.randn(64))
    want = rmsnorm.rms_norm(x.clone(), 4, weight.clone())
    handed.clear()
    assert torch.equal(rmsnorm.rms_norm(x, 4, weight, out=x), want)
    with pytest.raises(RuntimeError, match="share"):
        rmsnorm.add_rms_norm_(x, behind, WEIGHT)
    assert not any(handed)


@pytest.mark.parametrize(
    "given",
    [
        {"normalized_shape": 3},
        {"normalized_shape": "4"},
        {"normalized_shape": (3, 4)},
        {"normalized_shape": 4.0},
        {"normalized_shape": (4.0,)},
        {"normalized_shape": ()},
        {"normalized_shape": torch.tensor([4])},
        {"normalized_shape": True},
        {"weight": WEIGHT[:3]},
        {"weight": "weight"},
        {"eps": "1"},
        {"offset": "1"},
        {"offset": None},
        {"offset": None, "weight": None},
        {"casting_mode": "rounded"},
        {"out": torch.zeros(4, 3)},
        {"out": torch.zeros(3, 4, dtype=torch.float64)},
        {"out": "out"},
    ],
    ids=str,
)
def test_what_is_odd_comes_out_as_the_long_way(hand_to, given):
    arguments = {"normalized_shape": (4,), "weight": WEIGHT, "eps": 1e-6} | given

    def outcome():
        try:
            return rmsnorm.rms_norm(X, **arguments).tolist()
        except (RuntimeError, ValueError, TypeError) as error:
            return type(error), str(error)

    short = outcome()
    hand_to(lambda *given: None)
    assert short == outcome()


def test_what_is_large_is_the_operators(handed):
    """Which asks for huge pages."""
    before = _native.large_bytes()
    _native.set_cache_bytes(3, X.nbytes)
    try:
        rmsnorm.rms_norm(X, 4, WEIGHT)
        rmsnorm.rms_norm(X[:2], 4, WEIGHT)
    finally:
        _native.set_cache_bytes(3, before)
    assert handed == [False, True]


def test_the_version_counts(handed):
    x, residual, out = X.clone(), X.clone(), torch.empty_like(X)
    before = x._version, residual._version, out._version
    rmsnorm.rms_norm(x, 4, WEIGHT, out=out)
    rmsnorm.add_rms_norm_(x, residual, WEIGHT)
    assert (x._version, residual._version, out._version) == tuple(version + 1 for version in before)
    assert handed == [True, True]


@pytest.mark.parametrize("mode", [nullcontext, torch.inference_mode, torch.no_grad])
def test_the_output_is_of_the_mode(handed, mode):
    with mode():
        y = rmsnorm.rms_norm(X, 4, WEIGHT)
        assert y.is_inference() == torch.is_inference_mode_enabled()
    assert handed == [True]
    if not y.is_inference():
        y.resize_(100)  # of torch's allocator


def test_sizes_of_one_may_have_any_stride(handed):
    x = torch.randn(1, 1, 2, 4).transpose(1, 2)  # a token's heads: strides 8, 4, 8, 1
    y = rmsnorm.rms_norm(x, 4, WEIGHT)
    assert handed == [True]
    assert y.stride() == (8, 4, 4, 1)
    assert torch.equal(y, rmsnorm.rms_norm(x.contiguous(), 4, WEIGHT))


def test_nothing_is_kept():
    x, weight, out = X.clone(), WEIGHT.clone(), torch.empty_like(X)
    seen = weakref.ref(rmsnorm.rms_norm(x, 4, weight))
    gc.collect()
    assert seen() is None
    constants = None, True, (4,), 1e-6
    counted = [x, weight, out, *constants[2:]]
    before = [sys.getrefcount(one) for one in counted]
    for _ in range(100):
        rmsnorm.rms_norm(x, constants[2], weight, constants[3], out=out)
        rmsnorm.add_rms_norm(x, x, constants[2], weight, constants[3])
        rmsnorm.rms_norm(x, [4], weight, constants[3])
        rmsnorm.rms_norm(x.t().contiguous().t(), constants[2], weight, constants[3])
    assert [sys.getrefcount(one) for one in counted] == before


@pytest.mark.parametrize("rows", [16, 160])  # with the interpreter's lock, and without
def test_threads(rows):
    torch.manual_seed(0)
    given = [torch.randn(rows, 256) for _ in range(4)]
    want = [rmsnorm.rms_norm(x, 256) for x in given]
    wrong = []

    def work(k):
        wrong.extend(k for _ in range(100) if not torch.equal(rmsnorm.rms_norm(given[k], 256), want[k]))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_of_another_table_nothing_is_made(monkeypatch):
    """A torch without DLPack's table, with something else of its name, or with one of the next major version."""
    for table in (None, 7, torch.empty(0)):
        monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", table)
        assert not _handed._made()
    monkeypatch.undo()
    assert _handed._made()
    known = len(_handed._FUNCTIONS.split()) + len(_handed._OBJECTS) + len(_handed._INSIDE) + 1
    later = (ctypes.c_uint64 * 8)(2, *[1] * 7)  # its version, then functions
    assert _handed._hand(ctypes.addressof(later), [1] * known) is None
