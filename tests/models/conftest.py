"""The only file that counts how often a residual add and its norm ran as one, and saves small models for a module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rmsnorm.models import neighbours


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How often a fused operator ran."""
    seen: list[int] = []

    def counted(fused: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: (seen.append(1), fused(*args, **options))[1]

    for name in ("add_rms_norm", "rms_norm_add", "sandwich_rms_norm"):
        monkeypatch.setattr(neighbours, name, counted(getattr(neighbours, name)))
    return seen


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A directory with the model of a name; ``llama+`` has a tokenizer, too."""
    import tiny

    root = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {}

    def place(name: str) -> Path:
        if name not in made:
            made[name] = tiny.save(name.rstrip("+"), root / name)
            if name.endswith("+"):
                tiny.tokenizer().save_pretrained(root / name)
        return made[name]

    return place


@pytest.fixture(scope="module")
def directory(places: Callable[[str], Path]) -> Path:
    """A small Llama as save_pretrained writes it, without a tokenizer."""
    return places("llama")
