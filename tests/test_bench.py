"""What is measured and how: grids, contenders, the check before the clock, the clock, bytes, processes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")

import torch
import torch.nn.functional as F
from torch import Tensor

from rmsnorm.bench import bars, cases, contenders, memory, neighbourhoods, race, results, timing, worker
from rmsnorm.bench.cases import Case
from rmsnorm.bench.contenders import BY_NAME, FLOOR, OURS, TORCH, Contender

HERE = {"PYTHONPATH": str(Path(__file__).parent)}  # so that another process finds the functions of this file


def test_all_is_the_table_that_was_asked_for() -> None:
    """Forward, fresh and warm, and backward, at these shapes, in both types."""
    shapes = [(1, 4096), (16, 4096), (512, 4096), (2048, 576), (32768, 128), (4096, 4096)]
    preset = cases.PRESETS["all"]
    grid = cases.grid(preset.shapes, preset.dtypes, preset.directions, preset.memories, [1, 2])
    tasks = [("forward", "fresh"), ("forward", "warm"), ("backward", "fresh")]
    expected = [
        Case(*shape, dtype, *task, threads)
        for threads, shape, dtype, task in product([1, 2], shapes, ["float32", "bfloat16"], tasks)
    ]
    assert grid == expected
    asked = {"F.rms_norm", "torch.compile", "F.layer_norm", "rmsnorm.layer_norm", "transformers", "onnxruntime"}
    asked |= {"jax", "openvino", "mlx", "zentorch", "vllm", "copy_", "rmsnorm"}
    assert asked == {one.name for one in contenders.named(preset.against)}


@pytest.mark.parametrize("name", cases.PRESETS)
def test_presets_are_cases_that_ours_can_do(name: str) -> None:
    preset = cases.PRESETS[name]
    grid = cases.grid(preset.shapes, preset.dtypes, preset.directions, preset.memories)
    assert grid
    assert len(set(grid)) == len(grid)
    assert {case.task for case in grid} <= OURS.tasks.keys()
    assert {case.dtype for case in grid} <= cases.DTYPES.keys()
    assert all(case.tensor_bytes <= (2**29 if name == "gpu" else 2**27) for case in grid)
    assert contenders.named(preset.against)[0] is OURS


def test_a_group_and_a_member_of_it_are_raced_once() -> None:
    names = [one.name for one in contenders.named("F.rms_norm,torch,mlx")]
    assert names == ["rmsnorm", "F.rms_norm", "torch.compile", "F.layer_norm", "mlx", "copy_"]


@pytest.mark.parametrize(
    ("direction", "memory", "gigabytes"),
    [("forward", "fresh", 8.0), ("forward", "warm", 8.0), ("backward", "fresh", 12.0), ("add", "fresh", 16.0)],
)
def test_gigabytes_per_second_by_hand(direction: str, memory: str, gigabytes: float) -> None:
    """A tensor of 1000 × 1000 float32 has 4 MB. In 1 ms forward moves 2 of them, backward 3, add + norm 4: 8, 12 and 16
    GB/s. The copy moves 2 in 0.5 ms, always: 16 GB/s."""
    case = Case(1000, 1000, "float32", direction, memory)
    timings = {
        "rmsnorm": timing.Timing((1e-3, 1e-3, 3e-3), 1),
        "other": timing.Timing((4e-3, 2e-3, 4e-3), 1),
        "copy_": timing.Timing((5e-4, 5e-4, 5e-4), 1),
    }
    lines = results.lines(case, timings, ["rmsnorm", "other"])
    assert lines["rmsnorm"].gb_per_s == pytest.approx(gigabytes)
    assert lines["rmsnorm"].share_of_copy == pytest.approx(gigabytes / 16)
    assert lines["copy_"].gb_per_s == pytest.approx(16)
    assert lines["copy_"].share_of_copy == 1.0
    assert (lines["other"].median_s, lines["other"].min_s) == (4e-3, 2e-3)
    assert lines["other"].ours_over_this == pytest.approx(0.5)  # the median of 1/4, 1/2 and 3/4
    assert lines["other"].ours_over_this_min == pytest.approx(0.5)  # 1 ms ÷ 2 ms
    result = results.Result(case, lines)
    assert result.rivals() == {"other": pytest.approx(0.5)}
    assert results.first([result])[:2] == (1, 1)


def _wrong(*, may_fail: bool = False) -> Contender:
    return Contender("wrong", contenders.of(lambda p: lambda *given: 1.01 * F.rms_norm(*given)), may_fail=may_fail)


@pytest.mark.parametrize("direction", ["forward", "backward", "add", "recorded"])
def test_contenders_that_disagree_are_not_timed(direction: str) -> None:
    case = Case(4, 8, "float32", direction)
    with pytest.raises(ArithmeticError, match=f"wrong and F.rms_norm disagree at 4×8 float32 {direction}"):
        race.race(case, [OURS, _wrong()], 0.01)
    found = race.race(case, [OURS, _wrong(may_fail=True), FLOOR], 0.01)
    assert list(found.contenders) == ["rmsnorm", "copy_"]
    assert "wrong and F.rms_norm disagree" in found.skipped["wrong"]


def test_a_warm_race_writes_to_the_memory_that_is_given() -> None:
    p = contenders.Problem(Case(3, 64, "float32", "forward", "warm"))
    output = OURS.tasks["warm"](p)()
    assert output is p.out
    torch.testing.assert_close(p.out, F.rms_norm(p.x, (64,), p.weight, contenders.EPS))


def test_a_contender_that_cant_run_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax", None)

    def fail(p: contenders.Problem) -> Any:
        raise RuntimeError("no compiler\nand much more")

    entered = [OURS, BY_NAME["jax"], Contender("torch.compile", {"forward": fail}, may_fail=True)]
    found = race.race(Case(1, 8, "float32"), entered, 0.01)
    assert found.skipped["torch.compile"] == "no compiler"
    assert "jax" in found.skipped["jax"]


@pytest.mark.parametrize("task", [("forward", "fresh"), ("forward", "warm"), ("backward", "fresh"), ("add", "fresh")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.filterwarnings("ignore")  # theirs
def test_other_libraries_agree_or_say_why_not(dtype: str, task: tuple[str, str]) -> None:
    """race() leaves out those that disagree. Not all are installed where this runs; these two are, for other tests."""
    case = Case(3, 64, dtype, *task)
    found = race.race(case, [OURS, *contenders.PEERS], 0.01)
    known = {one.name for one in contenders.PEERS if case.task in one.tasks or case.task in one.lacks} | {"rmsnorm"}
    assert known == found.contenders.keys() | found.skipped.keys()
    assert not [why for why in found.skipped.values() if "disagree" in why or not why]
    assert all(found.skipped[one.name] == why for one in contenders.PEERS if (why := one.lacks.get(case.task)))
    if case.task != "warm":
        assert {"rmsnorm.layer_norm", "transformers"} <= found.contenders.keys()
    if task[0] == "forward":
        assert "onnxruntime" in found.contenders


def test_timing_takes_turns_and_survives_outliers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of our own: one costs three times the other, and a fifth of the time both are ten times slower."""
    now, calls = 0.0, 0

    def spend(seconds: float) -> None:
        nonlocal now, calls
        calls += 1
        now += seconds * (10 if calls % 997 > 800 else 1)

    monkeypatch.setattr(timing, "perf_counter", lambda: now)
    timings = timing.measure({"fast": lambda: spend(1e-5), "slow": lambda: spend(3e-5)}, 0.5)
    fast, slow = timings["fast"], timings["slow"]
    assert len(fast.seconds) == len(slow.seconds) >= timing.FEWEST_ROUNDS
    assert fast.calls * 1e-5 >= timing.SHORTEST_SAMPLE
    assert slow.median == pytest.approx(3e-5)
    assert slow.fastest == pytest.approx(3e-5)
    assert fast.ratio(slow) == pytest.approx(1 / 3)
    assert slow.ratio(fast) == pytest.approx(3)


