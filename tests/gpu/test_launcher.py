"""Proves that C++ launches what Triton's own launcher would, argument by argument, against a stand-in for the driver;
and that it enters no Python for it, and asks torch for no memory but that of the results and of sums over rows.
"""

from __future__ import annotations

from itertools import product

import pytest
import standin
import torch
from launches import LAYOUTS, Call, everything, heads, kinds, sizes
from oracle import EPS
from standin import framed, same
from torch import Tensor

from rmsnorm import _native

if not _native.gpu_operators() or torch.cuda.is_available():
    pytest.skip("the stand-in takes the place of a driver, and C++ launches", allow_module_level=True)


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
