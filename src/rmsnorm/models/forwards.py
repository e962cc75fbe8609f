"""The only file that writes the forward of a patched norm: with the signature of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from . import classes

SAME = "_rmsnorm_same"
"""What a forward that was written here has as an attribute: whether its module's class is what it was, for those who do
without a call."""


def forward_like(
    cls: type[nn.Module], tensors: int, methods: tuple[str, ...], attempt: Callable[..., Any]
) -> Callable[..., Any]:
    """What a patched norm does when it is called, with the signature of its own forward: ``torch.fx``, ``torch.export``
    and callers by keyword ask for it. The first ``tensors`` arguments are the recipe's; with any other that isn't left
    at its default, the module's own forward answers."""
    names, unused, passed, defaults = [], [], [], {}
    parameters = list(inspect.signature(cls.forward).parameters.values())
    if parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL:
        del parameters[0]
    for parameter in parameters:
        kind, name = parameter.kind, parameter.name
        if kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            stars = "*" if kind is parameter.VAR_POSITIONAL else "**"
            names.append(stars + name)
            passed.append(stars + name)
            unused.append(f"not {name}")
            continue
        if kind is parameter.KEYWORD_ONLY and not any(one.startswith("*") for one in names):
            names.append("*")
        passed.append(f"{name}={name}" if kind is parameter.KEYWORD_ONLY else name)
        optional = parameter.default is not parameter.empty
        if optional:
            defaults[f"_rmsnorm_{name}"] = parameter.default
        if len(passed) > tensors:
            unused.append(f"{name} is _rmsnorm_{name}" if optional else "False")
        names.append(f"{name}=_rmsnorm_{name}" if optional else name)
    if any(one.startswith("*") for one in passed[:tensors]):
        unused.append("False")  # nobody knows what comes
    taken = ", ".join(passed[:tensors])
    this = "_rmsnorm_self" if any(parameter.name == "self" for parameter in parameters) else "self"
    text = f"""
def make(_rmsnorm_own, _rmsnorm_attempt, _rmsnorm_same, {", ".join(defaults)}):
    def forward({this}, {", ".join(names)}):
        if {" and ".join([f"_rmsnorm_same({this})", *unused])}:
            _rmsnorm_output = _rmsnorm_attempt({this}, {taken})
            if _rmsnorm_output is not None:
                return _rmsnorm_output
        return _rmsnorm_own({this}, {", ".join(passed)})
    return forward
"""
    made: dict[str, Any] = {}
    exec(text, {"__name__": __name__}, made)
    same = _same_code(cls, methods)
    function = made["make"](classes.own_forward, attempt, same, **defaults)
    setattr(function, SAME, same)
    function.__qualname__, function.__module__ = cls.forward.__qualname__, cls.__module__
    return function


def _same_code(cls: type[nn.Module], names: tuple[str, ...]) -> Callable[[nn.Module], bool]:
    """Tells whether the class still has the functions that it has now: others exchange them."""
    forward, methods = cls.forward, [(name, getattr(cls, name)) for name in names]
    if not methods:
        return lambda module: cls.forward is forward

    def same(module: nn.Module) -> bool:
        own = module.__dict__
        for name, method in methods:  # not all(...): 0.3 µs of each call
            if name in own or getattr(cls, name) != method:
                return False
        return cls.forward is forward

    return same
