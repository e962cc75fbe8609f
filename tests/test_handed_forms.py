"""Kernels that are called past torch's dispatcher, of any form (csrc/straight_ops.cpp): the operators' bits, and nobody
is left out who would have been asked there. A row of the table for each."""

import gc
import sys
import weakref

import pytest
import torch
from torch.autograd import forward_ad
from watching import Functions, Sub, Trace, Watch, bits

import rmsnorm
from rmsnorm import _handed

pytestmark = pytest.mark.skipif(not rmsnorm.info().native, reason="the native library is off: no kernel is called")
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ROWS, WEIGHTS, SAMPLES = ("x", "residual", "gate"), ("weight", "bias"), ("scale", "shift", "by")
HEADS, ANGLES = ("query", "key"), ("cos", "sin")


def tensors(columns=8, dtype=torch.float32, rows=3):
    """By the names of the table's functions. Heads lie as a projection wrote them."""
    torch.manual_seed(0)
    given = {name: torch.randn(2, rows, columns) for name in ROWS}
    given |= {name: torch.randn(columns) for name in WEIGHTS} | {name: torch.randn(2, columns) for name in SAMPLES}
    given |= {name: torch.randn(2, rows, 2, columns).transpose(1, 2) for name in HEADS}
    given |= {name: torch.randn(rows, columns) for name in ANGLES}
    return {name: one.to(dtype) for name, one in given.items()}


def size(tensor):
    return tensor.shape[-1]


# Of those tensors alone that a function names, so that each can be another.
FORMS = {
    "bias": lambda x, weight, bias: rmsnorm.rms_norm(x, size(x), weight, 1e-6, bias=bias),
    "out_dtype": lambda x, weight: rmsnorm.rms_norm(x, size(x), weight, 1e-6, out_dtype=torch.float32),
    "rstd": lambda x, weight: rmsnorm.rms_norm(x, size(x), weight, 1e-6, return_rstd=True),
    "partial": lambda x, weight: rmsnorm.rms_norm(x, size(x), weight, 1e-6, partial=0.5),
    "add, bias": lambda x, residual, weight, bias: rmsnorm.add_rms_norm(x, residual, size(x), weight, 1e-6, bias=bias),
    "add, unrounded": lambda x, residual, weight: rmsnorm.add_rms_norm(
        x, residual, size(x), weight, 1e-6, round_sum=False
    ),
    "add, rstd": lambda x, residual, weight: rmsnorm.add_rms_norm(x, residual, size(x), weight, return_rstd=True),
    "add, wide": lambda x, residual, weight: rmsnorm.add_rms_norm(
        x, residual.float(), size(x), weight, out_dtype=x.dtype
    ),
    "add in place": lambda x, residual, weight: rmsnorm.add_rms_norm_(
        x.clone(), residual.clone(), weight, 1e-6, round_sum=False
    ),
    "inverse_rms": lambda x: rmsnorm.inverse_rms(x, size(x)),
    "l2": lambda x, weight: rmsnorm.l2_norm(x, size(x), weight),
    "l2, inside": lambda x: rmsnorm.l2_norm(x, size(x), eps=1e-6, eps_inside=True, casting_mode="llama"),
    "gated": lambda x, gate, weight: rmsnorm.gated_rms_norm(x, gate, size(x), weight, 1e-6),
    "gated first": lambda x, gate, weight: rmsnorm.gated_rms_norm(
        x, gate, size(x), weight, norm_before_gate=False, activation="sigmoid", casting_mode="llama"
    ),
    "modulated": lambda x, scale, shift: rmsnorm.modulated_norm(x, size(x), scale=scale, shift=shift),
    "modulated, added": lambda x, residual, by, scale: rmsnorm.modulated_norm(
        x, size(x), residual=residual, gate=by, scale=scale, statistic="layer"
    ),
    "gated add": lambda x, residual, by: rmsnorm.gated_add(x, residual, gate=by),
    "int8": lambda x, weight: rmsnorm.quantised_rms_norm(x, size(x), weight, 1e-6),
    "float8, added": lambda x, residual, weight: rmsnorm.quantised_rms_norm(
        x, size(x), weight, residual=residual, dtype=torch.float8_e4m3fn
    ),
    "heads": lambda query, key, cos, sin, weight, bias: rmsnorm.heads_rms_norm_rope(
        query, key, cos, sin, weight, bias, 1e-6
    ),
    "rope": lambda query, key, cos, sin: rmsnorm.rope(query, key, cos, sin, interleaved=True),
}
NAMES = {name: form.__code__.co_varnames[: form.__code__.co_argcount] for name, form in FORMS.items()}
EACH = [(name, which) for name, names in NAMES.items() for which in names]


