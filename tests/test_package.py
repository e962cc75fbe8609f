"""Proves the house rules that a program can check: the public page, what an import brings, and who imports whom."""

import ast
import re
from pathlib import Path

import pytest

import rmsnorm

ROOT = Path(rmsnorm.__file__).parent
# By their paths below the package, without the suffix: the corridor's files by name alone, "bench/race" in a room.
SOURCES = {path.relative_to(ROOT).with_suffix("").as_posix(): path for path in ROOT.rglob("*.py")}
OPTIONAL = (
    *("transformers", "triton", "matplotlib", "typer", "rich", "onnx", "kernels"),
    *("rmsnorm.cli", "rmsnorm.demo", "rmsnorm.bench", "rmsnorm.tutorial", "marimo"),
)

# The corridor: a file may import those to its right, and nothing else of ours.
MAY_IMPORT = {
    "reference": set(),
    "_native": set(),
    "_ops": {"_native", "reference"},
    "_vmap": {"_ops", "reference"},
    "_autograd": {"_ops", "_vmap", "reference"},
    "_gpu": {"_extras", "_launch", "_ops", "reference"},
    "_extras": set(),
    "_launch": {"_triton", "_triton_backward", "reference"},
    "_triton": set(),
    "_triton_backward": {"_triton"},
    "_onnx": {"reference"},
    "_arguments": set(),
    "_foreign": {"_onnx", "_ops", "reference"},
    "functional": {"_arguments", "_autograd", "_everyday", "_foreign", "_ops", "reference"},
    "_floored": {"_everyday", "functional"},
    "_everyday": {"_autograd", "_dtensor", "_ops"},  # the latter when a DTensor arrives
    "_dtensor": {"_floored", "_gated", "_layer_norm", "_ranks", "functional"},
    "_ranks": {"_gated_ops", "reference"},
    "_layer_norm": {"_arguments", "_everyday", "_foreign", "_layer_ops", "_ops"},
    "_layer_ops": {"_ops", "reference"},
    "module": {"_arguments", "functional"},
    "_gated_ops": {"_native", "_ops", "reference"},
    "_gated": {"_arguments", "_everyday", "_gated_autograd", "_gated_ops", "functional", "module", "reference"},
    "_gated_autograd": {"_autograd", "_foreign", "_gated_ops", "_onnx", "_ops", "reference"},
    "hub": {"_extras", "models"},
    "_install": {"_native", "_vmap"},
    "_info": {"_gpu", "_install", "_native"},
    "__init__": {"_gated", "_gpu", "_info", "_install", "_layer_norm", "functional", "models", "module"},
}


def test_public_page():
    public = {name for name in vars(rmsnorm) if not name.startswith("_")}
    submodules = {name.partition("/")[0] for name in SOURCES}
    assert (
        sorted(rmsnorm.__all__)
        == sorted(public - submodules)
        == [
            "GatedRMSNorm",
            "LayerNorm",
            "PatchReport",
            "RMSNorm",
            "add_rms_norm",
            "gated_rms_norm",
            "info",
            "install",
            "installed",
            "layer_norm",
            "patch",
            "patched",
            "rms_norm",
            "uninstall",
            "unpatch",
        ]
    )


PROBE = """
import sys
import torch
before = set(sys.modules)
{statement}
print(sorted(name for name in set(sys.modules) - before if name in {optional!r}))
"""


@pytest.mark.parametrize(("statement", "expected"), [("import rmsnorm", "[]"), ("import rich", "['rich']")])
def test_import_needs_only_torch(python, statement, expected):
    """The second case shows that the first one can fail."""
    result = python(PROBE.format(statement=statement, optional=OPTIONAL))
    assert result.stdout.strip() == expected, result.stderr


def imports(path: Path) -> set[str]:
    """The files of this package that one imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module} if node.module else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_follow_the_corridor(name):
    assert imports(SOURCES[name]) <= MAY_IMPORT[name]


@pytest.mark.parametrize("path", SOURCES.values(), ids=SOURCES)
def test_every_file_says_what_it_is_for(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text
    assert path.stem == "__init__" or text.startswith(("The only file", "Builds")), f"{path.name}: {text[:60]}"
    assert len(path.read_text().splitlines()) <= 250, f"{path.name} has outgrown one room"


@pytest.mark.parametrize(
    ("text", "owners"),
    [
        ("ctypes", ["_native"]),
        ("pip install", ["_extras"]),
        ("rmsnorm[", []),
        ("environ.get", ["_gpu", "_native", "study/workers"]),
        ("import triton", ["_triton", "_triton_backward"]),
        ("library.define", ["_gated_ops", "_install", "_layer_ops", "_ops"]),
        ("register_vmap", ["_install", "_vmap"]),
        ("autograd.Function", ["_autograd", "_dtensor", "_everyday", "_gated_autograd", "_layer_norm", "_ranks"]),
    ],
)
def test_one_owner(text, owners):
    """ "The only file that …" is meant."""
    code = {name: "\n".join(map(ast.unparse, code_of(path))) for name, path in SOURCES.items()}
    assert [name for name in sorted(code) if text in code[name]] == owners


def code_of(path: Path) -> list[ast.stmt]:
    """The statements of a file without docstrings."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            node.body = body[1:]
    return [node for node in tree.body if not (isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.body)]


@pytest.mark.xdist_group("house")
def test_groups_of_tests_hold(request):
    """Tests of a group share what takes memory or minutes. pytest 9.2 with xdist 3.8 drops them without a word
    (https://github.com/pytest-dev/pytest-xdist/issues/1386), as xdist says a test's group by its name."""
    if not request.config.getoption("loadgroup", default=False):
        pytest.skip("not on several processes, grouped")
    assert request.node.nodeid.endswith("@house")


def test_what_make_test_leaves_out_is_run_by_make_heavy_and_both_by_ci():
    root = Path(__file__).parents[1]
    targets = dict(re.findall(r"^(\w+):.*\n((?:\t.*\n)+)", (root / "Makefile").read_text(), re.MULTILINE))
    for part in ("--dist loadgroup", "TRITON_INTERPRET=1"):
        lines = [[line for line in targets[name].splitlines() if part in line] for name in ("test", "heavy")]
        assert [len(line) for line in lines] == [1, 1], part
        assert lines[0][0].replace('-m "not heavy"', "-m heavy") == lines[1][0] != lines[0][0]
    assert "\nmake test\nmake heavy\n" in (root / ".ci" / "run").read_text()
