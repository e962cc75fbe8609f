"""Proves that ``install()`` can be done, undone and done by others, refuses by name, and changes nothing before."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from oracle import EPS, gains, same_bits, sample

import rmsnorm
from rmsnorm import _install, _native, install, installed, uninstall

pytestmark = pytest.mark.skipif(
    not _native.cpu_targets(), reason="without the native library there is nothing to install"
)


@pytest.fixture(autouse=True)
def _undone():
    yield
    uninstall()


def runs_on_our_kernels() -> bool:
    """By what autograd records: torch's fused operator where it has a kernel, else the last of its eight operators."""
    x = torch.ones(2, 4, requires_grad=True)
    return type(F.rms_norm(x, (4,))).__name__ == "Tensor" and "FusedRmsNorm" in F.rms_norm(x, (4,)).grad_fn.name()


def test_importing_changes_nothing():
    assert not runs_on_our_kernels()
    assert not rmsnorm.info().installed


def test_install_uninstall_installed():
    install()
    install()
    assert runs_on_our_kernels()
    assert rmsnorm.info().installed
    with installed():
        assert runs_on_our_kernels()
    assert runs_on_our_kernels(), "the context manager leaves what it found"
    uninstall()
    uninstall()
    assert not runs_on_our_kernels()
    with pytest.raises(ZeroDivisionError), installed():
        _ = 1 / 0
    assert not runs_on_our_kernels()
    for _ in range(100):  # each a library object made and destroyed
        with installed():
            pass
    assert not runs_on_our_kernels()


def test_refusals_leave_torch_as_it_was(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(_install._SCHEMAS, "_fused_rms_norm", "aten::_fused_rms_norm(Tensor input) -> Tensor")
        with pytest.raises(RuntimeError, match=r"torch 2.* has aten::_fused_rms_norm\(Tensor input, int\[\]"):
            install()
    with monkeypatch.context() as patch:
        patch.setitem(_install._SCHEMAS, "_no_such_operator", "aten::_no_such_operator() -> ()")
        with pytest.raises(RuntimeError, match="has None, and these kernels are for aten::_no_such_operator"):
            install()
    with monkeypatch.context() as patch:
        patch.setattr(_native, "why_not", lambda: "it rained")
        with pytest.raises(RuntimeError, match="no native kernels: it rained"):
            install()
    other = torch.library.Library("aten", "IMPL")
    other.impl("_fused_rms_norm", lambda *a: None, "CPU")
    try:
        with pytest.raises(RuntimeError, match="another library has a CPU kernel for aten::_fused_rms_norm already"):
            install()
    finally:
        other._destroy()
    assert not runs_on_our_kernels()
    install()
    assert runs_on_our_kernels()


def test_a_recorded_graph_outlives_the_installation():
    x = sample(4, 64, torch.float32).requires_grad_()
    with installed():
        y = F.rms_norm(x, (64,), None, EPS)
        (wanted,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert same_bits(dx, wanted)
    install()  # and the slot of the backward operator, which is still ours, is no reason to refuse


def test_from_many_threads():
    """Installing and running at once, from eight threads."""
    x, weight = sample(8, 129, torch.float32), gains(129, dtype=torch.float32)
    expected = F.rms_norm(x, (129,), weight, EPS)
    wrong = []

    def work() -> None:
        for _ in range(50):
            install()
            if not torch.allclose(F.rms_norm(x, (129,), weight, EPS), expected, rtol=1e-5, atol=1e-6):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert runs_on_our_kernels()


PROBE = """
import sys
import torch
before = 'rmsnorm' in sys.modules
x = torch.ones(2, 4, requires_grad=True)
print(before, torch.nn.functional.rms_norm(x, (4,)).grad_fn.name(), sys.argv[1:])
"""


def test_for_programs_that_do_not_know_us(python, tmp_path):
    """``RMSNORM_INSTALL=1`` and ``python -m rmsnorm run``; nothing of ours is imported without them."""
    assert python(PROBE).stdout.startswith("False MulBackward0"), "torch's composite"
    assert python(PROBE, RMSNORM_INSTALL="0").stdout.startswith("False MulBackward0")
    assert python(PROBE, RMSNORM_INSTALL="1").stdout.startswith("True FusedRmsNormBackward0")
    first = "import rmsnorm; print(rmsnorm.info().installed)"
    assert python(first, RMSNORM_INSTALL="1").stdout.strip() == "True", "whichever import comes first"
    refused = python(PROBE, RMSNORM_INSTALL="1", RMSNORM_NATIVE="0")
    assert refused.stdout.startswith("True MulBackward0")
    assert "RMSNORM_INSTALL=1 asks for it, but" in refused.stderr
    assert "RMSNORM_NATIVE=0 turned it off" in refused.stderr

    script = tmp_path / "script.py"
    script.write_text(PROBE)
    run = "import sys, runpy; sys.argv = ['rmsnorm', 'run', {!r}, '--flag', '3']; "
    run += "runpy.run_module('rmsnorm', run_name='__main__')"
    result = python(run.format(str(script)))
    assert result.stdout.strip() == "True FusedRmsNormBackward0 ['--flag', '3']", result.stderr
    assert python(run.format("missing.py")).returncode == 2
    refused = python(run.format(str(script)), RMSNORM_NATIVE="0")
    assert refused.returncode == 2
    assert "RMSNORM_NATIVE=0 turned it off" in refused.stderr
