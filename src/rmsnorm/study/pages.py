"""The only file that publishes a study: docs/study/, README, docs/explained and the lesson; ``make study``.

No number in them is typed by hand: all come from the folder that ``rmsnorm study`` wrote.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from ..bench.export import replace
from ..bench.pages import replace_block, table
from . import findings, report
from .arms import ARMS
from .results import Study
from .summary import arms_of, difference

LABEL = "made by `make study`"
WIDTH = 118


def about(study: Study) -> str:
    """What was run on what, in two sentences."""
    here, s = study.machine, study.setting
    return (
        f"`rmsnorm study`, {here['date'][:10]}, {here['cpu']}, one thread per run, CPU target {here['cpu_target']}, "
        f"torch {s.torch}, rmsnorm {s.rmsnorm}. A LLaMA of {s.layers} layers, {s.width} wide, reads "
        f"{s.tokens / 1e6:.2f} million bytes of the text `{s.corpus}` with each norm; {s.seeds} seeds at each norm's "
        "own best learning rate; bands are 95 %."
    )


VERDICTS = {
    "worse": "更差",
    "better": "更好",
    "within noise": "在噪声之内",
    "too few seeds to say": "种子太少，无法判断",
}
"""Of a difference, in Chinese."""
COLUMNS = {
    "norm": "归一化",
    "best rate": "最佳学习率",
    "largest stable rate": "最大稳定学习率",
    "held-out loss": "留出集损失",
    "less RMSNorm": "减去 RMSNorm 的",
}
IN_CHINESE = {
    **COLUMNS,
    **VERDICTS,
    "no norm": "不归一化",
    "RMSNorm, no weight": "RMSNorm，无权重",
    "pRMSNorm, 1/16": "pRMSNorm，1/16",
    "none": "没有",
}
"""What the table of :func:`results` says; names of norms are what they are."""


def results(study: Study, words: Mapping[str, str] = MappingProxyType({})) -> str:
    """A line for each arm, in the words of a language."""
    arms, rows = arms_of(study), []
    for arm in arms.values():
        best = "" if arm.best_rate is None else f"{arm.best_rate:g}"
        number, comma, verdict = findings.less_rms(arm, arms).partition(", ")
        apart = number + ("，" if words else comma) * bool(comma) + words.get(verdict, verdict)
        named, rate = (words.get(one, one) for one in (arm.title, findings.rate(arm)))
        rows.append((named, best, rate, str(arm.held_out), apart))
    return table([words.get(title, title) for title in COLUMNS], rows)


BRIEF = {
    "README.md": (
        "{made}: held-out loss, RMSNorm − LayerNorm = {loss} nats per byte, {quality}; a training step takes "
        '{low:.3f} to {high:.3f} of the time of one with LayerNorm: "less computation" is {less}, '
        '"more stable training" is {stable}.',
        {},
    ),
    "README.zh-CN.md": (
        "{made}：留出集损失，RMSNorm − LayerNorm = {loss} nats/字节（{quality}；越小越好）；"
        "一个训练步的时间是 LayerNorm 的 {low:.3f} 到 {high:.3f} 倍：“计算更少”{less}，“训练更稳定”{stable}。",
        {
            **VERDICTS,
            "supported": "得到支持",
            "not supported": "没有得到支持",
            "contradicted": "被否定",
            "open": "尚无定论",
        },
    ),
}
"""What README says of a study, by language: a sentence, and the words of its verdicts."""


def readme(study: Study, name: str) -> str:
    """The findings for README.md or its twin: quality, cost and stability in one sentence."""
    arms, (sentence, words) = arms_of(study), BRIEF[name]
    apart = difference(arms["rms"], arms["layer"])
    ratios = findings.step_ratios(study)
    assert ratios is not None  # write() refuses a study without timing
    low, _, high = ratios
    verdicts = findings.verdict(apart), findings.computation(study), findings.stability(study, arms)
    quality, less, stable = (words.get(one, one) for one in verdicts)
    made = f"`rmsnorm study`, {study.machine['date'][:10]}, {study.machine['cpu']}, torch {study.setting.torch}"
    return filled(
        sentence.format(made=made, loss=apart.signed, quality=quality, low=low, high=high, less=less, stable=stable)
    )


def page(study: Study, names: list[str]) -> str:
    """docs/study/README.md."""
    paragraphs = [
        "# Less computation, more stable training?",
        filled(
            f"{about(study)} [report.html](report.html) has all figures, tables and the method; "
            f"{', '.join(f'`{name}`' for name in names if not name.endswith(('.png', '.html')))} have the data. "
            "This folder is written by `make study`, with every number in it."
        ),
        "\n".join(filled(f"- {line}", "  ") for line in findings.conclusions(study)),
        results(study).rstrip(),
        *(f"![{Path(name).stem}]({name})" for name in names if name.endswith(".png")),
        "## Method",
        *(filled(text) for text in report.method(study)),
        filled(f"The arms, by the names of `--arms`: {', '.join(f'`{name}` {ARMS[name].title}' for name in ARMS)}."),
    ]
    return "\n\n".join(paragraphs) + "\n"


def explained(study: Study, words: Mapping[str, str]) -> str:
    """The evidence in docs/explained.md or its twin: the table and a figure."""
    return f"{results(study, words).rstrip()}\n\n![rates](study/rates.png)\n"


def lesson(study: Study) -> str:
    """What the tutorial draws of a study, as JSON: by arm, means with their bands, and rates."""
    arms = arms_of(study)
    seen = {
        name: {
            "loss": [arm.held_out.mean, arm.held_out.band],
            "difference": [apart.mean, apart.band]
            if (apart := difference(arm, arms["rms"])) and name != "rms"
            else [0, 0],
            "stable": arm.largest_stable,
            "at_least": arm.open_end,
        }
        for name, arm in arms.items()
    }
    whole = {"date": study.machine["date"][:10], "seeds": study.setting.seeds, "step": findings.step_ratios(study)}
    return json.dumps({**whole, "arms": seen}, indent=1) + "\n"


def filled(text: str, indent: str = "") -> str:
    """Lines of the width of the other pages."""
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


def write(folder: Path, root: Path = Path()) -> None:
    """Publishes the study in a folder.

    Raises:
        ValueError: it is unfinished, or there is none.
    """
    study = Study.load(folder / "results.json")
    if not study.complete or not study.timing:
        raise ValueError(f"{folder} holds an unfinished study; go on with `rmsnorm study --out {folder} --resume`")
    place = root / "docs" / "study"
    place.mkdir(parents=True, exist_ok=True)
    names = report.write(study, place)
    replace(place / "README.md", page(study, names))
    replace(root / "src" / "rmsnorm" / "tutorial" / "study.json", lesson(study))
    for name in BRIEF:
        replace_block(root / name, LABEL, readme(study, name))
    for twin, words in {"explained.md": {}, "explained.zh.md": IN_CHINESE}.items():
        replace_block(root / "docs" / twin, LABEL, explained(study, words))


if __name__ == "__main__":
    write(Path(*sys.argv[1:2]))
