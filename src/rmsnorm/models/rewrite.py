"""The only file that rewrites a decoder layer: where a residual is added right before a norm, both become one call.

    hidden_states = residual + hidden_states        normed, hidden_states = add_norm(self.norm, residual, hidden_states)
    residual = hidden_states                    →   residual = hidden_states
    hidden_states = self.norm(hidden_states)        hidden_states = normed

The add is a line of the layer's own forward, so no change of a norm can reach it, and copies of every layer's source
would rot. Hence: the source of the layer's class, parsed, this one pattern replaced, compiled in its own globals.
``fusion.py`` compares what comes out with what the layer did before.
"""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import textwrap
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..functional import add_rms_norm
from . import classes
from .binding import binding_of, eps_of, serves, shape_of

Forward = Callable[..., Any]
_ADD, _NORMED, _MAKE = "_rmsnorm_add_norm", "_rmsnorm_normed", "_rmsnorm_make"


class Rewritten:
    """The forward of a class with its adds fused."""

    kind = "layer"

    def __init__(self, cls: type[nn.Module]) -> None:
        self.cls = cls
        self.function, self.norms = rewrite(cls.forward)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rewritten) and other.function is self.function

    def __hash__(self) -> int:
        return hash(self.function)

    def forward_for(self, cls: type[nn.Module]) -> Forward:
        return self.function

    def plain(self) -> tuple[Any, ...]:
        return ()


classes.READERS["layer"] = Rewritten


def add_norm(norm: Any, a: Any, b: Any) -> tuple[Any, Any]:
    """``norm(a + b)`` and ``a + b``; in one pass if the norm is patched, can add, and nobody listens to it."""
    binding = binding_of(norm)
    if (
        binding is not None
        and binding.adds()
        and isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and a.dtype is b.dtype
        and a.shape == b.shape
        and not (norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks)
        and not _has_any_global_hook()
    ):
        weight = getattr(norm, binding.weight) if binding.weight else None
        if serves(norm, binding, weight, a):
            recipe, shape, eps = binding.recipe, shape_of(norm, weight, a), eps_of(norm, binding)
            return add_rms_norm(a, b, shape, weight, eps, offset=recipe.offset, casting_mode=recipe.casting_mode)
    total = a + b
    return norm(total), total


@functools.cache
def norms_behind_adds(original: Forward) -> tuple[str, ...]:
    """The attributes of the norms that the function calls right behind an add."""
    definition = _definition(original)
    return tuple(_fuse(definition, definition.args.args[0].arg)) if definition and definition.args.args else ()


@functools.cache
def rewrite(original: Forward) -> tuple[Forward, tuple[str, ...]]:
    """The function with each add before a norm fused, and the attributes of those norms.

    Raises:
        ValueError: it can't be rewritten, with the reason.
    """
    definition = _definition(original)
    if definition is None or not definition.args.args:
        raise ValueError("its source can't be read")
    if definition.decorator_list or getattr(original, "__closure__", None) or hasattr(original, "__wrapped__"):
        raise ValueError("its forward is wrapped, or calls super()")
    norms = tuple(_fuse(definition, definition.args.args[0].arg))
    # A function that returns it: so add_norm is a variable of its own, and the globals stay as they are.
    text = f"def {_MAKE}({_ADD}):\n{textwrap.indent(ast.unparse(definition), '    ')}\n    return {definition.name}\n"
    file = f"<rmsnorm: {original.__module__}.{original.__qualname__} with fused adds>"
    linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file  # for tracebacks
    made: dict[str, Any] = {}
    exec(compile(text, file, "exec"), original.__globals__, made)
    function = made[_MAKE](add_norm)
    function.__defaults__, function.__kwdefaults__ = original.__defaults__, original.__kwdefaults__
    return function, norms


def _definition(original: Forward) -> ast.FunctionDef | None:
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(original))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    return definition if isinstance(definition, ast.FunctionDef) else None


def _fuse(node: ast.AST, this: str) -> list[str]:
    """Replaces the pattern in all blocks of statements below; returns the attributes of ``this`` that are called."""
    norms = [norm for child in ast.iter_child_nodes(node) for norm in _fuse(child, this)]
    for block in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
        statements = block if isinstance(block, list) else []
        for i, add in enumerate(statements):
            match add:
                case ast.Assign(targets=[ast.Name(id=total)], value=ast.BinOp(left=a, op=ast.Add(), right=b)):
                    use = _after_copies(statements[i + 1 :], total)
                    if use and (norm := _called(use.value, this, total)):
                        names: list[ast.expr] = [ast.Name(_NORMED, ast.Store()), ast.Name(total, ast.Store())]
                        add.targets = [ast.Tuple(names, ast.Store())]
                        layer = ast.Attribute(ast.Name(this, ast.Load()), norm, ast.Load())
                        add.value = ast.Call(ast.Name(_ADD, ast.Load()), [layer, a, b], [])
                        use.value = ast.Name(_NORMED, ast.Load())
                        norms.append(norm)
    return norms


def _after_copies(statements: list[ast.stmt], total: str) -> ast.Assign | None:
    """The first assignment that isn't ``other = name``, if only such copies stand before it."""
    for statement in statements:
        match statement:
            case ast.Assign(targets=[ast.Name(id=other)], value=ast.Name()) if other != total:
                continue
            case ast.Assign():
                return statement
        return None
    return None


def _called(value: ast.expr, this: str, argument: str) -> str | None:
    """``self.norm(argument)``: the attribute."""
    match value:
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id=owner), attr=name), args=[ast.Name(id=only)], keywords=[]
        ) if (owner, only) == (this, argument):
            return name
    return None
