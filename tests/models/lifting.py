"""Takes one class out of an installed package's source, with what it refers to there and nothing else of the package.

To import seventy packages takes all that they import, from data loaders to CUDA. A norm needs torch, and two or three
functions beside it: those statements of its own file run here, under the module name that they have in the package.
What they import from the package is lifted in the same way. What they import from elsewhere and norms don't compute
with is a stub: false, so that no accelerator counts as available, and an error in any arithmetic.
"""

from __future__ import annotations

import ast
import functools
import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Imported if installed, like the standard library; everything else is a stub.
REAL = {"torch", "numpy", "typing_extensions", "packaging"}
# Beside sys.path: whatever is there is seen by nothing but this file, so that other tests don't find half a package.
HOME = Path(__file__).parents[2] / "build" / "others"
COMPOUND = (ast.If, ast.Try, ast.With)
IMPORTS = (ast.Import, ast.ImportFrom)


class Stub:
    """Stands for what isn't there: any attribute and any call of it is a stub; as a decorator it does nothing."""

    def __init__(self, name: str = "stub") -> None:
        self._name = name

    def __getattr__(self, name: str) -> Stub:
        if name.startswith("__"):
            raise AttributeError(name)
        return Stub(f"{self._name}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        decorates = len(args) == 1 and not kwargs and isinstance(args[0], (type, types.FunctionType))
        return args[0] if decorates else Stub(f"{self._name}()")

    def __getitem__(self, key: Any) -> Stub:
        return self

    def __or__(self, other: Any) -> Any:
        return other

    __ror__ = __or__

    def __bool__(self) -> bool:
        return False

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return ()


class Module:
    """One module of a package; as much of it as was asked for has run."""

    def __init__(self, name: str, file: Path) -> None:
        self.name, self.package = name, name if file.name == "__init__.py" else name.rpartition(".")[0]
        self.file, self.source = file, file.read_text()
        self.statements: dict[str, list[ast.stmt]] = {}
        for statement in ast.parse(self.source).body:
            if not (isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test)):
                for bound in dict.fromkeys(defined(statement)):
                    self.statements.setdefault(bound, []).append(statement)
        self.module = types.ModuleType(name)
        self.module.__file__ = str(file)
        self.scope: dict[str, Any] = vars(self.module)
        self.started: set[int] = set()

    def __getitem__(self, name: str) -> Any:
        """What the name stands for, after its definition and all that this refers to have run."""
        for statement in self.statements[name]:
            if id(statement) not in self.started:
                self.started.add(id(statement))
                self._run(statement)
        return self.scope[name]

    def _run(self, statement: ast.stmt) -> None:
        if isinstance(statement, IMPORTS):
            self._bind(statement)
            return
        for node in ast.walk(statement):
            if isinstance(node, IMPORTS) and isinstance(statement, COMPOUND):
                self._bind(node)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in self.statements:
                try:
                    self[node.id]
                except Exception:  # if it is needed after all, the stub says so
                    self.scope.setdefault(node.id, Stub(node.id))
        if isinstance(statement, ast.Try) and any(_optional(node) for node in statement.body):
            # Whether somebody has it must not matter here: as if it were not installed.
            for inner in (inner for handler in statement.handlers for inner in handler.body):
                self._run(inner)
            return
        future = ast.ImportFrom("__future__", [ast.alias("annotations")], 0)
        body = ast.fix_missing_locations(ast.Module([future, statement], []))
        with self._registered():
            exec(compile(body, str(self.file), "exec"), self.scope)

    @contextmanager
    def _registered(self) -> Iterator[None]:
        """Dataclasses look up the module that they are defined in."""
        stranger = self.name not in sys.modules
        if stranger:
            sys.modules[self.name] = self.module
        try:
            yield
        finally:
            if stranger:
                del sys.modules[self.name]

    def _bind(self, statement: ast.Import | ast.ImportFrom) -> None:
        for alias in statement.names:
            name = alias.asname or alias.name.partition(".")[0]
            if isinstance(statement, ast.Import):
                top = outside(alias.name)
                self.scope[name] = top if alias.asname else outside(name)
            else:
                home = self.package.split(".")[: 1 - statement.level or None] if statement.level else []
                source = ".".join([*home, *filter(None, [statement.module])])
                self.scope[name] = self._imported(source, alias.name)

    def _imported(self, source: str, name: str) -> Any:
        if source.partition(".")[0] != self.name.partition(".")[0]:
            found = outside(source)
            return getattr(found, name) if hasattr(found, name) else outside(f"{source}.{name}")
        module = module_of(source)
        if module and name in module.statements:
            try:
                return module[name]
            except Exception:
                return Stub(name)
        inner = module_of(f"{source}.{name}")
        return Inside(inner) if inner else Stub(name)


class Inside:
    """A module that another one imports whole."""

    def __init__(self, module: Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return self._module[name] if name in self._module.statements else Stub(name)


def defined(statement: ast.stmt) -> Iterator[str]:
    """The names that a statement of a module binds."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        yield statement.name
    elif isinstance(statement, IMPORTS):
        yield from (alias.asname or alias.name.partition(".")[0] for alias in statement.names)
    elif isinstance(statement, COMPOUND):
        handlers = statement.handlers if isinstance(statement, ast.Try) else []
        for body in (statement.body, getattr(statement, "orelse", []), *(handler.body for handler in handlers)):
            for inner in body:
                yield from defined(inner)
    else:
        yield from (n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))


def _is_real(name: str) -> bool:
    top = name.partition(".")[0]
    return top in REAL or top in sys.stdlib_module_names


def _optional(node: ast.stmt) -> bool:
    """Whether it imports what may not be there."""
    if isinstance(node, ast.Import):
        return not all(_is_real(alias.name) for alias in node.names)
    return isinstance(node, ast.ImportFrom) and not node.level and not _is_real(node.module or "")


def outside(name: str) -> Any:
    """A module of the standard library or of ``REAL``; otherwise a stub."""
    if _is_real(name):
        try:
            return importlib.import_module(name)
        except ImportError:
            pass
    return Stub(name)


@functools.cache
def folder(package: str) -> Path | None:
    """Where an installed package lies; it is not imported."""
    path = HOME / package
    return path if path.is_dir() else None


@functools.cache
def module_of(name: str) -> Module | None:
    """A module of an installed package, of which nothing has run yet."""
    top, *rest = name.split(".")
    if (home := folder(top)) is None:
        return None
    path = home.joinpath(*rest)
    file = next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
    return Module(name, file) if file else None


def lift(path: str) -> Any:
    """The class with this dotted path.

    Raises:
        ModuleNotFoundError: its package isn't installed, or not in this version.
    """
    name, _, cls = path.rpartition(".")
    if (module := module_of(name)) is None or cls not in module.statements:
        raise ModuleNotFoundError(path)
    return module[cls]
