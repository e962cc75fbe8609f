"""Proves that options which are no numbers, sizes, modes or ways to keep memory get one clear error."""

import re

import numpy as np
import pytest
import torch
from test_errors import ANGLES, HEADS, X

import rmsnorm
from rmsnorm import add_rms_norm, gated_rms_norm, layer_norm, rms_norm

WITH_OPTIONS = {
    "rms_norm": lambda shape=4, **options: rms_norm(torch.ones(2, 4), shape, torch.ones(4), **options),
    "add_rms_norm": lambda shape=4, **options: add_rms_norm(torch.ones(2, 4), torch.ones(2, 4), shape, **options),
    "gated_rms_norm": lambda shape=4, **options: gated_rms_norm(torch.ones(2, 4), torch.ones(2, 4), shape, **options),
    "layer_norm": lambda shape=4, **options: layer_norm(torch.ones(2, 4), shape, **options),
    "RMSNorm": lambda shape=4, **options: rmsnorm.RMSNorm(shape, **options),
    "GatedRMSNorm": lambda shape=4, **options: rmsnorm.GatedRMSNorm(shape, **options),
}


@pytest.mark.parametrize("name", WITH_OPTIONS)
@pytest.mark.parametrize(
    ("bad", "came"),
    [
        *((4.0, "a float"), ("4", "a str"), (None, "None"), (torch.tensor(4.0), "a torch.Tensor"), (["4"], "a list")),
        *((torch.ones(4), "a tensor of shape [4]"), (torch.ones(2, 4), "a tensor of shape [2, 4]")),
    ],
)
def test_sizes_that_are_none(name, bad, came):
    message = f"{name}: normalized_shape must be an int or a sequence of ints, but is {came}; pass the size of"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        WITH_OPTIONS[name](bad)


@pytest.mark.parametrize("size", [np.int64(4), torch.tensor(4), [4], torch.Size([4]), (np.int32(4),)], ids=repr)
def test_sizes_of_any_integer_type(size):
    for call in WITH_OPTIONS.values():
        call(size)


@pytest.mark.parametrize(
    ("bad", "came"),
    [("a", "a str"), ([1e-6], "a list"), (1j, "a complex"), (torch.ones(2), r"a tensor of shape [2]")],
)
def test_options_that_are_no_numbers(bad, came):
    for name, call in WITH_OPTIONS.items():
        for option in ("eps",) if name == "layer_norm" else ("eps", "offset"):
            with pytest.raises(TypeError) as error:
                call(**{option: bad})
            assert str(error.value) == f"{name}: {option} must be a float, but is {came}; pass a number, e.g. 1e-6"


@pytest.mark.parametrize("eps", [torch.tensor(0.5), np.float32(0.5), np.float64(0.5)], ids=repr)
def test_numbers_of_other_kinds(eps):
    for name in ("rms_norm", "add_rms_norm", "gated_rms_norm", "layer_norm"):
        torch.testing.assert_close(WITH_OPTIONS[name](eps=eps), WITH_OPTIONS[name](eps=0.5))


KEEPS = {
    "plain": lambda x, w, **kept: rms_norm(x, 5, w, 1e-6, **kept),
    "no weight": lambda x, _, **kept: rms_norm(x, 5, eps=1e-6, **kept),
    "offset": lambda x, w, **kept: rms_norm(x, 5, w, 1e-6, offset=1.0, **kept),
    "llama": lambda x, w, **kept: rms_norm(x, 5, w, 1e-6, casting_mode="llama", **kept),
    "out": lambda x, w, **kept: rms_norm(x.detach(), 5, w, 1e-6, out=torch.empty_like(x), **kept),
    "add": lambda x, w, **kept: add_rms_norm(x, x, 5, w, 1e-6, **kept),
    "compiled": lambda x, w, **kept: torch.compile(rms_norm, backend="eager")(x, 5, w, 1e-6, **kept),
}


