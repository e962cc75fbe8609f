"""The only file that gives an instance another forward: a subclass of its class, made once for all that compute alike.

The forward of a class gets the module that it is called on: a replica, a shallow copy or a copy out of a file computes
with its own weights, and ``torch.compile`` sees equal layers as equal. A callable that is bound to one module, kept as
an attribute, can do neither. The subclass has the name, the module and the qualified name of the class; ``isinstance``
holds, the state is untouched, and the way back is the class itself. ``type(module) is cls`` does not hold meanwhile.

Copies and files name the original class and the change (see :func:`restored`): the subclass can't be imported.
"""

from __future__ import annotations

import copyreg
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

ORIGINAL, CHANGE, OFF = "_rmsnorm_original", "_rmsnorm_change", "_rmsnorm_off"


class Change(Protocol):
    """What makes the subclass differ; hashable, equal where it makes the same of a class."""

    kind: str
    """A key of ``READERS``."""

    def forward_for(self, cls: type[nn.Module]) -> Callable[..., Any]:
        """The forward of the subclass of ``cls``."""

    def plain(self) -> tuple[Any, ...]:
        """Its fields as strings, numbers and tuples of them, for files."""


READERS: dict[str, Callable[..., Change]] = {}
"""What makes a change of a class and what ``plain()`` returned; a ValueError says that it can't be made here."""
_made: dict[tuple[type[nn.Module], Callable[..., Any], Change], type[nn.Module]] = {}
_count = itertools.count()


def subclass(cls: type[nn.Module], change: Change) -> type[nn.Module]:
    """The class with another forward."""
    key = cls, cls.forward, change
    if key not in _made:
        namespace = {
            **{name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")},
            ORIGINAL: cls,
            CHANGE: change,
            OFF: False,
            "__prepare_scriptable__": _scriptable,
        }
        metaclass: Any = type(cls)
        made: Any = metaclass(cls.__name__, (cls,), namespace)
        # Set afterwards: a base's __init_subclass__ has wrapped what it found by now, and this forward has its
        # wrappers. (Handed in, it would be wrapped twice: transformers bears that, its outermost wrapper checkpoints.)
        made.forward = change.forward_for(cls)

        def reduce(module: nn.Module, protocol: Any) -> Any:
            reduced = super(made, module).__reduce_ex__(max(protocol, 2))
            if type(module) is not made:
                return reduced  # somebody has put a class around ours, and has to say what copies are
            if reduced[:2] != (copyreg.__newobj__, (made,)):  # type: ignore[attr-defined]
                return reduced[0], tuple(cls if one is made else one for one in reduced[1]), *reduced[2:]
            return restored, (cls, change.kind, change.plain()), *reduced[2:]

        made.__reduce_ex__ = reduce
        # torch.load(weights_only=True) fills only objects of classes that it was told of, by a name each.
        torch.serialization.add_safe_globals([(made, f"{__name__}.{next(_count)}")])
        _made[key] = made
    return _made[key]


def restored(cls: type[nn.Module], kind: str, plain: tuple[Any, ...]) -> nn.Module:
    """What copies and files call: an instance without state of the class with the change."""
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"rmsnorm: {cls!r} is not a class of modules; this file was not written by rmsnorm.patch")
    try:
        made = subclass(cls, READERS[kind](cls, *plain))
    except ValueError:  # the class of another version: its own forward means the same
        made = cls
    return made.__new__(made)


torch.serialization.add_safe_globals([restored])


def change_of(module: nn.Module) -> Any:
    """The change that is in force, or None."""
    how = getattr(type(module), CHANGE, None)
    return None if how is None or vars(module).get(OFF) else how  # functions, which layers call too, may lack vars()


def change(module: nn.Module, how: Change) -> None:
    """Gives this instance the changed forward."""
    if getattr(type(module), CHANGE, None) == how:  # switched off below a class that somebody put around it
        vars(module).pop(OFF, None)
    else:
        object.__setattr__(module, "__class__", subclass(type(module), how))  # past what a class does with attributes


def inner(cls: type[nn.Module]) -> type[nn.Module]:
    """The class below those that torch puts around a module's: FSDP2's, DDP's, parametrize's."""
    for one in cls.__mro__:
        if "forward" in vars(one):
            return one
        if one.__module__.partition(".")[0] != "torch":
            break
    return cls


def bare(module: nn.Module) -> nn.Module:
    """The module without such a class and its state, and without hooks, to be copied: FSDP2's modules refuse to be, and
    hooks hold whatever they like, a lock or the whole model."""
    cls = inner(type(module))
    none = {name: value for name, value in vars(nn.Module()).items() if "hook" in name}
    if cls is type(module) and not any(vars(module).get(name) for name in none):
        return module
    twin = cls.__new__(cls)
    vars(twin).update((name, value) for name, value in vars(module).items() if not name.startswith("__composable_api_"))
    vars(twin).update(none)
    return twin


def original(cls: type[nn.Module]) -> type[nn.Module]:
    """What it is a subclass of, if it was made here, else the class itself."""
    found: type[nn.Module] = vars(cls).get(ORIGINAL, cls)
    return found


def restore(module: nn.Module) -> None:
    """Takes it back. Below a class that somebody put around ours (FSDP, parametrize) it is switched off."""
    made, own = type(module), original(type(module))
    if own is not made:
        for name, value in list(vars(module).items()):  # accelerate keeps what it wraps as an attribute of its own
            if getattr(value, "__func__", None) is made.forward:
                setattr(module, name, own.forward.__get__(module))
        object.__setattr__(module, "__class__", own)
    elif hasattr(type(module), ORIGINAL):
        vars(module)[OFF] = True


@contextmanager
def undone_on_errors(model: nn.Module) -> Iterator[None]:
    """Takes back what the block has changed of the model if it raises, were it Ctrl-C."""
    unchanged = [module for module in model.modules() if change_of(module) is None]
    try:
        yield
    except BaseException:
        for module in unchanged:
            restore(module)
        raise


def switch(model: nn.Module) -> Callable[[bool], None]:
    """Turns all that is changed in the model off (False) and on again, in microseconds: for timing both in turns."""
    ours = [(module, type(module)) for module in model.modules() if ORIGINAL in vars(type(module))]

    def turn(on: bool) -> None:
        for module, cls in ours:
            module.__class__ = cls if on else getattr(cls, ORIGINAL)

    return turn


def own_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What the module's own class does when it is called; also for a method of ours that somebody has kept."""
    return getattr(type(module), ORIGINAL, type(module)).forward(module, *args, **kwargs)


def _scriptable(module: nn.Module) -> nn.Module:
    """What ``torch.jit.script`` compiles: a module with the same state and its own forward."""
    cls = getattr(type(module), ORIGINAL)
    twin = cls.__new__(cls)
    vars(twin).update(vars(module))
    prepare = getattr(cls, "__prepare_scriptable__", None)
    return prepare(twin) if prepare else twin
