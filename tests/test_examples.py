"""Proves that the programs of examples/ do what their first lines say, on tiny sizes; tests/distributed/test_example.py
has tensor_parallel.py on several ranks."""

from __future__ import annotations

import http.client
import json
import re
import runpy
import sys
import threading
import warnings
from http.server import HTTPServer
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PROGRAMS = sorted(path.name for path in EXAMPLES.glob("*.py"))
TINY_TRAINING = "--steps 40 --width 32 --layers 1 --heads 2 --context 32 --batch 8"
ONNX = "--layers 1"

# Program, options, and what it prints, as regular expressions in order.
RUNS = [
    (
        "train.py",
        TINY_TRAINING,
        [r"29,792 weights", r"step     1  loss 5\.[45]", r"held out    [34]\.\d", r"sample +.The "],
    ),
    (
        "serve.py",
        "--port 0 --ask norm",
        ["5 norms run on rmsnorm", "the same: True", "serving on http", '"tokens": 20'],
    ),
    (
        "ensemble.py",
        "--members 3 --steps 200 --width 16",
        [r"step    1  loss 0\.[4-9]", r"step  200  loss 0\.[01]", "never seen", r"at most \de-0[678]"],
    ),
    (
        "int8.py",
        "--tokens 5",
        ["4 norms quantise; .* bit for bit: True", "÷ torchao's own: "],
    ),
    ("export_onnx.py", ONNX, ["exported: .* 3 RMSNormalization", "runs it: .* 3 RMSNormalization", "allowed 1e-05"]),
    (
        "export_onnx.py",
        f"{ONNX} --opset 20",
        ["exported: .* no norm operator", r"runs it: .* 3 \w*SimplifiedLayerNormalization", "allowed 1e-05"],
    ),
]
# Program, options, and the words of its last line; nothing else is done.
REFUSALS = [
    ("train.py", "--width 30", "--width 30: must be a multiple of twice --heads, 8"),
    ("train.py", "--text nowhere.txt", "--text nowhere.txt: no such file"),
    ("train.py", f"--text {EXAMPLES / 'README.md'}", "bytes; --context 128 wants 2560"),
    ("serve.py", "--model ./nowhere", "nowhere"),
    ("int8.py", "--model ./nowhere", "nowhere"),
    ("int8.py", "--tokens 0", "--tokens must be 1 or more"),
    ("ensemble.py", "--members 1", "--members 1: it takes two to disagree"),
    ("export_onnx.py", "--opset 26", "--opset 26: torch's exporter knows 18 to 25"),
]


def run(name: str, options: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """As ``python examples/name options`` does, in this process; the exit status."""
    monkeypatch.setattr(sys, "argv", [name, *options.split()])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        if name == "export_onnx.py":  # onnxscript's and torch's, about each other, when they are imported
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return ended.value.code or 0


def needs(name: str) -> None:
    source = (EXAMPLES / name).read_text()
    for package in ("transformers", "torchao", "onnx", "onnxruntime"):
        if re.search(rf"^ +(import|from) {package}\b", source, re.MULTILINE):
            pytest.importorskip(package)


@pytest.mark.parametrize(("name", "options", "printed"), RUNS, ids=[f"{name} {options}" for name, options, _ in RUNS])
def test_example(name, options, printed, monkeypatch, capfd):
    needs(name)
    assert run(name, options, monkeypatch) == 0
    shown = capfd.readouterr()
    assert re.search(".*".join(printed), shown.out, re.DOTALL), shown.out
    assert shown.err == ""


@pytest.mark.parametrize(("name", "options", "words"), REFUSALS, ids=[f"{name} {words}" for name, _, words in REFUSALS])
def test_refusal_is_one_line(name, options, words, monkeypatch, capsys):
    needs(name)
    assert run(name, options, monkeypatch) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert words in shown.err.partition(f"{name}: error: ")[2]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"prompt": "norm"}', 200),
        (b'{"prompt": ""}', 400),
        (b'{"prompt": "norm", "tokens": 5000}', 400),
        (b'{"prompt": "norm", "tokens": "many"}', 400),
        (b"[1]", 400),
        (b"norm", 400),
    ],
)
def test_server_answers_bad_requests(body, status):
    handler = runpy.run_path(str(EXAMPLES / "serve.py"))["handler"](lambda prompt, tokens: {"text": prompt})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        connection = http.client.HTTPConnection(*server.server_address, timeout=60)
        connection.request("POST", "/", body)
        answer = connection.getresponse()
        assert answer.status == status
        assert json.loads(answer.read()).keys() == ({"text"} if status == 200 else {"error"})
        connection.close()
        thread.join()


@pytest.mark.parametrize("name", PROGRAMS)
def test_help(name, monkeypatch, capsys):
    """The first line of the page, which needs no more than torch, and a word on each option."""
    assert run(name, "--help", monkeypatch) == 0
    shown = capsys.readouterr().out
    first = (EXAMPLES / name).read_text().partition('"""')[2].partition("\n")[0]
    assert " ".join(first.split()) in " ".join(shown.split())
    assert not re.search(r"^  --\w+ [A-Z]+$(?!\n {10})", shown, re.MULTILINE), "an option without a word"


def test_table_names_all():
    """examples/README.md and this file."""
    assert set(PROGRAMS) == {*re.findall(r"^\| \[([\w.]+)\]", (EXAMPLES / "README.md").read_text(), re.MULTILINE)}
    assert set(PROGRAMS) == {name for name, *_ in RUNS} | {"tensor_parallel.py"}


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name != "tensor_parallel.py"])
def test_short_enough_to_read(name):
    assert 40 <= len((EXAMPLES / name).read_text().splitlines()) <= 120
