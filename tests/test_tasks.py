"""Proves that the code of docs/tasks.md prints what is shown below it, each block alone as a reader runs it, and that
the short blocks of the other pages run."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from launched import launched
from pages import Page

DOCS = Path(__file__).parents[1] / "docs"
# Who runs the Python blocks of a page: this file, or another one.
RUN_BY = {
    "explained.md": "test_docs.py",
    "explained.zh.md": "test_docs.py",  # the twin's code, compared
    "hub.md": "test_tasks.py",
    "models.md": "test_tasks.py",
    "log.md": "test_tasks.py",
    "surgery.md": "test_docs.py",
    "surgery.zh.md": "test_docs.py",
    "scaling.md": "distributed/test_scaling.py",
    "tasks.md": "test_tasks.py",
    "tasks.zh.md": "test_docs.py",
}
TASKS = Page(DOCS / "tasks.md")
NAMES = [words for level, words in TASKS.headings() if level == 2]
# Others' own: onnxscript's about torch and torch.export's about itself; torchao's, which registers enums.
THEIRS = (FutureWarning, DeprecationWarning, UserWarning)


def test_every_page_with_code_is_run():
    assert {page.name for page in DOCS.rglob("*.md") if Page(page).code()} == set(RUN_BY)


def test_each_task_has_one_block_of_ten_lines_or_so():
    """Not counted are imports and blank lines. The block of a training has two parts: the model, the loop."""
    assert len(TASKS.code()) == len(NAMES) == 8
    for name, code in zip(NAMES, TASKS.code(), strict=True):
        lines = [line for line in code.splitlines() if line.strip() and not line.startswith(("import", "from"))]
        assert len(lines) <= (22 if name == "Train from scratch" else 13), name


def shown(name: str) -> tuple[str, str]:
    """A task's code, and what the page shows below it."""
    block = next(i for i, (language, code, _) in enumerate(TASKS.blocks) if code == TASKS.code()[NAMES.index(name)])
    language, output, _ = TASKS.blocks[block + 1]
    assert language == "text"
    return TASKS.blocks[block][1], output


@pytest.mark.parametrize("name", [name for name in NAMES if name != "Shard"])
def test_task_prints_what_is_shown(name, tmp_path):
    """In this process, which has torch loaded, but with names of its own."""
    code, output = shown(name)
    for package in ("onnxruntime", "torchao", "transformers"):
        if f"{package}" in code and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is missing")
    file = tmp_path / "task.md"
    file.write_text(f"```python\n{code}```\n\n```text\n{output}```\n")
    with warnings.catch_warnings():
        for category in (
            THEIRS if {"onnxruntime", "torchao", "torch.compile"} & set(re.findall(r"[\w.]+", code)) else ()
        ):
            warnings.simplefilter("ignore", category)
        ((printed, wanted, _),) = Page(file).run()
    assert printed == wanted == output


@pytest.mark.xdist_group("distributed")
def test_shard_prints_what_is_shown(tmp_path):
    """By the page's command."""
    code, output = shown("Shard")
    (tmp_path / "shard.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "shard.py"]
    assert "torchrun --nproc-per-node 2 shard.py" in TASKS.text
    variables = {}
    if paths := os.environ.get("PYTHONPATH"):  # which may be relative, and the program starts elsewhere
        variables["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, paths.split(os.pathsep)))
    ended = launched(command, 240, cwd=tmp_path, **variables)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout == output


def test_code_of_models_runs(capsys):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.RMSNorm(8))
    ((printed, _, _),) = Page(DOCS / "models.md").run({"model": model})
    assert "1 norms run on rmsnorm." in printed
    assert type(model[1]) is torch.nn.RMSNorm


def test_code_of_hub_runs(monkeypatch):
    """The first block on a model that is made instead of loaded; the second registers, and is taken back."""
    transformers = pytest.importorskip("transformers")
    patching = pytest.importorskip("transformers.monkey_patching")
    if not transformers.utils.is_kernels_available():
        pytest.skip(f"transformers {transformers.__version__} wants another kernels")
    from rmsnorm import hub

    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )

    def load(name, use_kernels):
        model = transformers.LlamaForCausalLM(config)
        model.use_kernels = use_kernels
        return model

    monkeypatch.setattr(transformers, "AutoModelForCausalLM", types.SimpleNamespace(from_pretrained=load))
    names = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of kernels, about layers that nobody has registered
            first, second = Page(DOCS / "hub.md").code()
            exec(first, names)
            assert names["model"].model.norm.forward.__func__.__module__ == "rmsnorm.hub"
            exec(second, names)
            with patching.apply_patches():
                assert isinstance(transformers.LlamaForCausalLM(config).model.norm, names["RoundFirstRMSNorm"])
    finally:
        hub.unregister()
        patching.unregister_patch_mapping(["LlamaRMSNorm"])


def test_code_of_the_log_runs(monkeypatch):
    """Seven times of one call each: whether they are equal is for a quiet machine to say."""
    from torch.utils import benchmark

    monkeypatch.setattr(benchmark.Timer, "blocked_autorange", lambda timer, min_run_time: timer.timeit(1))
    ((printed, _, _),) = Page(DOCS / "performance/log.md").run()
    assert [line.split()[0] for line in printed.splitlines()] == ["0", "64", "128", "192", "256", "1024", "4032"]
