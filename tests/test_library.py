"""Proves that a CPU target is the one that was asked for, and that a library which is off or missing says why."""

import shutil
from pathlib import Path

import pytest

import rmsnorm
from rmsnorm import _native

USE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, rmsnorm
    for _ in range(3):
        y = rmsnorm.rms_norm(torch.tensor([0.1, 0.1, 0.2, 0.3]), 4, eps=0.0)
        rmsnorm.RMSNorm(4)(torch.ones(2, 4)).sum().backward()
    x = torch.randn(3, 4, dtype=torch.complex64)
    torch.testing.assert_close(rmsnorm.rms_norm(x, 4), torch.nn.functional.rms_norm(x, (4,)))
torch.testing.assert_close(y, torch.tensor([0.5164, 0.5164, 1.0328, 1.5492]), atol=5e-5, rtol=0)
info = rmsnorm.info()
print(len([w for w in caught if "rmsnorm" in str(w.message)]), info.native, info.cpu_target)
print(info.why_not_native)
print(*(f"{w.category.__name__} {w.message}" for w in caught))
"""


def test_unknown_cpu_target(python):
    result = python("import rmsnorm", RMSNORM_CPU_TARGET="avx10")
    assert result.returncode != 0
    assert "ValueError: RMSNORM_CPU_TARGET='avx10' is not a CPU target" in result.stderr
    assert "choose one of avx512, avx2, baseline, or unset it" in result.stderr


@pytest.mark.parametrize("name", _native.KNOWN_TARGETS)
def test_forced_cpu_target(python, name):
    """It is used, or there is an error that lists what this CPU has; never something else in silence."""
    if not rmsnorm.info().native:
        pytest.skip("the native library is off")
    result = python(USE, RMSNORM_CPU_TARGET=name)
    if any(target.startswith(name) for target in _native.cpu_targets()):
        assert result.stdout.startswith(f"0 True {name}"), result.stderr
    else:
        assert f"CPU target {name!r} can't run here: this CPU and this build have avx2, baseline" in result.stderr


def test_native_turned_off(python):
    """On request: silent, and info() remembers that it was a request."""
    result = python(USE, RMSNORM_NATIVE="0")
    assert result.stdout.splitlines()[:2] == ["0 False None", "RMSNORM_NATIVE=0 turned it off"], result.stderr


@pytest.mark.parametrize("broken", [False, True], ids=["missing", "not a library"])
def test_library_that_cannot_be_loaded(python, tmp_path, broken):
    """Everything works, one warning says why not natively, and info() too."""
    package = tmp_path / "rmsnorm"
    shutil.copytree(Path(_native.LIBRARY).parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if broken:
        (package / _native.LIBRARY.name).write_text("not a library")
    result = python(USE, path=tmp_path)
    assert result.returncode == 0, result.stderr
    counted, why, warning = result.stdout.splitlines()
    assert counted == "1 False None"
    assert ("could not be loaded into torch" if broken else "needs a C++20 compiler") in why
    assert warning.startswith("RuntimeWarning rmsnorm runs without its native CPU kernels")
    assert why in warning
