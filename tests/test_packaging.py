"""Proves what is built from the sources, without building wheels: what a sdist has, what a platform without a compiler
is told, which symbols the library asks for, and which tags become releases. `make wheels` checks the wheels."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import rmsnorm
from rmsnorm import _native

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the sources")


def setup(where: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """setup.py in a copy of the sources, beside which it writes; with a library, as in a checkout that was built."""
    tree = where / "tree"
    if not tree.exists():
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        for folder in ("src", "csrc"):
            shutil.copytree(ROOT / folder, tree / folder, ignore=ignored)
        for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md"):
            shutil.copy(ROOT / name, tree)
        (tree / "src/rmsnorm/librmsnorm.so").touch()
    variables = {"RMSNORM_BUILD_NATIVE": "", **variables}
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", *command],
        cwd=tree,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_sdist_has_the_kernels_and_no_library(tmp_path: Path) -> None:
    """The library of the checkout was in it: a wheel for another machine could have got the wrong one."""
    result = setup(tmp_path, "sdist", "--dist-dir", str(tmp_path))
    assert result.returncode == 0, result.stderr
    (made,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(made) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "src").rglob("*.py")}
    assert {*wanted, "LICENSE", "CHANGELOG.md", "src/rmsnorm/py.typed"} <= names
    assert not [name for name in names if name.endswith(".so")]


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"CXX": "no-such-compiler -O3"}, "no C++ compiler: 'no-such-compiler' isn't there"),
        ({"_PYTHON_HOST_PLATFORM": "win-amd64"}, "there are no kernels for Windows"),
        ({"CXX": "false"}, "exit status 1"),
    ],
    ids=["no compiler", "Windows", "a compiler that fails"],
)
def test_without_a_compiler_one_line_says_so(tmp_path: Path, variables: dict[str, str], says: str) -> None:
    command = ("build_ext", "--build-temp", str(tmp_path / "temp"), "--build-lib", str(tmp_path / "lib"))
    result = setup(tmp_path, *command, **variables)
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("rmsnorm:")]
    assert line.startswith("rmsnorm: the native library was NOT built, pure Python is installed: ")
    assert says in line
    assert not list((tmp_path / "lib").rglob("*.so"))
    result = setup(tmp_path, *command, **variables, RMSNORM_BUILD_NATIVE="1")
    assert result.returncode != 0
    assert says in result.stderr


@pytest.mark.parametrize(
    ("system", "machine", "says"),
    [
        ("win32", "AMD64", "no native kernels for Windows"),
        ("darwin", "x86_64", "no wheel of rmsnorm is made for darwin on x86_64"),
        ("linux", "riscv64", "no wheel of rmsnorm is made for linux on riscv64"),
        ("linux", "aarch64", "needs a C++20 compiler"),
        ("darwin", "arm64", "needs a C++20 compiler"),
    ],
)
def test_the_loader_says_why_there_is_no_library(system: str, machine: str, says: str) -> None:
    assert says in _native._why_not_built(system, machine)


@pytest.mark.skipif(not rmsnorm.info().native, reason="there is no library")
@pytest.mark.skipif(shutil.which("nm") is None or sys.platform != "linux", reason="needs nm, on Linux")
def test_the_library_asks_for_nothing_newer_than_its_wheels_tag() -> None:
    """manylinux_2_28 is glibc 2.28 and the libstdc++ of gcc 8. Names of libstdc++ without a version come from copies in
    torch's libraries, which are there by chance."""
    text = subprocess.run(["nm", "-D", _native.LIBRARY], capture_output=True, text=True, check=True).stdout
    undefined = re.findall(r"^ +U (\S+)$", text, re.MULTILINE)
    assert "__cxa_throw@CXXABI_1.3" in undefined
    newest = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
    for symbol in undefined:
        name, _, version = symbol.partition("@")
        if version:
            family, _, number = version.strip("@").rpartition("_")
            assert tuple(map(int, number.split("."))) <= newest[family], symbol
        else:
            assert not re.match("_ZN?K?[RO]?St", name), symbol


@pytest.mark.parametrize(
    ("tag", "says"),
    [("v9.9.9", "the tag v9.9.9 is not v"), ("v{}", "should be '## "), ("", None)],
    ids=["another", "no date yet", "no tag"],
)
def test_a_tag_is_the_version_and_the_changelog_has_it(tmp_path: Path, tag: str, says: str | None) -> None:
    (tmp_path / "packaging").mkdir()
    shutil.copy(ROOT / "packaging/version.py", tmp_path / "packaging")
    (tmp_path / "pyproject.toml").write_text('version = "1.2.3"\n')
    changes = tmp_path / "CHANGELOG.md"
    changes.write_text("# Changelog\n\n## 1.2.3 (unreleased)\n")
    program = [sys.executable, str(tmp_path / "packaging/version.py")]
    result = subprocess.run(
        [*program, *filter(None, [tag.format("1.2.3")])], capture_output=True, text=True, check=False
    )
    assert (result.returncode == 0) == (says is None)
    assert says is None or says in result.stderr
    changes.write_text("# Changelog\n\n## 1.2.3 (2027-01-31)\n")
    result = subprocess.run([*program, "v1.2.3"], capture_output=True, text=True, check=False)
    assert result.stdout == "1.2.3\n", result.stderr
    assert (ROOT / "CHANGELOG.md").read_text().count(f"\n## {rmsnorm.info().rmsnorm} (") == 1
