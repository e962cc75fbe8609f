"""The only file that watches what a stranger's forward asks tensors: their contents, their sizes, how they lie.

A trial shows what a module does with some tensors; a branch on what they hold, on how many rows there are, or on
whether they require gradients may do something else with the next. What is computed of sizes is followed: ``x.shape``
holds numbers that remember where they come from, and tell what they are compared with. The size that is normalised may
be compared with anything, and the others with 0 and 1: those cases are conditions of a binding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CONTENTS = frozenset({"item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "__array__"})
_CONTENTS |= {"__bool__", "__float__", "__int__", "__index__", "__complex__", "__contains__", "nonzero"}
_LIES = frozenset({"requires_grad", "is_leaf", "grad_fn", "grad", "_version", "is_cuda", "is_inference", "data_ptr"})
_LIES |= {"is_contiguous", "stride", "storage_offset", "untyped_storage", "nbytes"}
_FACTORIES = {torch.tensor, torch.ones, torch.zeros, torch.full, torch.empty, torch.arange, torch.linspace}
_FACTORIES |= {torch.eye, torch.as_tensor, torch.scalar_tensor}


class Looks(TorchFunctionMode):
    """Keeps what is asked while it is in force. ``own`` are sizes that a forward may know: those of its weights."""

    def __init__(self, own: Iterable[int]) -> None:
        super().__init__()
        self.own = frozenset(own)
        self.seen: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(getattr(func, "__name__", ""))
        name = func.__self__.__name__ if name == "__get__" else name
        if name in _CONTENTS:
            self.seen.add("it looks at what its tensors hold")
        elif name in _LIES:
            self.seen.add(f"it asks a tensor for its {name}")
        elif name == "__len__":  # a number of which nobody can tell where it goes
            self.watched(result).tell(None)
        elif name in {"shape", "size"} and isinstance(result, torch.Size):
            return torch.Size([self.watched(size) for size in result])
        elif name in {"size", "numel", "nelement"} and type(result) is int:
            return self.watched(result)
        elif func in _FACTORIES and "dtype" not in (kwargs or {}) and _takes_default(func, args, result):
            self.seen.add("it makes a tensor of torch's default type, which may change")
        return result

    def watched(self, size: int) -> Size:
        return Size.of(size, self, known=size in self.own, derived=False)


def _takes_default(func: Any, args: tuple[Any, ...], result: Any) -> bool:
    return isinstance(result, Tensor) and result.is_floating_point() and not (args and isinstance(args[0], Tensor))


class Size(int):
    """A number that comes of a tensor's sizes."""

    looks: Looks
    known: bool
    derived: bool

    @staticmethod
    def of(value: int, looks: Looks, *, known: bool, derived: bool) -> Size:
        size = Size(value)
        size.looks, size.known, size.derived = looks, known, derived
        return size

    def tell(self, other: object) -> None:
        if isinstance(other, Size) or self.known or (not self.derived and other in (0, 1)):
            return
        self.looks.seen.add("it compares sizes of its input")

    def __bool__(self) -> bool:
        self.tell(0)
        return self.real != 0

    def __int__(self) -> int:
        self.tell(None)
        return self.real

    def __float__(self) -> float:
        self.tell(None)
        return float(self.real)

    def __truediv__(self, other: Any) -> Any:
        return float(self) / other

    def __rtruediv__(self, other: Any) -> Any:
        return other / float(self)

    __hash__ = int.__hash__


def _comparing(name: str) -> Callable[[Size, Any], Any]:
    plain = getattr(int, name)

    def compare(self: Size, other: Any) -> Any:
        self.tell(other)
        return getattr(float, name)(float(self.real), other) if isinstance(other, float) else plain(self, other)

    return compare


def _computing(name: str) -> Callable[[Size, Any], Any]:
    plain = getattr(int, name)

    def compute(self: Size, other: Any) -> Any:
        result = plain(self, other)
        if type(result) is not int:
            return result
        return Size.of(result, self.looks, known=self.known and getattr(other, "known", True), derived=True)

    return compute


for _name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"):
    setattr(Size, _name, _comparing(_name))
for _name in ("add", "sub", "mul", "floordiv", "mod"):
    setattr(Size, f"__{_name}__", _computing(f"__{_name}__"))
    setattr(Size, f"__r{_name}__", _computing(f"__r{_name}__"))
