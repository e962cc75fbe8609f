"""Runs the core of the tests on other versions of torch, transformers and Python, each with the one wheel.

python tests/matrix.py                              # every row
python tests/matrix.py --row 2.14.1,5.24.0,3.11     # one: torch, transformers, Python
python tests/matrix.py --newest                     # the newest torch and transformers that pip finds
python tests/matrix.py --write                      # and put what was run into docs/versions.md

A row is an environment of its own, made in --folder and removed afterwards. torch is installed first and alone. All but
a few of torch's wheels are for CUDA and don't import without its libraries: such a row needs 6 GB while it runs.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/versions.md"
BEGIN, END = "<!-- matrix: python tests/matrix.py --write -->", "<!-- end -->"
NEWEST = "newest"
ROWS = [  # every torch once, every Python once with the torch that the wheel is built on, and both transformers
    ("2.10.0", "5.22.2", "3.11"),
    ("2.11.0", "5.22.2", "3.11"),
    ("2.12.1", "5.22.2", "3.11"),
    ("2.13.0", "5.20.2", "3.10"),  # the last transformers for Python 3.10
    ("2.13.0", "5.22.2", "3.11"),
    ("2.13.0", "5.24.0", "3.11"),
    ("2.13.0", "5.22.2", "3.12"),
    ("2.13.0", "5.22.2", "3.13"),
    ("2.13.0", "5.22.2", "3.14"),
    ("2.14.1", "5.24.0", "3.11"),
    ("2.15.0", "5.24.0", "3.11"),
]
CORE = [  # what a new torch, transformers or Python can break; the kernels' own tests don't depend on them
    "tests/test_forward.py",
    "tests/test_forward_caches.py",
    "tests/test_backward.py",
    "tests/test_module.py",
    "tests/test_handed.py",
    "tests/test_handed_forms.py",
    "tests/test_handed_recorded.py",
    "tests/test_handed_odd.py",
    "tests/test_handed_room.py",
    "tests/test_in_place.py",
    "tests/test_make_fx.py",
    "tests/test_forms_watched.py",
    "tests/test_eager.py",
    "tests/test_errors.py",
    "tests/test_errors_options.py",
    "tests/test_library.py",
    "tests/test_out.py",
    "tests/test_install.py",
    "tests/test_installed.py",
    "tests/test_installed_errors.py",
    "tests/test_transforms.py",
    "tests/test_unused.py",
    "tests/models/test_patch.py",
    "tests/models/test_fusion.py",
    "tests/models/test_conditions.py",
]
HOME = "tests/test_home.py"
"""With --home. Its oracle is the torch of the row: what fails there is new in torch, or in ours with it. 10 minutes."""
# setuptools and hypothesis are what the tests import; numpy comes in the version that pip finds for that Python.
TOOLS = ["pytest==9.1.1", "pytest-xdist==3.8.0", "numpy", "setuptools", "accelerate"]
TOOLS += ["hypothesis==6.170.15; python_version>='3.11'", "hypothesis; python_version<'3.11'"]
IMPORT = """
import torch, transformers, rmsnorm
info = rmsnorm.info()
assert info.native, info
torch.testing.assert_close(rmsnorm.rms_norm(torch.tensor([3.0, 4.0]), 2, eps=0.0), torch.tensor([0.8485, 1.1314]),
                           atol=1e-4, rtol=0)
print(torch.__version__.partition("+")[0], transformers.__version__)
"""


@dataclass(frozen=True)
class Result:
    torch: str
    transformers: str
    python: str
    outcome: str  # passed, failed and skipped; or why there is no such row
    seconds: int
    date: str
    good: bool = True

    def line(self) -> str:
        return f"| {self.torch} | {self.transformers} | {self.python} | {self.outcome} | {self.seconds} | {self.date} |"


HEAD = "| torch | transformers | Python | tests | seconds | date |\n|---|---|---|---|---|---|"


class NotToBeHad(Exception):
    """A version that can't be installed here."""


