"""Fixtures: the ranks, started once for all tests of this folder."""

from __future__ import annotations

import pytest
from pool import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Four ranks."""
    four = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield four
    four.close()
