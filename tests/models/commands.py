"""How the tests call ``rmsnorm patch``, and with which options that take little time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from rmsnorm import cli

SHORT = "--tokens", "8", "--text", "60"
FAST = *SHORT, "--seconds", "0"


def invoke(*arguments: str | Path) -> Any:
    return CliRunner().invoke(cli.build(), ["patch", *map(str, arguments)])
