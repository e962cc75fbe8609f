"""Proves that what can't be read, asked or copied is left alone with the reason, and that the rest is served; and that
a model of which ``patch`` raises is the model that it was.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from layers import Layer, Model, x
from oracle import same_bits
from torch import Tensor, nn
from torch.nn import functional as F

import rmsnorm
from rmsnorm.models import fusion
from rmsnorm.models.binding import binding_of


class WrapsItself(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


WrapsItself.forward.__wrapped__ = WrapsItself.forward


class NormThatWrapsItself(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


NormThatWrapsItself.forward.__wrapped__ = NormThatWrapsItself.forward


class Callable:
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other

    def __call__(self, x: Tensor) -> Tensor:
        return x


class Unhashable(nn.Module):
    forward = Callable()


class NotYet(nn.Module):
    """By its eps it may be a norm."""

    @property
    def eps(self) -> float:
        raise RuntimeError("not yet")

    def forward(self, x: Tensor) -> Tensor:
        return x


class Beside(nn.Module):
    """A layer that can be fused, behind something."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.layer = first, Layer()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(self.first(x))
        return y


OPAQUE = {
    "scripted": (lambda: torch.jit.script(nn.Linear(16, 16)), "lines not fused: torch.jit has compiled them"),
    "traced": (lambda: torch.jit.trace(nn.Linear(16, 16), x()), "lines not fused: torch.jit has compiled them"),
    "wraps itself": (WrapsItself, "lines not fused: its forward wraps itself"),
    "a norm that does": (lambda: NormThatWrapsItself(16), "it can't be probed: ValueError: wrapper loop"),
    "unhashable": (Unhashable, "lines not fused: TypeError: unhashable type: 'Callable'"),
    "a property that raises": (NotYet, "it can't be probed: RuntimeError: not yet"),
}


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("name", OPAQUE)
def test_it_is_left_alone_and_the_rest_is_served(name: str, fuse: bool) -> None:
    make, reason = OPAQUE[name]
    model = Beside(make())
    plain = model(x())
    report = rmsnorm.patch(model, fuse=fuse and {"x": x()})
    assert [entry.name for entry in report.patched] == ["layer.input_layernorm", "layer.post_attention_layernorm"]
    assert [entry.meaning for entry in report.fused] == ["add, then post_attention_layernorm"] * fuse
    said = {entry.reason for entry in report.skipped if entry.name == "first"}
    assert all(one.startswith(reason) or fuse for one in said), said
    assert any(one.startswith(reason) for one in said) or not fuse
    torch.testing.assert_close(model(x()), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
@pytest.mark.parametrize("late", [False, True])
def test_a_model_of_which_patch_raises_is_what_it_was(monkeypatch: Any, error: type[BaseException], late: bool) -> None:
    """Before the first layer is fused, and after it."""
    model = Model(Layer)
    rmsnorm.patch(model.layers[1])  # before: stays
    before = [type(module) for module in model.modules()]

    def fail(*_: object) -> None:
        raise error

    if late:  # the second layer can't be fused, and to say so fails
        monkeypatch.setattr(model.layers[1], "forward", model.layers[1].forward)
    else:
        monkeypatch.setattr(fusion, "_record", fail)
    monkeypatch.setattr(fusion, "_words", fail)
    with pytest.raises(error):
        rmsnorm.patch(model, fuse=True)
    assert [type(module) for module in model.modules()] == before
    assert not binding_of(model.layers[0].input_layernorm)
    assert binding_of(model.layers[1].input_layernorm)


class Activated(Layer):
    """What is called behind the second add is no module."""

    act: Any = staticmethod(F.silu)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.mixer(x)
        x = residual + x
        residual = x
        x = self.post_attention_layernorm(x)
        x = self.mlp(x)
        x = residual + x
        x = self.act(x)
        return x  # noqa: RET504 - the line is the pattern


class ByMethod(Activated):
    def act(self, x: Tensor) -> Tensor:
        return F.silu(x)


class ByBuiltin(Activated):
    """It has no ``vars()``."""

    act = staticmethod(F.gelu)


class OnlyThat(Layer):
    """No norm stands behind the add, but beside it one that is patched."""

    act = staticmethod(F.gelu)

    def forward(self, x: Tensor, late: bool = False) -> Tensor:
        y = x
        if late:
            x = self.mixer(x)
            x = y + x
            x = self.post_attention_layernorm(x)
        x = y + x
        x = self.act(x)
        return x  # noqa: RET504 - as above


@pytest.mark.parametrize("cls", [Activated, ByMethod, ByBuiltin])
def test_a_function_where_a_norm_may_stand(cls: type[Layer], calls: list[int]) -> None:
    model = Model(cls)
    rmsnorm.patch(model)
    plain = model(x())
    rmsnorm.unpatch(model)
    report = rmsnorm.patch(model, fuse=True)
    assert [entry.meaning for entry in report.fused] == ["add, then post_attention_layernorm"] * 2, report
    calls.clear()
    assert same_bits(model(x()), plain)
    assert len(calls) == 2


def test_a_function_alone_is_nothing_to_fuse() -> None:
    report = rmsnorm.patch(Model(OnlyThat), fuse=True)
    assert {entry.reason.partition(":")[2] for entry in report.skipped} == {
        " the model reaches no such line, or with norms or tensors that one pass doesn't take"
    }


class TakesLock(Layer):
    def forward(self, x: Tensor, lock: Any) -> Tensor:
        total = x + self.mixer(x)
        y = self.post_attention_layernorm(total)
        with lock:
            return self.mlp(y) + total


class Locking(Beside):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(self.first(x, threading.Lock()))
        return y


def test_an_argument_that_cant_be_copied_is_that_layers_own_matter() -> None:
    report = rmsnorm.patch(Locking(TakesLock()), fuse={"x": x()})
    assert [entry.name for entry in report.fused] == ["layer"]
    (left,) = report.skipped
    assert left.name == "first"
    assert left.reason.startswith("residual add not fused: what it is called with can't be copied: TypeError: cannot")


class Direct(Beside):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer.forward(self.first(x))


def test_a_forward_that_is_called_past_the_hooks() -> None:
    report = rmsnorm.patch(Direct(nn.Identity()), fuse={"x": x()})
    assert [entry.reason for entry in report.skipped] == [
        "residual add not fused: the model doesn't call it, or calls its forward past its hooks"
    ]


class Keeper:
    """Hears of a module, and holds what can't be copied."""

    def __init__(self) -> None:
        self.lock, self.heard = threading.Lock(), 0

    def __call__(self, *_: object) -> None:
        self.heard += 1


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_state_dict_pre_hook"]
)
def test_a_hook_that_cant_be_copied(register: str) -> None:
    norm, keeper = nn.RMSNorm(16), Keeper()
    getattr(norm, register)(keeper)
    assert [entry.meaning for entry in rmsnorm.patch(norm).patched] == ["weight, then round"]
    assert keeper.heard == 0, "it isn't told of the proof"
    norm(x())
    norm.state_dict()
    assert keeper.heard == 1
