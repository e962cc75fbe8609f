"""The only file that decides which numbers README and docs/performance show, in which words: ``make figure``."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import export, figures
from .cases import README_SHAPES, Case
from .console import mebibytes
from .neighbourhoods import Place, summary
from .pages import replace_block, table
from .placed import lost, newest, newest_elsewhere, rms_norms, where, won_elsewhere
from .results import FLOOR, OURS, Report, Result, first
from .timing import human

FIGURE = Path("docs/speed.png")
LIBRARIES = ("zentorch", "vllm", "onnxruntime", "openvino", "jax", "mlx")
README_TYPES = ("float32", "bfloat16")
README_COLUMNS = ("F.rms_norm", "torch.compile", "F.layer_norm", "transformers")


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _of(report: Report, threads: int) -> list[Result]:
    return [one for one in report.results if one.case.threads == threads]


def _count(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"


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
        f"The fastest of {len(rms_norms(report))} in {won} of {contested} cases "
        f"([who, and which not](docs/performance.md#where-we-are-not-first))."
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
        f"{contested} 种情形中有 {won} 种是 {len(rms_norms(report))} 种实现里最快的"
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
        text += f"\n{_count(threads)}:\n\n" + table(["", OURS, *(f"÷ {name}" for name in names)], rows)
    reasons = dict.fromkeys(f"{name}: {why}" for one in report.results for name, why in one.skipped.items())
    return text + (f"\nEmpty, with the reason given: {'; '.join(reasons)}.\n" if reasons else "")


def floor(report: Report) -> str:
    """What part of a copy's bandwidth ours reaches: a row for each case, thread counts side by side."""
    cells: dict[str, list[str]] = {}
    for result in report.results:
        if FLOOR in result.contenders:
            ours, copy = result.contenders[OURS], result.contenders[FLOOR]
            speeds = (f"{ours.gb_per_s:.1f}", f"{copy.gb_per_s:.1f}", f"{ours.share_of_copy or 0:.0%}")
            cells.setdefault(str(result.case), []).extend((human(ours.median_s), *speeds))
    titles = [t for count in report.threads() for t in (_count(count), "GB/s", f"`{FLOOR}`, GB/s", "of copy")]
    return f"{where(report)}.\n\n" + table(["", *titles], [[case, *row] for case, row in cells.items()])


def short_floor(report: Report) -> str:
    """The same for the shapes of the README alone; two types in one cell."""
    cells: dict[str, dict[tuple[int, int], list[str]]] = {}
    for result in report.results:
        case = result.case
        if FLOOR in result.contenders and (case.rows, case.cols) in README_SHAPES and case.dtype in README_TYPES:
            ours, row = result.contenders[OURS], cells.setdefault(f"{case.shape} {case.task}", {})
            for place, text in enumerate((human(ours.median_s), f"{ours.share_of_copy or 0:.0%}")):
                row.setdefault((case.threads, place), []).append(text)
    titles = ["", *(title for count in report.threads() for title in (_count(count), "of copy"))]
    rows = [[case, *(" · ".join(row[key]) for key in sorted(row))] for case, row in cells.items()]
    return f"{' · '.join(README_TYPES)}. {where(report)}.\n\n" + table(titles, rows)


def graph(machine: dict[str, Any], places: Sequence[Place]) -> str:
    """What neighbourhoods of a norm take in graphs, ours ÷ Inductor's code: a number for each run."""
    text = f"Time of ours ÷ time of the code that Inductor makes of the formula. {where(Report(machine))}.\n"
    for count, direction in dict.fromkeys((one.case.threads, one.case.direction) for one in places):
        mine = [one for one in places if (one.case.threads, one.case.direction) == (count, direction)]
        titles = dict.fromkeys(f"{one.case.shape} {one.case.dtype}" for one in mine)
        rows = [
            [name, *(" ".join(map(_ratio, one.ratios)) for one in mine if one.name == name)]
            for name in dict.fromkeys(one.name for one in mine)
        ]
        text += f"\n{direction}, {_count(count)}: {summary(mine)}.\n\n" + table(["", *titles], rows)
    return text + f"\nAll: {summary(places)}.\n"


