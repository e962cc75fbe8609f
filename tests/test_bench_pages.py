"""What is made of a race's results: tables in a terminal, a report, figures, and the pages that hold numbers."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from raced import MACHINE, invoke, made_up
from rich.console import Console

from rmsnorm.bench import bars, console, fitting, pages, placed, published
from rmsnorm.bench.results import Report

ROOT = Path(__file__).parent.parent


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
