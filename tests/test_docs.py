"""Proves that the pages are true: their code runs and prints what they show, the two languages say the same, links lead
somewhere, and the figures are those that the command draws."""

import ast
import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pages import Page, write
from PIL import Image

ROOT = Path(__file__).parents[1]
TWINS = {"README.md": "README.zh-CN.md", "docs/explained.md": "docs/explained.zh.md"}
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))
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


def test_code_of_readme_runs(capfd):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.RMSNorm(8))
    printed = [printed for printed, _, _ in page("README.md").run({"model": model})]
    assert "1 patched" in printed[1] or "RMSNorm" in printed[1], printed
    assert "forward" not in vars(model[1]), "unpatch has left something"


@twins
def test_twins_have_the_same_code(one, other):
    """All but comments: what was run for one holds for the other."""
    assert one.code()
    assert [*map(ast.dump, map(ast.parse, one.code()))] == [*map(ast.dump, map(ast.parse, other.code()))]
    outputs = [[content for kind, content, _ in twin.blocks if kind != "python"] for twin in (one, other)]
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


def test_explained_has_the_same_formulas_numbers_and_sources_in_both_languages():
    """Formulas stand indented; numbers, in tables; sources, in links, whose order follows the language."""
    one, other = (page(name) for name in ("docs/explained.md", "docs/explained.zh.md"))
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
