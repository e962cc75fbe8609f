"""Proves that a call from C++ treats the driver as torch does: the current stream, contexts, captures, threads, forks;
and what happens where a launch fails, or a part is missing: one error, or one warning and another way.
"""

from __future__ import annotations

import os
import threading
import warnings

import pytest
import standin
import torch
from launches import Call, everything
from oracle import EPS
from standin import framed, same

from rmsnorm import _native
from rmsnorm.gpu import launch, launcher, route

if not _native.gpu_operators() or torch.cuda.is_available():
    pytest.skip("the stand-in takes the place of a driver, and C++ launches", allow_module_level=True)


def test_the_current_stream(driver):
    x = torch.zeros(3, 64)
    for stream in (0x57, 0xABC, 0):
        driver.stream(stream)
        (one,) = same(driver, "rms_norm", (x, None, 1, EPS, 0.0, False))
        assert one.stream == stream


def test_the_context_of_a_kernel_is_current_while_it_is_launched(driver):
    x = torch.zeros(3, 64)
    call = standin.in_cpp("rms_norm")
    call(x, None, 1, EPS, 0.0, False)
    before = driver.library.standin_pushed()
    call(x, None, 1, EPS, 0.0, False)
    assert driver.library.standin_pushed() == before, "it was current"
    driver.context(0xEE)  # of another device
    call(x, None, 1, EPS, 0.0, False)
    assert [one.context for one in driver.launches()] == [0xC0] * 3
    assert driver.library.standin_pushed() == before + 1


def test_a_captured_call(driver):
    """Asks the driver for launches alone: nothing waits, no memory is the driver's, and no stream is the legacy one,
    which the stand-in refuses then."""
    for name, arguments in everything(Call("plain", 3, 576, torch.bfloat16, torch.bfloat16)).items():
        operator = standin.in_cpp(name)
        operator(*arguments)
        driver.launches(), driver.called()
        driver.capture(1)
        operator(*arguments)
        driver.capture(0)
        launched = driver.launches()
        each = ["aoti_torch_get_current_cuda_stream", "cuCtxGetCurrent", "cuLaunchKernel"]
        assert driver.called() == each * len(launched), name
        assert {one.stream for one in launched} == {0x57}, name


def test_the_first_call_in_a_capture(driver):
    """Loads its kernel, where the driver lets a thread do that which asks for it; then the thread may no more than
    before."""
    x = torch.zeros(3, 64)
    driver.capture(1)
    standin.in_cpp("rms_norm")(x, None, 1, EPS, 0.0, False)
    assert len(driver.launches()) == 1
    assert driver.library.standin_capture_mode() == 0
    driver.called()
    standin.in_cpp("rms_norm")(x, None, 1, EPS, 0.0, False)
    assert "cuModuleLoadData" not in driver.called()


def test_the_first_call_in_an_older_drivers_capture(driver):
    """An error that says what to do; a call after the capture loads the kernel, and later ones enter no Python."""
    x, call = torch.zeros(3, 64), standin.in_cpp("rms_norm")
    driver.capture(2)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"not permitted when stream is capturing.* Call rmsnorm once before"):
            call(x, None, 1, EPS, 0.0, False)
    assert driver.launches() == []
    driver.capture(0)
    call(x, None, 1, EPS, 0.0, False)
    frames, _ = framed(lambda: call(x, None, 1, EPS, 0.0, False))
    assert (frames, len(driver.launches())) == (0, 2)


def test_threads(driver):
    """Each has no context at first; none compiles what another has."""
    x, done = torch.zeros(3, 64), []
    call = standin.in_cpp("rms_norm")
    call(x, None, 1, EPS, 0.0, False)

    def work():
        for _ in range(200):
            call(x, None, 1, EPS, 0.0, False)
        done.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 4
    assert {one.context for one in driver.launches()} == {0xC0}


