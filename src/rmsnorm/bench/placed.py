"""The only file that knows who came first, on which machines, and which results are the newest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .pages import table
from .results import Report, first


def where(report: Report) -> str:
    """What was measured on, in one sentence."""
    here = report.machine
    return (
        f"{here['cpu']}, {here['cores']} cores, CPU target {here['cpu_target']}, huge pages: {here['huge_pages']}, "
        f"torch {here['torch']}, {here['date'][:10]}"
    )


def rms_norms(report: Report) -> list[str]:
    """The implementations of RMSNorm that were timed, ours first."""
    timed = (one for result in report.results for one in result.contenders.items())
    return list(dict.fromkeys(name for name, line in timed if line.is_rms_norm))


def lost(report: Report) -> str:
    """The cases that somebody else won."""
    won, contested, cases = first(report.results)
    rows = [[f"{case}, {case.threads} threads", name, f"{ratio:.2f}"] for case, name, ratio in cases]
    text = f"First in {won} of {contested} cases, against {', '.join(rms_norms(report)[1:])}. {where(report)}.\n"
    return text + ("\n" + table(("not in", "the first is", "rmsnorm ÷ it"), rows) if rows else "")


def won_elsewhere(report: Report, others: Sequence[Report]) -> str:
    """The same of other machines on which the same libraries were timed, in a line each."""
    lines = []
    for other in others:
        if set(rms_norms(other)) >= set(rms_norms(report)):
            won, contested, cases = first(other.results)
            beaten = ", ".join(f"{case}, {case.threads} threads ({name} {ratio:.2f})" for case, name, ratio in cases)
            lines.append(f"- First in {won} of {contested}: {where(other)}. Not in {beaten or 'none'}.\n")
    return "".join(lines) or "No other machine yet.\n"


def _results(folder: Path) -> list[Path]:
    """The latest last, by the dates in their names."""
    found = [file for file in folder.glob("*.json") if not file.stem.endswith("-bars")]
    return sorted(found, key=lambda file: (file.stem[-10:], file.stem))


def newest(folder: Path) -> Path:
    """The results with the latest date in their names.

    Raises:
        FileNotFoundError: there are none.
    """
    if not (found := _results(folder)):
        raise FileNotFoundError(f"{folder} has no results; run `make results` first")
    return found[-1]


def newest_elsewhere(results: Path) -> list[Path]:
    """The newest results of each other machine in that folder."""
    by_machine = {file.stem[:-10]: file for file in _results(results.parent)}
    return [file for name, file in by_machine.items() if name != results.stem[:-10]]