@pytest.mark.parametrize("recorded", [False, True], ids=["inference", "recorded"])
@pytest.mark.parametrize("call", KEEPS.values(), ids=KEEPS)
@pytest.mark.parametrize("bad", ["nonsense", "", "Lean", 0, False, [], ("lean",)], ids=repr)
def test_what_is_no_memory(bad, call, recorded):
    """Where nothing is recorded, too, and nothing would be kept: the training step would raise it, hours later."""
    x = X.clone().requires_grad_(recorded)
    with pytest.raises(ValueError, match=re.escape(f"rms_norm: unknown memory {bad!r}; choose one of 'lean'")):
        call(x, torch.ones(5), memory=bad)
    call(x, torch.ones(5), memory="".join(["le", "an"]))  # not the object that C++ knows


@pytest.mark.parametrize("bad", [["llama"], torch.ones(2), None], ids=["list", "tensor", "None"])
def test_modes_that_are_no_strings(bad):
    with pytest.raises(ValueError, match=r"^rms_norm: unknown casting_mode .* choose one of 'torch', 'llama'"):
        rms_norm(X, 5, casting_mode=bad)
    with pytest.raises(ValueError, match=r"^gated_rms_norm: unknown activation .* choose one of 'silu', 'sigmoid'"):
        gated_rms_norm(X, X, 5, activation=bad)
    with pytest.raises(RuntimeError, match=r"^gated_rms_norm: group_size must divide the last dimension"):
        gated_rms_norm(X, X, 5, group_size="5" if bad is None else bad)


def test_an_eps_of_two_numbers():
    many = torch.ones(2)
    for call in (
        lambda: rmsnorm.l2_norm(X, 5, None, many),
        lambda: rmsnorm.heads_rms_norm_rope(HEADS, HEADS, ANGLES, ANGLES, None, None, many),
        lambda: rmsnorm.sandwich_rms_norm(X, X, 5, None, None, many),
    ):
        with pytest.raises(TypeError, match=r"eps must be a float, but is a tensor of shape \[2\]"):
            call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: rms_norm(X, 5, casting_mode="gemma"),
        lambda: add_rms_norm(X, X, 5, casting_mode="gemma"),
        lambda: rmsnorm.RMSNorm(5, casting_mode="gemma"),
    ],
)
def test_unknown_casting_mode(call):
    with pytest.raises(ValueError, match=re.escape("unknown casting_mode 'gemma'; choose one of 'torch', 'llama'")):
        call()


@pytest.mark.parametrize(
    ("kind", "options", "word"),
    [
        (ValueError, {"casting_mode": "fat"}, "casting mode"),
        (ValueError, {"memory": "fat"}, "``memory``"),
        (ValueError, {"out_dtype": torch.int8}, "``out_dtype``"),
        (ValueError, {"partial": 0.0}, "``partial``"),
        (ValueError, {"eps": -1.0, "return_rstd": True}, "``eps`` below 0 beside further keywords"),
        (RuntimeError, {"memory": "lean", "bias": torch.zeros(4)}, "``memory`` beside further keywords"),
        (RuntimeError, {"out": torch.zeros(2, 4), "bias": torch.zeros(4)}, "``out`` or ``memory`` beside"),
    ],
)
def test_docstrings_list_what_is_raised(kind, options, word):
    """add_rms_norm's, which has no ``out``, points to the other's list."""
    names = ["rms_norm", "add_rms_norm"][: 1 + ("out" not in options)]
    for name in names:
        with pytest.raises(kind):
            WITH_OPTIONS[name](**options)
        assert f"{kind.__name__}: as :func:`rmsnorm.rms_norm`" in getattr(rmsnorm, name).__doc__ or name == "rms_norm"
    assert word in _listed(rms_norm, kind)


def test_the_docstring_of_l2_norm_lists_out_dtype():
    with pytest.raises(ValueError, match="out_dtype"):
        rmsnorm.l2_norm(torch.ones(4), 4, out_dtype=torch.int8)
    assert "``out_dtype``" in _listed(rmsnorm.l2_norm, ValueError)


def _listed(function, kind):
    """What its docstring says that this error is raised for."""
    listed = " ".join(function.__doc__.partition("Raises:")[2].partition("Examples:")[0].split())
    return listed.partition(f"{kind.__name__}: ")[2].partition("Error: ")[0]
