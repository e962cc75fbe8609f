"""The commands of the races: what they refuse, write, print and redraw, and what Ctrl-C leaves."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
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

from rich.console import Console
from typer.testing import CliRunner

from rmsnorm import cli
from rmsnorm._extras import extra_line
from rmsnorm.bench import (
    bars,
    cases,
    console,
    contenders,
    fitting,
    graph,
    memory,
    neighbourhoods,
    pages,
    placed,
    published,
    worker,
)
from rmsnorm.bench.results import FLOOR, Footprint, Line, Report, Result

TINY = ["bench", "--rows", "2", "--cols", "8", "--seconds", "0.01", "--against", "F.rms_norm,F.layer_norm"]
ROOT = Path(__file__).parent.parent
MACHINE = {
    "cpu": "A CPU (R) 9000",
    "cores": 2,
    "load": 0.0,
    "huge_pages": "madvise",
    "date": "2026-11-25T10:00:00+00:00",
    "torch": "2.13.0",
    "rmsnorm": "0.1.0",
    "cpu_target": "avx2",
    "why_not_native": None,
}


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: test_bench.py proves that another one does the same."""

    def apart(threads: int, function: Callable[..., Any], *arguments: Any, variables: Any = None) -> Iterator[Any]:
        return function(*arguments)

    monkeypatch.setattr(worker, "apart", apart)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.build(), list(arguments))


def made_up(shapes: Any = cases.PRESETS["all"].shapes, ours: float = 1.0) -> Report:
    """A report with every contender: ours takes 1 ms, the others 2, 3, … ms."""

    def line(place: int, name: str) -> Line:
        took, ratio = 1e-3 * (place + 1), ours / (place + 1) if place else 1.0
        is_rms_norm = name not in ("F.layer_norm", "rmsnorm.layer_norm", FLOOR)
        return Line(took, (took, took), took, 7, 1, 10.0 / (place + 1), 0.5, ratio, ratio, is_rms_norm)

    grid = cases.grid(shapes, memories=("fresh", "warm"), threads=(1, 2))
    names = [one.name for one in contenders.named("all")]
    absent = {"mlx": "one thread"}
    timed = [Result(case, {name: line(place, name) for place, name in enumerate(names)}, absent) for case in grid]
    kept = [Footprint("rmsnorm", 512, 4096, "float32", 2**23, 2**24, 2048, ["float32[512, 1]"])]
    return Report(MACHINE, timed, kept)


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
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=heed)  # noqa: PLW1509 - no threads yet
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


@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_fit_the_terminal(width: int) -> None:
    """Columns go, numbers and units don't: what is shown is a part of what a wide screen shows, word by word."""
    runs = [bars.Outcome(bar, 1, [1.0, 12.12, 0.3], [0.9, 0.9, 0.1]) for bar in bars.BARS[:6]]
    parts = (console.tables(made_up().results[:4]), console.footprints(made_up()), console.bars(runs))
    words, gone = [], []
    for columns in (400, width):
        screen = Console(width=columns)
        with screen.capture() as shown:
            screen.print(*parts)
        lines = [line.rstrip() for line in shown.get().splitlines()]
        assert max(map(len, lines)) <= columns
        notes = ("no room for", fitting.HINT)
        words.append({word for line in lines if not line.startswith(notes) for word in line.split()})
        assert lines.count(fitting.HINT) == sum(line.startswith("no room for") for line in lines)
        gone.append([line for line in lines if line.startswith("no room for")])
    assert {word for word in words[1] if set(word) != {"─"}} <= words[0]
    assert "…" not in "".join(words[1])  # rich's mark for what it had to cut
    assert gone[0] == []
    assert (
        gone[1]
        == {
            60: ["no room for: best", "no room for: minima, medians"],
            80: ["no room for: minima"],
            120: [],
        }[width]
    )


def test_header_warns_about_a_busy_machine_and_slow_kernels() -> None:
    assert "[yellow]" not in console.header(MACHINE)
    assert "last minute was busy" in console.header({**MACHINE, "load": 99.0})
    assert "no compiler" in console.header({**MACHINE, "why_not_native": "no compiler"})


