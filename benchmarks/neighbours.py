"""Times each fused form beside the same steps one after the other, ours and other libraries': ratios, and the floor.

    python benchmarks/neighbours.py [FORM ...] [--threads 1,2] [--runs 3] [--seconds 1.5] [--write]

The floor is a copy of as many bytes as have to move, read and written, which takes turns with the others. Outputs are
compared before. Each run is a process for each number of threads, with the allocator settled as `rmsnorm bench` has it;
what is shown is the middle one of the runs' medians.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from neighbour_forms import Calls, heads, modulated, norm_add, quantised, sandwich
from neighbour_small import small
from processes import say, tensors_of, what_they_say, where

from rmsnorm.bench import pages, timing

PAGE = Path(__file__).parents[1] / "docs/performance/neighbours.md"
FLOOR = "floor"
Case = tuple[str, Calls, int]
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def quantised_cases() -> Iterator[Case]:
    for (dtype, kind), (rows, columns) in product(TYPES.items(), ((1, 4096), (512, 4096), (512, 576))):
        for residual in (False, True):
            name = "add + norm + int8" if residual else "norm + int8"
            yield f"{name} {rows}×{columns} {kind}", *quantised(rows, columns, dtype, residual)


def sandwich_cases() -> Iterator[Case]:
    for (dtype, kind), (rows, columns) in product(TYPES.items(), ((1, 4096), (512, 4096), (4096, 4096))):
        for back in (False, True):
            name = f"sandwich{' backward' * back} {rows}×{columns} {kind}"
            yield name, *sandwich(rows, columns, dtype, back)


def half_sandwich_cases() -> Iterator[Case]:
    for (dtype, kind), (rows, columns) in product(TYPES.items(), ((1, 4096), (512, 4096), (4096, 4096))):
        yield f"norm + add {rows}×{columns} {kind}", *norm_add(rows, columns, dtype)


def modulated_cases() -> Iterator[Case]:
    for (dtype, kind), sizes in product(TYPES.items(), ((1, 512, 4096), (1, 4096, 4096), (2, 1024, 1152))):
        for layer, added, back in product((True, False), (False, True), (False, True)):
            said = f"{'gated add, ' * added}{'layer' if layer else 'rms'}{' backward' * back}"
            yield f"{said} {'×'.join(map(str, sizes))} {kind}", *modulated(sizes, dtype, layer, added, back)


def heads_cases(normed: bool) -> Iterator[Case]:
    for (dtype, kind), tokens, back in product(TYPES.items(), (1, 512), (False, True)):
        yield f"{tokens} tokens{' backward' * back} {kind}", *heads(tokens, dtype, normed, back)


def small_cases() -> Iterator[Case]:
    for (dtype, kind), (rows, columns) in product(TYPES.items(), ((1, 4096), (512, 4096), (4096, 4096))):
        for name, calls, moved in small(rows, columns, dtype):
            yield f"{name} {rows}×{columns} {kind}", calls, moved


FORMS = {
    "quantised": quantised_cases,
    "sandwich": sandwich_cases,
    "norm_add": half_sandwich_cases,
    "heads": lambda: heads_cases(True),
    "rope": lambda: heads_cases(False),
    "modulated": modulated_cases,
    "small": small_cases,
}
BARS = {  # forward and backward, of one of the others; at one row of a sandwich it is the call that is timed
    "quantised": ("ours + torchao", 0.55, 0.6),
    "sandwich": ("rms_norm, +, rms_norm", 0.6, 0.6),
    "heads": ("Qwen3's", 0.4, 0.6),
    "modulated": ("torch's", 0.45, 0.6),
}


def check(name: str, calls: Calls) -> None:
    """All results alike: to 2^-6 of the largest, as some round less; bit for bit is the tests' business."""
    first, *others = (tensors_of(call()) for call in calls.values())
    for other in others:
        for a, b in zip(first, other, strict=True):
            apart = (a.double() - b.double()).abs().max()
            assert apart <= 2**-6 * b.double().abs().max() + 1e-6, (name, a, b)


def race(forms: Iterable[str], seconds: float) -> None:
    """One process: says a line for each case: times of all, and ours ÷ each, round by round."""
    for form in forms:
        for name, calls, moved in FORMS[form]():
            with torch.no_grad():
                check(name, calls)
                a, b = torch.zeros(moved // 2, dtype=torch.int8), torch.zeros(moved // 2, dtype=torch.int8)
                times = timing.measure({**calls, FLOOR: lambda a=a, b=b: b.copy_(a)}, seconds)
            own = times.pop("fused")
            say(form, name, own.median, {other: own.ratio(time) for other, time in times.items()})


def tables(lines: list[tuple[int, list[Any]]], threads: list[int]) -> str:
    """One for each form: a row for each case; in bold what misses its bar."""
    made = []
    for form in dict.fromkeys(line[0] for _, line in lines):
        mine = [(ran, line) for ran, line in lines if line[0] == form]
        others = list(dict.fromkeys(other for _, line in mine for other in line[3]))
        others = [*(o for o in others if o != FLOOR), FLOOR]
        titles = [form]
        for count in threads:
            titles += [f"{count} thread{'s' * (count > 1)}", *(f"÷ {other}" for other in others)]
        rows = []
        for name in dict.fromkeys(line[1] for _, line in mine):
            row = [name]
            for count in threads:
                runs = [line for ran, line in mine if ran == count and line[1] == name]
                row.append(timing.human(statistics.median(run[2] for run in runs)))
                row += [cell(form, name, other, [run[3].get(other) for run in runs]) for other in others]
            rows.append(row)
        made.append(pages.table(titles, rows))
    return "\n".join(made)


def cell(form: str, name: str, other: str, ratios: list[float | None]) -> str:
    found = [ratio for ratio in ratios if ratio is not None]
    if not found:
        return ""
    ratio = statistics.median(found)
    against, forward, backward = BARS.get(form, ("", 0.0, 0.0))
    call = form == "sandwich" and " 1×" in name
    missed = other == against and not call and ratio > (backward if "backward" in name else forward)
    return f"**{ratio:.2f}**" if missed else f"{ratio:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("forms", nargs="*", help=", ".join(FORMS))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5, help="for each case of a run")
    parser.add_argument("--write", action="store_true", help="into docs/performance/neighbours.md")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    forms = given.forms or list(FORMS)
    if unknown := set(forms) - set(FORMS):
        parser.error(f"no form {', '.join(sorted(unknown))}: choose from {', '.join(FORMS)}")
    if given.one:
        race(forms, given.seconds)
        return
    threads = [int(count) for count in given.threads.split(",")]
    head = f"{where()}, {given.runs} runs."
    text = tables(list(what_they_say(__file__, given.runs, threads)), threads)
    print(f"{head}\n\n{text}")
    if given.write:
        pages.replace_block(PAGE, "neighbours: made by `python benchmarks/neighbours.py --write`", f"{head}\n\n{text}")


if __name__ == "__main__":
    main()
