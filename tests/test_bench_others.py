"""The commands beside the race: `bars`, which holds it to promises, and `graph`, which races compiled graphs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from raced import invoke

from rmsnorm.bench import bars, graph, neighbourhoods, worker


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: test_bench.py proves that another one does the same."""

    def apart(threads: int, function: Callable[..., Any], *arguments: Any, variables: Any = None) -> Iterator[Any]:
        return function(*arguments)

    monkeypatch.setattr(worker, "apart", apart)


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
