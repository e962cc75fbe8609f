"""The only file that changes weights: step by step in fp64, rounded once; and takes all back.

A plan is made of names, so it can be carried out on any copy of the model, in any type. What was there before is kept
with the model (or not, if the caller wants the memory), and comes back bit by bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .steps import Add, Shift, Step


@dataclass
class Plan:
    """All that one operation does to a model."""

    steps: list[Any] = field(default_factory=list)
    """``Step`` and ``Add``, each in its order; the products of all ``Add`` are formed first."""
    untie: list[tuple[str, str]] = field(default_factory=list)
    """Modules and attributes that get a copy of a weight that others have, too."""
    biases: list[str] = field(default_factory=list)
    """Modules that get a bias of zeros first."""
    swaps: dict[str, Callable[[nn.Module], nn.Module]] = field(default_factory=dict)
    """Modules by name, and what makes the one that takes its place."""
    hooks: list[tuple[str, Any]] = field(default_factory=list)
    """Modules, and what centres an argument of theirs."""
    undoable: bool = True
    """Whether weights can be taken back if something raises: copies of a model need no copy of theirs for that."""
    unseen: list[str] = field(default_factory=list)
    """Tokens that never ran, and are changed as those beside them."""

    def __bool__(self) -> bool:
        return bool(self.steps or self.swaps)

    def notes(self) -> list[str]:
        """What the model is beside, in words."""
        notes = [f"{'.'.join(one)} was tied, and has a weight of its own now" for one in self.untie]
        notes += [f"{name} got a bias" for name in self.biases]
        notes += [f"{name} never ran, and was changed as the tokens beside it" for name in self.unseen]
        return notes + [f"{name} centres what it is called with" for name, _ in self.hooks]


_done: weakref.WeakKeyDictionary[nn.Module, list[list[Callable[[], None]]]] = weakref.WeakKeyDictionary()


def carry_out(model: nn.Module, plan: Plan, *, keep: bool, compute: Callable[..., None] | None = None) -> int:
    """Does all of it, and returns how many bytes of what was are kept. If anything raises, all is taken back first.
    ``compute(model, steps, undo)`` does the steps, if not we.

    Raises:
        OverflowError: a weight outgrows its type.
    """
    undo: list[Callable[[], None]] = []
    try:
        with torch.no_grad():
            for module, attribute in plan.untie:
                _untie(model, module, attribute, undo)
            for name in plan.biases:
                _make_bias(model.get_submodule(name), undo)
            (compute or _compute)(model, plan.steps, undo if plan.undoable else None)
            for name, make in plan.swaps.items():
                _swap(model, name, make, undo)
            for name, hook in plan.hooks:
                handle = model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
                undo.append(handle.remove)
    except BaseException:
        _take_back(undo)
        raise
    _done.setdefault(model, []).append(undo)
    if not keep:
        return drop_last(model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return sum(tensors[name].nbytes for name in {one.weight for one in plan.steps} if name in tensors)


def drop_last(model: nn.Module) -> int:
    """Forgets how the last operation is undone: 0 bytes are kept."""
    _done[model][-1] = []
    return 0


def take_back(model: nn.Module) -> int:
    """Undoes every operation on this model, the last first; returns how many there were.

    Raises:
        ValueError: one of them kept nothing, or a weight isn't there any more. The operations behind it are undone.
    """
    history = _done.get(model, [])
    if any(not undo for undo in history):
        raise ValueError(
            "unfold: a change of this model was made with keep=False, so nothing of it was kept; load it anew"
        )
    count = len(history)
    while history:
        _take_back(history[-1])
        history.pop()
    _done.pop(model, None)
    return count


def forget_last(model: nn.Module) -> None:
    """Undoes the last operation."""
    _take_back(_done[model].pop())


def _take_back(undo: list[Callable[[], None]]) -> None:
    with torch.no_grad():
        for step in undo:
            if isinstance(step, _Before):
                step.place()
        for step in reversed(undo):
            step()


class _Before:
    """What a weight was. It goes into whatever is the module's weight by then, as others may have assigned one; the
    module is held by a weak reference, as in ``_puts_back``."""

    def __init__(self, model: nn.Module, name: str, tensor: Tensor) -> None:
        path, _, self.attribute = name.rpartition(".")
        self.name, self.module, self.before = name, weakref.ref(model.get_submodule(path)), tensor.detach().clone()

    def place(self) -> Tensor:
        tensor = getattr(self.module(), self.attribute, None)
        if not isinstance(tensor, Tensor) or tensor.shape != self.before.shape:
            raise ValueError(
                f"unfold: {self.name} of shape {list(self.before.shape)} isn't there any more, as its module was "
                "replaced or changed since, so it can't be given back; load the model anew"
            )
        return tensor

    def __call__(self) -> None:
        self.place().copy_(self.before)


def named(model: nn.Module) -> dict[str, Tensor]:
    """What steps name."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def grouped(
    tensors: dict[str, Tensor], steps: list[Any], product: Callable[[Add, Tensor], Tensor] = Add.product
) -> dict[str, list[Step]]:
    """Of each tensor its steps in their order: what is added comes first."""
    found: dict[str, list[Step]] = {}
    for one in steps:
        if isinstance(one, Add):
            found.setdefault(one.weight, []).append(Shift(one.weight, product(one, tensors[one.other])))
    for one in steps:
        if not isinstance(one, Add):
            found.setdefault(one.weight, []).append(one)
    return found


