"""Proves that bad input gets one clear error with the shapes and the fix; of ``out``: test_out.py."""

import functools
import re

import numpy as np
import pytest
import torch

import rmsnorm
from rmsnorm import _native, add_rms_norm, gated_rms_norm, layer_norm, rms_norm

X = torch.ones(2, 3, 5)


@pytest.mark.parametrize("function", [rms_norm, lambda x, shape, *rest: add_rms_norm(x, x, shape, *rest)])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, 4), "Given normalized_shape=[4], expected input with shape [*, 4], but got input of size [2, 3, 5]"),
        ((X, (3, 4)), "expected input with shape [*, 3, 4], but got input of size [2, 3, 5]; normalized_shape must be"),
        ((X, (1, 2, 3, 5)), "Given normalized_shape=[1, 2, 3, 5]"),
        ((X, ()), "Expected normalized_shape to be at least 1-dimensional, but got []"),
        ((torch.tensor(1.0), 1), "but got input of size []"),
        ((X, 5, torch.ones(4)), "weight of shape [4] and normalized_shape = [5]; reshape the weight to [5]"),
        ((X, 5, torch.ones(1, 5)), "weight of shape [1, 5] and normalized_shape = [5]"),
        ((X.int(), 5), "input must be of a floating or complex type, but is torch.int32 (shape [2, 3, 5])"),
        ((X, 5, torch.ones(5).long()), "weight must be of a floating or complex type, but is torch.int64 (shape [5])"),
        ((X, 5, torch.ones(5, device="meta")), "input is on cpu and weight on meta; move one of them"),
    ],
)
def test_arguments_that_do_not_fit(function, arguments, message):
    with pytest.raises(RuntimeError, match=re.escape(message)):
        function(*arguments)


HEADS, ANGLES, ROW = torch.ones(2, 4, 3, 6), torch.ones(2, 3, 6), torch.ones(2, 5)
# How forms are called with these tensors, which are all of those that may be wrong.
FORMS = {
    "rms_norm": (lambda *t: rms_norm(t[0], 5, *t[1:], 1e-6), (X, X[0, 0])),
    "rms_norm, bias": (lambda x, w, b: rms_norm(x, 5, w, 1e-6, bias=b), (X, X[0, 0], X[0, 0])),
    "add_rms_norm": (lambda x, r, w: add_rms_norm(x, r, 5, w, 1e-6), (X, X, X[0, 0])),
    "add_rms_norm_": (lambda x, r, w: rmsnorm.add_rms_norm_(x.clone(), r.clone(), w, 1e-6), (X, X, X[0, 0])),
    "add_rms_norm, round_sum": (lambda x, r, w: add_rms_norm(x, r, 5, w, 1e-6, round_sum=False), (X, X, X[0, 0])),
    "rms_norm_add": (lambda x, r, w: rmsnorm.rms_norm_add(x, r, 5, w, 1e-6), (X, X, X[0, 0])),
    "sandwich_rms_norm": (lambda x, r, *w: rmsnorm.sandwich_rms_norm(x, r, 5, *w, 1e-6), (X, X, X[0, 0], X[0, 0])),
    "gated_rms_norm": (lambda x, g, w: gated_rms_norm(x, g, 5, w, 1e-6), (X, X, X[0, 0])),
    "modulated_norm": (lambda x, a, b: rmsnorm.modulated_norm(x, 5, None, 1e-6, scale=a, shift=b), (X, ROW, ROW)),
    "modulated_norm, gate": (
        lambda x, r, g, a: rmsnorm.modulated_norm(x, 5, None, 1e-6, scale=a, residual=r, gate=g),
        (X, X, ROW, ROW),
    ),
    "gated_add": (rmsnorm.gated_add, (X, X, ROW)),
    "quantised_rms_norm": (lambda x, r, w: rmsnorm.quantised_rms_norm(x, 5, w, 1e-6, residual=r), (X, X, X[0, 0])),
    "l2_norm": (lambda x, w: rmsnorm.l2_norm(x, 5, w), (X, X[0, 0])),
    "layer_norm": (lambda x, w, b: layer_norm(x, 5, w, b), (X, X[0, 0], X[0, 0])),
    "heads_rms_norm_rope": (
        lambda *t: rmsnorm.heads_rms_norm_rope(*t, 1e-6),
        (HEADS, HEADS, ANGLES, ANGLES, ANGLES[0, 0], ANGLES[0, 0]),
    ),
    "rope": (rmsnorm.rope, (HEADS, HEADS, ANGLES, ANGLES)),
}
EACH = [(name, i) for name, (_, tensors) in FORMS.items() for i in range(len(tensors))]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("name", "which"), EACH)
def test_one_tensor_without_values(name, which, grad):
    """A weight that was never loaded lies on meta: torch asks shapes alone of what it is part of, and the output on
    the CPU would be memory that nobody has written."""
    call, tensors = FORMS[name]
    mixed = [t.to("meta") if i == which else t for i, t in enumerate(tensors)]
    if grad and name not in ("add_rms_norm_", "quantised_rms_norm"):
        mixed[0] = mixed[0].clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"meta") as error:
        call(*mixed)
    assert "cpu" in str(error.value)


