"""The only file that rewrites a decoder layer: where a residual is added right before a norm, both become one call.

    hidden_states = residual + hidden_states        normed, hidden_states = add_norm(self.norm, residual, hidden_states)
    residual = hidden_states                    →   residual = hidden_states
    hidden_states = self.norm(hidden_states)        hidden_states = normed

The add is a line of the layer's own forward, so no change of a norm can reach it, and copies of every layer's source
would rot. Hence: the source of the layer's class, parsed, this one pattern replaced, compiled for the same globals and
closure. Text is only how the function is read: it counts if it compiles, unchanged, to the very code that the function
runs. ``wrappers.py`` puts the decorators around the result, ``fusion.py`` compares what comes out with what the layer
did before.
"""

from __future__ import annotations
import __future__

import ast
import functools
import inspect
import linecache
from collections.abc import Callable, Iterable
from types import CellType, CodeType, FunctionType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..functional import add_rms_norm
from . import classes, wrappers
from .binding import binding_of, eps_of, serves, shape_of

Forward = Callable[..., Any]
_ADD, _NORMED, _MAKE = "_rmsnorm_add_norm", "_rmsnorm_normed", "_rmsnorm_make"
_FLAGS = functools.reduce(
    int.__or__, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)


class Rewritten:
    """The forward of a class with its adds fused."""

    kind, what = "layer", "residual add"

    def __init__(self, cls: type[nn.Module]) -> None:
        self.cls = cls
        self.function, self.norms = rewrite(cls.forward)
        self.meaning = "add, then " + ", ".join(self.norms)

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
    return found_by(_fuse, original)


def found_by(change: Callable[[ast.AST, str], list[str]], original: Forward) -> tuple[str, ...]:
    """What the change says of the function's source."""
    definition = _definition(original)
    return tuple(change(definition, definition.args.args[0].arg)) if definition and definition.args.args else ()


@functools.cache
def rewrite(original: Forward) -> tuple[Forward, tuple[str, ...]]:
    """The function with each add before a norm fused, in the wrappers that it has, and the attributes of those norms.

    Raises:
        ValueError: it can't be rewritten, with the reason.
    """
    return remade(original, _fuse, {_ADD: add_norm}, "fused adds")


def remade(
    original: Forward, change: Callable[[ast.AST, str], list[str]], calls: dict[str, Forward], what: str
) -> tuple[Forward, tuple[str, ...]]:
    """The function with a change of its source, in which the names of ``calls`` mean these, and what ``change`` says.

    Raises:
        ValueError: it can't be rewritten, with the reason.
    """
    links = wrappers.links_of(original)
    innermost, definition = links[-1], _definition(original)
    if definition is None or not definition.args.args or not isinstance(innermost, FunctionType):
        raise ValueError("its source can't be read")
    # With the lines of the source: between lines that differ, compilers leave instructions that do nothing.
    if _bare(_compile(innermost, _module(innermost, definition, calls), "<source>")) != _bare(innermost.__code__):
        raise ValueError("its source isn't what it runs")
    norms = tuple(change(definition, definition.args.args[0].arg))
    text = ast.unparse(_module(innermost, definition, calls))
    line = innermost.__code__.co_firstlineno
    file = f"<rmsnorm: {innermost.__module__}.{innermost.__qualname__}, line {line}, with {what}>"
    linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file  # for tracebacks
    code = _compile(innermost, text, file)
    # The cells themselves, that of ``super()`` among them: what is assigned to them later is seen here too.
    cells = dict(zip(innermost.__code__.co_freevars, innermost.__closure__ or (), strict=True))
    closure = tuple(cells[name] if name in cells else CellType(calls[name]) for name in code.co_freevars)
    function = FunctionType(code, innermost.__globals__, innermost.__name__, innermost.__defaults__, closure)
    function.__kwdefaults__ = innermost.__kwdefaults__
    wrappers.resemble(function, innermost)
    return wrappers.rewrap(links, function), norms


def _definition(original: Forward) -> ast.FunctionDef | None:
    """What the source of the innermost function says, without what was evaluated when it was defined."""
    try:
        source = inspect.getsource(original)
        # Not dedented, which would change strings of several lines.
        (found,) = ast.parse(f"if 1:\n{source}" if source[:1].isspace() else source).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    definition = found.body[0] if isinstance(found, ast.If) else found
    if not isinstance(definition, ast.FunctionDef):
        return None
    names = definition.args
    for argument in filter(None, (*names.posonlyargs, *names.args, names.vararg, *names.kwonlyargs, names.kwarg)):
        argument.annotation = None
    names.defaults, names.kw_defaults = [], [None] * len(names.kwonlyargs)
    definition.decorator_list, definition.returns = [], None
    return definition


def _module(function: FunctionType, definition: ast.FunctionDef, calls: Iterable[str]) -> ast.Module:
    """The definition in what makes its names mean what they mean in the function."""
    body: list[ast.stmt] = [definition]
    for name in _class_of(function):  # it becomes part of names such as __private
        body = [ast.ClassDef(name, [], [], body, [])]
    own = (*_class_of(function), definition.name)[0]
    if own not in function.__code__.co_freevars:  # as in super(Layer, self)
        body.insert(0, ast.Global([own]))
    variables = [ast.arg(name) for name in (*calls, *function.__code__.co_freevars)]
    maker = ast.FunctionDef(_MAKE, ast.arguments([], variables, None, [], [], None, []), body, [])
    # Never run: compilers call what hangs on an imported name (torch.clamp) by other instructions.
    used = {node.id for node in ast.walk(definition) if isinstance(node, ast.Name)}
    names = [ast.alias(name) for name in sorted(used & _imported("".join(inspect.findsource(function)[0])))]
    return ast.fix_missing_locations(ast.Module([ast.Import(names), maker] if names else [maker], []))


@functools.lru_cache(8)
def _imported(source: str) -> frozenset[str]:
    """The names that a file's own scope imports."""
    found, left = set[str](), list[ast.AST](ast.parse(source).body)
    for node in left:  # grows
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            left += (child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr))
    return frozenset(found - {"*"})


def _class_of(function: FunctionType) -> list[str]:
    return [name for name in function.__qualname__.split(".")[-2:-1] if name.isidentifier()]


def _compile(function: FunctionType, module: ast.Module | str, file: str) -> CodeType:
    """The definition's code. Nothing is run."""
    code = compile(module, file, "exec", function.__code__.co_flags & _FLAGS, dont_inherit=True)
    for _ in (_MAKE, *_class_of(function), function.__code__.co_name):
        (code,) = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return code


def _bare(code: CodeType) -> CodeType:
    """Without where it comes from: equal if the same instructions work on the same names and constants."""

    def bare(value: Any) -> Any:
        if isinstance(value, str):  # Python 3.10 keeps the qualified names of functions inside among the constants
            return value.rpartition("<locals>.")[2]
        return _bare(value) if isinstance(value, CodeType) else value

    constants, flags = tuple(map(bare, code.co_consts)), code.co_flags & ~inspect.CO_NESTED
    return code.replace(co_firstlineno=1, co_linetable=b"", co_flags=flags, co_consts=constants)


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
