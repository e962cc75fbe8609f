"""Proves that our norms are at home wherever torch's own are: whatever can be done to torch's norm, each of ours takes
too, with the same value, gradients, kind of result, and kind of error.

A row is something that is done to a norm, a column one of nine norms. Each cell runs its row twice, once on our norm
and once on torch's own counterpart, and compares.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import home_eager
import home_export  # noqa: F401
import home_graphs  # noqa: F401 - it adds rows
import home_onnx  # noqa: F401 - as does this
import pytest
import torch
from home_norms import NORMS, Failed, Norm, attempt, compare

from rmsnorm import _native

pytestmark = pytest.mark.skipif(not _native.cpu_targets(), reason="without the native library ours are torch's formula")

# (row, column) -> why this cell can't be as torch's is. A cell that has become right fails until it is taken out.
EXCEPTIONS: dict[tuple[str, str], str] = {}

# Row -> the columns whose counterpart torch itself refuses here, so that an error is what ours has to give.
REFUSALS: dict[str, str] = {}


def failures(result: Any) -> list[Failed]:
    """All errors within a result."""
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, list | tuple):
        return [failure for part in result for failure in failures(part)]
    return [result] if isinstance(result, Failed) else []


@cache
def truth(row: str, counterpart: str) -> Any:
    """Several columns have one counterpart."""
    theirs = next(theirs for _, theirs in NORMS.values() if theirs.name == counterpart)
    return run(row, theirs)


def run(row: str, norm: Norm) -> Any:
    torch.compiler.reset()
    torch.manual_seed(0)
    with warnings.catch_warnings(), norm.context():
        for message, category in home_eager.FILTERS[row]:
            warnings.filterwarnings("ignore", message, category)
        return attempt(lambda: home_eager.ROWS[row](norm))


@pytest.mark.parametrize("column", NORMS)
@pytest.mark.parametrize("row", home_eager.ROWS)
def test_cell(row, column):
    ours, theirs = NORMS[column]
    wanted = truth(row, theirs.name)
    refused = failures(wanted)
    assert not any(issubclass(f.kind, Warning) for f in refused), f"torch warns in this row; filter it: {refused}"
    assert not refused or row in REFUSALS, f"torch's own norm fails in this row: {refused}"
    got = run(row, ours)
    reason = EXCEPTIONS.get((row, column))
    try:
        compare(got, wanted)
    except AssertionError:
        if reason:
            pytest.xfail(reason)
        raise
    assert not reason, f"this cell is right now; take it out of EXCEPTIONS ({reason})"


def test_exceptions_are_cells():
    """No reason outlives its row or column."""
    assert all(row in home_eager.ROWS and column in NORMS for row, column in EXCEPTIONS)
    assert set(REFUSALS) <= set(home_eager.ROWS)
