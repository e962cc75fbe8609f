"""The only file that writes measured numbers into README and docs/performance.md: ``make figure``.

Blocks stand between ``<!-- NAME: made by `make figure` -->`` and ``<!-- end -->``; nobody edits them by hand.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from . import export, figures
from .cases import README_SHAPES, Case
from .console import mebibytes
from .results import FLOOR, OURS, Report, Result, first
from .timing import human

FIGURE = Path("docs/speed.png")
LIBRARIES = ("onnxruntime", "openvino", "jax", "mlx")
README_TYPES = ("float32", "bfloat16")
README_COLUMNS = ("F.rms_norm", "torch.compile", "F.layer_norm", "transformers")


def replace_block(page: Path, label: str, content: str) -> None:
    """Puts content between the comment with this label and the next ``<!-- end -->``.

    Raises:
        ValueError: the page has no such block.
    """
    begin, end = f"<!-- {label} -->\n", "<!-- end -->\n"
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page} has no block from {begin.strip()} to {end.strip()}")
    export.replace(page, before + begin + content.rstrip() + "\n" + end + after)


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; the first column to the left, numbers to the right."""
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def where(report: Report) -> str:
    """What was measured on, in one sentence."""
    here = report.machine
    return (
        f"{here['cpu']}, {here['cores']} cores, CPU target {here['cpu_target']}, huge pages: {here['huge_pages']}, "
        f"torch {here['torch']}, {here['date'][:10]}"
    )


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _of(report: Report, threads: int) -> list[Result]:
    return [one for one in report.results if one.case.threads == threads]


def _in_readme(case: Case) -> bool:
    return (case.rows, case.cols) in README_SHAPES and case.task in ("forward", "backward")


def alone(report: Report) -> str:
    """The table of the README: a norm alone, the most threads, fresh outputs, three shapes; two types in one cell."""
    rows: dict[str, list[list[str]]] = {}
    for result in _of(report, max(report.threads())):
        if _in_readme(result.case) and result.case.dtype in README_TYPES:
            ratios = result.ratios()
            best = max((ratios[name] for name in LIBRARIES if name in ratios), default=None)
            cells = [*(_ratio(ratios.get(name)) for name in README_COLUMNS), _ratio(best), _ratio(ratios.get(FLOOR))]
            rows.setdefault(f"{result.case.shape} {result.case.task}", []).append(cells)
    both = [[name, *(" · ".join(pair) for pair in zip(*cells, strict=True))] for name, cells in rows.items()]
    titles = ("", "`F.rms_norm`", "`torch.compile`", "`F.layer_norm`", "transformers", "best other library", "`copy_`")
    return table(titles, both)


def readme(report: Report) -> str:
    """That table, and how it was measured."""
    won, contested, _ = first(report.results)
    text = (
        f"A norm alone: time of rmsnorm ÷ time of the other, {' · '.join(README_TYPES)}; below 1, rmsnorm is faster. "
        f"Medians, outputs compared first, {max(report.threads())} threads, {where(report)}, `make results figure`. "
        f"The fastest RMSNorm in {won} of {contested} cases ([which not](docs/performance.md#where-we-are-not-first))."
    )
    return f"{textwrap.fill(text, 118, break_on_hyphens=False)}\n\n{alone(report)}"


def chinese(report: Report) -> str:
    """The same in Chinese."""
    here, (won, contested, _) = report.machine, first(report.results)
    made = alone(report)
    for words, theirs in (("forward", "前向"), ("backward", "反向"), ("best other library", "其他库中最快的")):
        made = made.replace(words, theirs)
    return (
        f"单独一个归一化层：本库的时间 ÷ 对方的时间，{' · '.join(README_TYPES)}；小于 1 表示本库更快。"
        f"取中位数，先核对输出；"
        f"{max(report.threads())} 线程，{here['cpu']}，{here['cores']} 核，目标 {here['cpu_target']}，"
        f"大页 {here['huge_pages']}，torch {here['torch']}，{here['date'][:10]}，`make results figure`。"
        f"{contested} 种情形中有 {won} 种是最快的 RMSNorm"
        f"（[其余几种](docs/performance.md#where-we-are-not-first)）。\n\n{made}"
    )


def speed(report: Report) -> str:
    """Every ratio, a table for each thread count."""
    names = [name for name in report.contenders() if name != OURS]
    text = f"Time of rmsnorm ÷ time of the other. {where(report)}.\n"
    for threads in report.threads():
        rows = []
        for result in _of(report, threads):
            ratios = result.ratios()
            rows.append(
                [str(result.case), human(result.contenders[OURS].median_s), *(_ratio(ratios.get(n)) for n in names)]
            )
        text += f"\n{threads} thread{'s' * (threads > 1)}:\n\n" + table(
            ["", OURS, *(f"÷ {name}" for name in names)], rows
        )
    return text


