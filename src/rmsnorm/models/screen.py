"""The only file that shows what `rmsnorm patch` does, and what it found, in a terminal."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..bench.console import mebibytes
from ..bench.fitting import Fitted, add_numbers, kept
from ..bench.timing import human
from .comparison import Comparison
from .report import PatchReport
from .workload import Memory, Speed

MOST_OUTPUTS = 6
NO_DIFFERENCE = "no difference measurable"


class Doing:
    """Says what is being done, on a terminal and while it lasts; elsewhere nothing."""

    def __init__(self) -> None:
        # One refresh a second: its thread must not take time from what is being timed.
        self._status = Console(stderr=True).status("", refresh_per_second=1)

    def __call__(self, what: str) -> None:
        self._status.update(escape(what) + " …")
        self._status.start()

    def done(self) -> None:
        """Clears the line: before anything is printed, and at the end."""
        self._status.stop()


def nothing(report: PatchReport, layer_norms: int) -> str:
    """Why there is nothing to compare, and what would change that; ``layer_norms`` is what --layer-norm would take."""
    norms = sum(" not fused: " not in entry.reason for entry in report.skipped)  # the others are layers
    if not norms:
        return "Nothing was patched: this model has no norm."
    text = f"Nothing was patched: none of its {norms} norms is an RMS norm that is known here."
    return f"{text} --layer-norm would take {layer_norms} of them." if layer_norms else text


def said(result: Comparison, tokenizer: Any, text: str) -> Iterator[str]:
    """What the model said before and after, in lines."""
    differences, numbers = result.differences(), result.numbers()
    if tokenizer is None and result.before.written:
        yield "no tokenizer for this model: it reads bytes as tokens, and writes numbers"
    for name, (apart, size) in list(differences.items())[:MOST_OUTPUTS]:
        yield f"{name}: differ by at most {apart:.1e}, among values up to {size:.4g}"
    if len(differences) > MOST_OUTPUTS:
        worst = max(apart for apart, _ in differences.values())
        yield f"and {len(differences) - MOST_OUTPUTS} more outputs; of all, the largest difference is {worst:.1e}"
    if "loss_before" in numbers:
        before, after, count = (numbers[name] for name in ("loss_before", "loss_after", "scored_tokens"))
        over = f"over {count} tokens of {text}; apart by {abs(after - before):.1e}"
        yield f"loss per token: {before:.6f} → {after:.6f}, {over}"
    if "written_tokens" in numbers:
        yield f"greedy text: {numbers['same_tokens']} of {numbers['written_tokens']} tokens alike"
        sides = {"before": result.before.written, "after": result.after.written}
        if sides["before"] == sides["after"]:
            sides = {"before and after": sides["before"]}
        for when, written in sides.items():
            yield f"  {when}: {_text(written, tokenizer)}"


def _text(written: list[int], tokenizer: Any) -> str:
    if tokenizer is None:
        return "tokens " + " ".join(map(str, written))
    return repr(tokenizer.decode(written))  # in one line, with its breaks visible


def times(speeds: Mapping[str, Speed]) -> Fitted:
    """A line for each kind of work."""
    titles = "before", "quartiles", "after", "quartiles ", "tokens/s", "time after ÷ before"

    def make(gone: Collection[str]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        table.add_column("in turns, medians", min_width=13)
        add_numbers(table, titles, gone)
        for name, speed in speeds.items():
            cells = [
                cell for side in (speed.before, speed.after) for cell in (human(side.median), human(*side.quartiles))
            ]
            cells += [
                " → ".join(f"{one:,.{1 if one < 100 else 0}f}" for one in speed.per_second) if speed.tokens else "",
                ratio(speed),
            ]
            what = f"{name}, {speed.tokens} token{'s' * (speed.tokens > 1)}" if speed.tokens else name
            table.add_row(what, *kept(titles, cells, gone))
        return table

    return Fitted(make, ("tokens/s", "quartiles|quartiles "))


def ratio(speed: Speed) -> str:
    """After ÷ before with its quartiles, or that the noise is larger."""
    low, high = speed.ratio_quartiles
    return f"{speed.ratio:.3f} ({low:.3f}–{high:.3f})" if speed.measurable else NO_DIFFERENCE


def memory(found: Mapping[str, Memory]) -> Iterator[str]:
    """What a training step keeps and holds, in lines."""
    before, after = found["before"], found["after"]
    for name, attribute in (("kept for backward", "kept"), ("peak of a training step", "peak")):
        sizes = [getattr(side, attribute) for side in (before, after)]
        factor = f", × {sizes[1] / sizes[0]:.3f}" if sizes[0] else ""
        yield f"{name}: {mebibytes(sizes[0])} → {mebibytes(sizes[1])}{factor}"
