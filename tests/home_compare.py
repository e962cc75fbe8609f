"""How a cell of the table in test_home.py is judged: results, gradients and errors, and whether two are alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


@dataclass(frozen=True)
class Either:
    """Where torch refuses what we can do: its error, or the right result."""

    error: Any
    result: Any


@dataclass(frozen=True)
class Failed:
    """An error in place of a result."""

    kind: type[BaseException]
    text: str


class Advice(str):
    """The text of an error of ours that says what to do instead: as good as the result."""


def attempt(function: Callable[[], Any]) -> Any:
    """The result, or the error."""
    try:
        return function()
    except Exception as error:  # whichever it is, it is compared
        return Failed(type(error), " ".join(str(error).split())[:2000])


def tensors_of(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple | list) else [result]


def loss(result: Any) -> Tensor:
    """A number that every element has its own part in."""
    return sum(t.sin().sum() for t in tensors_of(result))


def learn(function: Callable[..., Any], args: tuple[Any, ...], module: nn.Module | None = None) -> dict[str, Any]:
    """Results, and the gradients that a backward pass leaves in the arguments and in the module's parameters."""
    module = function if module is None else module
    result = function(*args)
    loss(result).backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    return {"result": result, "of inputs": [t.grad for t in args], "of weights": gradients}


TOLERANCES = {  # (relative, absolute): a few roundings of each type; gradients cancel
    torch.float64: (1e-10, 1e-10),
    torch.float32: (2e-5, 5e-5),
    torch.float16: (4e-3, 4e-3),
    torch.bfloat16: (3e-2, 3e-2),
}


def compare(ours: Any, theirs: Any, where: str = "result") -> None:
    """AssertionError unless both are the same structure: the same types and errors, values up to rounding."""
    if isinstance(ours, Advice):
        return
    if isinstance(theirs, Either):
        theirs = theirs.error if isinstance(ours, Failed) else theirs.result
    if isinstance(theirs, Failed):
        assert isinstance(ours, Failed), f"{where}: torch refuses ({theirs.kind.__name__}: {theirs.text}), ours doesn't"
        assert issubclass(ours.kind, theirs.kind), f"{where}: {ours}, but torch's is {theirs}"
        return
    assert not isinstance(ours, Failed), f"{where}: {ours.kind.__name__}: {ours.text}"
    assert type(ours) is type(theirs), f"{where}: {type(ours)}, torch's is {type(theirs)}"
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs), f"{where}: {list(ours)}, torch's are {list(theirs)}"
        for key, value in theirs.items():
            compare(ours[key], value, f"{where}, {key}")
    elif isinstance(theirs, tuple | list):
        assert len(ours) == len(theirs), f"{where}: {ours}, torch's is {theirs}"
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            compare(*pair, f"{where}[{i}]")
    elif isinstance(theirs, Tensor):
        _compare_tensors(ours, theirs, where)
    else:
        assert ours == theirs, f"{where}: {ours}, torch's is {theirs}"


def _compare_tensors(ours: Tensor, theirs: Tensor, where: str) -> None:
    for what in ("dtype", "requires_grad", "is_nested"):
        mine, its = getattr(ours, what), getattr(theirs, what)
        assert mine == its, f"{where}: {what} {mine}, torch's is {its}"
    if theirs.is_nested:
        return compare(ours.values(), theirs.values(), where)
    assert ours.shape == theirs.shape, f"{where}: {ours.shape}, torch's is {theirs.shape}"
    if isinstance(theirs, FakeTensor):
        return None
    for inner in ("a", "b", "wrapped") if type(theirs) not in (Tensor, nn.Parameter) else ():
        if hasattr(theirs, inner):
            compare(getattr(ours, inner), getattr(theirs, inner), f"{where}.{inner}")
    if type(theirs).__torch_dispatch__ is Tensor.__torch_dispatch__:  # else it has no values but those inside
        plain = [t.detach().as_subclass(Tensor) for t in (ours, theirs)]
        relative, absolute = TOLERANCES.get(theirs.dtype, (0.0, 0.0))  # masks are exact
        torch.testing.assert_close(*plain, rtol=relative, atol=absolute, equal_nan=True, msg=lambda m: f"{where}: {m}")
    return None
