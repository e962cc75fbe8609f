"""Proves that norms which may do something else later are refused, with the reason, or answer with their own forward
when they do: switches, globals, closures, contents and sizes of the input, gradients, classes that change.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rmsnorm

TABLE: dict[str, float] = {}
WIDTHS = (32, 96, 128, 384)


class Stranger(nn.Module):
    kept: Any

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = 1e-6

    def norm(self, x: Tensor) -> Tensor:
        rows = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight.float() * rows).to(x.dtype)

    def forward(self, x: Any) -> Any:
        return self.norm(x)


def stranger(forward: Callable[[Any, Any], Any]) -> type[Stranger]:
    return type("Norm", (Stranger,), {"forward": forward})


def _closure() -> Callable[[Any, Any], Any]:
    state = {"scale": 1.0}
    return lambda self, x: self.norm(x) * state["scale"]


def _default(self: Any, x: Any, table: dict[str, float] = {}) -> Any:  # noqa: B006
    return self.norm(x) * table.get("scale", 1.0)


def _imports(self: Any, x: Any) -> Any:
    import sched

    return self.norm(x) if sched else x


REFUSED = {
    "closure": (_closure(), "state"),
    "default": (_default, "a default of"),
    "import": (_imports, "sched"),
    "empty table": (lambda self, x: self.norm(x) * TABLE.get("scale", 1.0), "TABLE"),
    "environment": (lambda self, x: self.norm(x) * float(os.getenv("RMSNORM_NONE", "1")), "getenv"),
    "globals": (lambda self, x: self.norm(x) * len(globals()["WIDTHS"]) / 4, "globals"),
    "plain tensor": (lambda self, x: self.norm(x) * self.kept, "neither parameter nor buffer"),
    "contents": (lambda self, x: self.norm(x) * (2.0 if x.abs().max() > 1e9 else 1.0), "what its tensors hold"),
    "rows": (lambda self, x: self.norm(x) * (2.0 if x.shape[0] > 100 else 1.0), "compares sizes"),
    "length": (lambda self, x: self.norm(x) * (2.0 if len(x) > 100 else 1.0), "compares sizes"),
    "rows as a number": (lambda self, x: self.norm(x) * (2.0 if int(x.shape[0]) > 100 else 1.0), "compares sizes"),
    "half the rows": (lambda self, x: self.norm(x) * (2.0 if x.shape[0] / 2 > 50 else 1.0), "compares sizes"),
    "bytes": (lambda self, x: self.norm(x) * (2.0 if x.nbytes > 10**6 else 1.0), "nbytes"),
    "numbers": (lambda self, x: self.norm(x) * (2.0 if x.numel() > 10**6 else 1.0), "compares sizes"),
    "gradient": (lambda self, x: self.norm(x) * (1.0 if self.weight.requires_grad else 2.0), "requires_grad"),
    "layout": (lambda self, x: self.norm(x) * (1.0 if x.is_contiguous() else 2.0), "is_contiguous"),
    "default type": (lambda self, x: self.norm(x) * torch.ones(1), "default type"),
    "clamps": (lambda self, x: self.norm(x.clamp(-1e6, 1e6)), "large numbers"),
    "NaN": (lambda self, x: self.norm(x).nan_to_num(), "NaN"),
}


@pytest.mark.parametrize("size", WIDTHS)
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, size: int) -> None:
    forward, reason = REFUSED[name]
    norm = stranger(forward)(size)
    if name == "plain tensor":
        norm.kept = torch.tensor(1.0)
    report = rmsnorm.patch(norm)
    assert not report.patched
    assert reason in report.skipped[0].reason


@pytest.mark.parametrize(
    "make", [lambda s: {"__init_subclass__": classmethod(_final)}, lambda s: {"__deepcopy__": lambda self, memo: self}]
)
def test_a_class_that_bears_no_copy_or_subclass_is_left_alone(make: Callable[[int], dict[str, Any]]) -> None:
    norm: Any = type("Norm", (Stranger,), make(0))(32)
    weight = norm.weight
    assert not rmsnorm.patch(norm).patched
    assert norm.weight is weight
    assert norm.eps == 1e-6
    assert torch.equal(weight, torch.ones(32))


def _final(cls: type) -> None:
    raise TypeError("final")


def _double(norm: Any) -> None:
    norm.norm = lambda x: 2 * x


def _exchange(norm: Any) -> None:
    cls = next(c for c in type(norm).__mro__ if "forward" in vars(c) and not hasattr(c, "_rmsnorm_original"))
    cls.forward = lambda self, x: 2 * x


CHANGES: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any], None]]] = {
    "added": (lambda self, x: self.norm(x) * getattr(self, "later", 1.0), lambda n: setattr(n, "later", 2.0)),
    "a method": (lambda self, x: self.norm(x), _double),
    "the class's forward": (lambda self, x: self.norm(x), _exchange),
    "weight of more dimensions": (
        lambda self, x: self.norm(x),
        lambda n: setattr(n, "weight", nn.Parameter(torch.full((1, n.weight.numel()), 3.0))),
    ),
    "eps is none": (lambda self, x: self.norm(x) if self.eps else x, lambda n: setattr(n, "eps", None)),
}


@pytest.mark.parametrize("size", WIDTHS)
@pytest.mark.parametrize("name", CHANGES)
def test_its_own_forward_answers_after_a_change(name: str, size: int) -> None:
    forward, change = CHANGES[name]
    norm = stranger(forward)(size)
    before = copy.deepcopy(norm)
    assert rmsnorm.patch(norm).patched
    x = torch.randn(4, size)
    torch.testing.assert_close(norm(x), before(x))
    change(norm)
    if name != "the class's forward":
        change(before)
    assert torch.equal(norm(x), before(x))


def test_arguments_of_any_name_and_kind() -> None:
    def output(self: Any, output: Any) -> Any:
        return None if output is None else self.norm(output)

    norm = stranger(output)(32)
    assert rmsnorm.patch(norm).patched
    assert norm(None) is None
    assert norm(torch.randn(3, 32, dtype=torch.float64)).dtype is torch.float64
    norm = stranger(eval("lambda this, self: this.norm(self)"))(32)
    rmsnorm.patch(norm)
    assert norm(torch.ones(3, 32)).shape == (3, 32)
