"""The only file that draws the study: rates, curves, depth, BatchNorm, cost; matplotlib, no display.

Colours are Okabe and Ito's, which stay apart for colour-blind readers, and markers differ too. Bands over seeds are the
95 % band of the mean (bars) or the lowest and highest of the seeds (shaded), as each figure says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ..bench.figures import RC, WIDTH
from .arms import ARMS
from .results import Study, thin
from .summary import Arm, arms_of, envelope

STYLES = {
    "none": ("#000000", "P"),
    "batch": ("#E69F00", "s"),
    "layer": ("#0072B2", "v"),
    "rms": ("#D55E00", "o"),
    "rms-plain": ("#CC79A7", "D"),
    "prms": ("#009E73", "^"),
    "transformers": ("#7F7F7F", "h"),
}
Arms = dict[str, Arm]


def _figure(title: str, height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=11)
    return figure


def _look(name: str) -> dict[str, Any]:
    colour, marker = STYLES[name]
    return {"color": colour, "marker": marker, "markersize": 5, "linewidth": 2.4 if name == "rms" else 1.2}


def rates(study: Study, arms: Arms) -> Figure:
    """Held-out loss against the learning rate, and the seeds at each arm's best."""
    figure = _figure("Every norm at every learning rate, and at its own best one", 4.1)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _rates(left, study, arms)
    _seeds(right, [arm for arm in arms.values() if arm.seeds])
    _legend(figure, left)
    return figure


