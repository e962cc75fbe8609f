"""The only file that writes a study's results: JSON, CSV, PNG, and one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from ..bench import html
from ..bench.export import replace
from ..bench.figures import stack
from . import figures, findings, network, preface
from .arms import ARMS
from .results import Study, curves_csv, runs_csv
from .summary import NEAR, Arm, arms_of

TITLE = "Less computation, more stable training?"


def write(study: Study, folder: Path) -> list[str]:
    """Writes everything into the folder, each file at once; returns their names."""
    drawn = {name: stack([figure]) for name, figure in figures.drawn(study).items()}
    files: dict[str, str | bytes] = {
        "report.html": page(study, drawn),
        "results.json": study.to_json(),
        "runs.csv": runs_csv(study),
        "curves.csv": curves_csv(study),
        **{f"{name}.png": content for name, content in drawn.items()},
    }
    for name, content in files.items():
        replace(folder / name, content)
    return list(files)


def page(study: Study, drawn: dict[str, bytes]) -> str:
    """The whole report."""
    arms = arms_of(study)
    titles = {
        "rates": "Learning rates",
        "curves": "Training",
        "depth": "Depth",
        "batchnorm": "BatchNorm",
        "cost": "Cost",
    }
    tables = {
        "rates": _results(arms, study.setting.rehearsal) + _sweep(study, arms),
        "batchnorm": _leaks(arms),
        "cost": _times(study),
    }
    body = [
        f"<h1>{TITLE}</h1>",
        f'<p class="dim">{escape(where(study))}</p>',
        *(f"<p>{escape(text)}</p>" for text in (preface.preface(study.setting) if study.setting.rehearsal else ())),
        "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in findings.conclusions(study)) + "</ul>",
    ]
    for name, title in titles.items():
        if name in drawn:
            body.append(f"<h2>{title}</h2>{html.image(drawn[name], title, 'png')}")
            body.append(tables.get(name, ""))
    body += ["<h2>Method</h2>", *(f"<p>{escape(text)}</p>" for text in method(study))]
    return html.document(TITLE, body)


def where(study: Study) -> str:
    """What was run on, in one line."""
    here, setting = study.machine, study.setting
    return (
        f"{here['cpu']}, {here['cores']} cores, one thread per run · torch {setting.torch} · rmsnorm "
        f"{setting.rmsnorm}, CPU target {here['cpu_target']} · text: {setting.corpus} · {here['date'][:10]}"
    )


def method(study: Study) -> list[str]:
    """What was done, in words, with this study's numbers."""
    s = study.setting
    return [
        f"Model: transformers' LLaMA, {s.layers} layers, {s.width} wide, {s.heads} heads, trained to predict the next "
        f"byte from up to {s.context} bytes; every LlamaRMSNorm, the last one too, is replaced by the arm's norm. The "
        "arms of one seed have the same initial weights and the same batches.",
        f"Text: {s.corpus}, cut into stretches, the last tenth of each held out. Every run sees {s.tokens:,} bytes in "
        f"{s.steps} steps of {s.batch} windows, and is scored on the same {s.windows} held-out windows. A model that "
        f"knows only how frequent each byte is has a loss of {study.letters:.3f} nats per byte.",
        f"AdamW, betas {network.BETAS}, weight decay {network.DECAY} on matrices, rate up for a tenth of the steps, "
        "then down a cosine to a tenth. No gradient clipping, which would hide instability; no dropout.",
        f"Rates: a grid of factor {s.ratio:g} with seed 0, extended where the best rate is the last one or the highest "
        f"rate still trains. Then {s.seeds} other seeds at each arm's best rate: the seed that chose the rate has no "
        "say in the result. Bands are 95 % bands of the mean by Student's t; differences are taken seed by seed.",
        "A run is stable if its loss stays finite, doesn't stay above that of a uniform guess after the warm-up, and "
        "ends below that of letter frequencies.",
    ]


def _results(arms: dict[str, Arm], rehearsal: bool) -> str:
    rows = []
    for arm in arms.values():
        rows.append(
            (
                arm.title,
                "" if arm.best_rate is None else f"{arm.best_rate:g}{' (edge)' if arm.edge else ''}",
                findings.rate(arm),
                ", ".join(f"{rate:g}" for rate in arm.good_rates),
                str(arm.over_seeds("train_loss")),
                str(arm.held_out),
                findings.less_rms(arm, arms, rehearsal=rehearsal),
                str(arm.spikes),
            )
        )
    titles = (
        "norm",
        "best rate",
        "largest stable",
        f"within {NEAR} nats of the best",
        "training loss",
        "held-out loss",
    )
    return _table((*titles, "less RMSNorm", "largest gradient ÷ median"), rows)


def _sweep(study: Study, arms: dict[str, Arm]) -> str:
    tried = sorted({rate for arm in arms.values() for rate in arm.sweep})
    rows = []
    for arm in arms.values():
        cells = [arm.sweep.get(rate) for rate in tried]
        rows.append((arm.title, *("" if o is None else f"{o.held_out:.3f}" if o.stable else "failed" for o in cells)))
    return "<h3>Held-out loss of the sweep (seed 0)</h3>" + _table(("rate", *(f"{rate:g}" for rate in tried)), rows)


def _leaks(arms: dict[str, Arm]) -> str:
    places = ("future", "others", "itself")
    rows = [(arm.title, *(f"{arm.leak(place):.3g}" for place in places)) for arm in arms.values() if arm.seeds]
    titles = ("one later byte changed, in training mode: a logit moves by up to", "earlier positions", "other windows")
    return _table((*titles, "that position"), rows)


def _times(study: Study) -> str:
    if not study.timing:
        return ""
    steps, norms, rows = study.timing["steps"], study.timing["norms"], []
    for name, one in steps.items():
        against = one["ratios"].get("none")
        alone = norms.get(name)
        rows.append(
            (
                ARMS[name].title,
                f"{1e3 * one['median_s']:.1f} ms",
                f"{against[1]:.3f} ({against[0]:.3f} to {against[2]:.3f})",
                f"{1e3 * alone['median_s']:.2f} ms" if alone else "",
                f"{alone['median_s'] / one['median_s']:.1%}" if alone else "",
            )
        )
    theirs = norms["transformers"]["median_s"]
    rows.append(("LlamaRMSNorm (transformers)", "", "", f"{1e3 * theirs:.2f} ms", ""))
    return _table(
        ("norm", "step, median", "÷ step without norms (quartiles)", "norms alone", "share of the step"), rows
    )


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = (f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return html.table(map(escape, titles), lines)