def test_operators_refuse_one_tensor_without_values():
    for made in (torch.ops.rmsnorm.rms_norm_add, torch.ops.rmsnorm.sandwich_rms_norm_forward):
        count = len([a for a in made.default._schema.arguments if "Tensor" in str(a.type)])
        tensors = [X, X, *[X[0, 0].to("meta")] * (count - 2)]
        with pytest.raises(RuntimeError, match="tensors are on cpu and meta; move them to one device"):
            made(*tensors, *([1, 1e-6, 0.0, False] if count == 3 else [1, 1e-6, 1e-6, 0.0, False]))


@pytest.mark.parametrize(("name", "which"), [each for each in EACH if each[0] != "layer_norm"])
def test_eight_bits_are_no_numbers(name, which):
    """Torch has no arithmetic of them: its own words were of ``pow``, and of promotion."""
    call, tensors = FORMS[name]
    narrow = [t.to(torch.float8_e4m3fn) if i == which else t for i, t in enumerate(tensors)]
    with pytest.raises(RuntimeError, match=rf"^{name.partition(',')[0]}: .*16 bits.* but .*float8_e4m3fn"):
        call(*narrow)


@pytest.mark.parametrize("name", ["rms_norm_add", "sandwich_rms_norm", "heads_rms_norm_rope", "l2_norm"])
def test_weights_of_forms_are_real(name):
    call, tensors = FORMS[name]
    with pytest.raises(RuntimeError, match=r"weight must be of a real floating type, but is torch\.complex64"):
        call(*tensors[:-1], tensors[-1].cfloat())


def test_errors_name_the_tensor_that_is_wrong():
    x, short = torch.ones(2, 5), torch.ones(4)
    for label, call in {
        "bias": lambda: rms_norm(x, 5, torch.ones(5), bias=short),
        "next_weight": lambda: rmsnorm.sandwich_rms_norm(x, x, 5, torch.ones(5), short),
    }.items():
        with pytest.raises(RuntimeError, match=rf"Expected {label} to be of same shape.*reshape the {label} to \[5\]"):
            call()
    with pytest.raises(NotImplementedError, match=r"bias must be of a floating or complex type, but is torch\.int64"):
        rms_norm(x, 5, torch.ones(5), bias=torch.ones(5, dtype=torch.int64))
    with pytest.raises(TypeError, match="eps must be a float, but is None"):
        rmsnorm.l2_norm(x, 5, eps=None)
    with pytest.raises(TypeError, match=r"partial must be a float, but is a str; pass a number, e\.g\. 0\.5"):
        rms_norm(x, 5, partial="a")
    q = torch.ones(1, 2, 3, 8)
    with pytest.raises(RuntimeError, match="pass the angles of these 3 tokens"):
        rmsnorm.rope(q, q, torch.ones(4, 8), torch.ones(4, 8))
    with pytest.raises(RuntimeError, match="no dimension of heads: index or squeeze that"):
        rmsnorm.rope(q, q, torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8))


NO_TENSORS = {
    "list": ([1.0] * 4, "a list", "pass torch.tensor({})"),
    "numpy": (np.ones((2, 4), np.float32), "a numpy.ndarray", "pass torch.from_numpy({})"),
    "str": ("a", "a str", "pass a tensor"),
    "None": (None, "None", "pass a tensor"),
    "class": (torch.Tensor, "the class Tensor", "pass a tensor"),
}
PLACES = {
    "rms_norm input": lambda bad, x, w: rms_norm(bad, 4, w),
    "rms_norm weight": lambda bad, x, w: rms_norm(x, 4, bad),
    "rms_norm out": lambda bad, x, w: rms_norm(x, 4, w, out=bad),
    "add_rms_norm input": lambda bad, x, w: add_rms_norm(bad, x, 4, w),
    "add_rms_norm residual": lambda bad, x, w: add_rms_norm(x, bad, 4, w),
    "add_rms_norm weight": lambda bad, x, w: add_rms_norm(x, x, 4, bad),
    "gated_rms_norm input": lambda bad, x, w: gated_rms_norm(bad, x, 4, w),
    "gated_rms_norm gate": lambda bad, x, w: gated_rms_norm(x, bad, 4, w),
    "gated_rms_norm weight": lambda bad, x, w: gated_rms_norm(x, x, 4, bad),
    "layer_norm input": lambda bad, x, w: layer_norm(bad, 4, w),
    "layer_norm weight": lambda bad, x, w: layer_norm(x, 4, bad),
    "layer_norm bias": lambda bad, x, w: layer_norm(x, 4, w, bad),
    # The layers call the functions, and their words are the functions'.
    "rms_norm input, of RMSNorm": lambda bad, x, w: rmsnorm.RMSNorm(4)(bad),
    "add_rms_norm residual, of RMSNorm": lambda bad, x, w: rmsnorm.RMSNorm(4)(x, bad),
    "gated_rms_norm input, of GatedRMSNorm": lambda bad, x, w: rmsnorm.GatedRMSNorm(4)(bad),
    "gated_rms_norm gate, of GatedRMSNorm": lambda bad, x, w: rmsnorm.GatedRMSNorm(4)(x, bad),
    "layer_norm input, of LayerNorm": lambda bad, x, w: rmsnorm.LayerNorm(4)(bad),
}


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("kind", NO_TENSORS)
@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_tensor(place, kind, grad):
    """One line, which names the function, the argument, what came and what to pass."""
    bad, came, instead = NO_TENSORS[kind]
    function, label = place.partition(",")[0].split()
    optional = label in ("weight", "out", "gate", "bias")
    call = functools.partial(PLACES[place], bad, torch.ones(2, 4, requires_grad=grad and label != "out"), torch.ones(4))
    if bad is None and (optional or place == "add_rms_norm residual, of RMSNorm"):
        call()
        return
    if label == "out" and kind != "numpy":
        instead = "pass a tensor to write to, e.g. torch.empty_like(input)"
    with torch.set_grad_enabled(grad), pytest.raises(TypeError) as error:
        call()
    wanted = "a torch.Tensor or None" if optional else "a torch.Tensor"
    assert str(error.value) == f"{function}: {label} must be {wanted}, but is {came}; {instead.format(label)}"