def test_timing_enters_what_a_contender_runs_inside_of() -> None:
    """And only for that one: this is how install() is measured against torch without it, in one run."""
    inside = False

    @contextmanager
    def around() -> Iterator[None]:
        nonlocal inside
        inside = True
        yield
        inside = False

    seen: dict[str, set[bool]] = {"in": set(), "out": set()}
    timing.measure({name: lambda name=name: seen[name].add(inside) for name in seen}, 0.01, {"in": around})
    assert seen == {"in": {True}, "out": {False}}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [((3.14159e-6,), "3.14 µs"), ((5e-8,), "0.05 µs"), ((0.0273,), "27.3 ms"), ((9.28e-4, 1.001e-3), "928–1001 µs")],
)
def test_times_are_written_with_three_digits(seconds: tuple[float, ...], text: str) -> None:
    assert timing.human(*seconds) == text


def threads_and_pid() -> Iterator[tuple[int, int]]:
    yield torch.get_num_threads(), os.getpid()


def peaks() -> Iterator[int]:
    x = torch.ones(2**21)  # 8 MiB
    memory.peak(x[:1024].exp)
    yield memory.peak(lambda: x.exp().exp_())
    yield memory.peak(lambda: (x.exp(), x.exp(), x.exp()))
    yield memory.peak(lambda: None)


