"""The only file that makes the HTML report: one page that needs nothing else, no script, no network."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

from . import figures
from .cases import DIRECTIONS, MEMORIES
from .console import mebibytes, skipped
from .results import OURS, Footprint, Report, Result, first
from .timing import human

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 72rem; margin: 0 auto;
  padding: 1rem; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; } h3 { font-size: 1rem; }
p, li { max-width: 46rem; } .dim { color: #666; font-size: .875rem; }
img { width: 100%; height: auto; }
.wide { overflow-x: auto; } .wide img { min-width: 42rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { border-bottom: 1px solid #999; font-weight: 600; white-space: normal; vertical-align: bottom; }
tr.case th { padding-top: .7rem; text-align: left; }
tr.ours td { background: #fdf1e8; }
"""


def page(report: Report) -> str:
    """The whole report."""
    here, threads = report.machine, report.threads()
    won, contested, lost = first(report.results)
    facts = f"{here['cpu']}, {here['cores']} cores · torch {here['torch']} · rmsnorm {here['rmsnorm']}, CPU target "
    facts += (
        f"{here['cpu_target']} · huge pages: {here['huge_pages']} · load before {here['load']:.1f} · {here['date']}"
    )
    body = [
        "<h1>rmsnorm bench</h1>",
        f'<p class="dim">{escape(facts)}</p>',
        f"<p><strong>rmsnorm is the fastest RMSNorm in {won} of {contested} cases.</strong></p>",
        _list(f"{case}, {case.threads} threads: {name} is faster, {ratio:.2f}" for case, name, ratio in lost),
    ]
    if not report.complete:
        body.append("<p>Stopped early: some cases are missing.</p>")
    if here["why_not_native"]:
        body.append(f"<p>The native kernels are off: {escape(here['why_not_native'])}</p>")
    for count in threads if report.results else ():
        title = f"{count} thread{'s' * (count > 1)}"
        body += [
            f"<h2>{title}</h2>",
            image(figures.svg(figures.roofline(report, count)), f"bandwidth reached, {title}"),
            image(figures.svg(figures.ratios(report, count)), f"time ÷ time, {title}"),
        ]
    if report.footprints:
        body += ["<h2>Memory of forward and backward</h2>", _footprints(report.footprints)]
    for count in threads:
        body.append(f"<h2>All times, {count} thread{'s' * (count > 1)}</h2>")
        body.append(_times([one for one in report.results if one.case.threads == count]))
    if reasons := skipped(report.results):
        body += ["<h2>Skipped</h2>", _list(reasons)]
    body += ["<h2>Method</h2>", *map(_paragraph, _method())]
    return document("rmsnorm bench", body)


def document(title: str, body: Iterable[str]) -> str:
    """A page of its own around these parts; empty ones are left out."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(filter(None, body)) + "\n</body></html>\n"
    )


def _times(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        rows.append(f'<tr class="case"><th colspan="8">{escape(str(result.case))}</th></tr>')
        ratios = result.ratios()
        for name, line in result.contenders.items():
            cells = (
                escape(name),
                human(line.median_s),
                human(*line.quartiles_s),
                human(line.min_s),
                f"{line.gb_per_s:.1f}",
                "" if line.share_of_copy is None else f"{line.share_of_copy:.0%}",
                f"{ratios[name]:.2f}" if name in ratios else "",
                f"{line.ours_over_this_min:.2f}" if name in ratios else "",
            )
            ours = ' class="ours"' * (name == OURS)
            rows.append(f"<tr{ours}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    titles = ("", "median", "quartiles", "fastest", "GB/s", "of copy", "ours ÷ this", "of the fastest")
    return table(titles, rows)


def _footprints(footprints: Sequence[Footprint]) -> str:
    rows, case = [], ""
    for one in footprints:
        if case != (case := f"{one.rows}×{one.cols} {one.dtype}"):
            rows.append(f'<tr class="case"><th colspan="6">{case}, input {mebibytes(one.tensor_bytes)}</th></tr>')
        cells = (
            escape(one.contender),
            mebibytes(one.peak_bytes),
            f"{one.peak_bytes / one.tensor_bytes:.1f}",
            mebibytes(one.kept_bytes),
            f"{one.kept_bytes / one.tensor_bytes:.1f}",
            escape(", ".join(one.kept)),
        )
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return table(("", "peak", "÷ input", "kept for backward", "÷ input", "what is kept"), rows)


def _method() -> list[str]:
    return [
        "Outputs are compared with F.rms_norm before anything is timed. The contenders take turns in one process for "
        "each thread count, in a new random order each round; a ratio is the median over the rounds of time ÷ time. "
        "GB/s are the bytes that must move (forward 2 tensors of the input's size, backward 3, add + norm 4) ÷ the "
        'median time; "of copy" compares that with copy_ into warm memory in the same race: above 100 % where a cache '
        "serves one and not the other.",
        "; ".join(f"{name}: {text}" for name, text in (DIRECTIONS | MEMORIES).items()) + ".",
        "Peak: by how much the resident memory of a process rises in one forward and backward with the output alive, "
        "beside input, weight and incoming gradient. Kept: what autograd saves beside input and weight.",
    ]


def table(titles: Iterable[str], rows: Iterable[str]) -> str:
    """A table below its titles; they and the ``<tr>`` rows are HTML."""
    head = "".join(f"<th>{title}</th>" for title in titles)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def image(content: bytes, text: str, kind: str = "svg+xml") -> str:
    """A picture inside the page, and what it shows in words."""
    address = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return f'<div class="wide"><img alt="{escape(text)}" src="{address}"></div>'


def _list(items: Iterable[str]) -> str:
    lines = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f"<ul>{lines}</ul>" if lines else ""


def _paragraph(text: str) -> str:
    return f'<p class="dim">{escape(text)}</p>'
