"""The command of the race: what it refuses, writes and prints, and what Ctrl-C leaves."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from raced import MACHINE, WIDE, invoke, made_up

from rmsnorm._extras import extra_line
from rmsnorm.bench import console, memory, worker
from rmsnorm.bench.results import Report

TINY = ["bench", "--rows", "2", "--cols", "8", "--seconds", "0.01", "--against", "F.rms_norm,F.layer_norm"]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: test_bench.py proves that another one does the same."""

    def apart(threads: int, function: Callable[..., Any], *arguments: Any, variables: Any = None) -> Iterator[Any]:
        return function(*arguments)

    monkeypatch.setattr(worker, "apart", apart)


@pytest.mark.parametrize(
    ("arguments", "good"),
    [
        (["--preset", "everything"], "'everything' is not one of readme, all, layernorm, gpu, sizes, decode"),
        (["--dtype", "int8"], "float32, bfloat16, float16, float64"),
        (["--dtype", "float32,float23"], "'float23' is not one of float32"),
        (["--direction", "sideways"], "forward, backward, add, recorded"),
        (["--memory", "cold"], "'cold' is not one of fresh, warm"),
        (["--memory", "warm", "--direction", "backward"], "warm memory is for the direction forward only"),
        (["--rows", "0"], "from 1 up"),
        (["--rows", "1,,2"], "like 1,512,4096"),
        (["--cols", "many"], "like 1,512,4096"),
        (["--threads", "0"], "from 1 up"),
        (["--threads", "1,999"], f"999 threads on {os.cpu_count()} cores"),
        (["--json", "/no/such/place/x.json"], "/no/such/place is not a directory"),
        (["--csv", "x.xls"], "x.xls must end in .csv"),
        (["--report", "x.pdf"], "x.pdf must end in .html or .png"),
        (["--against", "jaxx"], "'jaxx' is not one of torch, peers, all, F.rms_norm, torch.compile"),
    ],
)
def test_bad_values_are_refused_with_the_good_ones(arguments: list[str], good: str) -> None:
    result = invoke("bench", *arguments)
    assert result.exit_code == 2
    assert good in result.output
    assert "Traceback" not in result.output


def test_without_matplotlib_one_line_says_what_to_install(tmp_path: Path) -> None:
    program = "import sys; sys.modules['matplotlib'] = None; from rmsnorm.cli import main; main()"
    command = [sys.executable, "-c", program, *TINY, "--report", str(tmp_path / "x.html")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert extra_line("bench") in done.stderr


def test_bench_writes_what_it_prints(here: None, tmp_path: Path) -> None:
    files = {name: tmp_path / f"x.{name}" for name in ("json", "csv", "html")}
    options = [*TINY, "--memory", "fresh,warm", "--dtype", "float32"]
    result = invoke(*options, "--json", str(files["json"]), "--csv", str(files["csv"]), "--report", str(files["html"]))
    assert result.exit_code == 0, result.output
    assert sorted(tmp_path.iterdir()) == sorted(files.values())  # the temporary files are gone
    report = Report.load(files["json"])
    assert report.complete
    assert report.machine["torch"] in result.output
    assert [str(one.case) for one in report.results] == [
        "2×8 float32 forward",
        "2×8 float32 forward warm",
        "2×8 float32 backward",
    ]
    everybody = ["rmsnorm", "F.rms_norm", "F.layer_norm", "copy_"]
    assert [list(one.contenders) for one in report.results] == [everybody, ["rmsnorm", "copy_"], everybody]
    page, table = files["html"].read_text(), csv.DictReader(files["csv"].read_text().splitlines())
    rows = {(row["direction"], row["memory"], row["contender"]): row for row in table}
    assert len(rows) == 10
    for one in report.results:
        assert str(one.case) in result.output
        assert str(one.case) in page
        assert one.contenders["rmsnorm"].ours_over_this == 1.0
        for name, line in one.contenders.items():
            assert 0 < line.min_s <= line.quartiles_s[0] <= line.median_s <= line.quartiles_s[1]
            assert line.gb_per_s > 0
            row = rows[one.case.direction, one.case.memory, name]
            assert float(row["median_s"]) == line.median_s
    assert "rmsnorm was the first of all RMSNorms in" in result.output


def test_ctrl_c_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In every file. The second case is the one that is stopped."""

    def apart(threads: int, function: Callable[..., Any], todo: list[Any], *more: Any, **_: Any) -> Iterator[Any]:
        yield from function(todo[:1], *more)
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "apart", apart)
    files = [tmp_path / name for name in ("x.json", "x.csv", "x.html")]
    options = zip(("--json", "--csv", "--report"), map(str, files), strict=True)
    result = invoke(*TINY, *(part for option in options for part in option))
    assert result.exit_code == 130
    assert "2×8 float32 forward" in result.output
    assert "stopped after 1 of 4 cases" in result.output
    report = json.loads(files[0].read_text())
    assert (report["complete"], len(report["results"])) == (False, 1)
    assert files[1].read_text().count("\n") == 5  # a head, and four contenders
    assert "Stopped early" in files[2].read_text()


def test_a_real_ctrl_c_ends_the_measuring_process_too(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    command = [sys.executable, "-m", "rmsnorm", "bench", "--rows", "8192", "--json", str(file), "--seconds", "60"]
    # A test run in the background of a shell ignores the signal, and so would what it starts.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, env=os.environ | WIDE, stdout=subprocess.PIPE, text=True, preexec_fn=heed)  # noqa: PLW1509 - no threads yet
    assert process.stdout
    assert "load" in process.stdout.readline()  # the header; then it measures
    while not (children := psutil.Process(process.pid).children()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert not psutil.wait_procs(children, timeout=60)[1]
    assert process.returncode == 130
    assert "stopped after 0 of 4 cases" in output
    assert json.loads(file.read_text())["complete"] is False


def test_a_dead_process_is_one_line_and_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def apart(threads: int, function: Callable[..., Any], todo: list[Any], *more: Any, **_: Any) -> Iterator[Any]:
        yield from function(todo[:1], *more)
        raise RuntimeError("the measuring process ended with signal SIGKILL")

    monkeypatch.setattr(worker, "apart", apart)
    result = invoke(*TINY, "--json", str(tmp_path / "x.json"))
    assert result.exit_code == 1
    assert "ended with signal SIGKILL stopped after 1 of 4 cases" in result.output
    assert len(Report.load(tmp_path / "x.json").results) == 1


def test_header_warns_about_a_busy_machine_and_slow_kernels() -> None:
    assert "[yellow]" not in console.header(MACHINE)
    assert "last minute was busy" in console.header({**MACHINE, "load": 99.0})
    assert "no compiler" in console.header({**MACHINE, "why_not_native": "no compiler"})


def test_results_are_named_after_machine_and_date(here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "machine", lambda: MACHINE)
    assert invoke(*TINY, "--json", str(tmp_path)).exit_code == 0
    assert invoke("bars", "--only", "kept", "--threads", "1", "--json", str(tmp_path)).exit_code == 0
    names = ["a-cpu-r-9000-2-cores-avx2-2026-11-25-bars.json", "a-cpu-r-9000-2-cores-avx2-2026-11-25.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_footprints_come_with_the_results(here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "measure", lambda: iter(made_up().footprints))
    result = invoke(*TINY, "--footprint", "--json", str(tmp_path / "x.json"))
    assert "16.00 MiB" in result.output
    assert Report.load(tmp_path / "x.json").footprints == made_up().footprints
