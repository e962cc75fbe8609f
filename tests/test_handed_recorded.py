"""Everyday calls that are recorded past torch's dispatcher (src/rmsnorm/_handed.py), and those that are left to it."""

import pytest
import torch
from torch.autograd import forward_ad
from watching import Functions, Sub, Trace, Watch

import rmsnorm

pytestmark = pytest.mark.skipif(not rmsnorm.info().native, reason="the native library is off: nothing is handed to it")
X = torch.linspace(-2.0, 3.0, 12).view(3, 4)
WEIGHT = torch.tensor([1.0, 0.5, -2.0, 3.0])


def test_gradients_are_recorded(handed):
    x = X.clone().requires_grad_()
    assert rmsnorm.rms_norm(x, 4, WEIGHT).requires_grad
    assert rmsnorm.rms_norm(X, 4, WEIGHT.clone().requires_grad_()).requires_grad
    assert rmsnorm.rms_norm(x, 4).requires_grad
    assert rmsnorm.rms_norm(x, 4, WEIGHT, offset=1.0).requires_grad
    with pytest.raises(RuntimeError, match="out"):
        rmsnorm.rms_norm(X, 4, WEIGHT, out=torch.empty_like(X).requires_grad_())
    for form in (rmsnorm.add_rms_norm, rmsnorm.rms_norm_add, rmsnorm.sandwich_rms_norm):
        results = form(X, x, 4, WEIGHT)
        assert all(t.requires_grad for t in (results if isinstance(results, tuple) else [results]))
    assert rmsnorm.layer_norm(X, 4, WEIGHT, x[0].clone()).requires_grad
    assert rmsnorm.sandwich_rms_norm(X, X, 4, WEIGHT, x[0].clone())[0].requires_grad
    assert handed == [True, True] + [False] * 8  # of the recorded a row or a few by their weight alone
    with torch.no_grad():
        assert not rmsnorm.rms_norm(x, 4, WEIGHT).requires_grad
    assert handed[10:] == [True]


# What has to see a call that is recorded, too, or has to be let by. Functions of the input and the weight.
WATCHED = {
    "nothing": lambda x, w: rmsnorm.rms_norm(x, 4, w),
    "a layer": lambda x, w: torch.func.functional_call(rmsnorm.RMSNorm(4), {"weight": w}, x),
    "dispatch": lambda x, w: within(Watch(), x, w),
    "functions": lambda x, w: within(Functions(), x, w),
    "profiler": lambda x, w: within(torch.profiler.profile(), x, w),
    "execution trace": lambda x, w: within(Trace(), x, w),
    "forward mode": lambda x, w: within(forward_ad.dual_level(), x, w),
    "negated input": lambda x, w: rmsnorm.rms_norm(torch._neg_view(x), 4, w),
    "negated weight": lambda x, w: rmsnorm.rms_norm(x, 4, torch._neg_view(w)),
    "subclass": lambda x, w: rmsnorm.rms_norm(x.as_subclass(Sub), 4, w).as_subclass(torch.Tensor),
    "subclass of a weight": lambda x, w: rmsnorm.rms_norm(x, 4, w.as_subclass(Sub)).as_subclass(torch.Tensor),
    "vmap": lambda x, w: torch.func.vmap(lambda one: rmsnorm.rms_norm(x, 4, w) + one)(torch.zeros(1))[0],
    "offset": lambda x, w: rmsnorm.rms_norm(x, 4, w - 1, offset=1.0),
    "lean": lambda x, w: rmsnorm.rms_norm(x, 4, w, memory="lean"),
}


def within(context, x, weight):
    with context:
        return rmsnorm.rms_norm(x, 4, weight)


@pytest.mark.parametrize("name", WATCHED)
def test_who_watches_what_is_recorded(handed, name):
    x, weight = X.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    y = WATCHED[name](x, weight)
    assert handed[0] == (name in ("nothing", "a layer"))  # the mode for functions then calls it again
    dx, dw = torch.autograd.grad(y.sum(), (x, weight))
    sign = torch.tensor([-1.0 if "input" in name else 1.0, -1.0 if "weight" in name and "neg" in name else 1.0])
    one, other = X.double().requires_grad_(), WEIGHT.double().requires_grad_()
    want = torch.nn.functional.rms_norm(one * sign[0], (4,), other * sign[1], torch.finfo(torch.float32).eps)
    torch.testing.assert_close(y.double(), want)
    for got, true in zip((dx, dw), torch.autograd.grad(want.sum(), (one, other)), strict=True):
        torch.testing.assert_close(got.double(), true, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # as above
def test_a_tracer_sees_what_is_recorded(handed):
    x, weight = X.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    traced = torch.jit.trace(lambda x, w: rmsnorm.rms_norm(x, 4, w), (x, weight), check_trace=False)
    assert not any(handed)
    assert "rms_norm" in str(traced.inlined_graph)
    torch.testing.assert_close(traced(X + 1, weight), rmsnorm.rms_norm(X + 1, 4, weight))


def test_what_cannot_be_kept_goes_the_long_way():
    """Inference tensors are no inputs of what autograd keeps; the layer finds that out by an error."""
    layer = rmsnorm.RMSNorm(4)
    with torch.inference_mode():
        x = X.clone()
    outcomes = []
    for norm in (layer, lambda x: rmsnorm.rms_norm(x, 4, layer.weight)):
        try:
            outcomes.append(norm(x).tolist())
        except RuntimeError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


def test_a_layer_whose_mode_was_changed():
    layer = rmsnorm.RMSNorm(4)
    layer.casting_mode = "rounded"
    with pytest.raises(ValueError, match="casting_mode"):
        layer(X)
