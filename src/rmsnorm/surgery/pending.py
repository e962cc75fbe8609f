"""The only file that changes weights without writing them: who reads one gets it changed, in fp64, while he reads.

So a model is proven in fp64 at the size that it has. Its weights stay what they are; beside them stand the steps that
are planned for each; and no more of it is in fp64 than what one operator reads, of a large matrix a block of rows. When
all is proven, the steps of each weight are done one after the other in fp64, and it is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from . import edits
from .edits import Plan
from .graph import mapped
from .proof import SMALL, Wide
from .steps import Add

BLOCK = 2**21
"""Numbers of a weight that are changed at once: 16 MB in fp64, and as much for a step."""
aten = torch.ops.aten


class Pending(Wide):
    """A mode in which the model computes what it would after all that is planned, in fp64, whatever type it has."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.steps: dict[int, tuple[Tensor, list[Any]]] = {}
        """Of each weight, by its id: itself, and what is to be done to it."""
        self.turned: Any = WeakIdKeyDictionary()
        """Of large matrices, transposed, the weights that they are: they are read in blocks."""
        self.convolutions = _Convolutions()

    def __enter__(self) -> Any:
        self.convolutions.__enter__()  # type: ignore[no-untyped-call]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.convolutions.__exit__(*error)  # type: ignore[no-untyped-call]

    def take(self, plan: Plan) -> None:
        """Plans that much more. What changes no weight is done now: heads are untied, modules take others' places."""
        untied = [(self.model.get_submodule(owner), attribute) for owner, attribute in plan.untie]
        before = [list(self._planned(getattr(module, attribute))) for module, attribute in untied]

        def compute(model: nn.Module, steps: list[Any], undo: object) -> None:
            for (module, attribute), planned in zip(untied, before, strict=True):
                own = getattr(module, attribute)
                self.steps[id(own)] = own, planned
            tensors = edits.named(model)
            for name, changes in edits.grouped(tensors, steps, self._multiplied).items():
                self.steps.setdefault(id(tensors[name]), (tensors[name], []))[1].extend(changes)

        edits.carry_out(self.model, plan, keep=False, compute=compute)

    def write(self) -> None:
        """Does all that is planned. A weight that outgrows its type is for the caller to find."""
        for tensor, steps in self.steps.values():
            for part in _blocks(tensor.detach(), steps) if steps else ():
                part.copy_(_done(part, steps))
        self.steps.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.t.default and self._by_rows(args[0]) and args[0].numel() > BLOCK:
            turned = func(*args)
            self.turned[turned] = args[0]
            return turned
        if func in (aten.mm.default, aten.addmm.default) and not kwargs and args[-1] in self.turned:
            return self._product(*args)
        if func is aten.embedding.default and self._by_rows(args[0]):
            weight, index = args[:2]
            return _done(weight.detach()[index.flatten()], self._planned(weight)).view(*index.shape, weight.shape[1])
        written = {i for i, one in enumerate(func._schema.arguments) if one.alias_info and one.alias_info.is_write}
        args = tuple(one if i in written else mapped(one, Tensor, self._whole) for i, one in enumerate(args))
        kwargs = {name: one if name == "out" else mapped(one, Tensor, self._whole) for name, one in kwargs.items()}
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _planned(self, tensor: Tensor) -> list[Any]:
        found = self.steps.get(id(tensor))
        return found[1] if found and found[0] is tensor else []

    def _changes(self, tensor: Tensor) -> bool:
        """Whether it isn't read as it is. Weights of a kind of their own are: nothing is planned for them."""
        return type(tensor) in (Tensor, nn.Parameter) and (tensor.dtype in SMALL or bool(self._planned(tensor)))

    def _by_rows(self, tensor: Tensor) -> bool:
        return self._changes(tensor) and tensor.dim() == 2 and _free(tensor, self._planned(tensor)) == 0

    def _whole(self, tensor: Tensor) -> Tensor:
        """What the model reads: all of it, in fp64."""
        if not self._changes(tensor):
            return tensor
        if (weight := self.turned.get(tensor)) is not None:
            return self._whole(weight).t()
        steps = self._planned(tensor)
        made = torch.empty_like(tensor, dtype=torch.float64, requires_grad=False)
        for part, into in zip(_blocks(tensor.detach(), steps), _blocks(made, steps), strict=True):
            into.copy_(_done(part, steps))
        return made

    def _product(self, *given: Tensor) -> Tensor:
        """``[bias +] rows @ weight.T``, some columns after the others."""
        *bias, rows = (self._whole(one) for one in given[:-1])
        weight, steps, at = self.turned[given[-1]], self._planned(self.turned[given[-1]]), 0
        made = rows.new_empty(len(rows), len(weight))
        for part in _blocks(weight.detach(), steps):
            made[:, at : at + len(part)] = rows @ _done(part, steps).t()
            at += len(part)
        return made.add_(bias[0]) if bias else made

    def _multiplied(self, step: Add, weight: Tensor) -> Tensor:
        """What a bias gets: the product of a weight, as it is planned so far, with a vector."""
        steps = self._planned(weight)
        parts = [step.product(_done(part, steps)) for part in _blocks(weight.detach(), [*steps, step])]
        along = _free(weight, [*steps, step])
        return torch.cat(parts, (along or 0) - (step.axis < (along or 0)))


CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}


class _Convolutions(TorchFunctionMode):
    """They compare the types of what they are given before a mode sees the operator: so it is called itself."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (dims := CONVOLUTIONS.get(func)) and (padding := self.given(args, kwargs, 4, "padding", 0)) != "same":
            x, weight, bias = (self.given(args, kwargs, i, name) for i, name in enumerate(("input", "weight", "bias")))
            stride, dilation = self.given(args, kwargs, 3, "stride", 1), self.given(args, kwargs, 5, "dilation", 1)
            sizes = [stride, 0 if padding == "valid" else padding, dilation]
            steps = ([one] * dims if isinstance(one, int) else [*one] * (dims // len(one)) for one in sizes)
            alone = x.dim() == dims + 1
            rest = False, [0] * dims, self.given(args, kwargs, 6, "groups", 1)
            y = aten.convolution(x[None] if alone else x, weight, bias, *steps, *rest)
            return y[0] if alone else y
        return func(*args, **(kwargs or {}))

    @staticmethod
    def given(args: Any, kwargs: Any, at: int, name: str, default: Any = None) -> Any:
        return args[at] if at < len(args) else (kwargs or {}).get(name, default)


def _free(tensor: Tensor, steps: Iterable[Any]) -> int | None:
    """An axis whose indices the steps change one apart from the other."""
    taken = {step.axis % tensor.dim() for step in steps if hasattr(step, "axis")} if tensor.dim() else set()
    return next((axis for axis in range(tensor.dim()) if axis not in taken), None)


def _blocks(tensor: Tensor, steps: Iterable[Any]) -> tuple[Tensor, ...]:
    """Parts of a tensor that can be changed one after the other."""
    axis = _free(tensor, steps)
    if axis is None or tensor.numel() <= BLOCK:
        return (tensor,)
    return tensor.split(max(1, BLOCK * tensor.shape[axis] // tensor.numel()), axis)


def _done(part: Tensor, steps: Iterable[Any]) -> Tensor:
    value = part.double()
    for step in steps:
        value = step(value)
    return value
