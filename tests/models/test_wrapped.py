"""Proves that a layer whose forward is wrapped, or calls super(), is fused inside of its wrappers, that these do what
they did, once, and that copies compute with their own state. What transformers 5.23 does is made here, smaller.
"""

from __future__ import annotations

import copy
import functools
import pickle
import types
import warnings

import pytest
import torch
from layers import Layer, Model, x
from oracle import same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rmsnorm
from rmsnorm.models import classes, rewrite
from rmsnorm.models.classes import switch


class Checkpointed(Layer):
    """Each subclass's forward is wrapped, and only the outermost wrapper acts: by class, as FSDP2 makes subclasses."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        inner = cls.forward

        @functools.wraps(inner)
        def outermost(self, *args, **kwargs):
            if self.training and type(self).forward is outermost:
                return checkpoint(functools.partial(inner, self, **kwargs), *args, use_reentrant=False)
            return inner(self, *args, **kwargs)

        cls.forward = outermost


def renamed(old: str, new: str):
    def decorate(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            if old in kwargs:
                warnings.warn(f"{old} is {new} now", FutureWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapper

    return decorate


def by_default(function):
    @functools.wraps(function)
    def wrapper(*args, wrapped=function, **kwargs):
        return wrapped(*args, **kwargs)

    return wrapper


class Once(Checkpointed):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(x)
        y = self.post_attention_layernorm(x)
        return x + self.mlp(y)


class Inherited(Once):
    """Two wrappers of one kind around a forward of the base's."""


class Renamed(Checkpointed):
    """Two of different kinds, and annotations that were evaluated."""

    @renamed("factor", "scale")
    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        x = x + self.mixer(x) * scale
        y = self.post_attention_layernorm(x)
        return x + self.mlp(y)


class Defaulted(Layer):
    forward = by_default(torch.no_grad()(by_default(Layer.forward)))


