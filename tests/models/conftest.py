"""The only file that counts how often a residual add and its norm ran as one."""

from __future__ import annotations

import pytest

from rmsnorm.models import rewrite


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How often the fused operator ran."""
    seen: list[int] = []
    fused = rewrite.add_rms_norm
    monkeypatch.setattr(rewrite, "add_rms_norm", lambda *args, **options: (seen.append(1), fused(*args, **options))[1])
    return seen
