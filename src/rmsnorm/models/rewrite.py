"""The only file that rewrites a decoder layer: where a residual is added beside a norm, both become one call.

The add is a line of the layer's own forward, so no change of a norm can reach it, and copies of every layer's source
would rot. Hence: the source of the layer's class, parsed, what ``patterns.py`` knows replaced, compiled for the same
globals and closure. Text is only how the function is read: it counts if it compiles, unchanged, to the very code that
the function runs. ``wrappers.py`` puts the decorators around the result, ``fusion.py`` compares what comes out with
what the layer did before.
"""

from __future__ import annotations
import __future__

import ast
import functools
import inspect
import linecache
from collections.abc import Callable, Iterable, Sequence
from types import CellType, CodeType, FunctionType
from typing import Any

from torch import nn

from . import classes, wrappers
from .neighbours import add_norm, norm_add, sandwich
from .patterns import CALLS, Fused, fuse

Forward = Callable[..., Any]
# Of a function's source and the name of its first argument: changes it, and says what was found.
Change = Callable[[ast.AST, str], Iterable[Any]]
Served = Sequence[tuple[str, tuple[str, ...]]]
_MAKE = "_rmsnorm_make"
_EXCHANGED = "_rmsnorm_exchanged"
FILE = "<rmsnorm: "
"""What the file of a rewritten function begins with."""
_FLAGS = functools.reduce(
    int.__or__, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)


class Remade:
    """A change of a class (``classes.py``) that is another function: equal where it is the same one."""

    function: Forward

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and other.function is self.function

    def __hash__(self) -> int:
        return hash(self.function)

    def forward_for(self, cls: type[nn.Module]) -> Forward:
        return self.function

    def plain(self) -> tuple[Any, ...]:
        return ()


class Rewritten(Remade):
    """The forward of a class with its adds fused."""

    kind, what = "layer", "residual add"

    def __init__(self, cls: type[nn.Module]) -> None:
        self.cls = cls
        self.function, self.fused = rewrite(cls.forward)

    @property
    def norms(self) -> tuple[str, ...]:
        return tuple(norm for pair in self.fused for norm in pair if norm)

    def said(self, served: Served) -> str:
        """What became one call each, of the lines that were served (``witness.py``)."""
        behind = [norm for call, (norm, *_) in served if call == "add_norm"]
        said = [", then ".join((f"{before}, add", *after)) for call, (before, *after) in served if call != "add_norm"]
        return "; ".join([*(["add, then " + ", ".join(behind)] if behind else []), *said])


classes.READERS["layer"] = Rewritten


@functools.cache
def norms_beside_adds(original: Forward) -> tuple[str, ...]:
    """The attributes of the norms that the function calls right beside an add."""
    return tuple(norm for pair in found_by(fuse, original) for norm in pair if norm)


def found_by(change: Change, original: Forward, *words: str) -> tuple[Any, ...]:
    """What the change says of the function's source, if a name there has one of the words: reading takes 1 ms."""
    code = getattr(wrappers.links_of(original)[-1], "__code__", None)
    names = (*code.co_names, *code.co_varnames) if code else ()
    if words and not any(word in name for name in names for word in words):
        return ()
    definition = _definition(original)
    return tuple(change(definition, definition.args.args[0].arg)) if definition and definition.args.args else ()


@functools.cache
def rewrite(original: Forward) -> tuple[Forward, tuple[Fused, ...]]:
    """The function with each add beside a norm fused, in the wrappers that it has, and the attributes of those norms.

    Raises:
        ValueError: it can't be rewritten, with the reason.
    """
    return remade(original, fuse, dict(zip(CALLS, (add_norm, norm_add, sandwich), strict=True)), "fused adds")


def remade(original: Forward, change: Change, calls: dict[str, Forward], what: str) -> tuple[Forward, tuple[Any, ...]]:
    """The function with a change of its source, in which the names of ``calls`` mean these, and what ``change`` says.

    Raises:
        ValueError: it can't be rewritten, with the reason.
    """

    def exchanged(module: nn.Module) -> Forward | None:
        """The class's forward, if somebody has given it another since."""
        cls = getattr(type(module), classes.ORIGINAL, None)  # none where somebody has handed this function on
        return None if cls is None or cls.forward is original else cls.forward

    calls = {**calls, _EXCHANGED: exchanged}
    links = wrappers.links_of(original)
    innermost, definition = links[-1], _definition(original)
    if definition is None or not definition.args.args or not isinstance(innermost, FunctionType):
        raise ValueError("its source can't be read")
    # With the lines of the source: between lines that differ, compilers leave instructions that do nothing.
    if _bare(_compile(innermost, _module(innermost, definition, calls), "<source>")) != _bare(innermost.__code__):
        raise ValueError("its source isn't what it runs")
    said = tuple(change(definition, definition.args.args[0].arg))
    definition.body[:0] = _answers_otherwise(definition.args)
    text = ast.unparse(_module(innermost, definition, calls))
    line = innermost.__code__.co_firstlineno
    file = f"{FILE}{innermost.__module__}.{innermost.__qualname__}, line {line}, with {what}>"
    linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file  # for tracebacks
    code = _compile(innermost, text, file)
    # The cells themselves, that of ``super()`` among them: what is assigned to them later is seen here too.
    cells = dict(zip(innermost.__code__.co_freevars, innermost.__closure__ or (), strict=True))
    closure = tuple(cells[name] if name in cells else CellType(calls[name]) for name in code.co_freevars)
    function = FunctionType(code, innermost.__globals__, innermost.__name__, innermost.__defaults__, closure)
    function.__kwdefaults__ = innermost.__kwdefaults__
    wrappers.resemble(function, innermost)
    return wrappers.rewrap(links, function), said


def _answers_otherwise(names: ast.arguments) -> list[ast.stmt]:
    """``if (other := exchanged(self)): return other(self, …)``, with all that the function is given."""
    given = [one.arg for one in (*names.posonlyargs, *names.args)]
    given += [f"*{names.vararg.arg}"] if names.vararg else []
    given += [f"{one.arg}={one.arg}" for one in names.kwonlyargs]
    given += [f"**{names.kwarg.arg}"] if names.kwarg else []
    other = "_rmsnorm_other"
    lines = f"{other} = {_EXCHANGED}({given[0]})\nif {other} is not None:\n    return {other}({', '.join(given)})"
    return ast.parse(lines).body


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