def test_a_forked_process(driver):
    """Has no driver: an error as torch's, and not a launch with the other's handles."""
    x = torch.zeros(3, 64)
    call = standin.in_cpp("rms_norm")
    call(x, None, 1, EPS, 0.0, False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            call(x, None, 1, EPS, 0.0, False)
            os._exit(1)
        except RuntimeError as error:
            os._exit(0 if "forked" in str(error) and "spawn" in str(error) else 2)
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    call(x, None, 1, EPS, 0.0, False)


def test_a_launch_that_fails(driver):
    x = torch.zeros(3, 64)
    call = standin.in_cpp("rms_norm")
    call(x, None, 1, EPS, 0.0, False)
    driver.fail(719)
    words = (
        r"did not launch the kernel forward on device 0: unspecified launch failure \(719\); grid 1 x 1 x 1, block 64"
    )
    with pytest.raises(RuntimeError, match=words):
        call(x, None, 1, EPS, 0.0, False)
    driver.fail(0)
    call(x, None, 1, EPS, 0.0, False)


def test_a_kernel_that_triton_has_to_launch(driver, monkeypatch):
    """One that needs scratch, or a cluster; and one that can't be compiled: Python does it, and says what is wrong."""
    x = torch.zeros(3, 64)
    monkeypatch.setattr(launcher, "_is_plain", lambda metadata: False)
    standin.in_cpp("rms_norm")(x, None, 1, EPS, 0.0, False)
    assert len(driver.launches()) == 1

    asked = []

    def broken(*arguments, **options):
        asked.append(arguments)
        raise NotImplementedError("no such kernel")

    with monkeypatch.context() as patch:
        patch.setattr(launcher, "kernels", broken)
        patch.setattr(launch, "_launch", broken)
        for _ in range(2):
            with pytest.raises(NotImplementedError, match="no such kernel"):
                standin.in_cpp("rms_norm")(torch.zeros(3, 128), None, 1, EPS, 0.0, False)
        assert [len(arguments) for arguments in asked] == [0, 5, 5], "it is asked for once, then Python launches"


def test_errors_are_pythons(driver):
    x = torch.zeros(3, 64)
    with pytest.raises(RuntimeError, match="don't fit, or are of no floating type"):
        standin.in_cpp("rms_norm")(x, torch.zeros(65), 1, EPS, 0.0, False)


@pytest.mark.parametrize("missing", ["driver", "function", "torch"])
def test_where_something_is_missing(made, driver, monkeypatch, tmp_path, missing):
    """One warning, and Python launches, as before."""
    old = standin.built(tmp_path, "-DSTANDIN_OLD", name="libcuda.so.0")
    monkeypatch.setattr(launcher, "TORCH" if missing == "torch" else "DRIVER", "libnowhere.so.1")
    if missing == "function":
        monkeypatch.setattr(launcher, "DRIVER", str(old))
    monkeypatch.setattr(launcher, "_asked", set())
    _native.gpu_serve(0, launcher.PYTHON)
    x = torch.zeros(3, 64)
    words = "through Python, which takes longer: .*" + (
        "cuLaunchKernel" if missing == "function" else "libnowhere.so.1"
    )
    with pytest.warns(RuntimeWarning, match=words):
        standin.in_cpp("rms_norm")(x, None, 1, EPS, 0.0, False)
    standin.in_cpp("rms_norm")(x, None, 1, EPS, 0.0, False)
    assert len(driver.launches()) == 2


def test_torch_first(made, monkeypatch):
    """The default: what torch's fused kernel means is torch's, without a frame of ours; the rest is launched."""
    with standin.standing_in(made, monkeypatch, "torch"), standin.nothing_compiled(monkeypatch):
        x, weight = torch.randn(3, 64), torch.randn(64)
        frames, y = framed(lambda: standin.in_cpp("rms_norm")(x, weight, 1, EPS, 0.0, False))
        assert (frames, made.launches()) == (0, [])
        torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (64,), weight, EPS))
        assert len(same(made, "add_rms_norm", (x, x.clone(), weight, 1, EPS, 0.0, False))) == 1
        assert len(same(made, "rms_norm", (x, weight, 1, EPS, 1.0, False))) == 1


def test_without_triton(made, monkeypatch):
    """torch serves what it can without a frame of ours, the definition the rest, and nobody looks for a driver."""
    with standin.standing_in(made, monkeypatch), standin.nothing_compiled(monkeypatch):
        monkeypatch.setattr(route, "runs_triton", lambda device: False)
        monkeypatch.setattr(launcher, "_asked", set())
        monkeypatch.setattr(_native, "gpu_open", None)
        x, weight = torch.randn(3, 64), torch.randn(64)
        call = standin.in_cpp("rms_norm")
        _native.gpu_serve(0, launcher.PYTHON)
        assert framed(lambda: call(x, weight, 1, EPS, 0.0, False))[0] > 0
        frames, y = framed(lambda: call(x, weight, 1, EPS, 0.0, False))
        assert frames == 0
        torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (64,), weight, EPS))
        y = call(x, weight, 1, EPS, 1.0, False)
        torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (64,), weight + 1, EPS))
        assert made.launches() == []
