"""Proves that the pages are true: their code runs and prints what they show, the two languages say the same, links lead
somewhere, and the figures are those that the command draws."""

import ast
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pages import Page, write
from PIL import Image

ROOT = Path(__file__).parents[1]
TWINS = {
    "README.md": "README.zh-CN.md",
    "docs/explained.md": "docs/explained.zh.md",
    "docs/tasks.md": "docs/tasks.zh.md",
    "docs/surgery.md": "docs/surgery.zh.md",
}
FOLDERS = ("*.md", "docs/**/*.md", "examples/*.md", "findings/*.md")
PAGES = sorted(path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in ROOT.glob(folder))
CJK = re.compile(r"[\u3000-\u9fff\uff00-\uffef]")


def page(name):
    return Page(ROOT / name)


twins = pytest.mark.parametrize(("one", "other"), [pytest.param(page(a), page(b), id=a) for a, b in TWINS.items()])


def test_code_of_explained_prints_what_is_shown_below_it():
    """Printed are counts, and numbers of few digits, so that another CPU or thread count prints the same."""
    results = list(page("docs/explained.md").run())
    assert len(results) >= 15
    for printed, shown, _ in results:
        assert printed == (shown or "")


def test_code_of_surgery_prints_what_is_shown_below_it():
    pytest.importorskip("transformers")
    results = list(page("docs/surgery.md").run())
    assert len(results) == 2
    for printed, shown, _ in results:
        assert printed == shown != ""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder where the name that README loads from Hugging Face is a directory: a tiny LLaMA with a tokenizer."""
    tokenizers, transformers = (pytest.importorskip(name) for name in ("tokenizers", "transformers"))
    place = tmp_path / "HuggingFaceTB/SmolLM2-135M-Instruct"
    words = {word: n for n, word in enumerate(["<unk>", "The", "sky", "is", "blue", "because"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(place)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(vocab_size=len(words), bos_token_id=0, eos_token_id=None, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(place)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_code_of_readme_runs(hub, name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ten, drop_in = (printed for printed, _, _ in page(name).run())
    assert "LlamaRMSNorm  model.layers.*" in ten
    assert "The sky is blue because" in ten
    assert "native" in drop_in
    assert page(name).text.count("\n") <= 120, "README is for who arrives; docs/ has room"


def test_numbers_of_readme_name_their_command():
    """Each block of numbers says which command wrote it, and that is a target of the Makefile."""
    targets = set(re.findall(r"^(\w+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name in ("README.md", "README.zh-CN.md"):
        made = re.findall(r"<!-- made by `make (\w+)` -->\n(.*?)<!-- end -->", page(name).text, re.DOTALL)
        assert [command for command, _ in made] == ["gain", "figure", "study"]
        assert {command for command, _ in made} <= targets
        assert all(content.strip() for _, content in made)


@pytest.mark.heavy
def test_install_lines_of_readme_work(tmp_path):
    """In an empty environment, but for torch's packages, which are lent; without the C++, which `make wheel` builds."""
    [lines] = [content for kind, content, _ in page("README.md").blocks if kind == "sh"]
    pips = [line.partition("#")[0] for line in lines.splitlines() if line.startswith("pip ")]
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    lent = next(path for path in sys.path if path.endswith("site-packages"))
    [site] = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "lent.pth").write_text(lent)
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "build", "dist", "benchmarks", "*.so", "tests"))
    environment = {**os.environ, "RMSNORM_BUILD_NATIVE": "0", "PATH": f"{tmp_path}/venv/bin:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    assert len(pips) == 2
    for line in pips:
        subprocess.run(f"{line} --quiet", shell=True, check=True, cwd=copy, env=environment, timeout=600)
    found = subprocess.run(
        ["rmsnorm", "info"], check=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert "rmsnorm" in found.stdout


def _bare(kind, content):
    """Without the comments of a shell."""
    return re.sub(r" *# .*", "", content) if kind == "sh" else content


@twins
def test_twins_have_the_same_code(one, other):
    """All but comments: what was run for one holds for the other."""
    assert one.code()
    assert [*map(ast.dump, map(ast.parse, one.code()))] == [*map(ast.dump, map(ast.parse, other.code()))]
    outputs = [[_bare(kind, content) for kind, content, _ in twin.blocks if kind != "python"] for twin in (one, other)]
    assert outputs[0] == outputs[1]


@twins
def test_twins_have_the_same_headings(one, other):
    assert [level for level, _ in one.headings()] == [level for level, _ in other.headings()]
    for (_, words), (_, theirs) in zip(one.headings(), other.headings(), strict=True):
        assert CJK.search(theirs) or words == theirs, f"{theirs!r} is not translated"
        assert re.findall(r"\d+", words) == re.findall(r"\d+", theirs)


@twins
def test_twins_link_each_other_on_top(one, other):
    for here, there in ((one, other), (other, one)):
        assert f"({there.path.name})" in here.text.split("\n\n")[1]


@pytest.mark.parametrize("name", ["docs/explained.md", "docs/surgery.md"])
def test_twins_have_the_same_formulas_numbers_and_sources(name):
    """Formulas stand indented; numbers, in tables; sources, in links, whose order follows the language."""
    one, other = page(name), page(TWINS[name])
    for pattern in (r"^    .+$", r"^\[\w+\]: .+$"):
        ours, theirs = (re.findall(pattern, twin.prose(), re.MULTILINE) for twin in (one, other))
        assert ours == theirs != []
    rows = [re.findall(r"^\|.+$", twin.prose(), re.MULTILINE) for twin in (one, other)]
    for row, theirs in zip(*rows, strict=True):
        assert re.findall(r"\d[\d.]*", row) == re.findall(r"\d[\d.]*", theirs)
    cited = [re.findall(r"\]\[(\w+)\]", twin.prose()) for twin in (one, other)]
    assert sorted(cited[0]) == sorted(cited[1])
    assert set(cited[0]) == set(re.findall(r"^\[(\w+)\]: ", one.prose(), re.MULTILINE))


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for link in page(name).links():
        target, _, anchor = link.partition("#")
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        file = (ROOT / name).parent.joinpath(target).resolve() if target else ROOT / name
        assert file.exists(), f"{link}: no such file"
        assert not anchor or anchor in Page(file).anchors(), f"{link}: no such heading"


def test_what_is_measured_of_surgery_stands_in_both_languages():
    """The blocks that `make surgery` writes: the same numbers, and none of them empty."""
    blocks = [
        dict(re.findall(r"<!-- (\w+): made by `make surgery` -->\n(.*?)<!-- end -->", page(name).text, re.DOTALL))
        for name in ("docs/surgery.md", "docs/surgery.zh.md")
    ]
    assert [*blocks[0]] == [*blocks[1]] == ["fold", "int8", "whisper", "speed"]
    for key, block in blocks[0].items():
        assert len(re.findall(r"\d", block)) > 40
        assert re.findall(r"[\d.e+–-]*\d", block) == re.findall(r"[\d.e+–-]*\d", blocks[1][key])


def test_figures_are_what_the_command_draws(tmp_path):
    """Equal bytes here, also with torch's code for CPUs without AVX and without our library. Another FreeType may shade
    an edge otherwise: 16 pixels of a million may differ by more than 32 of 255. One digit of a label is more."""
    command = [sys.executable, "-W", "error", str(ROOT / "docs" / "figures"), str(tmp_path)]
    subprocess.run(command, check=True, timeout=300)
    drawn = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_bytes() for path in ROOT.glob("docs/explained-*.png")}
    assert (
        sorted(drawn)
        == sorted(kept)
        == sorted(link for link in page("docs/explained.md").links() if link.endswith("png") and "/" not in link)
    )
    assert sum(map(len, kept.values())) < 600_000
    for name, content in kept.items():
        images = [np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), int) for png in (content, drawn[name])]
        assert images[0].shape == images[1].shape, name
        assert (np.abs(images[0] - images[1]).max(-1) > 32).mean() < 16e-6, f"{name}: run `make explained`"


