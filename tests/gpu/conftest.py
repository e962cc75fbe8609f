"""Fixtures for the ways to run the GPU's kernels, of which one process has one.

With TRITON_INTERPRET=1 (`make test` starts such a process) kernels run in Triton's interpreter, on numpy. With
RMSNORM_TEST_DEVICE=cuda (or xpu) they run on a GPU, and test_values.py carries each launch there; test_device.py is
for tensors that live there. In both cases the operators have to be without C++ (RMSNORM_NATIVE=0), so that the GPU's
route can be registered for CPU tensors, and the whole corridor is that of a GPU, from the public function to the
launch. With neither, kernels are compiled, for any GPU.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from carried import DEVICE, carried

from rmsnorm import _form, _native
from rmsnorm.gpu import backward, forms, general, heads, launch, neighbours, route, serve

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = ["test_bench_device.py", "test_compiled.py", "test_driver.py", "test_launcher.py", "test_route.py"]
VALUES = ["test_values.py", "test_rare_values.py", "test_sums.py"]
if INTERPRETED:
    collect_ignore = [*COMPILED, "test_device.py"]
elif DEVICE:
    collect_ignore = [*COMPILED, "test_interpreter.py"]
else:
    collect_ignore = [*VALUES, "test_forms.py", "test_neighbours.py", "test_interpreter.py", "test_device.py"]

FORMS = {made.form.name + end for made in _form.registered for end in made.schemas}
ROOMS = forms, general, heads, neighbours
LAUNCHES = {launch: ("forward",), backward: ("backward",), **{room: FORMS & vars(room).keys() for room in ROOMS}}

if INTERPRETED or DEVICE:
    if not _native.why_not():
        raise RuntimeError("these tests need RMSNORM_NATIVE=0: the C++ kernels hold the place of CPU tensors")
    serve.register("CPU")
if INTERPRETED:
    import hardware

    hardware.correct_interpreter()
elif DEVICE:
    torch.use_deterministic_algorithms(True)  # which fills what is empty with NaN


@pytest.fixture
def on_triton(monkeypatch):
    """CPU tensors take a GPU's route, to Triton wherever it has a kernel."""
    monkeypatch.setattr(route, "runs_triton", lambda device: True)
    monkeypatch.setattr(route, "choice", lambda: "triton")
    for room, names in LAUNCHES.items() if DEVICE else ():
        for name in names:
            monkeypatch.setattr(room, name, carried(getattr(room, name)))
    with np.errstate(all="ignore"):  # numpy warns of the overflows that a GPU makes silently
        yield


@pytest.fixture(params=["held", "blocks"])
def form(request, monkeypatch):
    """Rows that stay in registers, and rows in blocks of 128 columns (a program has several) or of 1024: what rows get
    that are wider than 16384, forced upon narrow ones."""
    if request.param == "blocks":
        columns = request.node.callspec.params.get("columns", 0)
        monkeypatch.setattr(launch, "WIDEST", dict.fromkeys(launch.WIDEST, 0))
        monkeypatch.setattr(launch, "LOOP_BLOCK", dict.fromkeys(launch.WIDEST, 128 if columns < 1000 else 1024))
    return request.param


@pytest.fixture
def never_the_definition(monkeypatch):
    """A plain norm that isn't Triton's, but for empty tensors, fails."""

    def unless_empty(default):
        def serve(*arguments):
            assert not arguments[0].numel(), "not served by Triton"
            return default(*arguments)

        return serve

    monkeypatch.setattr(route.reference, "rms_norm", unless_empty(route.reference.rms_norm))
    monkeypatch.setattr(route._ops, "_rms_norm_backward", unless_empty(route._ops._rms_norm_backward))


@pytest.fixture
def nothing_falls_back(monkeypatch):
    """A form that isn't Triton's, but for empty tensors, fails."""
    real = serve._launched

    def launched(form, arguments, keep):
        results = real(form, arguments, keep)
        empty = any(isinstance(t, torch.Tensor) and not t.numel() for t in arguments[:2])
        assert results is not None or empty, f"{form.name} is not served by Triton"
        return results

    monkeypatch.setattr(serve, "_launched", launched)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    import standin

    return standin.StandIn(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def driver(made, monkeypatch):
    """Kernels of no code, for `RMSNORM_CUDA=triton`."""
    import standin

    with standin.standing_in(made, monkeypatch), standin.nothing_compiled(monkeypatch):
        yield made


@pytest.fixture
def never_python(monkeypatch):
    """What C++ hands on fails."""
    reached = []
    monkeypatch.setattr(_native, "telling", lambda: reached.append(1))
    yield
    assert not reached, "C++ handed a call to Python"
