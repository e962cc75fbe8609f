"""Proves that a residual add is fused where the layer's own source has it before a norm, only there, and only if output
and gradients stay; the layers are made here, so that each can be wrong in its own way.
"""

from __future__ import annotations

import copy
import pickle
import traceback

import pytest
import tiny
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
    assert "it has no dummy_inputs; pass what it is called with, as in fuse={'" in report.skipped[0].reason
    rmsnorm.unpatch(alone)
    training = alone.train().training
    assert rmsnorm.patch(alone, fuse_add={"hidden_states": x()}).fused
    assert alone.training is training


@pytest.mark.parametrize("example", [torch.ones(2, 2), (1,), None, 0, "input_ids"])
@pytest.mark.parametrize("name", ["fuse", "fuse_add"])
def test_what_is_no_example_is_refused_before_anything_is_changed(name: str, example: object) -> None:
    model = Model(Layer)
    with pytest.raises(TypeError, match=rf"patch: {name} must be True, False, or the keyword arguments that the model"):
        rmsnorm.patch(model, **{name: example})
    assert not any(binding_of(module) for module in model.modules())


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


class Sandwich(Layer):
    """A norm on either side of the first add, one before the second, which ends the layer."""

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.mixer(x)
        x = self.input_layernorm(x)
        x = x + residual
        residual = x
        x = self.post_attention_layernorm(x)
        x = self.mlp(x)
        x = self.input_layernorm(x)
        x = residual + x
        return x  # noqa: RET504 - the line is the pattern


class UsedAgain(Layer):
    """What the norm made is read behind the add, or the add isn't of what it made."""

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        normed = self.input_layernorm(x)
        x = residual + normed
        x = self.mlp(x + normed)
        x = self.post_attention_layernorm(x)
        x = x + x
        return x  # noqa: RET504 - as above


def test_norms_before_adds(calls: list[int]) -> None:
    model = Model(Sandwich)
    rmsnorm.patch(model)
    plain = model(x())
    rmsnorm.unpatch(model)
    report = rmsnorm.patch(model, fuse=True)
    said = "input_layernorm, add, then post_attention_layernorm; input_layernorm, add"
    assert [entry.meaning for entry in report.fused] == [said] * 2
    calls.clear()
    assert same_bits(model(x()), plain)
    assert len(calls) == 4
    rmsnorm.unpatch(model.layers[0].input_layernorm)  # the sandwich falls apart: what is ours stays so
    calls.clear()
    model(x())
    assert len(calls) == 3
    model.layers[1].post_attention_layernorm.register_forward_hook(lambda *_: None)
    calls.clear()
    model(x())
    assert len(calls) == 3


def test_what_is_used_again_is_no_pattern() -> None:
    report = rmsnorm.patch(Model(UsedAgain), fuse=True)
    assert (report.fused, report.skipped) == ([], [])


@pytest.mark.parametrize(
    ("name", "said", "each"),
    [
        ("gemma2", "post_attention_layernorm, add, then pre_feedforward_layernorm; post_feedforward_layernorm, add", 2),
        ("gemma3", "post_attention_layernorm, add, then pre_feedforward_layernorm; post_feedforward_layernorm, add", 2),
        ("olmo2", "post_attention_layernorm, add; post_feedforward_layernorm, add", 2),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_with_norms_before_adds(calls: list[int], name: str, said: str, each: int, dtype: torch.dtype) -> None:
    """The bits of the patched model that is not fused; gradients within rounding."""
    torch.manual_seed(0)
    model = tiny.MODELS[name]().to(dtype).eval()
    ids = torch.arange(2, 26).view(2, 12)
    rmsnorm.patch(model)
    plain = model(input_ids=ids, labels=ids)
    plain.loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    rmsnorm.unpatch(model)
    report = rmsnorm.patch(model, fuse={"input_ids": ids})
    layers = [entry.meaning for entry in report.fused if "rotary" not in entry.meaning]  # attention is fused, too
    assert layers == [said] * 2, report.skipped
    calls.clear()
    output = model(input_ids=ids, labels=ids)
    assert len(calls) == 2 * each
    assert same_bits(output.logits, plain.logits)
    output.loss.backward()
    for place, parameter in model.named_parameters():
        apart = (parameter.grad - wanted[place]).double().norm() / wanted[place].double().norm().clamp_min(1e-30)
        assert apart <= 16 * torch.finfo(dtype).eps, place
