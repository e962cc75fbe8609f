"""Proves that the kernels of all targets are one function: same bits, no shared code, built with setup.py's own flags.

The AVX-512 sources run here on any x86 CPU: the intrinsics that they use are emulated (tests/native/emulate_avx512.h).
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rmsnorm

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX", "c++")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]

pytestmark = [
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason="needs a C++ compiler"),
    pytest.mark.xdist_group("native"),  # one process compiles, for all
    pytest.mark.skipif(not rmsnorm.info().native, reason="the native library is off: nothing to compare"),
]


def run(*command: str | Path) -> str:
    result = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout[-2000:]}{result.stderr[-4000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The object files of the library that is installed, where its build left them; else of a build from scratch,
    which takes two minutes on one core."""
    newest = max(path.stat().st_mtime for path in (*ROOT.glob("csrc/*"), ROOT / "setup.py"))
    for where in ROOT.glob("build/temp*"):
        if all(path.stat().st_mtime > newest for path in where.glob("*.o")) and (where / "target_baseline.o").exists():
            return where
    where = tmp_path_factory.mktemp("build")
    run(sys.executable, "setup.py", "-q", "build_ext", "--build-temp", where, "--build-lib", where / "lib")
    return where


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """compare_targets.cpp, with checks for whatever the kernels write through its pointers."""
    target = tmp_path_factory.mktemp("driver") / "driver.o"
    source = "tests/native/compare_targets.cpp"
    run(COMPILER, "-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-c", source, "-o", target)
    return target


def kernels(where: Path, name: str, *flags: str) -> Path:
    """One more target, compiled by hand."""
    target = where / f"extra_{name}.o"
    names = [f"-DRMSNORM_TARGET=target_{name}", f'-DRMSNORM_TARGET_NAME="{name}"']
    common = ["-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-w", "-Wno-psabi"]
    run(COMPILER, *common, *names, *flags, "-c", "csrc/target.cpp", "-o", target)
    return target


def built(objects: Path, name: str) -> tuple[Path, Path]:
    """A target of the library, in two units."""
    return objects / f"target_{name}.o", objects / f"target_{name}_f64.o"


def compare(*objects: Path) -> subprocess.CompletedProcess[str]:
    program = objects[0].with_suffix("")
    run(COMPILER, *objects, "-o", program)
    return subprocess.run([program], capture_output=True, text=True, check=False)


def test_no_target_exports_code_that_another_could_run(objects: Path) -> None:
    """A weak symbol of the AVX-512 object may be the one that the linker keeps, and the first call on an older CPU
    that reaches it is an illegal instruction. So each unit defines nothing but its tables."""
    targets = sorted(objects.glob("target_*.o"))
    assert targets
    for target in targets:
        name = target.stem.removeprefix("target_")
        tables = [f"rmsnorm::lent_{name}"] + ([] if name.endswith("_f64") else [f"rmsnorm::target_{name}"])
        defined = re.findall(r"^[0-9a-f]+ ([A-Z]|[vwu]) (\S+)$", run("nm", "-C", target), re.MULTILINE)
        assert sorted(name for _, name in defined) == tables


@pytest.mark.heavy  # compiles a target anew
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the other targets are for x86-64")
def test_every_target_writes_the_same_bits(objects: Path, driver: Path, tmp_path: Path) -> None:
    emulated = kernels(tmp_path, "avx512bf16", "-O1", *AVX2, "-DRMSNORM_EMULATE_AVX512")
    result = compare(driver, *built(objects, "baseline"), *built(objects, "avx2"), emulated)
    assert result.returncode == 0, result.stdout
    assert "285120 tensors compared, all equal, targets: baseline avx2 avx512bf16" in result.stdout


@pytest.mark.heavy
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the other targets are for x86-64")
def test_the_comparison_can_fail(objects: Path, driver: Path, tmp_path: Path) -> None:
    """Let the compiler contract a·b + c as it likes: that is the difference which the contract rules out."""
    contracting = ["-ffp-contract=fast", "-fexpensive-optimizations"]  # what of -O2 contracts, in half the time
    contracted = kernels(tmp_path, "avx2", "-O1", *AVX2, *contracting)
    result = compare(driver, *built(objects, "baseline"), contracted)
    assert result.returncode == 1, result.stdout
    assert "differs: avx2 from baseline" in result.stdout
