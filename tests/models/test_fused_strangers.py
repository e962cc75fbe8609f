"""Proves that a fused layer is what it was: the proof leaves no trace in the model, what is exchanged later is heeded,
and lines keep the order of their operands and of their dice. The truth is a copy that was never patched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import same_bits
from torch import Tensor, nn

import rmsnorm
from rmsnorm.models.turns import turn_of

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
BEYOND = 64
SIGN = 1.0


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.linspace(0.5, 2, 16)), 1e-6

    def scaled(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.scaled(x)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mixer, self.norm = nn.Linear(16, 16), Norm()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.watch(x)
        residual = x
        x = self.mixer(x)
        x = residual + x
        y = self.norm(x)
        return x + y * (1 + self.seen)

    def watch(self, x: Tensor) -> None:
        """Nothing here."""


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, **given: Any) -> Any:
        return self.layer(**given)


def fused(layer: nn.Module, fuses: bool = True, **given: Any) -> tuple[nn.Module, nn.Module]:
    """The layer in a model that is patched, and a copy in one that isn't."""
    model = Model(layer)
    plain = copy.deepcopy(model)
    given = given or {"x": X}
    report = rmsnorm.patch(model, fuse=given)
    assert bool(report.fused) is fuses, report
    return model, plain


def equal(model: nn.Module, plain: nn.Module, **given: Any) -> None:
    """With the same dice, in both modes, of which one is as it was left."""
    for training in (plain.training, not plain.training):
        results = []
        for one in (model, plain):
            torch.manual_seed(5)
            results.append(one.train(training)(**given or {"x": X}))
        ours, theirs = results
        if isinstance(theirs, tuple):
            assert ours[1:] == theirs[1:]
            ours, theirs = ours[0], theirs[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


class Counts(Layer):
    def watch(self, x: Tensor) -> None:
        self.seen += 1


class Caches(Layer):
    cached: Tensor | None = None

    def watch(self, x: Tensor) -> None:
        if self.cached is None:
            self.cached = x.detach().clone()
        self.seen = self.cached.mean()


class Lists(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.table = {"last": torch.zeros(16)}

    def watch(self, x: Tensor) -> None:
        self.rows.append(len(x))
        self.table["last"].copy_(x.detach()[0, 0])
        self.seen = self.table["last"].sum() * len(self.rows)


class Merges(Layer):
    """As loralib's layers, which eval() merges, and train() divides again."""

    def __init__(self) -> None:
        super().__init__()
        self.more, self.merged = nn.Parameter(torch.ones(16)), False

    def train(self, mode: bool = True) -> Merges:
        self.merged = not mode
        return super().train(mode)

    def watch(self, x: Tensor) -> None:
        self.seen = self.seen if self.merged else self.more.sum()


class Rolls(Layer):
    def watch(self, x: Tensor) -> None:
        self.seen = torch.rand(())


@pytest.mark.parametrize("cls", [Counts, Caches, Lists, Merges, Rolls])
def test_the_proof_leaves_no_trace(cls: type[Layer]) -> None:
    dice = torch.get_rng_state()
    layer = cls().train()
    torch.set_rng_state(dice)
    model, plain = fused(layer)
    assert torch.equal(torch.get_rng_state(), dice)
    ours, theirs = vars(model.layer), vars(plain.layer)
    assert ours.keys() == theirs.keys()
    assert same_bits(model.layer.seen, plain.layer.seen)
    assert all(str(ours[name]) == str(theirs[name]) for name in ours if name[:1] != "_")
    assert all(a.training == b.training for a, b in zip(model.modules(), plain.modules(), strict=True))
    equal(model, plain, x=X * 2)
    model(x=X).sum().backward()
    plain(x=X).sum().backward()
    grads = [{name: p.grad for name, p in one.named_parameters()} for one in (model.train(), plain.train())]
    assert grads[0].keys() == grads[1].keys()
    assert [name for name in grads[0] if (grads[0][name] is None) is not (grads[1][name] is None)] == []


def double(self: Any, x: Tensor) -> Tensor:
    return 2 * x


CHANGES: dict[str, Callable[[pytest.MonkeyPatch, Any], None]] = {
    "the norm's class's method": lambda patch, layer: patch.setattr(Norm, "scaled", double),
    "the norm's class's forward": lambda patch, layer: patch.setattr(Norm, "forward", double),
    "a method of the norm's own": lambda patch, layer: setattr(layer.norm, "scaled", lambda x: 2 * x),
    "the layer's class's forward": lambda patch, layer: patch.setattr(Layer, "forward", double),
    "a class around the norm": lambda patch, layer: setattr(
        layer.norm, "__class__", type("Loud", (type(layer.norm),), {"forward": double})
    ),
    "a call around the norm": lambda patch, layer: setattr(
        layer.norm, "__class__", type("Loud", (type(layer.norm),), {"__call__": double})
    ),
    "a weight of one number": lambda patch, layer: setattr(layer.norm, "weight", nn.Parameter(torch.full((1,), 3.0))),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_exchanged_later_is_heeded(monkeypatch, name: str) -> None:
    model, plain = fused(Layer())
    before = model(x=X)
    for layer in (model.layer, plain.layer):
        CHANGES[name](monkeypatch, layer)
    assert not torch.allclose(model(x=X), before)
    equal(model, plain)


class Loud(Tensor):
    """Its sums are three times as large."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result * 3 if func in (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__) else result


class After(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm()

    def forward(self, x: Any, residual: Any) -> Any:
        x = self.norm(x)
        x = x + residual
        return x  # noqa: RET504


class Before(After):
    def forward(self, x: Any, residual: Any) -> Any:
        x = x + residual
        y = self.norm(x)
        return x, y


@pytest.mark.parametrize("cls", [After, Before])
def test_a_residual_that_watches_its_adds(cls: type[nn.Module]) -> None:
    given = {"x": X, "residual": X + 1}
    model, plain = fused(cls(), **given)
    given["residual"] = given["residual"].as_subclass(Loud)
    ours, theirs = model(**given), plain(**given)
    for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (ours, theirs)), strict=True):
        torch.testing.assert_close(a.as_subclass(Tensor), b.as_subclass(Tensor), rtol=1e-5, atol=1e-5)


class Words(After):
    """Lists are added, and multiplied, too."""

    def forward(self, x: Any, residual: Any) -> Any:
        names = ["a"]
        names = self.norm_names(names)
        names = names + ["b"]  # noqa: RUF005
        gates, gate = 2, x + 1
        order = ["c"]
        order = gates * ["gate"] + order
        residual = residual + gate * x
        return residual, names, order

    def norm_names(self, names: list[str]) -> list[str]:
        return names


class Dice(After):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Dropout(0.5), nn.Dropout(0.2)

    def forward(self, x: Any, residual: Any) -> Any:
        gate = residual + 1
        h = residual
        h = h + self.a(x) * self.b(gate)
        return h  # noqa: RET504


class OneLine(After):
    def forward(self, x: Any, residual: Any) -> Any:
        gate = residual + 1
        y = x
        h = residual
        # fmt: off
        y = gate * y; h = h + y; z = y  # noqa: E702
        # fmt: on
        return h + z if self.training else h


class Closure(After):
    def forward(self, x: Any, residual: Any) -> Any:
        gate, h, y = residual + 1, residual, x
        last = lambda: y  # noqa: E731
        y = gate * y
        h = h + y
        return h + last() if self.training else h


class Deletes(After):
    def forward(self, x: Any, residual: Any) -> Any:
        gate, h, y = residual + 1, residual, x
        y = gate * y
        h = h + y
        if self.training:
            del y
        return h


@pytest.mark.parametrize(("cls", "fuses"), [(Words, True), (Dice, True), (OneLine, False), (Closure, False),
                                            (Deletes, False)])  # fmt: skip
def test_lines_keep_their_order(cls: type[nn.Module], fuses: bool) -> None:
    given = {"x": X, "residual": X + 1}
    model, plain = fused(cls(), fuses, **given)
    equal(model, plain, **given)


def half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return q * cos + half(q) * sin, k * cos + half(k) * sin


ROTARY: dict[str, Callable[..., Any]] = {
    "as it is": lambda q, k, cos, sin: turn(q, k, cos[:, None], sin[:, None]),
    "a global": lambda q, k, cos, sin: turn(q, k, cos[:, None], sin[:, None] * SIGN),
    "clamps": lambda q, k, cos, sin: turn(q.clamp(-30, 30), k, cos[:, None], sin[:, None]),
    "long texts": lambda q, k, cos, sin: turn(q * (2 if q.shape[-2] > BEYOND else 1), k, cos[:, None], sin[:, None]),
    "one table": lambda q, k, cos, sin: turn(q, k, cos[0], sin[0]),
    "gradients": lambda q, k, cos, sin: turn(q * (1 if q.requires_grad else 1.0), k, cos[:, None], sin[:, None]),
}


@pytest.mark.parametrize("name", ROTARY)
def test_what_turns_depends_on_nothing_else(name: str) -> None:
    assert (turn_of(ROTARY[name]) is not None) is (name == "as it is")


class Scaled(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.scaled(x) * SIGN


def test_compiled_it_hears_of_a_global(monkeypatch) -> None:
    model, plain = nn.Sequential(Scaled()), nn.Sequential(Scaled())
    assert rmsnorm.patch(model).patched
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(X), plain(X))
    monkeypatch.setitem(globals(), "SIGN", 3.0)
    torch.testing.assert_close(compiled(X), plain(X))


class Halves(Norm):
    """Of which gradients differ in training alone."""

    def scaled(self, x: Tensor) -> Tensor:
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return x * (r.detach() if self.training else r)


class Counted(Norm):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.scaled(x) * self.gain.clamp(min=1)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("cls", [Halves, Counted])
def test_norms_that_are_another_in_training_or_with_other_numbers(cls: type[nn.Module], training: bool) -> None:
    report = rmsnorm.patch(cls().train(training))
    assert not report.patched
    assert any(words in report.skipped[0].reason for words in ("it does something else", "not backward"))