def die() -> Iterator[None]:
    yield None
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> Iterator[None]:
    yield None
    raise ValueError("of the last line")


def disagree() -> Iterator[None]:
    yield None
    raise ArithmeticError("they disagree")


def test_a_thread_count_has_a_process_of_its_own() -> None:
    import test_bench

    ((count, pid),) = worker.apart(1, test_bench.threads_and_pid, variables=HERE)
    assert count == 1  # which torch takes by itself on one core only
    assert pid != os.getpid()


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("die", RuntimeError, "ended with signal SIGKILL: it said nothing"),
        ("fail", RuntimeError, "ended with status 1: ValueError: of the last line"),
        ("disagree", ArithmeticError, "they disagree"),
    ],
)
def test_what_was_measured_comes_before_the_end_of_its_process(name: str, error: type[Exception], text: str) -> None:
    import test_bench

    items = worker.apart(1, getattr(test_bench, name), variables=HERE)
    assert next(items) is None
    with pytest.raises(error, match=text):
        next(items)


def test_peak_memory_of_known_functions() -> None:
    """One output of 8 MiB, then three at once, then none; the kernel counts late by up to 0.3 MiB."""
    import test_bench

    found = [peak / 2**20 for peak in worker.apart(1, test_bench.peaks, variables={**memory.MALLOC, **HERE})]
    assert found == pytest.approx([8, 24, 0], abs=0.5)


def _kept(function: Any, *given: Tensor) -> list[tuple[int, str]]:
    return memory.kept(lambda: function(*given), given)


def test_what_autograd_keeps_of_known_functions() -> None:
    """A product keeps its factors, which were given; exp keeps its output, and so does the exp of that."""
    x, y = torch.ones(5, 7, requires_grad=True), torch.ones(5, 7, requires_grad=True)
    assert _kept(torch.mul, x, y) == []
    assert _kept(torch.exp, x) == [(5 * 7 * 4, "float32[5, 7]")]
    assert _kept(lambda x: x.exp().exp(), x) == [(5 * 7 * 4, "float32[5, 7]")] * 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ours_keeps_one_number_per_row(dtype: str) -> None:
    """But of a row or a few none."""
    found = memory.footprint(OURS, Case(72, 512, dtype, "recorded"))
    assert (found.kept_bytes, found.kept) == (72 * 4, ["float32[72, 1]"])
    found = memory.footprint(OURS, Case(24, 512, dtype, "recorded"))
    assert (found.kept_bytes, found.kept) == (0, [])
    theirs = memory.footprint(TORCH[0], Case(24, 512, dtype, "recorded"))
    assert theirs.kept_bytes >= 24 * 512 * 4


