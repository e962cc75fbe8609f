"""Proves what can be proven of `rmsnorm bench --device` without one: the refusal, and that work which is only queued is
waited for, once before a sample and once at its end."""

from __future__ import annotations

import time

import pytest
import torch
from typer.testing import CliRunner

from rmsnorm import cli
from rmsnorm.bench import cases, command, contenders, race, timing


@pytest.mark.parametrize(
    ("device", "said"),
    [("meteor", "not a device that torch knows; give cpu, cuda or xpu"), ("mps", "finds no such device")],
)
def test_a_device_that_is_not_here(device, said):
    result = CliRunner().invoke(cli.build(), ["bench", "--device", device])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"--device {device}: ")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_queued_work_is_waited_for():
    """A device on which a call queues 1 ms, and the end waits for all of it; without the wait calls would be free."""
    queue: list[float] = []

    def finish() -> None:
        time.sleep(sum(queue))
        queue.clear()

    found = timing.measure({"one": lambda: queue.append(1e-3), "two": lambda: queue.append(2e-3)}, 0.01, finish=finish)
    assert found["one"].fastest >= 1e-3
    assert 2e-3 <= found["two"].fastest < 0.1
    assert not queue


def test_a_race_waits_where_a_device_queues(monkeypatch):
    waits = []
    monkeypatch.setattr(race, "finish_of", lambda device: lambda: waits.append(device))
    result = race.race(cases.Case(2, 64, "float32"), [contenders.BY_NAME[n] for n in ("rmsnorm", "copy_")], 0.01)
    assert list(result.contenders) == ["rmsnorm", "copy_"]
    assert len(waits) >= 2 * 2 * timing.FEWEST_ROUNDS
    monkeypatch.undo()
    assert race.finish_of("cpu") is None
    assert race.finish_of("cuda").args == (torch.device("cuda"),)


def test_ours_is_tritons_there(monkeypatch):
    """A contender that would be torch's own kernel by default must not race against itself."""
    seen = []
    monkeypatch.setattr(command.worker, "apart", lambda *arguments, **options: seen.append(options) or iter(()))
    command.measure(cases.grid([(1, 8)], device="cuda"), ["rmsnorm"], 0.01, [])
    command.measure(cases.grid([(1, 8)]), ["rmsnorm"], 0.01, [])
    assert [one["variables"] for one in seen] == [{"RMSNORM_CUDA": "triton"}, {}]
    assert contenders.Problem(cases.Case(2, 8, "float32", device="meta")).x.device.type == "meta"