def _rates(axes: Axes, study: Study, arms: Arms) -> None:
    top = study.letters
    losses = [o.held_out for arm in arms.values() for o in arm.sweep.values() if o.held_out is not None and o.stable]
    low = min(losses, default=top - 1)
    failed = top + 0.06 * (top - low)
    for place, (name, arm) in enumerate(arms.items()):
        good = [(rate, one.held_out) for rate, one in arm.sweep.items() if one.stable]
        axes.plot([r for r, _ in good], [loss for _, loss in good], label=arm.title, **_look(name))  # type: ignore[arg-type]
        bad = [rate for rate, one in arm.sweep.items() if not one.stable]
        height = failed + place * 0.055 * (top - low)
        axes.plot(bad, [height] * len(bad), linestyle="none", marker="x", markersize=5, color=STYLES[name][0])
    axes.axhline(top, color="#888888", linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_xscale("log", base=2)
    tried = sorted({rate for arm in arms.values() for rate in arm.sweep})
    axes.set_xticks(tried, [f"{rate:.3g}" for rate in tried], rotation=45, fontsize=7)
    axes.set_xlabel("learning rate (peak)")
    axes.set_ylabel("held-out loss, nats per byte")
    axes.set_title("the sweep, seed 0 (dashed: letter frequencies; ×: failed)")


def _seeds(axes: Axes, arms: Sequence[Arm]) -> None:
    for place, arm in enumerate(arms):
        colour, marker = STYLES[arm.name]
        values = arm.held_out.values
        axes.plot(
            values, [place] * len(values), linestyle="none", marker=marker, color=colour, markersize=4, alpha=0.55
        )
        axes.errorbar(
            arm.held_out.mean, place + 0.28, xerr=arm.held_out.band, fmt=marker, color=colour, capsize=3, markersize=6
        )
    axes.set_yticks(range(len(arms)), [f"{arm.title}\nat {arm.best_rate:g}" for arm in arms], fontsize=7.5)
    axes.set_ylim(len(arms) - 0.4, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("held-out loss, nats per byte")
    axes.set_title("at its best rate: seeds, mean, 95 % band")


def curves(study: Study, arms: Arms) -> Figure:
    """Training loss and gradient norm, step by step."""
    figure = _figure("Training at each arm's best rate (line: mean of the seeds; shade: lowest to highest)", 3.9)
    panels = figure.subplots(1, 2)
    fields = ("losses", "gradient_norms")
    for axes, field, label in zip(panels, fields, ("training loss, nats per byte", "gradient norm"), strict=True):
        for name, arm in arms.items():
            thinned = [thin(getattr(one, field), 40) for one in arm.seeds.values() if one.losses]
            if thinned:
                steps = [step for step, _ in thinned[0]]
                mean, low, high = envelope([[value for _, value in curve] for curve in thinned])
                axes.plot(steps, mean, color=STYLES[name][0], linewidth=_look(name)["linewidth"], label=arm.title)
                axes.fill_between(steps, low, high, color=STYLES[name][0], alpha=0.15, linewidth=0)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
    panels[1].set_yscale("log")
    _plain(panels[1])
    _legend(figure, panels[0])
    return figure


def depth(study: Study, arms: Arms) -> Figure:
    """Activations and gradients by layer, at the first step and at the last."""
    figure = _figure("Layer by layer, at the best rate (mean of the seeds; shade: lowest to highest)", 3.6)
    panels = figure.subplots(1, 4, sharex=True)
    kinds = [(look, field) for field in ("activation", "gradient") for look in (0, -1)]
    for axes, (look, field) in zip(panels, kinds, strict=True):
        for name, arm in arms.items():
            seen = [one.layers[look][field] for one in arm.seeds.values() if one.layers]
            if seen:
                mean, low, high = envelope(seen)
                layers = range(1, len(mean) + 1)
                axes.plot(layers, mean, label=arm.title, **_look(name))
                axes.fill_between(layers, low, high, color=STYLES[name][0], alpha=0.15, linewidth=0)
        axes.set_yscale("log")
        _plain(axes)
        axes.set_xticks(range(1, study.setting.layers + 1))
        axes.set_xlabel("layer")
        axes.set_title(f"{'rms' if field == 'activation' else 'gradient norm'}, {'last' if look else 'first'} step")
    _legend(figure, panels[0])
    return figure


def batch_norm(study: Study, arms: Arms) -> Figure:
    """BatchNorm's three held-out losses, with RMSNorm's beside them."""
    figure = _figure("BatchNorm: whose mean and variance? (dots: seeds; bar: 95 % band of the mean)", 2.4)
    axes = figure.subplots()
    lines = [
        ("running averages (evaluation)", arms["batch"].statistics("running"), "batch"),
        ("estimated anew after training", arms["batch"].statistics("estimated"), "batch"),
        ("the batch's own, future included (training)", arms["batch"].statistics("batch"), "batch"),
    ]
    if "rms" in arms and arms["rms"].seeds:
        lines.append(("RMSNorm: none needed", arms["rms"].held_out, "rms"))
    for place, (_, spread, name) in enumerate(lines):
        colour, marker = STYLES[name]
        axes.plot(spread.values, [place] * len(spread.values), marker, color=colour, markersize=4, alpha=0.55)
        axes.errorbar(spread.mean, place + 0.25, xerr=spread.band, fmt=marker, color=colour, capsize=3, markersize=6)
    axes.set_yticks(range(len(lines)), [line[0] for line in lines])
    axes.set_ylim(len(lines) - 0.4, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("held-out loss, nats per byte")
    return figure


def cost(study: Study, arms: Arms) -> Figure:
    """The time of a step, and of the norms alone."""
    assert study.timing
    figure = _figure("Time on one thread (median; bar: quartiles)", 2.9)
    panels = figure.subplots(1, 2)
    titles = {name: arm.title for name, arm in ARMS.items()} | {"transformers": "LlamaRMSNorm (transformers)"}
    for axes, part in zip(panels, ("steps", "norms"), strict=True):
        found = study.timing[part]
        for place, (name, one) in enumerate(found.items()):
            low, high = (1e3 * seconds for seconds in one["quartiles_s"])
            middle = 1e3 * one["median_s"]
            errors = [[middle - low], [high - middle]]
            axes.barh(place, middle, color=STYLES[name][0], alpha=0.75, height=0.65, xerr=errors, capsize=3)
        axes.set_yticks(range(len(found)), [titles[name] for name in found], fontsize=7.5)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("milliseconds")
    panels[0].set_title("a training step")
    panels[1].set_title(f"its {study.timing['norms_in_a_step']} norms alone, forward and backward")
    return figure


def _plain(axes: Axes) -> None:
    """Numbers instead of powers on a logarithmic axis, three to a decade."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=6, fontsize=7.5)


def drawn(study: Study) -> dict[str, Figure]:
    """The figures that the study has data for, by name."""
    arms = arms_of(study)
    trained = any(arm.seeds for arm in arms.values())
    wanted: dict[str, tuple[Callable[[Study, Arms], Figure], bool]] = {
        "rates": (rates, any(arm.sweep for arm in arms.values())),
        "curves": (curves, trained),
        "depth": (depth, trained),
        "batchnorm": (batch_norm, "batch" in arms and bool(arms["batch"].seeds)),
        "cost": (cost, bool(study.timing)),
    }
    with matplotlib.rc_context(RC):
        return {name: draw(study, arms) for name, (draw, possible) in wanted.items() if possible}
