"""Proves that bad input gets one clear error with the shapes and the fix, and that a missing library says why."""

import re
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch

import rmsnorm
from rmsnorm import _gpu, _native, _ops, add_rms_norm, rms_norm

X = torch.ones(2, 3, 5)


@pytest.mark.parametrize("function", [rms_norm, lambda x, shape, *rest: add_rms_norm(x, x, shape, *rest)])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, 4), "Given normalized_shape=[4], expected input with shape [*, 4], but got input of size [2, 3, 5]"),
        ((X, (3, 4)), "expected input with shape [*, 3, 4], but got input of size [2, 3, 5]; normalized_shape must be"),
        ((X, (1, 2, 3, 5)), "Given normalized_shape=[1, 2, 3, 5]"),
        ((X, ()), "Expected normalized_shape to be at least 1-dimensional, but got []"),
        ((torch.tensor(1.0), 1), "but got input of size []"),
        ((X, 5, torch.ones(4)), "weight of shape [4] and normalized_shape = [5]; reshape the weight to [5]"),
        ((X, 5, torch.ones(1, 5)), "weight of shape [1, 5] and normalized_shape = [5]"),
        ((X.int(), 5), "input must be of a floating or complex type, but is torch.int32 (shape [2, 3, 5])"),
        ((X, 5, torch.ones(5).long()), "weight must be of a floating or complex type, but is torch.int64 (shape [5])"),
        ((X, 5, torch.ones(5, device="meta")), "input is on cpu and weight on meta; move one of them"),
    ],
)
def test_arguments_that_do_not_fit(function, arguments, message):
    with pytest.raises(RuntimeError, match=re.escape(message)):
        function(*arguments)


@pytest.mark.parametrize(
    "call",
    [
        lambda: rms_norm(X, 5, casting_mode="gemma"),
        lambda: add_rms_norm(X, X, 5, casting_mode="gemma"),
        lambda: rmsnorm.RMSNorm(5, casting_mode="gemma"),
    ],
)
def test_unknown_casting_mode(call):
    with pytest.raises(ValueError, match=re.escape("unknown casting_mode 'gemma'; choose one of 'torch', 'llama'")):
        call()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.empty(2, 5), "out must have shape [2, 3, 5], dtype torch.float32 and device cpu, but has shape [2, 5]"),
        (torch.empty(2, 3, 5, dtype=torch.bfloat16), "but has shape [2, 3, 5], dtype torch.bfloat16"),
        (torch.empty(2, 3, 5, device="meta"), "dtype torch.float32 and device meta"),
        (torch.empty(2, 3, 5, requires_grad=True), "out= does not support automatic differentiation"),
    ],
)
def test_out_that_does_not_fit(out, message):
    before = out.detach().clone()
    for weight in (None, torch.ones(5)):  # operators of their own
        with pytest.raises(RuntimeError, match=re.escape(message)):
            rms_norm(X, 5, weight, out=out)
    if out.device.type == "cpu":
        assert torch.equal(out.detach().view(torch.uint8), before.view(torch.uint8)), "out was written to"


@pytest.mark.parametrize(
    "out",
    [torch.ones(2, 5), torch.ones(2, 3, 5).double(), torch.ones(5).expand(2, 3, 5)],
    ids=["shape", "dtype", "expanded"],
)
def test_operators_check_out_themselves(out):
    """An everyday call leaves that to them, and they write nowhere but where a result belongs."""
    whole = 1, 1e-6, 0.0, False
    for operator, arguments in (
        (_ops.rms_norm_out, whole),
        (_ops.rms_norm_weighted_out, (1e-6,)),
        (_ops._rms_norm_out, whole),  # other devices' default
        (_gpu.rms_norm_out, whole),
    ):
        with pytest.raises(RuntimeError, match="out must be on the device of input, of its shape and the dtype of the"):
            operator(2 * X, torch.ones(5), *arguments, out)
    assert (out == 1).all()


@pytest.mark.parametrize("which", ["input", "weight"])
def test_out_with_gradients(which):
    x, weight = X.clone().requires_grad_(which == "input"), torch.ones(5, requires_grad=which == "weight")
    out = torch.empty_like(X)
    with pytest.raises(RuntimeError, match=r"drop out=, or call it under torch\.no_grad"):
        rms_norm(x, 5, weight, out=out)
    with torch.no_grad():
        assert rms_norm(x, 5, weight, out=out) is out


def test_out_that_overlaps(target):
    """An ``out`` that is its own neighbour is refused; one that overlaps the input is refused or right, as in torch."""
    for place, weight in product((torch.zeros(5), torch.zeros(1)), (None, torch.ones(5))):
        with pytest.raises(RuntimeError, match=r"single memory location|overlap"):
            rms_norm(X, 5, weight, out=place.expand(2, 3, 5))
    for shift in (1, 5):
        buffer = torch.linspace(-3, 2, 30 + shift)
        x, out = buffer[:-shift].view(6, 5), buffer[shift:].view(6, 5)
        expected = rms_norm(x.clone(), 5)
        try:
            rms_norm(x, 5, out=out)
        except RuntimeError as refusal:
            if "overlap" not in str(refusal):
                raise
        else:
            assert torch.equal(out, expected), f"out is the input shifted by {shift}"


@pytest.mark.parametrize("residual", [torch.ones(5), torch.ones(2, 3, 1), torch.ones(2, 3, 5, device="meta")])
def test_residual_of_another_shape_or_device(residual):
    message = f"residual must have the shape and device of input, (2, 3, 5) on cpu, but is {tuple(residual.shape)} on "
    with pytest.raises(RuntimeError, match=re.escape(message)):
        add_rms_norm(X, residual, 5)


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