def layer_norm(report: Report) -> str:
    """RMSNorm ÷ LayerNorm, ours both."""
    other, threads = "rmsnorm.layer_norm", report.threads()
    found: dict[str, dict[int, float]] = {}
    for result in report.results:
        if other in result.ratios():
            found.setdefault(str(result.case), {})[result.case.threads] = result.ratios()[other]
    rows = [[case, *(_ratio(ratios.get(count)) for count in threads)] for case, ratios in found.items()]
    titles = ("time of RMSNorm ÷ time of LayerNorm", *map(_count, threads))
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


def bars(plain: dict[str, Any], *verdicts: str) -> str:
    """The performance contract and what it measured: all of it, or what came out like one of these."""
    rows = []
    for one in plain["bars"]:
        cell = f"{one['cell']}, {Case(one['rows'], one['cols'], one['dtype']).shape} {one['dtype']}"
        runs = [" ".join(f"{value:.2f}" for value in one[name]) for name in ("medians", "minima")]
        if not verdicts or one["verdict"] in verdicts:
            ratio = f"{one['ours']} ÷ {one['other']}"
            rows.append([cell, ratio, f"{one['bound']:.2f}", str(one["threads"]), *runs, one["verdict"]])
    titles = ("cell", "ratio", "at most", "threads", "medians of the runs", "minima", "")
    return f"{where(Report(plain['machine']))}.\n\n" + (table(titles, rows) if rows else "")


def missed_bars(plain: dict[str, Any]) -> str:
    """How many bars hold, and those that don't."""
    found = [one["verdict"] for one in plain["bars"]]
    counts = ", ".join(f"{verdict}: {found.count(verdict)}" for verdict in dict.fromkeys(found))
    return f"{counts}, of {len(found)} bounds. {bars(plain, 'missed', 'not measured')}"


DOCS, TABLES = Path("docs/performance.md"), Path("docs/performance/tables.md")
BLOCKS: dict[tuple[Path, str], Callable[[Report], str]] = {
    (DOCS, "short floor"): short_floor,
    (DOCS, "lost"): lost,
    (TABLES, "floor"): floor,
    (TABLES, "speed"): speed,
    (TABLES, "memory"): memory,
    (TABLES, "layernorm"): layer_norm,
}
CONTRACT = {(DOCS, "missed bars"): missed_bars, (TABLES, "bars"): bars}


def write(results: Path, root: Path = Path()) -> None:
    """Redraws the figure and rewrites the blocks from a results file, and from its ``-bars.json`` if there is one."""
    report = Report.load(results)
    threads = max(report.threads())
    shown = [one.case for one in report.results if _in_readme(one.case)]
    bandwidth = figures.roofline(report, threads, ("forward", "backward"))
    drawn = figures.stack([bandwidth, figures.ratios(report, threads, shown)])
    export.replace(root / FIGURE, drawn)
    for name, made in (("README.md", readme(report)), ("README.zh-CN.md", chinese(report))):
        replace_block(root / name, "made by `make figure`", made)
    for (page, name), block in BLOCKS.items():
        replace_block(root / page, f"{name}: made by `make figure`", block(report))
    others = [Report.load(file) for file in newest_elsewhere(results)]
    replace_block(root / DOCS, "elsewhere: made by `make figure`", won_elsewhere(report, others))
    contract = results.with_name(f"{results.stem}-bars.json")
    if contract.exists():
        plain = json.loads(contract.read_text())
        for (page, name), contract_of in CONTRACT.items():
            replace_block(root / page, f"{name}: made by `make figure`", contract_of(plain))


if __name__ == "__main__":
    write(Path(sys.argv[1]) if sys.argv[1:] else newest(Path("benchmarks/results")))
