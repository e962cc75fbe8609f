"""Proves that every cell of the accuracy table (tests/accuracy.py, docs/numerics.md) is within the contract."""

from __future__ import annotations

import pytest
from accuracy import COLUMNS, DATA, errors
from oracle import DTYPES, ULPS


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cell(native_target, dtype, data):
    for columns in COLUMNS:
        largest, _ = next(errors(dtype, columns, data, elements=2**16))
        assert largest <= ULPS[dtype], columns
