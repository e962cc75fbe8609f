"""Proves that errors stay a sentence when what is wrong is long: a number of thousands of digits, which Python itself
refuses to write (the error was its ValueError then), texts of a page, sizes of many dimensions.
"""

from __future__ import annotations

import pytest
import torch

import rmsnorm
from rmsnorm import _shown

X, W, HEADS, ANGLES = torch.ones(2, 8), torch.ones(8), torch.ones(1, 2, 3, 8), torch.ones(3, 8)
LEARNT = torch.ones(8, requires_grad=True)
HUGE = {"401 digits": 10**400, "5001 digits, below 0": -(10**5000), "a list of it": [10**5000] * 1000}
NORMS = {
    "rms_norm": lambda shape, **options: rmsnorm.rms_norm(X, shape, W, **options),
    "add_rms_norm": lambda shape, **options: rmsnorm.add_rms_norm(X, X, shape, W, **options),
    "gated_rms_norm": lambda shape, **options: rmsnorm.gated_rms_norm(X, X, shape, W, **options),
    "quantised_rms_norm": lambda shape, **options: rmsnorm.quantised_rms_norm(X, shape, W, **options),
    "modulated_norm": lambda shape, **options: rmsnorm.modulated_norm(X, shape, scale=W, **options),
    "l2_norm": lambda shape, **options: rmsnorm.l2_norm(X, shape, **options),
    "inverse_rms": lambda shape, **options: rmsnorm.inverse_rms(X, shape, **options),
}
CHOICES = {
    "casting_mode": lambda value: rmsnorm.rms_norm(X, 8, W, casting_mode=value),
    "memory": lambda value: rmsnorm.rms_norm(X, 8, LEARNT, memory=value),
    "out_dtype": lambda value: rmsnorm.rms_norm(X, 8, W, out_dtype=value),
    "a layer's casting_mode": lambda value: rmsnorm.RMSNorm(8, casting_mode=value),
    "activation": lambda value: rmsnorm.gated_rms_norm(X, X, 8, W, activation=value),
    "group_size": lambda value: rmsnorm.gated_rms_norm(X, X, 8, W, group_size=value),
    "dtype": lambda value: rmsnorm.quantised_rms_norm(X, 8, W, dtype=value),
    "mode": rmsnorm.set_compile_mode,
}


def words(kind: type[Exception], call: object, *given: object, **options: object) -> str:
    with pytest.raises(kind) as caught:
        call(*given, **options)  # type: ignore[operator]
    assert caught.type is not ValueError or "Exceeds the limit" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return str(caught.value)


@pytest.mark.parametrize("shape", [*HUGE.values(), (8,) * 1000, [1] * 10**5], ids=[*HUGE, "1000 sizes", "10^5 sizes"])
@pytest.mark.parametrize("name", NORMS)
def test_sizes(name, shape):
    said = words(RuntimeError, NORMS[name], shape)
    assert said.startswith(f"{name}: Given normalized_shape=[")
    assert "but got input of size [2, 8]" in said
    assert ("bits>" in said) == (shape in HUGE.values())


def test_sizes_that_a_tensor_may_have_are_written_as_torch_writes_them():
    shape = [*range(1, 64), 2**63 - 1]
    assert _shown.sizes(shape) == str(shape)
    assert _shown.sizes([*shape, 5]) == "[1, 2, 3, 4, 5, 6, 7, 8, and 57 more]"
    assert _shown.sizes([2**63, -(2**63)]) == f"[{2**63}, {-(2**63)}]"
    assert _shown.sizes([2**64, -(2**64)]) == "[<int of 65 bits>, <int of 65 bits>]"


@pytest.mark.parametrize("value", [*HUGE.values(), "a" * 5000, ("a" * 50,) * 999], ids=[*HUGE, "text", "texts"])
@pytest.mark.parametrize("label", CHOICES)
def test_choices(label, value):
    assert _shown.shown(value) in words((ValueError, RuntimeError), CHOICES[label], value)  # type: ignore[arg-type]


@pytest.mark.parametrize("label", ["eps", "offset"])
@pytest.mark.parametrize("name", list(NORMS)[:5])
@pytest.mark.parametrize("weight", [W, LEARNT], ids=["plain", "learnt"])
def test_numbers_beyond_all_floats(monkeypatch, name, label, weight):
    if label == "offset" and name == "modulated_norm":
        pytest.skip("it has none")
    monkeypatch.setitem(globals(), "W", weight)
    expected = f"{name}: {label} must be a float, but is an int beyond all of them; pass a number, e.g. 1e-6"
    for value in (10**400, 10**5000, -(10**5000)):
        assert words(OverflowError, NORMS[name], 8, **{label: value}) == expected


def test_an_eps_beyond_all_floats_of_heads():
    call = rmsnorm.heads_rms_norm_rope
    assert "an int beyond all" in words(OverflowError, call, HEADS, HEADS, ANGLES, ANGLES, W, W, 10**5000)