@pytest.mark.parametrize("report", [made_up(), made_up(((3, 8),)), Report(MACHINE)], ids=["all", "one", "none"])
def test_the_report_needs_nothing_else(tmp_path: Path, report: Report) -> None:
    """No network, no script: figures are in the page, and nothing is loaded."""
    (tmp_path / "x.json").write_text(report.to_json())
    assert Report.load(tmp_path / "x.json") == report
    result = invoke("report", str(tmp_path / "x.json"), str(tmp_path / "x.html"))
    assert result.exit_code == 0, result.output
    page = (tmp_path / "x.html").read_text()
    assert "http" not in page
    assert "<script" not in page
    assert all(source.startswith("data:image/svg+xml;base64,") for source in re.findall(r'src="([^"]*)"', page))
    assert page.count("<img") == 2 * len(report.threads())
    assert 'name="viewport"' in page
    for result in report.results:
        assert str(result.case) in page


@pytest.mark.parametrize("report", [made_up(((3, 8),)), Report(MACHINE)], ids=["one", "none"])
def test_a_figure_alone(tmp_path: Path, report: Report) -> None:
    (tmp_path / "x.json").write_text(report.to_json())
    assert invoke("report", str(tmp_path / "x.json"), str(tmp_path / "x.png")).exit_code == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("content", [b"[1, 2]", b"{}", b"", bytes(range(255, 0, -1)) * 9], ids=len)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    result = invoke("report", str(tmp_path / "x.json"), str(tmp_path / "x.html"))
    assert result.exit_code == 2
    assert "is not a result of `rmsnorm bench --json`" in " ".join(result.output.replace("│", "").split())
    assert len(result.output.splitlines()) < 12  # not the file itself


