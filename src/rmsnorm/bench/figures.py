"""The only file that draws: bandwidth reached against size, and time ÷ time for each case; matplotlib, no display.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; markers differ too, and ours is the thick line.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from .cases import Case
from .results import FLOOR, OURS, Report, Result

# Colour and marker by name: the same in every figure, whoever takes part.
STYLES = {
    OURS: ("#D55E00", "o"),
    "F.rms_norm": ("#0072B2", "s"),
    "torch.compile": ("#56B4E9", "^"),
    "F.layer_norm": ("#E69F00", "v"),
    "rmsnorm.layer_norm": ("#CC79A7", "o"),
    "transformers": ("#009E73", "D"),
    "onnxruntime": ("#8C564B", "P"),
    "openvino": ("#7F7F7F", "X"),
    "jax": ("#B8A800", "*"),
    "mlx": ("#5A3E9B", "p"),
    FLOOR: ("#000000", "_"),
}
WIDTH = 9.0
FLOOR_LABEL = "copy_ (floor)"
RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.7,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "svg.fonttype": "path",
}
TITLES = {
    "forward": "forward, fresh output",
    "warm": "forward, out=",
    "add": "add + norm",
    "recorded": "recorded forward",
}
RATIOS = (1 / 256, 1 / 64, 1 / 16, 1 / 4, 1 / 2, 1, 2, 4, 16)


def png(report: Report) -> bytes:
    """Both figures, one below the other, for the most threads."""
    if not report.results:
        empty = Figure(figsize=(WIDTH, 1.0))
        empty.text(0.01, 0.5, "Nothing was measured.")
        return stack([empty])
    threads = max(report.threads())
    return stack([roofline(report, threads), ratios(report, threads)])


def svg(figure: Figure) -> bytes:
    return _saved(figure, "svg")


def roofline(report: Report, threads: int, tasks: Sequence[str] | None = None) -> Figure:
    """GB/s against the size of the input: a line of panels for each task, one for each dtype."""
    results = [one for one in report.results if one.case.threads == threads]
    dtypes = list(dict.fromkeys(one.case.dtype for one in results))
    tasks = [task for task in dict.fromkeys(one.case.task for one in results) if tasks is None or task in tasks]
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(WIDTH, 2.6 * len(tasks) + 1.1), layout="constrained")
        panels = figure.subplots(len(tasks), len(dtypes), squeeze=False, sharey=True)
        for task, line in zip(tasks, panels, strict=True):
            for dtype, axes in zip(dtypes, line, strict=True):
                some = [one for one in results if (one.case.dtype, one.case.task) == (dtype, task)]
                _bandwidth(axes, sorted(some, key=lambda one: one.case.tensor_bytes))
                axes.set_title(f"{TITLES.get(task, task)}, {dtype}")
            line[0].set_ylabel("GB/s")
        figure.suptitle(f"Bandwidth reached, {_threads(threads)} (higher is better)", x=0.01, ha="left", weight="bold")
        shown = _names([one for one in results if one.case.task in tasks])
        _legend(figure, [name for name in report.contenders() if name in shown])
        return figure


def _bandwidth(axes: Axes, results: Sequence[Result]) -> None:
    places = range(len(results))
    for name in _names(results):
        speeds = [one.contenders[name].gb_per_s if name in one.contenders else float("nan") for one in results]
        colour, marker = STYLES.get(name, ("#444444", "."))
        if name == FLOOR:
            axes.plot(places, speeds, color=colour, linestyle=(0, (2, 2)), linewidth=1.2, zorder=1)
        else:
            width = 2.6 if name == OURS else 1.1
            axes.plot(
                places, speeds, color=colour, marker=marker, markersize=4.5, linewidth=width, zorder=2 + (name == OURS)
            )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(list(places), [f"{one.case.shape}\n{size(one.case)}" for one in results], fontsize=6.5)
    axes.set_xlim(-0.3, len(results) - 0.7)


def ratios(report: Report, threads: int, cases: Sequence[Case] | None = None) -> Figure:
    """The time of ours ÷ that of each other, a line of dots for each case."""
    results = [one for one in report.results if one.case.threads == threads and (cases is None or one.case in cases)]
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(WIDTH, 0.24 * len(results) + 1.5), layout="constrained")
        axes = figure.subplots()
        for place, result in enumerate(results):
            found = [(name, ratio) for name, ratio in result.ratios().items() if name != FLOOR]
            axes.plot([min([1.0, *(r for _, r in found)]), 1.0], [place, place], color="#DDDDDD", linewidth=1, zorder=1)
            for name, ratio in found:
                colour, marker = STYLES.get(name, ("#444444", "."))
                axes.plot(ratio, place, marker, color=colour, markersize=5.5, zorder=3, alpha=0.9)
        axes.axvline(1, color="#000000", linewidth=1, zorder=2)
        axes.set_xscale("log", base=2)
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(FixedLocator([r for r in RATIOS if low <= r <= high] or [1]))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:g}" if value >= 1 else f"1/{1 / value:g}")
        )
        axes.set_yticks(range(len(results)), [str(one.case) for one in results], fontsize=7.5)
        axes.set_ylim(len(results) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("left of the line, rmsnorm is faster")
        title = f"Time of rmsnorm ÷ time of the other, {_threads(threads)}"
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
        _legend(figure, [name for name in _names(results) if name not in (OURS, FLOOR)])
        return figure


def _names(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(name for one in results for name in one.contenders))


def _legend(figure: Figure, names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for name in names:
        colour, marker = STYLES.get(name, ("#444444", "."))
        look: dict[str, Any] = {"marker": marker, "linewidth": 2.6 if name == OURS else 1.1}
        if name == FLOOR:
            look = {"linestyle": (0, (2, 2)), "linewidth": 1.2}
        handles.append(Line2D([], [], color=colour, label=FLOOR_LABEL if name == FLOOR else name, markersize=5, **look))
    figure.legend(handles=handles, loc="outside lower left", ncols=4, fontsize=8)


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def size(case: Case) -> str:
    """The bytes of one tensor, in words."""
    unit, name = next(
        (u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B")) if case.tensor_bytes >= u
    )
    return f"{case.tensor_bytes / unit:.3g} {name}"


def stack(figures: Sequence[Figure]) -> bytes:
    """Several figures as one PNG."""
    from PIL import Image

    images = [Image.open(io.BytesIO(_saved(figure, "png"))) for figure in figures]
    whole = Image.new("RGB", (max(i.width for i in images), sum(i.height for i in images)), "white")
    for number, image in enumerate(images):
        whole.paste(image, (0, sum(i.height for i in images[:number])))
    out = io.BytesIO()
    whole.quantize(96).save(out, "PNG", optimize=True)  # a few colours and their edges: a quarter of the bytes
    return out.getvalue()


def _saved(figure: Figure, kind: str) -> bytes:
    out = io.BytesIO()
    with matplotlib.rc_context(RC):
        figure.savefig(out, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    return out.getvalue()