def floor(report: Report) -> str:
    """What a copy reaches, and what part of that ours does."""
    rows = []
    for result in report.results:
        if FLOOR in result.contenders:
            ours, copy = result.contenders[OURS], result.contenders[FLOOR]
            speeds = (f"{copy.gb_per_s:.1f}", f"{ours.gb_per_s:.1f}", f"{ours.share_of_copy or 0:.0%}")
            rows.append([f"{result.case}, {result.case.threads} threads", human(ours.median_s), *speeds])
    return f"{where(report)}.\n\n" + table(("", OURS, "copy_, GB/s", "rmsnorm, GB/s", "of copy"), rows)


def lost(report: Report) -> str:
    """The cases that somebody else won."""
    won, contested, cases = first(report.results)
    rows = [[f"{case}, {case.threads} threads", name, f"{ratio:.2f}"] for case, name, ratio in cases]
    text = f"First in {won} of {contested} cases. {where(report)}.\n"
    return text + ("\n" + table(("not in", "the first is", "rmsnorm ÷ it"), rows) if rows else "")


def layer_norm(report: Report) -> str:
    """RMSNorm ÷ LayerNorm, ours both."""
    other, threads = "rmsnorm.layer_norm", report.threads()
    found: dict[str, dict[int, float]] = {}
    for result in report.results:
        if other in result.ratios():
            found.setdefault(str(result.case), {})[result.case.threads] = result.ratios()[other]
    rows = [[case, *(_ratio(ratios.get(count)) for count in threads)] for case, ratios in found.items()]
    titles = ("time of RMSNorm ÷ time of LayerNorm", *(f"{count} thread{'s' * (count > 1)}" for count in threads))
    return f"{where(report)}.\n\n" + table(titles, rows)


def memory(report: Report) -> str:
    """Peak and kept bytes."""
    rows = []
    for one in report.footprints:
        sizes = [
            c for size in (one.peak_bytes, one.kept_bytes) for c in (mebibytes(size), f"{size / one.tensor_bytes:.1f}")
        ]
        rows.append([f"{one.rows}×{one.cols} {one.dtype}", one.contender, *sizes])
    return f"{where(report)}.\n\n" + table(("", "", "peak", "÷ input", "kept for backward", "÷ input"), rows)


def bars(plain: dict[str, Any]) -> str:
    """The performance contract and what it measured."""
    rows = []
    for one in plain["bars"]:
        cell = f"{one['cell']}, {Case(one['rows'], one['cols'], one['dtype']).shape} {one['dtype']}"
        runs = [" ".join(f"{value:.2f}" for value in one[name]) for name in ("medians", "minima")]
        rows.append(
            [cell, f"{one['ours']} ÷ {one['other']}", f"{one['bound']:.2f}", str(one["threads"]), *runs, one["verdict"]]
        )
    titles = ("cell", "ratio", "at most", "threads", "medians of the runs", "minima", "")
    return f"{where(Report(plain['machine']))}.\n\n" + table(titles, rows)


PERFORMANCE: dict[str, Callable[[Report], str]] = {
    "floor": floor,
    "lost": lost,
    "speed": speed,
    "memory": memory,
    "layernorm": layer_norm,
}


def newest(folder: Path) -> Path:
    """The results with the latest date in their names.

    Raises:
        FileNotFoundError: there are none.
    """
    found = [file for file in folder.glob("*.json") if not file.stem.endswith("-bars")]
    if not found:
        raise FileNotFoundError(f"{folder} has no results; run `make results` first")
    return max(found, key=lambda file: file.stem[-10:])


def write(results: Path, root: Path = Path()) -> None:
    """Redraws the figure and rewrites the blocks from a results file, and from its ``-bars.json`` if there is one."""
    report, page = Report.load(results), root / "docs" / "performance.md"
    threads = max(report.threads())
    shown = [one.case for one in report.results if _in_readme(one.case)]
    bandwidth = figures.roofline(report, threads, ("forward", "backward"))
    drawn = figures.stack([bandwidth, figures.ratios(report, threads, shown)])
    export.replace(root / FIGURE, drawn)
    for name, made in (("README.md", readme(report)), ("README.zh-CN.md", chinese(report))):
        replace_block(root / name, "made by `make figure`", made)
    for name, block in PERFORMANCE.items():
        replace_block(page, f"{name}: made by `make figure`", block(report))
    contract = results.with_name(f"{results.stem}-bars.json")
    if contract.exists():
        replace_block(page, "bars: made by `make figure`", bars(json.loads(contract.read_text())))


if __name__ == "__main__":
    write(Path(sys.argv[1]) if sys.argv[1:] else newest(Path("benchmarks/results")))