@pytest.mark.parametrize(
    ("bad", "came"),
    [
        ("gpt2", "a str"),
        (rms_norm, "a function"),
        ([torch.nn.RMSNorm(4)], "a list"),
        (None, "None"),
        (torch.nn.RMSNorm, "the class RMSNorm"),
    ],
)
def test_what_is_no_model(bad, came):
    for name in ("patch", "unpatch"):
        with pytest.raises(TypeError) as error:
            getattr(rmsnorm, name)(bad)
        assert str(error.value).startswith(f"{name}: model must be a torch.nn.Module, but is {came}; pass the model")


SPOILED = {
    "one less": lambda t: t[..., :-1],
    "no rows": lambda t: t[:0],
    "of no dimensions": lambda t: torch.tensor(1.0),
    "int32": lambda t: t.int(),
    "bits8": lambda t: torch.empty(t.shape, dtype=torch.bits8),
    "complex": lambda t: t.to(torch.complex64),
}
_x, _row, _w = torch.ones(4, 8), torch.ones(4, 1), torch.ones(8)
OPERATORS = {
    "rms_norm": (_x, _w, 1, 1e-6, 0.0, False),
    "rms_norm_weighted": (_x, _w, 1e-6),
    "rms_norm_rounded": (_x, _w, 1e-6),
    "rms_norm_weighted_backward": (_x, _x, _w, 1e-6, True, True),
    "add_rms_norm_weighted": (_x, _x, _w, 1e-6),
    "add_rms_norm_rounded": (_x, _x, _w, 1e-6),
    "rms_norm_out": (_x, _w, 1, 1e-6, 0.0, False, torch.empty(4, 8)),
    "rms_norm_weighted_out": (_x, _w, 1e-6, torch.empty(4, 8)),
    "rms_norm_forward": (_x, _w, 1, 1e-6, 0.0, False),
    "rms_norm_backward": (_x, _x, _x, _row, _w, 1, 1e-6, 0.0, True, True),
    "add_rms_norm": (_x, _x, _w, 1, 1e-6, 0.0, False),
    "add_rms_norm_forward": (_x, _x, _w, 1, 1e-6, 0.0, False),
    "gated_rms_norm": (_x, _x, _w, 1, 1e-6, 0.0, False, True, True),
    "gated_rms_norm_forward": (_x, _x, _w, 1, 1e-6, 0.0, False, True, True),
    "gated_rms_norm_backward": (_x, _x, _x, _row, _w, 1, 1e-6, 0.0, True, True, True, True, True),
    "layer_norm": (_x, _w, _w, 1, 1e-6),
    "layer_norm_forward": (_x, _w, _w, 1, 1e-6),
    "layer_norm_backward": (_x, _x, _row.double(), _row, _w, _w, 1, 1e-6, True, True, True),
}


@pytest.mark.skipif(not _native.cpu_targets(), reason="the native library is off")
@pytest.mark.parametrize("how", SPOILED)
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_refuse_each_tensor_that_does_not_fit(name, how):
    """In words alone, with no place in the C++ before them; and without reading what isn't there."""
    operator, arguments = getattr(torch.ops.rmsnorm, name), OPERATORS[name]
    operator(*arguments)
    for i, tensor in enumerate(arguments):
        if not isinstance(tensor, torch.Tensor) or (how == "no rows" and i == 0 and tensor is _x):
            continue  # an input of no rows is an input
        with pytest.raises(RuntimeError) as error:
            operator(*arguments[:i], SPOILED[how](tensor), *arguments[i + 1 :])
        assert str(error.value).startswith("rmsnorm: "), i


@pytest.mark.parametrize("residual", [torch.ones(5), torch.ones(2, 3, 1), torch.ones(2, 3, 5, device="meta")])
def test_residual_of_another_shape_or_device(residual):
    message = f"residual must have the shape and device of input, (2, 3, 5) on cpu, but is {tuple(residual.shape)} on "
    with pytest.raises(RuntimeError, match=re.escape(message)):
        add_rms_norm(X, residual, 5)