def test_the_tree_names_every_file():
    """docs/design.md: each in the list of its own room, and none that is gone."""
    rooms = re.split(
        r"^`src/rmsnorm/(\w+)/` is", page("docs/design.md").text.partition("\n## The tree\n")[2], flags=re.M
    )
    for room, words in zip(["", *rooms[1::2]], rooms[::2], strict=True):
        folders = (ROOT / "src/rmsnorm" / room, *([] if room else [ROOT / "csrc", ROOT / "src"]))
        files = {file.name for folder in folders for file in folder.iterdir() if file.suffix in {".py", ".cpp", ".h"}}
        named = set(re.findall(r"\w+\.(?:py|cpp|h)\b", words)) - {"pages.py" if not room else ""}  # the test's
        assert files - named == files & {"__init__.py", "__main__.py"}, f"{room or 'the corridor'}: no place yet"
        assert named <= files, f"{room or 'the corridor'}: gone"
    listed = page("docs/design.md").text.partition("\n## The benchmarks\n")[2].partition("\n## ")[0]
    named = set(re.findall(r"^ {4}(\S.*?)  ", listed, flags=re.M))
    assert {name for names in named for name in names.split(", ")} == {
        file.name for file in (ROOT / "benchmarks").iterdir() if file.suffix in {".py", ".cpp"}
    }, "the benchmarks"


def test_figures_have_no_words_of_one_language():
    for path in ROOT.glob("docs/figures/*.py"):
        assert not CJK.search(path.read_text())


def test_write_puts_output_below_code(tmp_path):
    """Code without a block behind it keeps to itself; what a block showed before is gone."""
    file = tmp_path / "page.md"
    file.write_text("```python\nn = 1\nprint(n)\n```\n\n```text\nold\nlines\n```\n\n```python\nprint(n + 1)\n```\n")
    write(Page(file))
    assert file.read_text() == "```python\nn = 1\nprint(n)\n```\n\n```text\n1\n```\n\n```python\nprint(n + 1)\n```\n"


def test_errors_name_the_line_of_the_page(tmp_path):
    file = tmp_path / "page.md"
    file.write_text("# Title\n\n```python\nx = 1\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as caught:
        list(Page(file).run())
    assert (caught.traceback[-1].path, caught.traceback[-1].lineno + 1) == (file, 5)
