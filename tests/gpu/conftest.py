"""Fixtures for Triton's two ways to work without a GPU, which exclude each other in one process.

With TRITON_INTERPRET=1 (`make test` starts such a process) kernels run in Triton's interpreter, on numpy. Then the
operators have to be without C++ (RMSNORM_NATIVE=0), so that the GPU's route can be registered for CPU tensors, and the
whole corridor is that of a GPU, from the public function to the launch. Without it, kernels are compiled, for any GPU.
"""

from __future__ import annotations

import os

import numpy as np
import pytest

from rmsnorm import _gpu, _native

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = (
    ["test_bench_device.py", "test_compiled.py", "test_route.py"] if INTERPRETED else ["test_interpreted.py"]
)

if INTERPRETED:
    if not _native.why_not():
        raise RuntimeError("TRITON_INTERPRET=1 needs RMSNORM_NATIVE=0: the C++ kernels hold the place of CPU tensors")
    import hardware

    hardware.correct_interpreter()
    _gpu.register("CPU")


@pytest.fixture
def on_triton(monkeypatch):
    """CPU tensors take a GPU's route, to Triton wherever it has a kernel."""
    monkeypatch.setattr(_gpu, "runs_triton", lambda device: True)
    monkeypatch.setattr(_gpu, "choice", lambda: "triton")
    with np.errstate(all="ignore"):  # numpy warns of the overflows that a GPU makes silently
        yield