def called(name, given, **others):
    """All results, in a tuple."""
    results = FORMS[name](**({which: given[which] for which in NAMES[name]} | others))
    return results if isinstance(results, tuple) else (results,)


def assert_same(results, expected):
    for one, other in zip(results, expected, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert torch.equal(bits(one), bits(other))


def is_there(name, dtype):
    return dtype is not torch.float64 or not any(word in name for word in ("int8", "float8", "wide", "out_dtype"))


@pytest.mark.parametrize("columns", [2, 126, 1030])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", FORMS)
def test_bits_are_the_operators(straight, without_straight, name, dtype, columns):
    if not is_there(name, dtype):
        return
    given = tensors(columns, dtype)
    results = called(name, given)
    assert straight == [True]
    without_straight()
    expected = called(name, given)
    assert_same(results, expected)
    assert [one.stride() for one in results] == [one.stride() for one in expected]


@pytest.mark.parametrize("name", FORMS)
def test_of_many_rows_other_threads_run(straight, without_straight, name):
    given = tensors(1024, rows=40)
    results = called(name, given)
    assert straight == [True]
    without_straight()
    assert_same(results, called(name, given))


# What shows other values than its memory holds, has none, or a class of its own.
OTHERS = {
    "negated": torch._neg_view,
    "a class": lambda t: t.as_subclass(Sub),
    "zeros": lambda t: torch._efficientzerotensor(t.shape),
    "meta": lambda t: t.to("meta"),
    "whole numbers": torch.Tensor.int,
    "none of them": lambda t: t[:0],
    "no tensor": lambda t: "tensor",
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize(("name", "which"), EACH)
def test_who_is_not_served(straight, without_straight, name, which, kind):
    given = tensors()
    if kind == "whole numbers" and which == "residual" and "wide" in name:
        return  # made floats first
    if name == "add in place" and which in ("x", "residual") and kind != "a class":
        return  # a clone of it shows what it holds
    other = OTHERS[kind](given[which])

    def outcome():
        try:
            return [one.as_subclass(torch.Tensor) for one in called(name, given, **{which: other})]
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            return type(error), str(error)

    found = outcome()
    assert not any(straight[:1] if kind == "a class" else straight)  # which is left on the way
    without_straight()
    again = outcome()
    if isinstance(found, tuple) or kind == "meta":
        assert kind == "meta" or found == again
        return
    assert_same(found, again)
    if kind == "negated":
        assert_same(found, called(name, given, **{which: other.clone().contiguous()}))


@pytest.mark.parametrize(("name", "which"), EACH)
def test_gradients_are_recorded(straight, name, which):
    given = tensors()
    learns = given[which].clone().requires_grad_()
    with torch.no_grad():
        assert not any(one.requires_grad for one in called(name, given, **{which: learns}))
    assert straight == [True]
    straight.clear()
    if "int8" in name or "float8" in name or "place" in name:
        with pytest.raises(RuntimeError, match="grad"):
            called(name, given, **{which: learns})
    else:
        assert any(one.requires_grad for one in called(name, given, **{which: learns}))
    assert not any(straight)
    straight.clear()
    parameter = torch.nn.Parameter(given[which], requires_grad=False)
    first = which == NAMES[name][0] or (name == "add in place" and which == "residual")
    assert_same(called(name, given, **{which: parameter}), called(name, given))
    assert first or all(straight)


WATCHERS = {
    "modes": Watch,
    "modes of functions": Functions,
    "profiler": torch.profiler.profile,
    "older profiler": torch.autograd.profiler.profile,
    "execution trace": Trace,
    "forward mode": forward_ad.dual_level,
}


@pytest.mark.parametrize("watcher", WATCHERS)
@pytest.mark.parametrize("name", FORMS)
def test_who_watches(straight, name, watcher):
    given = tensors()
    expected = called(name, given)
    straight.clear()
    with WATCHERS[watcher]() as watch:
        results = called(name, given)
    if watcher == "modes":
        assert any("rmsnorm." in seen for seen in watch.seen)
        assert not any(straight)
    elif watcher == "modes of functions":
        assert any(seen.startswith("rmsnorm") for seen in watch.seen if seen)  # and called it again, within itself
    else:
        assert not any(straight)
    if watcher == "execution trace":
        assert any(seen.startswith("rmsnorm::") for seen in watch.seen)
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=1e-5, atol=1e-5)  # forward mode has the definition


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace's: it is deprecated, and sizes become constants
@pytest.mark.parametrize("name", [name for name in FORMS if "place" not in name])
def test_tracers_and_transforms(straight, name):
    given = tensors()
    first = NAMES[name][0]
    torch.jit.trace(lambda one: called(name, given, **{first: one}), given[first], check_trace=False)
    assert not any(straight)
    torch.func.vmap(lambda one: called(name, given, **{first: given[first] + one}))(torch.zeros(2))
    assert not any(straight)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("name", FORMS)
def test_results_are_of_the_mode(straight, name, mode):
    with mode():
        results = called(name, tensors())
    assert straight == [True]
    assert all(one.is_inference() == (mode is torch.inference_mode) for one in results)
    if mode is torch.no_grad:
        results[0].resize_(100)  # of torch's allocator


def test_in_place(straight):
    given = tensors()
    x, residual, weight = given["x"].bfloat16(), given["residual"], given["weight"].bfloat16()
    expected = rmsnorm.add_rms_norm(x, residual, 8, weight, 1e-6, out_dtype=torch.bfloat16)
    before = x._version, residual._version
    straight.clear()
    results = rmsnorm.add_rms_norm_(x, residual, weight, 1e-6)
    assert straight == [True]
    assert results[0] is x
    assert results[1] is residual
    assert_same(results, expected)
    assert (x._version, residual._version) == (before[0] + 1, before[1] + 1)
    with torch.inference_mode():
        frozen = residual.clone()
    for one, other in ((x, frozen), (frozen, residual), (residual, residual)):
        straight.clear()
        with pytest.raises(RuntimeError):
            rmsnorm.add_rms_norm_(one, other, None, 1e-6, round_sum=False)
        assert straight == [False]
    with torch.inference_mode():
        rmsnorm.add_rms_norm_(x, frozen, weight, 1e-6)
    assert straight[1:] == [True]


@pytest.mark.parametrize("weight", [torch.ones(8), torch.ones(3, 8), None], ids=["a row", "several", "none"])
def test_in_place_the_weight_has_the_sizes(straight, weight):
    given = tensors()
    x, residual = given["x"].clone(), given["residual"].clone()
    expected = rmsnorm.add_rms_norm(
        x, residual, (3, 8) if weight is not None and weight.dim() == 2 else 8, weight, 1e-6
    )
    straight.clear()
    assert_same(rmsnorm.add_rms_norm_(x, residual, weight, 1e-6, round_sum=False), expected)
    assert straight == [True]


def test_several_rows_of_a_weight(straight):
    """Whose sizes aren't the normalised ones: a gain for each head."""
    x, weight = torch.randn(2, 3, 8), torch.randn(3, 8)
    for call in (
        lambda w: rmsnorm.rms_norm(x, 8, w, 1e-6, out_dtype=torch.bfloat16),
        lambda w: rmsnorm.add_rms_norm(x, x, 8, w, 1e-6, round_sum=False)[0],
        lambda w: rmsnorm.gated_rms_norm(x, x, 8, w, 1e-6),
        lambda w: rmsnorm.l2_norm(x, 8, w),
    ):
        expected = torch.stack([call(weight[head].contiguous())[:, head] for head in range(3)], 1)
        assert_same([call(weight)], [expected])


@pytest.mark.parametrize("dims", [1, 2])
def test_modulations_by_fewer_dimensions(straight, dims):
    """Of a sample, beside rows of several dimensions; parts of a wider tensor are read where they lie."""
    x = torch.randn(2, 3, 4, 8)
    scale, shift = torch.randn(2, *x.shape[-dims:-1], 24)[..., 4:20].chunk(2, -1)
    whole = [one.reshape(2, *[1] * (3 - dims), *x.shape[-dims:]).contiguous() for one in (scale, shift)]
    options = {"eps": 1e-6}
    got = rmsnorm.modulated_norm(x, x.shape[-dims:], scale=scale, shift=shift, **options)
    want = rmsnorm.modulated_norm(x, x.shape[-dims:], scale=whole[0], shift=whole[1], **options)
    assert straight == [True, True]
    assert_same([got], [want])
    y = x.double() * torch.rsqrt(x.double().square().mean(tuple(range(-dims, 0)), keepdim=True) + 1e-6)
    torch.testing.assert_close(got.double(), y * (1 + whole[0]) + whole[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "given",
    [
        *({"normalized_shape": shape} for shape in (None, 7, "8", (3, 8), 8.0, (), (8.0,), True)),
        *({"eps": eps} for eps in ("1", -1.0, float("nan"), None)),
        *({"offset": offset} for offset in ("1", None, 1)),
        *({"casting_mode": mode} for mode in ("rounded", [], "llama")),
        *({"bias": bias} for bias in (torch.ones(7), torch.ones(3, 8), torch.ones(8, dtype=torch.float64), "bias")),
        *({"out_dtype": dtype} for dtype in (torch.int8, "float", torch.float64)),
        *({"partial": part} for part in (0.0, 2, "1", None)),
        {"weight": torch.ones(7)},
        {"return_rstd": "yes"},
    ],
    ids=str,
)
def test_what_is_odd_comes_out_as_the_long_way(without_straight, given):
    arguments = {"normalized_shape": (8,), "weight": torch.ones(8), "eps": 1e-6, "bias": torch.ones(8)} | given

    def outcome():
        try:
            results = rmsnorm.rms_norm(tensors()["x"], **arguments)
            return str(results)
        except (RuntimeError, ValueError, TypeError) as error:
            return type(error), str(error)

    short = outcome()
    without_straight()
    assert short == outcome()


@pytest.mark.parametrize("name", FORMS)
def test_nothing_is_kept(name):
    given = tensors()
    seen = weakref.ref(called(name, given)[0])
    gc.collect()
    assert seen() is None
    counted = [*given.values(), None, True, int, torch.Tensor]
    wide = given | {NAMES[name][0]: torch._neg_view(given[NAMES[name][0]])}
    before = [sys.getrefcount(one) for one in counted]
    for _ in range(50):
        called(name, given)
        called(name, wide)  # not served
    assert all(abs(sys.getrefcount(one) - count) < 25 for one, count in zip(counted, before, strict=True))


@pytest.mark.parametrize("name", FORMS)
def test_no_tensor_is_left_behind(name):
    """Nor the handles that a kernel is given, in which a tensor would live on."""
    given = tensors()
    counts = [given[which]._use_count() for which in NAMES[name]]
    results = called(name, given)
    assert [given[which]._use_count() for which in NAMES[name]] == counts
    fresh = torch.empty(4)._use_count()
    assert all(one._use_count() == fresh for one in results if "place" not in name)


def test_on_a_torch_that_lacks_what_is_inside(monkeypatch):
    """Kernels are left to the dispatcher then, and a tensor is asked through Python."""
    x, weight = tensors()["x"], torch.nn.Parameter(torch.ones(8))
    with monkeypatch.context() as patch:
        patch.setattr(_handed, "_INSIDE", (*_handed._INSIDE[:-1], "no_such_function"))
        assert _handed._inside() == [0] * (len(_handed._INSIDE) + 2)
        norm = _handed._made()[0]
        kernel = _handed.straight("gated_rms_norm", "(Tensor input) -> Tensor")
        assert kernel(8, x) is None
        given = 0, 8, 1e-6, 0.0, False, None, None, None
        with torch.no_grad():
            assert torch.equal(norm(*given, x, None, weight), rmsnorm.rms_norm(x, 8, weight, 1e-6))
            assert norm(*given, torch._neg_view(x), None, weight) is None
            with torch._C._IncludeDispatchKeyGuard(torch._C.DispatchKey.PreDispatch):
                assert norm(*given, x, None, weight) is None
        with torch.inference_mode():
            frozen = torch.empty_like(x)
            assert norm(*given[:5], frozen, None, None, x, None, None) is frozen
        assert norm(*given[:5], frozen, None, None, x, None, None) is None
        assert norm(*given, x, None, weight).requires_grad
    assert _handed._made()
    assert all(_handed._inside())
