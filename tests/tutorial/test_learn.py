"""`rmsnorm learn`: its texts, its refusals, its static pages, and the notebook as a script."""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
import sys
from html.parser import HTMLParser

import pytest

pytest.importorskip("typer")
pytest.importorskip("marimo")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner

from rmsnorm import cli
from rmsnorm._extras import extra_line
from rmsnorm.models import loading
from rmsnorm.tutorial import blocks, command, cost, depth, server, static, texts
from rmsnorm.tutorial.chapters import PANELS

LANGUAGES = tuple(texts.LANGUAGES)


def learn(*arguments: str):
    return CliRunner().invoke(cli.build(), ["learn", *arguments])


def test_both_languages_have_the_same_keys():
    english, chinese = map(texts.load, LANGUAGES)
    assert list(english) == list(chinese)
    assert len(english) > 150


def test_chinese_is_chinese():
    """But for names, symbols and the sentence that SmolLM2 reads first."""
    chinese = texts.load("zh")
    foreign = [key for key, text in chinese.items() if not re.search("[\u4e00-\u9fff]", text)]
    allowed = r"\.(option\.(nan|65504|1000|256|16)|control\.eps|number\.(x|square|y)|sentence\.start)$"
    assert [key for key in foreign if not re.search(allowed, key)] == []


NAMES = r"\{[\w.]+\}|`[^`]*`|b?float\d\d|SmolLM2(-135M)?"  # quoted numbers, code, and names that end in digits
CONSTANTS = {"0", "1", "10", "16", "0.5"}  # of the formulas, "x ten times larger", 16 bits, half an ulp
OF_THIS_TEXT = {
    "layer.number.y": {"4"},  # RMSNorm(4, …), which is code
    "cost.answer": {"6.9", "2019", "6.1"},  # the paper's, with year and section
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_number_is_typed_in(language):
    """As the page says: but for what the reader may predict, and constants."""
    for key, text in texts.load(language).items():
        typed = set(re.findall(r"\d(?:[\d.,]*\d)?", re.sub(NAMES, "", text)))
        if ".option." not in key:
            assert typed <= CONSTANTS | OF_THIS_TEXT.get(key, set()), (key, text)
        assert not re.search("quarter|hundred|thousand|四分之|百分之|[百千万]倍|上[百千万]", text), (key, text)


@pytest.mark.parametrize("panel", PANELS.values(), ids=PANELS)
def test_both_languages_quote_every_number_there_is(panel):
    for language in LANGUAGES:
        text = texts.load(language)
        mine = [key for key in text if key.startswith(f"{panel.name}.")]
        found = {name for key in mine for name in re.findall(r"\{([\w.]+)\}", text[key])}
        assert found == set(panel.quoted())
        for key in mine:
            assert "{" not in blocks.said(panel, text, key.removeprefix(f"{panel.name}."))


@pytest.mark.parametrize("text", ["## title\nwords", "# a\n## b\n", "# a\n## b\nwords\n## b\nwords"])
def test_a_text_without_panel_words_or_name_of_its_own_is_refused(text):
    with pytest.raises(ValueError, match="needs a panel"):
        texts.parse(text)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "en_GB.UTF-8"}, "en"),
        ({"LANG": "de_DE.UTF-8"}, "en"),
        ({"LC_ALL": "", "LANG": "zh_TW"}, "zh"),
    ],
)
def test_the_locale_chooses_the_language(monkeypatch, variables, expected):
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert texts.of_locale() == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.5, "0.5"),
        (-1.25, "−1.25"),
        (1e-16, "1\u00a0×\u00a010⁻¹⁶"),
        (-2.5e7, "−2.5\u00a0×\u00a010⁷"),
        (float("inf"), "∞"),
        (float("nan"), "NaN"),
        (4194304, "4,194,304"),
        (True, "yes"),
        ((0.1, 2.0), "0.1  2"),
        ("3.1 µs", "3.1 µs"),
    ],
)
def test_numbers_are_written_for_readers(value, expected):
    assert blocks.number(value, texts.load("en")) == expected


def one_line(result, *words: str) -> None:
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def test_unknown_language_is_refused():
    one_line(learn("--lang", "fr"), "'fr'", "en, zh")


def test_a_port_that_is_taken_is_refused():
    with socket.socket() as taken:
        taken.bind((server.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        one_line(learn("--no-browser", "--port", str(port)), f"port {port}", "in use", "--port")


@pytest.mark.parametrize("package", command.NEEDED)
def test_a_missing_package_is_named_with_its_remedy(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    one_line(learn("--no-browser"), package, extra_line("tutorial"))


def test_export_into_a_place_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    one_line(learn("--export", str(file)), str(file), "choose another directory")
    one_line(learn("--export", str(file / "below")), "choose another directory")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "mine"


@pytest.fixture
def quick(monkeypatch):
    """Three frames a panel, no model, a short race."""
    monkeypatch.setattr(static, "MOST_FRAMES", 3)
    monkeypatch.setattr(cost, "SECONDS", 0.01)
    for shape in cost.SHAPES:
        monkeypatch.setitem(cost.SHAPES, shape, (1, cost.COLS))

    def none():
        raise loading.Unusable("no model here")

    monkeypatch.setattr(depth, "model", none)
    depth.inputs_of_norms.cache_clear()


class Fetched(HTMLParser):
    """Collects what a browser would fetch for a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.languages: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "srcset", "data", "action") or (tag == "link" and name == "href"):
                self.addresses.append(value)
            if name == "lang" and tag in ("html", "section"):
                self.languages.add(value)


def test_export_writes_two_pages_that_need_nothing_else(tmp_path, quick):
    directory = tmp_path / "new" / "pages"
    result = learn("--export", str(directory))
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in directory.iterdir()) == ["en.html", "zh.html"]
    for language in LANGUAGES:
        page = (directory / f"{language}.html").read_text(encoding="utf-8")
        found = Fetched(page)
        assert all(address.startswith("data:") for address in found.addresses)
        assert found.languages == {language}
        assert "@import" not in page
        assert "url(" not in page
        assert page.count('class="rn-frame"') >= 2 * len(PANELS)
        assert page.count('class="rn-guess"') == sum(len(panel.options) for panel in PANELS.values())
        assert "no model here" in page
        assert 'data-number="dial.gap"' in page


def test_an_export_that_fails_leaves_the_old_pages(tmp_path, quick, monkeypatch):
    (tmp_path / "en.html").write_text("old")
    monkeypatch.setattr(static, "frames", lambda panel, text: 1 / 0)
    assert isinstance(learn("--export", str(tmp_path)).exception, ZeroDivisionError)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("en.html", "old")]


def test_an_export_without_room_is_one_line_and_leaves_the_old_pages(tmp_path, quick, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "en.html").write_text("old")
    monkeypatch.setattr(static, "pages", lambda progress: {"en.html": "new", "zh.html": "new"})
    monkeypatch.setattr(os, "fsync", full)
    one_line(learn("--export", str(tmp_path)), "no space left", "en.html", "choose another directory")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("en.html", "old")]


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_notebook_runs_as_a_script(language):
    command = [sys.executable, "-W", "error", str(server.NOTEBOOK), "--lang", language]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_needs_no_notebook():
    """`rmsnorm` lists its commands without loading marimo or matplotlib."""
    check = "sys.exit(' '.join({'marimo', 'matplotlib'} & set(sys.modules)) or 0)"
    program = f"import sys; from rmsnorm import cli; cli.build(); {check}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
