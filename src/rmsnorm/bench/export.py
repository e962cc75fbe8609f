"""The only file that writes results to files: JSON, CSV, HTML, PNG; beside the destination first, then renamed."""

from __future__ import annotations

import csv
import importlib.util
import io
import os
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from .results import Report


def to_csv(report: Report) -> str:
    """One line for each contender of each case."""
    text = io.StringIO()
    writer: csv.DictWriter[str] | None = None
    for result in report.results:
        for name, line in result.contenders.items():
            plain = asdict(line)
            low, high = plain.pop("quartiles_s")
            row = {**asdict(result.case), "contender": name, **plain, "quartile_low_s": low, "quartile_high_s": high}
            if writer is None:
                writer = csv.DictWriter(text, list(row), lineterminator="\n")
                writer.writeheader()
            writer.writerow(row)
    return text.getvalue()


def _html(report: Report) -> str:
    from .html import page

    return page(report)


def _png(report: Report) -> bytes:
    from .figures import png

    return png(report)


FORMATS: dict[str, Callable[[Report], str | bytes]] = {
    ".json": Report.to_json,
    ".csv": to_csv,
    ".html": _html,
    ".png": _png,
}
NEEDS_MATPLOTLIB = (".html", ".png")


def refusal(file: Path, *suffixes: str) -> str | None:
    """Why a file can't be written, or None: known before anything is measured."""
    if file.suffix not in suffixes and not file.is_dir():
        return f"{file.name} must end in {' or '.join(suffixes)}"
    if not file.parent.is_dir():
        return f"{file.parent} is not a directory; make it first"
    if file.suffix in NEEDS_MATPLOTLIB and importlib.util.find_spec("matplotlib") is None:
        return "figures need matplotlib: pip install 'rmsnorm[bench]'"
    return None


def write(report: Report, file: Path) -> Path:
    """Writes the report in the format that the suffix names; into a directory, as JSON under a name of its own."""
    if file.is_dir():
        file /= default_name(report)
    content = FORMATS[file.suffix](report)
    replace(file, content)
    return file


def replace(file: Path, content: str | bytes) -> None:
    """Writes beside the destination, then renames: nobody ever reads half a file."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def default_name(report: Report) -> str:
    """``<machine>-<date>.json``."""
    here = report.machine
    words = re.sub(r"[^a-z0-9]+", "-", f"{here['cpu']} {here['cores']} cores {here['cpu_target'] or 'no kernels'}".lower())
    return f"{words.strip('-')}-{here['date'][:10]}.json"
