"""The only file that writes results to files: JSON, CSV, HTML, PNG; beside the destination first, then renamed."""

from __future__ import annotations

import csv
import importlib.util
import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .._extras import extra_line
from .results import Report


def to_csv(report: Report) -> str:
    """One line for each contender of each case."""
    rows = []
    for result in report.results:
        for name, line in result.contenders.items():
            plain = asdict(line)
            low, high = plain.pop("quartiles_s")
            ends = {"quartile_low_s": low, "quartile_high_s": high}
            rows.append({**asdict(result.case), "contender": name, **plain, **ends})
    return csv_of(rows)


def csv_of(rows: Sequence[Mapping[str, object]]) -> str:
    """The rows below a line of the first one's names; nothing for no rows."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
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
    if file.suffix not in suffixes and not (os.path.isdir(file) and ".json" in suffixes):
        return f"{file.name} must end in {' or '.join(suffixes)}"
    if reason := closed(file):
        return reason
    if file.suffix in NEEDS_MATPLOTLIB and importlib.util.find_spec("matplotlib") is None:
        return f"figures need matplotlib: {extra_line('bench')}"
    return None


def closed(file: Path) -> str | None:
    """Why there can be no file in its directory, or None."""
    with suppress(PermissionError):  # of a directory above, which keeps us out: then this can't be written to either
        if not file.parent.is_dir():
            return f"{file.parent} is not a directory; make it first"
    if not os.access(file.parent, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        return f"{file.parent} can't be written to; choose another directory"
    return None


def write(report: Report, file: Path) -> Path:
    """Writes the report in the format that the suffix names; into a directory, as JSON under a name of its own."""
    file = in_directory(file, report.machine)
    replace(file, FORMATS[file.suffix](report))
    return file


def in_directory(file: Path, machine: dict[str, Any], ending: str = ".json") -> Path:
    """The file, or ``<machine>-<date><ending>`` in it if it is a directory."""
    if not file.is_dir():
        return file
    words = f"{machine['cpu']} {machine['cores']} cores {machine['cpu_target'] or 'no kernels'}"
    return file / f"{re.sub(r'[^a-z0-9]+', '-', words.lower()).strip('-')}-{machine['date'][:10]}{ending}"


def replace(file: Path, content: str | bytes) -> None:
    """Writes beside the destination, synchronises, then renames: after a power cut, too, nobody reads half a file."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as out:
            out.write(content.encode() if isinstance(content, str) else content)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
