"""The only file that leaves values of a parameter to `make heavy`: what repeats, at length, what `make test` shows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def heavy_but(kept: Iterable[Any], values: Iterable[Any]) -> list[Any]:
    """All values, those that aren't kept as heavy ones; a tuple is the values of several parameters."""
    kept = list(kept)
    return [
        pytest.param(*(one if isinstance(one, tuple) else (one,)), marks=[] if one in kept else pytest.mark.heavy)
        for one in values
    ]
