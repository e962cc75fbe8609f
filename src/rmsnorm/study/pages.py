"""The only file that publishes a study: docs/study/, the findings in README.md and docs/explained, ``make study``.

No number in them is typed by hand: all come from the folder that ``rmsnorm study`` wrote.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

from ..bench.export import replace
from ..bench.pages import replace_block, table
from . import findings, report
from .arms import ARMS
from .results import Study
from .summary import arms_of

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


def results(study: Study) -> str:
    """A line for each arm."""
    arms, rows = arms_of(study), []
    for arm in arms.values():
        best = "" if arm.best_rate is None else f"{arm.best_rate:g}"
        rows.append((arm.title, best, findings.rate(arm), str(arm.held_out), findings.less_rms(arm, arms)))
    return table(("norm", "best rate", "largest stable rate", "held-out loss", "less RMSNorm"), rows)


def readme(study: Study) -> str:
    """The findings for README.md: quality, stability, cost, BatchNorm, and one figure."""
    lines = [f"- {line}" for line in findings.headlines(study)]
    text = "\n".join([filled(about(study)), "", *(filled(line, "  ") for line in lines)])
    return (
        f"{text}\n\n![Held-out loss by learning rate and norm, and the seeds at the best rates](docs/study/rates.png)\n"
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


def explained(study: Study) -> str:
    """The evidence in docs/explained.md, and in Chinese: the table and a figure, which need no words."""
    return f"{results(study).rstrip()}\n\n![rates](study/rates.png)\n"


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
    replace_block(root / "README.md", LABEL, readme(study))
    for twin in ("explained.md", "explained.zh.md"):
        replace_block(root / "docs" / twin, LABEL, explained(study))


if __name__ == "__main__":
    write(Path(*sys.argv[1:2]))
