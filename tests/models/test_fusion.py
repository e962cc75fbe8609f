"""Proves that a residual add is fused where the layer's own source has it before a norm, only there, and only if output
and gradients stay; the layers are made here, so that each can be wrong in its own way.
"""

from __future__ import annotations

import copy
import pickle
import traceback

import pytest
import torch
from layers import Layer, Model, x
from oracle import same_bits
from torch import Tensor

import rmsnorm
from rmsnorm.models import rewrite
from rmsnorm.models.binding import binding_of


class InABranch(Layer):
    """Other names, an expression in the sum, no copy between, a branch."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim():
            total = self.mixer(x) * 0.5 + x
            y = self.post_attention_layernorm(total)
        else:
            raise RuntimeError("no")
        return self.mlp(y) + total


class SomethingBetween(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(x)
        x = x * 2
        return self.mlp(self.post_attention_layernorm(x)) + self.post_attention_layernorm(x)


class Augmented(Layer):
    """In place: the caller's tensor changes, which no fused add does."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.mixer(x)
        y += x
        y = self.post_attention_layernorm(y)
        return self.mlp(y)


@pytest.mark.parametrize("cls", [Layer, InABranch])
def test_fused_with_the_same_bits(cls: type[Layer], calls: list[int]) -> None:
    model = Model(cls)
    rmsnorm.patch(model)
    plain = model(x())
    rmsnorm.unpatch(model)
    report = rmsnorm.patch(model, fuse_add=True)
    assert [(entry.name, entry.meaning) for entry in report.fused] == [
        ("layers.0", "add, then post_attention_layernorm"),
        ("layers.1", "add, then post_attention_layernorm"),
    ]
    calls.clear()
    assert same_bits(model(x()), plain)
    assert len(calls) == 2
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        assert same_bits(twin(x()), plain)
        assert len(calls) == 2
        assert twin.layers[0].forward.__self__ is twin.layers[0]
    assert rewrite.rewrite(cls.forward)[0].__defaults__ is cls.forward.__defaults__
    rmsnorm.unpatch(model)
    calls.clear()
    model(x())
    assert not calls
    assert type(model.layers[0]) is cls


@pytest.mark.parametrize("cls", [SomethingBetween, Augmented])
def test_no_such_line_nothing_to_say(cls: type[Layer]) -> None:
    report = rmsnorm.patch(Model(cls), fuse_add=True)
    assert (report.fused, report.skipped) == ([], [])


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda norm, a, b: (norm(a + b) * 1.0001, a + b), "its output changes"),
        (lambda norm, a, b: (norm(a + b), a), "its output changes"),
        (lambda norm, a, b: (norm(a + b.detach()), a + b), "its gradient changes"),
        (lambda norm, a, b: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_layer_that_changes_is_left_alone(monkeypatch, wrong, reason: str) -> None:
    monkeypatch.setattr(rewrite, "add_norm", wrong)
    rewrite.rewrite.cache_clear()
    model = Model(Layer)
    rmsnorm.patch(model)
    plain = model(x())
    rmsnorm.unpatch(model)
    report = rmsnorm.patch(model, fuse_add=True)
    rewrite.rewrite.cache_clear()
    assert not report.fused
    assert all(reason in entry.reason for entry in report.skipped), report.skipped
    assert len(report.skipped) == 2
    assert same_bits(model(x()), plain)


def test_an_example_is_needed_and_can_be_given() -> None:
    alone = Layer()
    report = rmsnorm.patch(alone, fuse_add=True)
    assert len(report.patched) == 2
    assert "the model can't be run on its example" in report.skipped[0].reason
    rmsnorm.unpatch(alone)
    training = alone.train().training
    assert rmsnorm.patch(alone, fuse_add={"hidden_states": x()}).fused
    assert alone.training is training


def test_an_unpatched_norm_is_still_called(calls: list[int]) -> None:
    """The rewritten layer asks at each call whether the norm is ours, its types proven, its shapes equal."""
    model = Model(Layer)
    rmsnorm.patch(model, fuse_add=True)
    layer = model.layers[0]
    calls.clear()
    rmsnorm.unpatch(layer.post_attention_layernorm)
    layer(x())
    assert not calls
    rmsnorm.patch(layer.post_attention_layernorm)
    assert binding_of(layer.post_attention_layernorm)
    layer(x())
    assert len(calls) == 1
    layer.double()(x().double())
    assert len(calls) == 1


def test_tracebacks_show_the_rewritten_lines() -> None:
    model = Model(InABranch)
    rmsnorm.patch(model, fuse_add=True)
    with pytest.raises(RuntimeError) as error:
        model.layers[0](torch.tensor(1.0))
    text = "".join(traceback.format_exception(error.value))
    assert "with fused adds" in text
    assert "raise RuntimeError('no')" in text
