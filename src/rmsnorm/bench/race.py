"""The only file that runs a race: binds the contenders, checks that they agree, then lets the clock decide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import peers, timing
from .cases import Case
from .contenders import BY_NAME, EPS, Call, Contender, Problem
from .results import Result, lines

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3, "float64": 1e-13}
"""Largest difference to torch's result, relative to its largest element: a few roundings of the type."""

SETTLE = 0.003
"""Seconds of its own calls before a contender's sample where thread pools are mixed. libgomp's threads, which are
torch's, spin for milliseconds before they sleep, on a core that onnxruntime or MLX needs: 23 µs instead of 15."""


def race(case: Case, contenders: Sequence[Contender], seconds: float) -> Result:
    """Checks that the contenders agree with ``F.rms_norm``, then times them.

    Raises:
        ArithmeticError: they don't agree; a faster wrong answer is not a result. Contenders that depend on more than
            torch are left out instead, with that as the reason.
    """
    p = Problem(case)
    calls: dict[str, Call] = {}
    skipped = {one.name: one.lacks[case.task] for one in contenders if case.task in one.lacks}
    entered = [one for one in contenders if case.task in one.tasks]
    with torch.inference_mode(not p.records):
        expected = truth(p)
        for one in entered:
            try:
                with one.around():
                    call = one.tasks[case.task](p)
                    value = call()
                if one.is_rms_norm:
                    _check(one.name, case, value, expected)
            except Exception as error:
                if not one.may_fail:
                    raise
                skipped[one.name] = next(iter(str(error).splitlines()), "") or type(error).__name__
            else:
                calls[one.name] = call
            value = None  # a kept output would be memory that the next fresh one can't have
        del expected
        mixed = case.threads > 1 and any(one.own_threads and one.name in calls for one in entered)
        around = {one.name: one.around for one in entered}
        timings = timing.measure(calls, seconds, around, SETTLE if mixed else 0.0, finish_of(case.device))
    return Result(case, lines(case, timings, (one.name for one in entered if one.is_rms_norm)), skipped)


def finish_of(device: str) -> Call | None:
    """What waits for a device's queue; the CPU has none."""
    return None if device == "cpu" else partial(torch.accelerator.synchronize, torch.device(device))


def races(cases: Sequence[Case], names: Sequence[str], seconds: float) -> Iterator[Result]:
    """Races of contenders by their names, for a process of its own."""
    for case in cases:
        yield race(case, [BY_NAME[name] for name in names], seconds)


def truth(p: Problem) -> tuple[Tensor, ...]:
    """What everybody must compute: torch's own formula, run by torch."""
    if p.case.direction == "backward":
        return torch.autograd.grad(F.rms_norm(p.x, p.shape, p.weight, EPS), (p.x, p.weight), p.grad)
    if p.case.direction == "add":
        sum = p.x + p.residual
        return F.rms_norm(sum, p.shape, p.weight, EPS), sum
    return (F.rms_norm(p.x, p.shape, p.weight, EPS).detach(),)


def _check(name: str, case: Case, value: Any, expected: tuple[Tensor, ...]) -> None:
    several = isinstance(value, (tuple, list))
    for theirs, right in zip(value if several else (value,), expected, strict=True):
        difference = (peers.to_torch(theirs) - right).abs().max() / right.abs().max()
        if not difference <= TOLERANCE[case.dtype]:
            raise ArithmeticError(
                f"{name} and F.rms_norm disagree at {case} by {difference:.1e} of the largest element "
                f"({TOLERANCE[case.dtype]:.0e} allowed), so {name} was not timed"
            )
