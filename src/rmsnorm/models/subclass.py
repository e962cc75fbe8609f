"""The only file that gives a layer another class: a subclass of its own that differs in its forward.

A forward of the class, not of the instance: wrappers ask ``type(self).forward is wrapper`` before they checkpoint, and
copies, replicas and pickles of the layer then call it with themselves. Name, module and ``isinstance`` stay.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

Class = type[nn.Module]
_ORIGINAL = "_rmsnorm_original"


@functools.cache
def subclass(cls: Any, forward: Callable[..., Any], by: Callable[[Class], Class]) -> Class:
    """``cls`` with this forward, one class for all its layers. ``by(cls)`` makes it again where it is unpickled."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}

    def reduce(self: nn.Module, protocol: Any) -> Any:
        parts: Any = super(made, self).__reduce_ex__(max(protocol, 2))
        if type(self) is not made:  # somebody has put a class on top, and has to say what copies are
            return parts
        make, arguments, *rest = parts
        arguments = tuple(cls if argument is made else argument for argument in arguments)
        return _again, (cls, by, make, arguments), *rest

    made = type(cls)(cls.__name__, (cls,), {**names, "__reduce_ex__": reduce, _ORIGINAL: cls})
    # Set afterwards: a base's __init_subclass__ has wrapped what it found by now, and this forward has its wrappers.
    # (Handed in above it would be wrapped twice. transformers bears that: only its outermost wrapper checkpoints.)
    made.forward = forward
    return made


def original(cls: Class) -> Class:
    """What it is a subclass of, if it was made here, else the class itself."""
    found: Class = vars(cls).get(_ORIGINAL, cls)
    return found


def restore(module: nn.Module) -> None:
    """Gives the module its own class back. A class that somebody has put on top, as FSDP2 does, stays."""
    made = type(module)
    own = original(made)
    if own is made:
        return
    for name, value in list(vars(module).items()):  # accelerate keeps what it wraps as an attribute of its own
        if getattr(value, "__func__", None) is made.forward:
            setattr(module, name, own.forward.__get__(module))
    module.__class__ = own


def _again(cls: Class, by: Callable[[Class], Class], make: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """An empty copy, to which pickle or copy give their state."""
    module = make(*arguments)
    module.__class__ = by(cls)
    return module