def _compute(model: nn.Module, steps: list[Any], undo: list[Callable[[], None]] | None) -> None:
    tensors = named(model)
    for name, changes in grouped(tensors, steps).items():
        tensor = tensors[name]
        value = tensor.detach().double()
        for change in changes:
            value = change(value)
        rounded = value.to(tensor.dtype)
        if not bool(rounded.isfinite().all()) and bool(tensor.isfinite().all()):
            raise OverflowError(f"{name} would outgrow {tensor.dtype}; convert the model to bfloat16 or float32 first")
        if undo is not None:
            undo.append(_Before(model, name, tensor))
        tensor.copy_(rounded)


def _untie(model: nn.Module, name: str, attribute: str, undo: list[Callable[[], None]]) -> None:
    module = model.get_submodule(name)
    shared = module._parameters[attribute]
    assert shared is not None
    undo.append(_ties(model, module, attribute, shared))
    module._parameters[attribute] = nn.Parameter(shared.detach().clone(), shared.requires_grad)
    for config in configs(model):
        undo.append(lambda config=config: setattr(config, "tie_word_embeddings", True))  # type: ignore[misc]
        config.tie_word_embeddings = False


def _puts_back(module: nn.Module, space: str, name: str, value: object) -> Callable[[], None]:
    """The module by a weak reference: it may be the model, which would then keep itself alive."""
    place = weakref.ref(module)

    def put() -> None:
        if (found := place()) is not None:
            vars(found)[space][name] = value

    return put


def _ties(model: nn.Module, module: nn.Module, attribute: str, shared: nn.Parameter) -> Callable[[], None]:
    """The weight of another place that has it, whatever is there by then."""
    places = ((one, name) for one in model.modules() for name, weight in one._parameters.items() if weight is shared)
    owner, name = next(place for place in places if place != (module, attribute))
    where, there = weakref.ref(module), weakref.ref(owner)

    def tie() -> None:
        if (module := where()) is not None and (owner := there()) is not None:
            module._parameters[attribute] = owner._parameters[name]

    return tie


def configs(model: nn.Module) -> list[Any]:
    """Those that say that embeddings and head are one weight: else transformers ties them again when it loads them."""
    config: Any = getattr(model, "config", None)
    parts = [config, config.get_text_config()] if hasattr(config, "get_text_config") else [config]
    return list({id(one): one for one in parts if getattr(one, "tie_word_embeddings", False)}.values())


def _make_bias(module: nn.Module, undo: list[Callable[[], None]]) -> None:
    weight: Tensor = module.weight  # type: ignore[assignment]
    undo.append(_puts_back(module, "_parameters", "bias", None))
    module.register_parameter("bias", nn.Parameter(weight.new_zeros(len(weight)), weight.requires_grad))


def _swap(model: nn.Module, name: str, make: Callable[[nn.Module], nn.Module], undo: list[Callable[[], None]]) -> None:
    """In every place that has the module, so that what is shared stays shared."""
    old = model.get_submodule(name)
    new = make(old)
    for parent in list(model.modules()):
        for child in [child for child, module in parent._modules.items() if module is old]:
            undo.append(_puts_back(parent, "_modules", child, old))
            parent._modules[child] = new
