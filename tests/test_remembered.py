"""The oracle's memory (remembered.py): a truth is that of the same numbers, in any layout, and of no others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import DTYPES
from remembered import key, remembered


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 3, 127])
def test_numbers_are_told_by_content_and_not_by_layout(dtype, count):
    plain = torch.arange(count, dtype=torch.float64).to(dtype)
    spread = torch.zeros(2 * count + 2, dtype=dtype)[: 2 * count : 2].copy_(plain)
    assert key(plain) == key(spread)
    assert key(plain) != key(plain.reshape(1, count))
    assert count == 0 or key(plain) != key(plain + 1)


def test_what_was_found_is_found_again_and_never_changed():
    calls = []

    @remembered
    def double(values: np.ndarray, sign: float) -> np.ndarray:
        calls.append(sign)
        return 2 * values * sign

    numbers = np.arange(3.0)
    assert double(numbers, 1.0) is double(numbers.copy(), 1.0)
    double(numbers + 1, 1.0), double(numbers, -0.0), double(numbers, 0.0), double(numbers, True)
    assert calls == [1.0, 1.0, -0.0, 0.0, True]
    with pytest.raises(ValueError, match="read-only"):
        double(numbers, 1.0)[0] = 3
