"""The only file that exchanges the function inside its wrappers: decorators stay in force around another function.

A decorator's wrapper reaches what it wraps through a cell of its closure (or a default). So each wrapper is made again
from its own code, with that cell holding the new function. A wrapper that knows itself, as one does that asks
``type(self).forward is wrapper``, has its new self in that cell. transformers wraps the forward of every layer so, from
5.23.0 on for checkpointing, from 5.24.0 on for a renamed argument too.

Nothing has to be known of what a wrapper does. What else in it leads to the old function, for instance through a list,
goes on leading there: the same values, but not fused.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

Function = Callable[..., Any]


def links_of(function: Function) -> tuple[Function, ...]:
    """The function, what it wraps, what that wraps, and so on."""
    links = [function]
    while (inner := getattr(links[-1], "__wrapped__", None)) is not None:
        if any(inner is link for link in links):
            raise ValueError("its forward wraps itself")
        links.append(inner)
    return tuple(links)


def rewrap(links: tuple[Function, ...], inner: Function) -> Function:
    """The wrappers, from the outermost to what they wrap, around ``inner`` instead of the last.

    Raises:
        ValueError: one of them isn't made so that this can be done, with the reason.
    """
    new: dict[int, Any] = {id(links[-1]): inner}
    cells: dict[int, CellType] = {}  # two wrappers that share a cell go on doing so
    for link, wrapped in itertools.pairwise(links):
        if not isinstance(link, FunctionType):
            raise ValueError(f"its forward is wrapped by {type(link).__name__}, which is no Python function")
        if not any(value is wrapped for value in _held(link)):
            raise ValueError(f"its forward is wrapped by {link.__code__.co_name}, which doesn't hold it in its closure")
        closure = link.__closure__ or ()
        for cell in closure:
            if any(value is known for value in _contents(cell) for known in links):
                cells.setdefault(id(cell), CellType())
        made = tuple(cells.get(id(cell), cell) for cell in closure)
        new[id(link)] = FunctionType(link.__code__, link.__globals__, link.__name__, None, made)

    def swapped(value: Any) -> Any:
        return new.get(id(value), value)

    for link in links[:-1]:
        assert isinstance(link, FunctionType)
        twin = new[id(link)]
        for cell, other in zip(link.__closure__ or (), twin.__closure__ or (), strict=True):
            if other is not cell:
                other.cell_contents = swapped(cell.cell_contents)
        resemble(twin, link)
        twin.__dict__.update({name: swapped(value) for name, value in vars(link).items()})
        twin.__defaults__ = link.__defaults__ and tuple(map(swapped, link.__defaults__))
        twin.__kwdefaults__ = link.__kwdefaults__ and {name: swapped(x) for name, x in link.__kwdefaults__.items()}
    outermost: Function = new[id(links[0])]
    return outermost


def resemble(function: FunctionType, original: Function) -> None:
    """Gives it the name, the annotations and the attributes of the original."""
    functools.update_wrapper(function, original)
    del function.__wrapped__  # type: ignore[attr-defined]
    function.__dict__.update(vars(original))


def _held(function: FunctionType) -> list[Any]:
    """What a function can reach by itself."""
    values = [value for cell in function.__closure__ or () for value in _contents(cell)]
    return [*values, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def _contents(cell: CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # it is empty
        return []
