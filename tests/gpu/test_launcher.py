"""Proves that C++ launches what Triton's own launcher would, argument by argument, against a stand-in for the driver;
that the current stream, contexts, threads and forks are what torch has; and what happens where something is missing.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from itertools import product

import pytest
import standin
import torch
from launches import LAYOUTS, Call, everything, heads, kinds, sizes
from oracle import EPS
from torch import Tensor

from rmsnorm import _native, _ops
from rmsnorm.gpu import launch, launcher, route

if not _native.gpu_operators() or torch.cuda.is_available():
    pytest.skip("the stand-in takes the place of a driver, and C++ launches", allow_module_level=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return standin.StandIn(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def driver(made, monkeypatch):
    """Kernels of no code, for `RMSNORM_CUDA=triton`."""
    with standin.standing_in(made, monkeypatch), standin.nothing_compiled(monkeypatch):
        yield made


def same(driver, name: str, arguments: tuple, placed: bool = True) -> list:
    """The launches, which Triton and C++ have to agree upon, and upon where the results are in them. ``placed`` is
    False where a result may lie where a copy lay that lived for the first launches alone."""
    given = [t for t in arguments if isinstance(t, Tensor)]
    found = []
    for operator in (standin.in_python(name), standin.in_cpp(name)):
        driver.launches()
        results = operator(*arguments)
        results = [results] if isinstance(results, Tensor) else list(results or ())
        found.append((standin.told(driver.launches(), given, results), results))
    (theirs, before), (ours, after) = found
    assert ours.launches == theirs.launches, name
    assert ours.places == theirs.places or not placed, name
    for one, two in zip(before, after, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (two.shape, two.dtype, two.stride()), name
    return ours.launches


@pytest.fixture
def never_python(monkeypatch):
    """What C++ hands on fails."""
    reached = []
    monkeypatch.setattr(_native, "telling", lambda: reached.append(1))
    yield
    assert not reached, "C++ handed a call to Python"


@pytest.mark.parametrize(("dtype", "layout"), kinds(*LAYOUTS))
def test_launches_are_tritons(driver, never_python, dtype, layout):
    """For every awkward size, each form with and without gains, offset and roundings."""
    launched = 0
    for columns, rows in sizes(layout):
        for gain, offset in ((dtype, 0.0), (None, 0.0), (torch.float32, 1.0)):
            call = Call(layout, rows, columns, dtype, gain)
            for first in (False, True):
                for name, arguments in call.norms(offset, first).items():
                    launched += len(same(driver, name, arguments))
            for needs in ((True, True), (False, True), (True, False)):
                for name, arguments in call.gradients(offset, needs).items():
                    launched += len(same(driver, name, arguments))
    assert launched > 1000


@pytest.mark.parametrize(("dtype", "layout"), kinds(*LAYOUTS))
def test_launches_of_modulated_norms_are_tritons(driver, never_python, dtype, layout):
    """With the mean (LayerNorm) and without, with a residual that is gated, and none; rows share their modulation."""
    for columns, rows in sizes(layout):
        call = Call(layout, rows, columns, dtype, None)
        for layer, each in product((False, True), repeat=2):
            for residual, gated in ((False, False), (True, False), (True, True)):
                for name, arguments in call.modulated(layer, residual, gated, each).items():
                    placed = layout == "plain" or not name.endswith("backward")
                    assert same(driver, name, arguments, placed)


@pytest.mark.parametrize(("dtype", "layout"), kinds(*LAYOUTS))
def test_launches_of_the_other_norms_are_tritons(driver, never_python, dtype, layout):
    """With a bias, of some columns, with a floor; lean gradients; sandwiches, and quantised norms."""
    for columns, rows in sizes(layout):
        for gain, offset in ((dtype, 0.0), (None, 1.0)):
            call = Call(layout, rows, columns, dtype, gain)
            for one, two in product((False, True), repeat=2):
                calls = call.general(one, two, offset, one is two) | call.sandwiches(offset, one, two)
                for name, arguments in calls.items():
                    assert same(driver, name, arguments, layout == "plain" or name != "sandwich_rms_norm_backward")


@pytest.mark.parametrize(("dtype", "layout"), kinds("written", *LAYOUTS))
def test_launches_of_heads_are_tritons(driver, never_python, dtype, layout):
    for columns, batch in product((16, 24, 64, 127, 128, 576), (1, 3)):
        for first, interleaved in product((False, True), repeat=2):
            for name, arguments in heads(layout, dtype, columns, batch, first, interleaved).items():
                assert same(driver, name, arguments, layout == "written")


@pytest.mark.parametrize("dims", [1, 2])
def test_a_weight_of_several_rows_and_several_dimensions(driver, never_python, dims):
    x, grad = torch.zeros(5, 4, 3, 64), torch.zeros(5, 4, 3, 64)
    weight, rstd = torch.zeros(4, 3, 64), torch.ones(5, 4, *[1] * dims) if dims == 2 else torch.ones(5, 4, 3, 1)
    (forward,) = same(driver, "rms_norm", (x, weight, dims, EPS, 0.0, False))
    assert forward.grid[1] == (12 if dims == 1 else 4)
    assert len(same(driver, "rms_norm_backward", (grad, None, x, rstd, weight, dims, EPS, 0.0, True, True))) == 2


def test_rows_wider_than_registers(driver, never_python):
    """In all of the tables of tiles, and the widths beside their bounds."""
    for dtype, columns in product((torch.bfloat16, torch.float64), (8193, 16384, 16385, 40000)):
        call = Call("plain", 3, columns, dtype, dtype)
        for name, arguments in everything(call).items():
            assert same(driver, name, arguments)


def test_beyond_32_bits(driver, never_python, tmp_path):
    """Rows that one number tells, and a stride: of a tensor that is expanded, and one in a file without data."""
    x, grad, gate = torch.zeros(16), torch.zeros(16), torch.zeros(1, 16)
    rows = 2**31 + 8
    launches = same(driver, "gated_add_backward", (grad.expand(rows, 16), x.expand(rows, 16), gate, False, True))
    assert (rows, 8) in launches[0].arguments
    apart = 2**31 + 16
    flat = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * apart, dtype=torch.bfloat16)
    (one,) = same(driver, "rms_norm", (flat.view(2, apart)[:, :64], None, 1, EPS, 0.0, False))
    assert (apart, 8) in one.arguments


def test_nothing_is_launched_for_nothing(driver):
    for shape in ((0, 64), (3, 0)):
        x, weight = torch.zeros(shape), torch.zeros(shape[1])
        assert same(driver, "rms_norm", (x, weight, 1, EPS, 0.0, False)) == []
        assert same(driver, "add_rms_norm", (x, x, weight, 1, EPS, 0.0, False)) == []
    x = torch.zeros(3, 64)
    arguments = (x, None, x, torch.ones(3, 1), None, 1, EPS, 0.0, False, True)
    assert same(driver, "rms_norm_backward", arguments) == []


def test_into_an_output(driver, never_python):
    """Where that lies as the kernel writes; else a copy, which Python makes."""
    x, weight, out = torch.zeros(3, 64), torch.zeros(64), torch.ones(3, 64)
    standin.in_cpp("rms_norm_out")(x, weight, 1, EPS, 0.0, False, out)
    (one,) = standin.told(driver.launches(), [x, weight, out], []).launches
    assert one.arguments[:3] == ("input 0", (64, 4), "input 1")
    assert one.arguments[3] == "input 2"
    standin.in_cpp("rms_norm_weighted_out")(x, weight, EPS, out)
    assert standin.told(driver.launches(), [x, weight, out], []).launches == [one]


@pytest.mark.parametrize("round_sum", [False, True])
def test_in_place(driver, never_python, round_sum):
    x, residual, weight = torch.zeros(3, 64, dtype=torch.bfloat16), torch.zeros(3, 64), torch.zeros(64)
    (one,) = same(driver, "add_rms_norm_", (x, residual, weight, 1, EPS, 0.0, False, round_sum))
    assert one.arguments[:7] == ("input 0", (64, 4), "input 1", (64, 4), "input 2", "input 0", "input 1")


def test_the_everyday_names(driver, never_python):
    """Operators of fewer arguments are the others, without a way through Python."""
    x, weight = torch.zeros(3, 64), torch.zeros(64)
    for added, first in product((False, True), repeat=2):
        name = ("add_" if added else "") + "rms_norm"
        given = (x, torch.zeros(3, 64)) if added else (x,)
        arguments = (*given, weight, 1, EPS, 0.0, first)
        wanted = same(driver, name, arguments)
        standin.in_cpp(name + ("_rounded" if first else "_weighted"))(*given, weight, EPS)
        assert standin.told(driver.launches(), [*given, weight], []).launches == wanted


def test_code_that_was_compiled(made, monkeypatch):
    """The kernels themselves, for sm_90: the bytes of their parameters are what the code says, and as many as C++ hands
    over."""
    with standin.standing_in(made, monkeypatch):
        call = Call("plain", 3, 576, torch.bfloat16, torch.bfloat16)
        forward = same(made, "rms_norm_forward", call.norms(0.0, False)["rms_norm_forward"])
        backward = same(made, "rms_norm_backward", call.gradients(0.0, (True, True))["rms_norm_backward"])
        gated = same(made, "gated_rms_norm", call.norms(0.0, True)["gated_rms_norm"])
    assert [one.name for one in forward + backward + gated] == ["forward", "backward", "fold", "forward"]
    # x and its stride, the weight, y, 1/rms, rows, columns, part, eps, and two that Triton adds.
    sizes = [argument[1] if isinstance(argument, tuple) else 8 for argument in forward[0].arguments]
    assert sizes == [8, 4, 8, 8, 8, 4, 4, 8, 8, 8, 8]
    assert forward[0].block == (64, 1, 1)


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


def framed(call):
    """How many frames of the package a call enters, and what it returns."""
    entered = []
    home = os.path.dirname(_ops.__file__)
    sys.setprofile(lambda frame, event, _: entered.append(1) if frame.f_code.co_filename.startswith(home) else None)
    try:
        result = call()
    finally:
        sys.setprofile(None)
    return len(entered), result


def every_event(profile):
    """Also those within an operator, which ``events()`` adds up."""
    return profile.profiler.kineto_results.events()


def test_a_later_call_enters_no_python(driver):
    """And asks torch for memory alone: for each result, each sum over rows, and the means of wide rows (not here). The
    results are all that is left. The first calls show that frames are counted."""
    met = 0
    for name, arguments in everything(Call("plain", 3, 576, torch.bfloat16, torch.bfloat16)).items():
        operator = standin.in_cpp(name)
        met += framed(lambda op=operator, given=arguments: op(*given))[0]
        frames, _ = framed(lambda op=operator, given=arguments: op(*given))
        assert frames == 0, name
        with torch.profiler.profile(profile_memory=True) as profile:
            kept = operator(*arguments)
        results = [kept] if isinstance(kept, Tensor) else kept
        taken = sum(event.cpu_memory_usage for event in profile.events() if event.name.startswith("rmsnorm::"))
        assert taken == sum(t.nbytes for t in results), name
        rooms = sum(event.name() == "[memory]" and event.nbytes() > 0 for event in every_event(profile))
        folded = sum(one.name == "fold" for one in driver.launches()) // 3
        assert rooms == sum(t.nbytes > 0 for t in results) + folded, name
        asked = {event.name for event in profile.events() if event.name.startswith("aten::")}
        assert asked <= {"aten::transpose", "aten::as_strided"}, name  # of heads
    assert met > 0