class CallsSuper(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(x)
        x = self.post_attention_layernorm(x)
        return super().forward(x)


class NamesItself(Checkpointed):
    """The two-argument super, a private name, and a string of two lines."""

    __scale = """2
        """

    def forward(self, x: Tensor) -> Tensor:
        text = """2
        """
        scale = 2.0 if self.__scale == text else 0.0
        x = x + self.mixer(x) * scale
        x = self.post_attention_layernorm(x)
        return super(NamesItself, self).forward(x)  # noqa: UP008


FUSED = [Once, Inherited, Renamed, Defaulted, CallsSuper, NamesItself]


@pytest.mark.parametrize("cls", FUSED)
def test_fused_in_its_wrappers(cls: type[Layer], calls: list[int]) -> None:
    model = Model(cls)
    rmsnorm.patch(model)
    plain = model(x())
    rmsnorm.unpatch(model)
    report = rmsnorm.patch(model, fuse_add=True)
    assert ([entry.name for entry in report.fused], report.skipped) == (["layers.0", "layers.1"], [])
    layer = model.layers[0]
    assert (type(layer).__name__, isinstance(layer, cls), "forward" in vars(layer)) == (cls.__name__, True, False)
    calls.clear()
    assert same_bits(model(x()), plain)
    assert len(calls) == 2
    again = rmsnorm.patch(model, fuse_add=True)
    assert "residual add not fused: it is fused already" in {entry.reason for entry in again.skipped}
    turn = switch(model)
    for on in (False, True):
        turn(on)
        calls.clear()
        model(x())
        assert len(calls) == 2 * on
    rmsnorm.unpatch(model)
    assert type(layer) is cls


def recomputed(model: nn.Module) -> tuple[int, dict[str, Tensor]]:
    """How often an mlp ran in a training step, and the gradients."""
    seen: list[int] = []
    # Before it: recomputing stops in the mlp, as soon as nothing more is needed.
    hooks = [layer.mlp.register_forward_pre_hook(lambda *_: seen.append(1)) for layer in model.layers]
    model.train().zero_grad()
    model(x().requires_grad_()).square().sum().backward()
    for hook in hooks:
        hook.remove()
    return len(seen), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("cls", [Once, Inherited, Renamed])
@pytest.mark.parametrize("handed_in", [False, True], ids=["set", "handed in"])
def test_checkpoints_once(cls: type[Layer], handed_in: bool, calls: list[int]) -> None:
    """Also if the rewritten forward stands in the body of the subclass, whose base then wraps it once more."""
    model = Model(cls)
    assert recomputed(model)[0] == 4  # two layers, forward and again
    rmsnorm.patch(model)
    count, gradients = recomputed(model)
    assert count == 4
    rmsnorm.unpatch(model)
    rmsnorm.patch(model, fuse_add=True)
    if handed_in:
        for layer in model.layers:
            layer.__class__ = type(cls)(cls.__name__, (cls,), {"forward": rewrite.Rewritten(cls).function})
    calls.clear()
    count, ours = recomputed(model)
    assert (count, len(calls)) == (4, 4)
    assert gradients.keys() == ours.keys()
    assert all(same_bits(ours[name], gradient) for name, gradient in gradients.items())


def test_a_subclass_made_later_checkpoints_once() -> None:
    """What FSDP2 does with a layer that is fused."""
    model = Model(Once)
    rmsnorm.patch(model, fuse_add=True)
    for layer in model.layers:
        layer.__class__ = type("On" + type(layer).__name__, (type(layer),), {})
    assert recomputed(model)[0] == 4
    rmsnorm.unpatch(model)
    unpatched = model.eval()(x())
    assert same_bits(unpatched, Model(Once).eval()(x()))


def test_a_renamed_argument_is_still_taken_and_told() -> None:
    model = Model(Renamed)
    rmsnorm.patch(model, fuse_add=True)
    layer = model.layers[0].eval()
    with pytest.warns(FutureWarning, match="factor is scale now") as seen:
        output = layer(x(), factor=0.5)
    assert len(seen) == 1
    assert same_bits(output, layer(x(), scale=0.5))
    assert not same_bits(output, layer(x()))


@pytest.mark.parametrize("cls", FUSED)
def test_copies_compute_with_their_own_state(cls: type[Layer], calls: list[int]) -> None:
    model = Model(cls)
    rmsnorm.patch(model, fuse_add=True)
    layer = model.layers[0]
    for twin in (
        copy.copy(layer),
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        layer._replicate_for_data_parallel(),
    ):
        assert type(twin) is type(layer)
        twin._modules = twin._modules | {"mixer": nn.Linear(16, 16)}
        calls.clear()
        ours = twin(x())
        assert len(calls) == 1
        classes.restore(twin)
        assert same_bits(ours, twin(x()))
        assert not same_bits(ours, layer(x()))


def test_accelerate_around_a_fused_layer() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = Model(Once)
    rmsnorm.patch(model, fuse_add=True)
    layer = model.layers[0]
    hooks.add_hook_to_module(layer, hooks.ModelHook())
    rmsnorm.unpatch(model)
    assert layer._old_forward.__func__ is Once.forward
    hooks.remove_hook_from_module(layer)
    assert recomputed(model)[0] == 4


class Callable:
    def __init__(self, function) -> None:
        functools.update_wrapper(self, function)

    def __get__(self, instance, owner=None):
        return self if instance is None else types.MethodType(self, instance)

    def __call__(self, *args, **kwargs):
        return self.__wrapped__(*args, **kwargs)


def in_a_list(function):
    held = [function]

    @functools.wraps(function)
    def elsewhere(*args, **kwargs):
        return held[0](*args, **kwargs)

    return elsewhere


def edited(function):
    """A function that runs something else than its source says."""
    code = function.__code__
    other = code.replace(co_names=tuple({"mixer": "mlp"}.get(name, name) for name in code.co_names))
    return types.FunctionType(other, function.__globals__, function.__name__, function.__defaults__)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (Callable(Layer.forward), "its forward is wrapped by Callable, which is no Python function"),
        (in_a_list(Layer.forward), "its forward is wrapped by elsewhere, which doesn't hold it in its closure"),
        (edited(Layer.forward), "its source isn't what it runs"),
    ],
)
def test_what_cant_be_rewritten_is_said(forward, reason: str) -> None:
    cls = type("Odd", (Layer,), {"forward": forward})
    model = Model(cls)
    plain = model(x())
    report = rmsnorm.patch(model, fuse_add=True)
    assert not report.fused
    assert {entry.reason for entry in report.skipped} == {f"residual add not fused: {reason}"}
    assert type(model.layers[0]) is cls
    rmsnorm.unpatch(model)
    assert same_bits(model(x()), plain)


def test_a_variable_of_a_closure_stays_one() -> None:
    """A class that is made in a function, and sees what is assigned there later."""
    scale = 1.0

    class Local(Layer):
        def forward(self, x: Tensor) -> Tensor:
            x = x + self.mixer(x) * scale
            return self.mlp(self.post_attention_layernorm(x)) if not scale else self.late(x)

        def late(self, x: Tensor) -> Tensor:
            return x

    class Late(Local):
        def forward(self, x: Tensor) -> Tensor:
            x = x + self.mixer(x) * scale
            y = self.post_attention_layernorm(x)
            return y * scale

    model = Model(Late)
    assert len(rmsnorm.patch(model, fuse_add=True).fused) == 2
    scale = 0.0
    assert not model(x()).any()
