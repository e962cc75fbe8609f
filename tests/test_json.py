"""Proves that ``--json`` means the same in each command that has it: a file, or standard output for JSON alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner

from rmsnorm import cli
from rmsnorm.models import course
from rmsnorm.models.report import PatchReport

QUICK = ["--seconds", "0.001"]
COMMANDS: dict[str, tuple[list[str], str]] = {
    "info": (["info"], "rmsnorm"),
    "bench": (["bench", *QUICK, "--rows", "1", "--dtype", "float32", "--against", "F.rms_norm"], "machine"),
}
ALONE = {"at the end": ["--json"], "before the rest": ["--json", "--"], "a dash": ["--json", "-"]}


def invoke(arguments: Sequence[str]) -> Any:
    return CliRunner().invoke(cli.build(), arguments)


@pytest.mark.parametrize("how", ALONE)
@pytest.mark.parametrize("name", ["info", "bench"])
def test_alone_it_is_standard_output(name: str, how: str) -> None:
    """Where nothing else is printed; people read on at standard error."""
    arguments, key = COMMANDS[name]
    result = invoke([*arguments, *ALONE[how]])
    assert result.exit_code == 0, result.output
    assert key in json.loads(result.stdout)
    assert ("F.rms_norm" in result.stderr) == (name == "bench")


@pytest.mark.parametrize("name", ["info", "bench"])
def test_with_a_file_it_is_that_file(name: str, tmp_path: Path) -> None:
    arguments, key = COMMANDS[name]
    result = invoke([arguments[0], "--json", str(tmp_path / "x.json"), *arguments[1:]])
    assert result.exit_code == 0, result.output
    assert key in json.loads((tmp_path / "x.json").read_text())
    assert (result.stdout == "") == (name == "info")


REFUSED = [["info"], ["patch", "smollm2"], ["convert", "smollm2", "--fold", "--out", "folded"]]


@pytest.mark.parametrize("arguments", REFUSED, ids=lambda arguments: arguments[0])
def test_a_file_that_cannot_be_written_is_refused_first(arguments: list[str], tmp_path: Path) -> None:
    where = {"nowhere/x.json": "is not a directory; make it first", ".": "is a directory"}
    for file, reason in where.items():
        result = invoke([*arguments, "--json", str(tmp_path / file)])
        assert result.exit_code == 2, result.output
        assert reason in " ".join(result.stderr.replace("│", "").split())
        assert not result.stdout
    assert not list(tmp_path.iterdir())


@pytest.fixture
def patched_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """`rmsnorm patch` with a model that has no norm, and no file."""
    model = torch.nn.Identity()
    monkeypatch.setattr(course.loading, "load", lambda *_: (None, model))
    monkeypatch.setattr(course, "patch", lambda model, **_: PatchReport())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["m", "--json"], "Nothing was patched"),
        (["--json", "-", "m"], "Nothing was patched"),
        (["--json", "--seconds", "0", "m"], "Nothing was patched"),
        (["--json", "--", "m"], "Nothing was patched"),
    ],
)
def test_patch_as_well(patched_nothing: None, arguments: list[str], said: str) -> None:
    result = invoke(["patch", *arguments])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["model"] == "m"
    assert said in result.stderr


def test_patch_with_a_file_before_the_model(patched_nothing: None, tmp_path: Path) -> None:
    """As it was ever: what stands behind --json is its file."""
    result = invoke(["patch", "--json", str(tmp_path / "x.json"), "m"])
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    assert json.loads((tmp_path / "x.json").read_text())["model"] == "m"
    assert "Nothing was patched" in result.stdout


@pytest.mark.parametrize("command", ["info", "patch", "bench", "bars"])
def test_help_says_so(command: str) -> None:
    text = " ".join(invoke([command, "--help"]).output.replace("│", "").split())
    assert "--json [FILE]" in text
    assert "Without FILE, or with -, to standard output" in text
