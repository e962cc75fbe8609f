"""Proves that surgery compares what a model returns, wherever it lies, and leaves no trace of the runs it needs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rmsnorm
from rmsnorm.surgery.operations import SurgeryError
from rmsnorm.surgery.trace import results


@dataclass
class Held:
    y: Any


SHAPES: dict[str, Callable[[Tensor], Any]] = {
    "a tensor": lambda y: y,
    "a tuple": lambda y: (y,),
    "a list in a dictionary": lambda y: {"out": [y]},
    "a tuple in a tuple": lambda y: ((y, 3),),
    "an object": Held,
    "a list in an object": lambda y: Held([None, y]),
}


class Read(nn.Module):
    """A norm, of which the stream is read by something else, too: neither centring nor rotating it is exact."""

    def __init__(self, shape: Callable[[Tensor], Any], norm: nn.Module, raw: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = nn.Linear(8, 8), norm, nn.Linear(8, 8)
        self.raw = nn.Linear(8, 8)
        self.reads, self.shape = raw, shape
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 2, 8))

    def forward(self, x: Tensor) -> Any:
        s = self.embed(x)
        y = self.head(self.norm(s))
        return self.shape(y + torch.tanh(self.raw(s.abs())) if self.reads else y)


def only(output: Any) -> Tensor:
    """The tensor in it."""
    while not isinstance(output, Tensor):
        held = output.y if isinstance(output, Held) else output.get("out") if isinstance(output, dict) else output
        output = (
            held if isinstance(held, Tensor) else next(one for one in held if isinstance(one, Tensor | tuple | list))
        )
    return output


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("operation", ["rotate", "to_rms", "fold"])
@pytest.mark.parametrize("name", SHAPES)
def test_an_output_is_what_it_was_wherever_it_lies(name: str, operation: str) -> None:
    norm = nn.LayerNorm(8) if operation == "to_rms" else nn.RMSNorm(8, 1e-6)
    model = Read(SHAPES[name], norm)
    before = copy.deepcopy(model)
    try:
        report = getattr(rmsnorm, operation)(model, inputs=X)
    except SurgeryError:
        report = None
    torch.testing.assert_close(only(model(X)), only(before(X)), rtol=1e-4, atol=1e-4)
    if operation == "fold":
        assert report is not None
        assert list(report.differences["float64"].outputs.values()) != []


def test_nothing_to_compare_is_an_error_and_changes_nothing() -> None:
    model = Read(lambda y: {"n": len(y)}, nn.RMSNorm(8, 1e-6), raw=False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="nothing to compare: the model's dict holds no floating-point tensors"):
        rmsnorm.fold(model, inputs=X)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))


class Merges(nn.Linear):
    """As loralib's: merged by eval(), divided again by train(). And it counts its calls."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.merged = False
        self.register_buffer("seen", torch.zeros(()))

    def train(self, mode: bool = True) -> Merges:
        self.merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return super().forward(x)


def test_the_runs_leave_no_trace() -> None:
    model = nn.Sequential(nn.RMSNorm(8), Merges()).train()
    rmsnorm.fold(model, inputs=X)
    assert (model[1].training, model[1].merged, float(model[1].seen)) == (True, False, 0.0)
    rmsnorm.unfold(model)
    assert float(model[1].seen) == 0.0


class OnlyFloat(nn.Module):
    """Runs in fp32 alone; what a fold makes of it is 6e-3 off."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.RMSNorm(8, 1e-6), nn.Linear(8, 8)
        with torch.no_grad():
            self.norm.weight.copy_(torch.linspace(0.5, 2, 8))

    def forward(self, x: Tensor) -> Tensor:
        if self.head.weight.dtype is not torch.float32:
            raise TypeError("float32 only")
        y = self.head(self.norm(x))
        return y + 0.02 * self.norm.weight.detach().numpy().mean().item()


def test_what_fp64_cant_prove_must_be_close_in_its_own_type() -> None:
    model = OnlyFloat()
    before = copy.deepcopy(model)
    with pytest.raises(SurgeryError):
        rmsnorm.fold(model, inputs=X)
    assert torch.equal(model(X), before(X))


def test_a_name_with_points_is_no_depth() -> None:
    """Points in a key were counted as levels: nothing was found below a key of eight."""
    deep = torch.ones(2)
    [found] = results({"a.b.c.d.e.f.g.h.i": (deep,)}).values()
    assert found is deep
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(ValueError, match="holds no floating-point tensors"):
        results(endless)
