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
    *("rmsnorm.cli", "rmsnorm.demo", "rmsnorm.bench", "rmsnorm.surgery", "rmsnorm.tutorial", "markdown_it"),
)

# The corridor: a file may import those to its right, and nothing else of ours.
MAY_IMPORT = {
    "reference": set(),
    "_native": set(),
    "_form": {"_arguments", "_native", "reference"},
    "_ops": {"_form", "_native", "reference"},
    "_vmap": {"_form", "_ops", "reference"},
    "_recorded": {"_form"},
    "_autograd": {"_ops", "_recorded", "_vmap", "reference"},
    "_extras": set(),
    "_onnx": {"reference"},
    "_shown": set(),
    "_arguments": {"_shown", "reference"},
    "_nodes": set(),
    "_turned": {"_nodes"},
    "_called": {"_native"},
    "_template": {"_called", "_native"},
    "_around": {"_called"},
    "_objects": set(),
    "_direct": {"_around", "_called", "_objects"},
    "_followed": {"_form", "_ops"},
    "_turned_back": {"_followed", "_nodes", "_turned"},
    "_gradients": {"_followed", "_nodes", "_turned_back"},
    "_few": {"_called", "_followed", "_handed", "_nodes"},
    "_neighbours": {"_called", "_followed", "_gradients", "_nodes", "_turned", "_turned_back"},
    "_graphs": {"_called", "_shown", "_direct", "_few", "_neighbours", "_template"},  # when torch.compile meets a norm
    "_foreign": {"_form", "_graphs", "_onnx", "reference"},
    "forms/lean": {"_form", "_ops", "forms/served", "reference"},
    "_serve": {"_autograd", "_foreign", "_ops", "forms/lean", "reference"},
    "_writable": {"_arguments", "_autograd", "_ops", "reference"},
    "_handed": {"_arguments", "_native", "_ops"},
    "_eager": {"_arguments", "_autograd", "_handed", "_ops", "forms/lean"},
    "functional": {"_arguments", "_eager", "_everyday", "_handed", "_ops", "_serve", "_writable", "reference"},
    "_everyday": {
        "_arguments",
        "_autograd",
        "_foreign",
        "_graphs",
        "_handed",
        "_ops",
        "forms/lean",
        "distributed/placement",
    },  # the latter when a DTensor arrives
    "module": {"_arguments", "functional"},
    "forms/floored": {"_arguments", "_autograd", "_eager", "_everyday", "_ops", "_serve", "functional"},
    "forms/layer_norm": {"_arguments", "_everyday", "_handed", "forms/layer_ops", "forms/served"},
    "forms/layer_ops": {"_form", "reference"},
    "forms/gated_ops": {"_form", "reference"},
    "forms/calls": {"_arguments", "_everyday", "_foreign", "_handed", "forms/served", "functional"},
    "forms/served": {"_autograd", "_foreign", "_form", "_handed", "_onnx", "_recorded", "forms/unused"},
    "forms/unused": {"_form"},
    "forms/gated": {
        *("_arguments", "_everyday", "_shown", "functional", "module", "reference"),
        *("forms/calls", "forms/gated_ops", "forms/served"),
    },
    "forms/quantised": {
        *("_arguments", "_form", "_shown", "forms/calls", "forms/gated", "forms/gated_ops", "forms/served"),
        "reference",
    },
    "forms/heads_ops": {"_foreign", "_form", "reference"},
    "forms/heads": {
        *("_arguments", "_everyday", "_foreign", "functional", "distributed/heads"),  # the latter for a DTensor
        *("forms/calls", "forms/heads_ops", "forms/served"),
    },
    "forms/general_ops": {"_form", "reference"},
    "forms/everyday_ops": {"_form", "_handed"},
    "forms/general": {
        *("_arguments", "_shown", "forms/calls", "forms/everyday_ops", "forms/general_ops", "forms/served"),
        "functional",
    },
    "forms/l2": {
        "_arguments",
        "_everyday",
        "_handed",
        "forms/calls",
        "forms/general",
        "forms/general_ops",
        "functional",
    },
    "forms/in_place": {
        "_writable",
        *(
            "forms/everyday_ops",
            "_arguments",
            "_autograd",
            "_everyday",
            "_foreign",
            "_form",
            "_handed",
            "_ops",
            "forms/calls",
            "functional",
            "reference",
        ),
    },
    "distributed/heads": {"distributed/parts", "distributed/placement"},
    "distributed/parts": set(),
    "forms/modulated": {
        *(
            "_arguments",
            "_everyday",
            "functional",
            "forms/calls",
            "forms/layer_norm",
            "forms/modulated_ops",
            "forms/served",
        ),
    },
    "forms/modulated_ops": {"_form", "reference"},
    "forms/sandwich": {"_arguments", "_form", "forms/calls", "forms/served", "functional", "reference"},
    "distributed/placement": {"distributed/parts", "distributed/ranks"},
    "distributed/ranks": {"forms/gated_ops", "reference"},
    "gpu/__init__": {"gpu/route", "gpu/serve"},
    "gpu/route": {"_extras", "_ops", "gpu/backward", "gpu/launch", "reference"},
    "gpu/serve": {
        *("_form", "_ops", "gpu/forms", "gpu/general", "gpu/heads", "gpu/launcher", "gpu/neighbours", "gpu/route"),
    },
    "gpu/launcher": {
        *("_form", "_native", "gpu/backward", "gpu/launch", "gpu/route", "gpu/steps"),
        *("gpu/triton_backward", "gpu/triton_forward"),
        *("gpu/triton_heads", "gpu/triton_quantised", "gpu/triton_sandwich"),
    },
    "gpu/forms": {
        *("gpu/launch", "gpu/neighbours", "gpu/steps", "gpu/triton_quantised", "gpu/triton_sandwich", "reference"),
    },
    "gpu/general": {"gpu/backward", "gpu/launch", "gpu/steps", "reference"},
    "gpu/heads": {"gpu/backward", "gpu/launch", "gpu/triton_heads", "reference"},
    "gpu/neighbours": {"gpu/backward", "gpu/launch", "gpu/steps", "gpu/triton_forward", "reference"},
    "gpu/steps": set(),
    "gpu/launch": {"gpu/steps", "gpu/triton_forward", "reference"},
    "gpu/backward": {"gpu/heads", "gpu/launch", "gpu/steps", "gpu/triton_backward", "reference"},
    "gpu/triton_numbers": set(),
    "gpu/triton_steps": {"gpu/triton_numbers"},
    "gpu/triton_forward": {"gpu/triton_steps"},
    "gpu/triton_gradients": {"gpu/triton_numbers", "gpu/triton_steps"},
    "gpu/triton_backward": {"gpu/triton_gradients", "gpu/triton_heads", "gpu/triton_steps"},
    "gpu/triton_heads": {"gpu/triton_numbers", "gpu/triton_steps"},
    "gpu/triton_quantised": {"gpu/triton_steps"},
    "gpu/triton_sandwich": {"gpu/triton_numbers", "gpu/triton_steps"},
    "hub": {"_extras", "models/binding", "models/probe"},
    "_install": {"_native", "_vmap"},
    "_surgery": {"surgery/__init__"},  # when somebody asks for it
    "_info": {"_install", "_native", "gpu/route"},
    "__init__": {
        *(
            "_graphs",
            "_info",
            "_install",
            "_surgery",
            "forms/gated",
            "forms/general",
            "forms/heads",
            "forms/in_place",
            "forms/l2",
            "forms/layer_norm",
            "forms/quantised",
            "functional",
        ),
        *("forms/modulated", "forms/sandwich", "gpu/__init__", "models/__init__", "module"),
    },
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
            "add_rms_norm_",
            "fold",
            "gated_add",
            "gated_rms_norm",
            "heads_rms_norm_rope",
            "info",
            "install",
            "installed",
            "inverse_rms",
            "l2_norm",
            "layer_norm",
            "modulated_norm",
            "patch",
            "patched",
            "quantised_rms_norm",
            "rms_norm",
            "rms_norm_add",
            "rope",
            "rotate",
            "sandwich_rms_norm",
            "set_compile_mode",
            "to_rms",
            "unfold",
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
    """The files of this package that one imports, at the top or inside a function, by their names in SOURCES."""
    found, tree = set(), ast.parse(path.read_text())
    unreal = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    skipped = {id(inner) for node in unreal for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in skipped:
            folder = path.parents[node.level - 1].joinpath(*(node.module or "").split(".")).resolve()
            named = [folder / alias.name for alias in node.names]
            for to in (each if each.with_suffix(".py").exists() or each.is_dir() else folder for each in named):
                name = to.relative_to(ROOT).as_posix()
                found.add(name if name in SOURCES else f"{name}/__init__".removeprefix("./"))
    return found


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_follow_the_corridor(name):
    assert imports(SOURCES[name]) <= MAY_IMPORT[name]


def test_no_circle():
    """No file imports itself by way of others, late imports inside functions included."""
    ahead = {name: imports(path) - {name} for name, path in SOURCES.items()}
    while leaves := {name for name, others in ahead.items() if not others & ahead.keys()}:
        ahead = {name: others for name, others in ahead.items() if name not in leaves}
    assert not ahead


@pytest.mark.parametrize("path", SOURCES.values(), ids=SOURCES)
def test_every_file_says_what_it_is_for(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text
    assert path.stem == "__init__" or text.startswith(("The only file", "Builds")), f"{path.name}: {text[:60]}"
    assert len(path.read_text().splitlines()) <= 250, f"{path.name} has outgrown one room"


@pytest.mark.parametrize(
    ("text", "owners"),
    [
        ("ctypes", ["_handed", "_native", "surgery/allocator"]),
        ("pip install", ["_extras"]),
        ("rmsnorm[", []),
        ("environ.get", ["_native", "gpu/route", "study/workers"]),
        (
            "import triton.language",
            [
                f"gpu/triton_{name}"
                for name in ("backward", "forward", "gradients", "heads", "numbers", "quantised", "sandwich", "steps")
            ],
        ),
        (
            "library.define",
            [
                "_form",
                "_install",
                "_ops",
                "forms/everyday_ops",
                "gpu/launcher",
            ],
        ),
        ("register_vmap", ["_install", "_vmap"]),
        (
            "autograd.Function",
            [
                *("_autograd", "_eager", "distributed/parts", "distributed/ranks"),
                *("forms/served", "models/gates"),
            ],
        ),
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