def interpreter(version: str) -> str:
    """A Python of this version: this one, one on PATH, or one of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    places = [
        sys.executable,
        f"python{version}",
        *map(str, sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True)),
    ]
    for place in places:
        ask = [place, "-c", "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"]
        try:
            found = subprocess.run(ask, capture_output=True, text=True, check=False)
        except OSError:
            continue
        if found.stdout.strip() == version:
            return place
    raise NotToBeHad(f"no Python {version} on this machine")


def wheel() -> Path:
    """The wheel in dist/, built anew if a source is younger."""
    sources = [p for place in ("src", "csrc") for p in (ROOT / place).rglob("*") if p.suffix in (".py", ".h", ".cpp")]
    youngest = max(path.stat().st_mtime for path in [*sources, ROOT / "setup.py", ROOT / "pyproject.toml"])
    # `make wheels` puts those of other platforms beside it.
    mine = f"rmsnorm-*-py3-none-*linux*_{platform.machine()}.whl"
    found = sorted((ROOT / "dist").glob(mine), key=lambda path: path.stat().st_mtime)
    if found and found[-1].stat().st_mtime > youngest:
        return found[-1]
    print("building the wheel", flush=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    environment = os.environ | {"RMSNORM_BUILD_NATIVE": "1"}
    subprocess.run([*command, "--wheel-dir", str(ROOT / "dist"), str(ROOT)], env=environment, check=True)
    return max((ROOT / "dist").glob(mine), key=lambda path: path.stat().st_mtime)


def install(python: Path, *what: str) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    done = subprocess.run([*command, *what], capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reasons = [line for line in errors if "Ignored the following" not in line] or [done.stderr[-200:]]
        wanted = [line.strip() for line in done.stdout.splitlines() if "(constraint)" in line]
        raise NotToBeHad("not installed: " + (wanted or reasons)[0].removeprefix("ERROR: "))


def exact(name: str, version: str) -> str:
    return name if version == NEWEST else f"{name}=={version}"


def run(torch: str, transformers: str, version: str, built: Path, folder: Path, keep: bool) -> Result:
    """One row."""
    began, today = time.monotonic(), datetime.date.today().isoformat()
    home = folder / f"{torch}-{transformers}-{version}"

    def result(outcome: str, good: bool = True) -> Result:
        return Result(torch, transformers, version, outcome, round(time.monotonic() - began), today, good)

    # The wheel is tested as users have it: nothing of this checkout on the path, none of our variables.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RMSNORM_") and k != "PYTHONPATH"}
    environment["PYTHONPATH"] = str(ROOT / "tests")
    try:
        subprocess.run([interpreter(version), "-m", "venv", str(home)], check=True)  # what --keep left is kept
        python = home / "bin/python"
        install(python, exact("torch", torch))
        install(python, exact("transformers", transformers), *TOOLS)
        install(python, "--no-deps", "--force-reinstall", str(built))
        use = [str(python), "-W", "error::RuntimeWarning", "-c", IMPORT]
        used = subprocess.run(use, env=environment, cwd=home, capture_output=True, text=True, check=False)
        if used.returncode:
            return result(f"FAILED to import: {used.stderr.strip().splitlines()[-1]}", good=False)
        torch, transformers = used.stdout.split()
        report = home / "report.xml"
        tests = [test for test in CORE if (ROOT / test).exists()]
        # New versions deprecate things: pyproject's rule that warnings are errors is for the pinned ones.
        options = ["-q", "-n", "2", "--dist", "loadgroup", "-m", "not heavy", "-p", "no:cacheprovider"]
        options += ["-k", "not avx2 and not baseline"]  # one kind of kernel will do: no kernel knows of torch
        options += ["-o", "filterwarnings=", f"--junitxml={report}"]
        pytest = [str(python), "-m", "pytest", *options, *tests]
        done = subprocess.run(pytest, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if not report.exists():
            return result(f"FAILED to run: {(done.stdout + done.stderr).strip().splitlines()[-1]}", good=False)
        suite = ET.parse(report).getroot().find("testsuite")
        assert suite is not None
        count, skipped = int(suite.attrib["tests"]), int(suite.attrib["skipped"])
        failed = int(suite.attrib["failures"]) + int(suite.attrib["errors"])
        for line in done.stdout.splitlines():
            if line.startswith(("FAILED", "ERROR")):
                print(line)
        return result(
            f"{count - failed - skipped} passed, {failed} failed, {skipped} skipped", not failed and count > 0
        )
    except NotToBeHad as reason:
        return result(str(reason))
    finally:
        if not keep:
            shutil.rmtree(home, ignore_errors=True)


def write(results: list[Result]) -> None:
    """Puts the rows into the page, in place of those with the same versions."""
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    block, after = rest.split(END)
    lines = {tuple(re.split(r" *\| *", line)[1:4]): line for line in block.strip().splitlines()[2:]}
    for result in results:
        lines[result.torch, result.transformers, result.python] = result.line()
    ordered = [
        lines[key] for key in sorted(lines, key=lambda key: [list(map(int, re.findall(r"\d+", part))) for part in key])
    ]
    PAGE.write_text(f"{before}{BEGIN}\n{HEAD}\n" + "\n".join(ordered) + f"\n{END}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", action="append", help="torch,transformers,Python; may be given several times")
    parser.add_argument("--newest", action="store_true", help="the newest of both, on this Python")
    parser.add_argument("--wheel", type=Path, help="instead of the one in dist/, which is built if it is missing")
    parser.add_argument("--folder", type=Path, help="where the environments go")
    parser.add_argument("--keep", action="store_true", help="leave them there, and use those that are")
    parser.add_argument("--write", action="store_true", help=f"put the rows into {PAGE.relative_to(ROOT)}")
    parser.add_argument("--home", action="store_true", help=f"{HOME} too")
    options = parser.parse_args()
    if options.home:
        CORE.append(HOME)
    rows = [tuple(row.split(",")) for row in options.row or []]
    if options.newest:
        rows.append((NEWEST, NEWEST, "{}.{}".format(*sys.version_info)))
    folder = options.folder or Path(tempfile.mkdtemp(prefix="rmsnorm-matrix-"))
    folder.mkdir(parents=True, exist_ok=True)
    built = (options.wheel or wheel()).resolve()
    results = []
    print(HEAD, flush=True)
    for torch, transformers, version in rows or ROWS:
        results.append(run(torch, transformers, version, built, folder, options.keep))
        print(results[-1].line(), flush=True)
        if options.write:
            write(results[-1:])
    return 0 if all(result.good for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