def test_results_are_named_after_machine_and_date(here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "machine", lambda: MACHINE)
    assert invoke(*TINY, "--json", str(tmp_path)).exit_code == 0
    assert invoke("bars", "--only", "kept", "--threads", "1", "--json", str(tmp_path)).exit_code == 0
    names = ["a-cpu-r-9000-2-cores-avx2-2026-11-25-bars.json", "a-cpu-r-9000-2-cores-avx2-2026-11-25.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize(("bound", "verdict", "code"), [(1.0, "holds", 0), (0.5, "missed", 1)])
def test_bars(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: float, verdict: str, code: int
) -> None:
    """Of what is kept for backward, which is 1.0 times what it may be: no clock is read."""
    kept = [bars.Bar(**{**vars(bar), "rows": 9, "bound": bound}) for bar in bars.BARS if bar.other == bars.KEPT]
    monkeypatch.setattr(bars, "BARS", tuple(kept))
    options = ["bars", "--threads", "1,2", "--runs", "2", "--json", str(tmp_path / "x.json")]
    result = invoke(*options)
    assert result.exit_code == 0, result.output
    assert invoke(*options, "--strict").exit_code == code
    found = json.loads((tmp_path / "x.json").read_text())["bars"]
    assert [(one["dtype"], one["threads"]) for one in found] == [(d, t) for t in (1, 2) for d in bars.HALF_AND_FULL]
    assert all((one["medians"], one["verdict"]) == ([1.0, 1.0], verdict) for one in found)
    assert result.output.count(verdict) >= 4


def test_bars_refuses_a_cell_that_nobody_promised() -> None:
    result = invoke("bars", "--only", "training")
    assert result.exit_code == 2
    assert "add + norm" in result.output


def test_footprints_come_with_the_results(here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "measure", lambda: iter(made_up().footprints))
    result = invoke(*TINY, "--footprint", "--json", str(tmp_path / "x.json"))
    assert "16.00 MiB" in result.output
    assert Report.load(tmp_path / "x.json").footprints == made_up().footprints


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A copy of the pages that hold numbers."""
    (tmp_path / "docs" / "performance").mkdir(parents=True)
    for name in ("README.md", "README.zh-CN.md", "docs/performance.md", "docs/performance/tables.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_pages_are_written_from_results(site: Path) -> None:
    """Ours takes 2.5 ms, transformers, which is the 6th, 6 of them; so F.rms_norm, the 2nd, is faster: 1.25."""
    results = site / "m-2026-11-25.json"
    results.write_text(made_up(ours=2.5).to_json())
    runs = [bars.Outcome(bars.BARS[0], 1, [0.91], [0.92]), bars.Outcome(bars.BARS[1], 2, [0.51], [0.52])]
    (site / "m-2026-11-25-bars.json").write_text(bars.to_json(MACHINE, runs, True))
    for day, ours in (("23", 2.5), ("24", 0.5)):
        (site / f"other-2026-11-{day}.json").write_text(made_up(ours=ours).to_json())
    published.write(results, site)
    pages_of = ("README.md", "docs/performance.md", "docs/performance/tables.md")
    readme, page, tables = ((site / name).read_text() for name in pages_of)
    row = "| 512×4096 backward | 1.25 · 1.25 | 0.83 · 0.83 | 0.62 · 0.62 | 0.42 · 0.42 | 0.36 · 0.36 |"
    assert row in readme
    assert row.replace("backward", "反向") in (site / "README.zh-CN.md").read_text()
    assert "The fastest of 10 in 0 of 72 cases" in " ".join(readme.split())
    assert "72 种情形中有 0 种是 10 种实现里最快的" in (site / "README.zh-CN.md").read_text()
    assert "First in 0 of 72 cases, against F.rms_norm, torch.compile, transformers, zentorch, vllm, onn" in page
    assert "| 1×4096 float32 forward warm, 2 threads | F.rms_norm | 1.25 |" in page
    assert page.count("- First in ") == page.count("- First in 72 of 72: ") == 1  # elsewhere, the newest
    assert "| 1×4096 warm | 1.00 ms · 1.00 ms | 50% · 50% | 1.00 ms · 1.00 ms | 50% · 50% |" in page
    assert "| 1×4096 float32 forward warm | 1.00 ms | 10.0 | 0.8 | 50% | 1.00 ms | 10.0 | 0.8 | 50% |" in tables
    assert "| 512×4096 float32 | rmsnorm | 16.00 MiB | 2.0 | 2.00 KiB | 0.0 |" in tables
    assert "| 32768×128 float32 forward | 0.50 | 0.50 |" in tables  # rmsnorm.layer_norm is the 5th
    assert "Empty, with the reason given: mlx: one thread." in tables
    holds, missed = (f"| decode, a function call, 1×4096 float32 | rmsnorm ÷ {one.bar.other} |" for one in runs)
    assert (holds in tables, missed in tables, holds in page, missed in page) == (True, True, False, True)
    assert "holds: 1, missed: 1, of 2 bounds." in page
    assert (site / "docs" / "speed.png").exists()
    published.write(results, site)
    assert (site / "README.md").read_text() == readme  # written again, nothing grows
    assert placed.newest(site) == results


def test_a_page_without_its_block_is_left_alone(site: Path) -> None:
    before = (site / "README.md").read_text()
    with pytest.raises(ValueError, match=r"README.md has no block from <!-- no such -->"):
        pages.replace_block(site / "README.md", "no such", "text")
    assert (site / "README.md").read_text() == before
    with pytest.raises(FileNotFoundError, match="make results"):
        placed.newest(site)


def test_graph_shows_a_number_for_each_run_and_writes_the_table(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = iter([0.5, 0.8, 2.0, 0.5] * 2)

    def races(asked: Any, seconds: float) -> Iterator[tuple[float, float]]:
        yield from ((next(given), 1e-3) for _ in asked)

    monkeypatch.setattr(neighbourhoods, "races", races)
    page = tmp_path / "tables.md"
    page.write_text(f"before\n<!-- {graph.BLOCK} -->\nold\n<!-- end -->\nafter\n")
    arguments = ["--rows", "3", "--cols", "128", "--only", "norm, add", "--direction", "forward", "--threads", "1"]
    result = invoke("graph", *arguments, "--runs", "2", "--write", str(page))
    assert result.exit_code == 0, result.output
    written = page.read_text()
    assert written.startswith("before\n")
    assert written.endswith("<!-- end -->\nafter\n")
    assert "| norm, add (Gemma, OLMo 2) | 0.50 0.50 | 0.80 0.80 |" in written
    assert "| norm, add, norm (Gemma) | 2.00 2.00 | 0.50 0.50 |" in written
    assert "geometric mean 0.80, largest 2.00, above 1 in 2 of 8" in written
    assert "geometric mean 0.80, largest 2.00, above 1 in 2 of 8" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "good"),
    [
        (["--direction", "add"], "'add' is not one of forward, backward"),
        (["--only", "attention"], "'attention' is in none of norm, add, norm"),
        (["--write", "no/such.md"], "no/such.md has no comment 'graph: made by"),
    ],
)
def test_graph_refuses_what_it_cannot_do(arguments: list[str], good: str) -> None:
    result = invoke("graph", *arguments)
    assert result.exit_code == 2
    assert good in result.output
