"""Every form where somebody else sees the call first: torch.fx, whose sizes and types are no values yet; a mode, as
torch.set_default_device is one; a jagged tensor. The rows are those of test_handed_forms.py."""

import inspect
import re

import pytest
import torch
from test_handed_forms import FORMS, NAMES, called, tensors

import rmsnorm
from rmsnorm import gated_rms_norm, layer_norm, modulated_norm, quantised_rms_norm, rms_norm, rope

MORE = {
    "plain": lambda x, weight: rms_norm(x, x.shape[-1], weight, 1e-6),
    "llama": lambda x, weight: rms_norm(x, x.shape[-1], weight, 1e-6, casting_mode="llama"),
    "add": lambda x, residual, weight: rmsnorm.add_rms_norm(x, residual, x.shape[-1], weight, 1e-6),
    "groups": lambda x, gate, weight: gated_rms_norm(x, gate, x.shape[-1], weight, group_size=x.shape[-1] // 2),
    "partial, added": lambda x, residual, weight: rmsnorm.add_rms_norm(x, residual, x.shape[-1:], weight, partial=0.3),
    "int8, gated": lambda x, gate, weight: quantised_rms_norm(x, x.shape[-1], weight, gate=gate),
    "layer_norm": lambda x, weight, bias: layer_norm(x, (x.shape[-1],), weight, bias),
    "sandwich": lambda x, residual, weight: rmsnorm.sandwich_rms_norm(x, residual, x.shape[-1], weight),
    "a tuple handed on": lambda query, key, cos, sin: rope(*rope(query, key, cos, sin), cos, sin),
}
NAMES_OF = NAMES | {name: form.__code__.co_varnames[: form.__code__.co_argcount] for name, form in MORE.items()}


def results_of(name, given):
    if name in FORMS:
        return called(name, given)
    found = MORE[name](**{which: given[which] for which in NAMES_OF[name]})
    return found if isinstance(found, tuple) else (found,)


def assert_equal(results, expected):
    for one, other in zip(results, expected, strict=True):
        assert one.dtype is other.dtype
        assert torch.equal(one.float(), other.float())


@pytest.mark.parametrize("name", NAMES_OF)
def test_recorded_by_fx_it_is_the_call(name):
    """Layers unpack what they get, and find sizes and types by asking; no result is asked for that isn't there."""
    form, given = (FORMS | MORE)[name], tensors(8, torch.bfloat16)

    class Layer(torch.nn.Module):
        def forward(self, *tensors):
            found = form(*tensors)
            return tuple(one.clone() for one in (found if isinstance(found, tuple) else (found,)))

    names = ", ".join(NAMES_OF[name])
    scope = {"body": Layer.forward}
    exec(f"def forward(self, {names}):\n    return body(self, {names})", scope)
    Layer.forward = scope["forward"]
    recorded = torch.fx.symbolic_trace(Layer())(*(given[which] for which in NAMES_OF[name]))
    expected = [one.clone() for one in results_of(name, given)]
    if name == "layer_norm":  # a graph has torch's operator
        torch.testing.assert_close(recorded[0], expected[0])
    else:
        assert_equal(recorded, expected)


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace's: it is deprecated, and sizes become constants
def test_groups_of_a_size_that_is_asked_for_are_traced():
    given = tensors()
    arguments = tuple(given[which] for which in NAMES_OF["groups"])
    traced = torch.jit.trace(MORE["groups"], arguments)
    torch.testing.assert_close(traced(*arguments), MORE["groups"](*arguments))


@pytest.mark.parametrize("name", NAMES_OF)
def test_a_default_device_changes_no_bit(name):
    given = tensors(24)
    expected = results_of(name, given)
    with torch.device("cpu"):
        assert_equal(results_of(name, given), expected)


@pytest.mark.parametrize("name", ["bias", "partial", "rstd", "add, unrounded", "partial, added", "inverse_rms", "l2"])
def test_jagged_rows_and_their_gradients(name):
    """Those forms that aren't made of torch's norm."""
    sizes, given = (2, 5, 1), {"weight": torch.randn(8), "bias": torch.randn(8)}
    rows = {which: torch.randn(sum(sizes), 8) for which in ("x", "residual")}
    leaves = [{which: t.clone().requires_grad_() for which, t in (rows | given).items()} for _ in range(2)]
    jagged, dense = leaves
    nested = torch.nested.nested_tensor_from_jagged
    of_rows = {"x": nested(jagged["x"], torch.tensor([0, 2, 7, 8]))}
    of_rows["residual"] = nested(jagged["residual"], of_rows["x"].offsets())
    results, expected = results_of(name, jagged | of_rows), results_of(name, dense)
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one.values(), other)
    for some in ([one.values() for one in results], expected):
        sum(one.square().sum() for one in some).backward()
    for which in NAMES_OF[name]:
        torch.testing.assert_close(jagged[which].grad, dense[which].grad)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda x, w: modulated_norm(x, 8, scale=x, statistic=[]), ValueError, "unknown statistic []; choose one of"),
        (lambda x, w: quantised_rms_norm(x, 8, dtype=["int8"]), ValueError, "dtype must be torch.int8 or torch.float8"),
        (lambda x, w: rms_norm(x, 8, bias=w[:7]), RuntimeError, "reshape the bias to [8], or, for one of its own"),
        (lambda x, w: gated_rms_norm(x, x, 8, w + 0j), RuntimeError, "gated_rms_norm: weight must be of a real"),
        (lambda x, w: rmsnorm.add_rms_norm_(x, x.clone(), w + 0j), RuntimeError, "add_rms_norm_: weight must be of a"),
    ],
)
def test_errors_are_of_the_function_and_of_the_argument(call, kind, words):
    with pytest.raises(kind, match=re.escape(words)):
        call(torch.randn(2, 8), torch.randn(8))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", [name for name in rmsnorm.__all__ if "norm" in name or name in ("rope", "gated_add")])
def test_every_form_says_what_it_is_and_what_to_do_instead_of_scripting(name):
    function = getattr(rmsnorm, name)
    text = inspect.getdoc(function)
    for part in ("Args:", "Returns:", "Raises:", "Examples:", "Source:"):
        assert part in text
    with pytest.raises(Exception, match=r"torch\.jit\.trace instead"):
        torch.jit.script(function)