def test_the_contract_is_complete() -> None:
    """The agreement's table, typed again: (rows, cols, dtype, direction, memory) → who ÷ whom ≤ how much."""
    both = ("float32", "bfloat16")
    expected: dict[tuple[Any, ...], float] = {
        (1, 4096, "float32", "forward", "fresh", "rmsnorm", "F.layer_norm, no bias"): 1.0,
        (1, 4096, "float32", "forward", "fresh", "rmsnorm", "F.rms_norm"): 0.4,
        (1, 4096, "float32", "forward", "fresh", "rmsnorm.RMSNorm", "nn.RMSNorm"): 0.5,
        (1, 4096, "float32", "recorded", "fresh", "rmsnorm.RMSNorm", "F.rms_norm"): 0.8,
        (1, 4096, "float32", "forward", "fresh", "nn.RMSNorm, installed", "nn.RMSNorm"): 0.55,
        (1, 4096, "float32", "recorded", "fresh", "nn.RMSNorm, installed", "nn.RMSNorm"): 0.55,
        (8192, 4096, "float32", "forward", "fresh", "rmsnorm", "torch.neg"): 0.35,
        (8192, 4096, "float32", "forward", "fresh", "rmsnorm", "F.rms_norm"): 0.12,
        (32768, 128, "float32", "forward", "warm", "rmsnorm", "copy_"): 1.4,
        (32768, 128, "bfloat16", "forward", "warm", "rmsnorm", "copy_"): 2.0,
    }
    for dtype in both:
        for other, bound in (("copy_", 1.6), ("F.rms_norm", 0.35), ("torch.compile", 0.75)):
            expected[512, 4096, dtype, "forward", "fresh", "rmsnorm", other] = bound
        for other, bound in (("F.rms_norm", 0.15), ("torch.compile", 0.7), ("F.layer_norm", 0.9)):
            expected[512, 4096, dtype, "backward", "fresh", "rmsnorm", other] = bound
        expected[8192, 4096, dtype, "forward", "warm", "rmsnorm", "copy_"] = 1.1
        expected[32768, 128, dtype, "forward", "fresh", "rmsnorm", "F.rms_norm"] = 0.3
        expected[512, 4096, dtype, "add", "fresh", "rmsnorm", "add, then rmsnorm"] = 0.85
        expected[512, 4096, dtype, "recorded", "fresh", "rmsnorm", bars.KEPT] = 1.0
    found = {(b.rows, b.cols, b.dtype, b.direction, b.memory, b.ours, b.other): b.bound for b in bars.BARS}
    assert len(found) == len(bars.BARS)
    assert found == expected


def test_every_bar_can_be_measured() -> None:
    """At a small size, by everybody but the compiler, which is slow to start."""
    small = [
        bars.Bar(**{**vars(bar), "rows": 600 if bar.other == bars.KEPT else 3, "cols": 64})  # a few rows keep nothing
        for bar in bars.BARS
        if bar.other != "torch.compile"
    ]
    settled = [one for group in bars.run(bars.groups(small), 0.001) for one in group]
    assert {bar for bar, _, _ in settled} == set(small)
    assert all(0 < median < 1e4 and 0 < least < 1e4 for _, median, least in settled)


@pytest.mark.parametrize(
    ("medians", "minima", "verdict"),
    [
        ([0.9, 1.0], [1.1, 1.2], "holds"),
        ([0.9, 1.1], [1.1, 1.0], "holds by minima"),
        ([0.9, 1.1], [0.9, 1.01], "missed"),
        ([0.9, float("nan")], [0.9, float("nan")], "not measured"),
    ],
)
def test_verdicts(medians: list[float], minima: list[float], verdict: str) -> None:
    bar = next(bar for bar in bars.BARS if bar.bound == 1.0)
    assert bars.Outcome(bar, 1, medians, minima).verdict == verdict


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", neighbourhoods.NAMES)
def test_neighbourhoods_compute_the_same_with_either_norm(name: str, direction: str, monkeypatch) -> None:
    """Uncompiled here; and a wrong one isn't timed."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    place = neighbourhoods.Place(name, cases.Case(3, 128, "float32", direction))
    calls = neighbourhoods._bound(place)
    assert [*calls] == [neighbourhoods.OURS, neighbourhoods.THEIRS]
    wrong = dict(neighbourhoods.NEIGHBOURHOODS[neighbourhoods.OURS])
    right = wrong[name]
    wrong[name] = lambda *tensors: _scaled(right(*tensors))
    monkeypatch.setattr(neighbourhoods, "NEIGHBOURHOODS", neighbourhoods.NEIGHBOURHOODS | {neighbourhoods.OURS: wrong})
    with pytest.raises(ArithmeticError, match="ours and the formula disagree"):
        neighbourhoods._bound(place)


def _scaled(value):
    return tuple(1.1 * one for one in value) if isinstance(value, tuple) else 1.1 * value
