"""The command `rmsnorm learn`: what it refuses, what it exports, how early it is there."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import socket
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("markdown_it")

from typer.testing import CliRunner

from rmsnorm import cli
from rmsnorm._extras import extra_line
from rmsnorm.tutorial import build, command, measured, serve, texts

LANGUAGES = tuple(texts.LANGUAGES)


def learn(*arguments: str):
    return CliRunner().invoke(cli.build(), ["learn", *arguments])


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
        taken.bind((serve.HOST, 0))
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


class Fetched(HTMLParser):
    """Collects what a browser would fetch for a page, and its ids."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "srcset", "data", "action") or (tag == "link" and name == "href"):
                self.addresses.append(value)
            if name == "id":
                self.ids.append(value)


def test_export_writes_two_pages_that_need_nothing_else(tmp_path, quick):
    directory = tmp_path / "new" / "pages"
    result = learn("--export", str(directory), "--home", "https://example.org/rmsnorm/")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in directory.iterdir()) == ["en.html", "zh.html"]
    ids = []
    for language in LANGUAGES:
        page = (directory / f"{language}.html").read_text(encoding="utf-8")
        found = Fetched(page)
        assert all(address.startswith("data:") for address in found.addresses)
        assert "@import" not in page
        assert "url(" not in page
        assert "no model here" in page
        assert len(gzip.compress(page.encode())) < 150_000  # a tenth of what was asked
        assert page.count('name="guess-') == sum(".option." in key for key in texts.load(language))
        assert "https://example.org/rmsnorm/blob/main/docs/explained" in page
        assert len(found.ids) == len(set(found.ids))
        ids.append(found.ids)
        kept = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])["measured"]
        assert set(kept["cost"]["seconds"]) == set(measured.NAMES)
        assert torch.__version__ in kept["machine"]
    assert ids[0] == ids[1]
    assert "blob/main" not in "".join(build.pages({}).values())


def test_an_export_that_fails_leaves_the_old_pages(tmp_path, quick, monkeypatch):
    (tmp_path / "en.html").write_text("old")
    monkeypatch.setattr(build, "page", lambda *rest: 1 / 0)
    assert isinstance(learn("--export", str(tmp_path)).exception, ZeroDivisionError)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("en.html", "old")]


def test_an_export_without_room_is_one_line_and_leaves_the_old_pages(tmp_path, quick, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "en.html").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    one_line(learn("--export", str(tmp_path)), "no space left", "en.html", "choose another directory")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("en.html", "old")]


def test_the_command_needs_neither_torch_nor_a_wait():
    """The page is served before torch is imported, and `rmsnorm learn` says what any other command says."""
    program = (
        "import sys; from rmsnorm_command import main; sys.argv = ['rmsnorm', 'learn', '--lang', 'fr']\n"
        "try: main()\nexcept SystemExit as end: print(end.code, *map(sys.modules.__contains__, ['torch', 'rmsnorm']))\n"
        "from rmsnorm_tutorial import serve\nserve.bind(0).server_close()\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.split() == ["2", "False", "False", "False"], done.stderr
    assert "unknown language 'fr'" in done.stderr


def test_help_needs_no_page():
    """`rmsnorm` lists its commands without what the page is made with."""
    check = "sys.exit(' '.join({'markdown_it', 'rmsnorm.tutorial.build', 'matplotlib'} & set(sys.modules)) or 0)"
    program = f"import sys; from rmsnorm import cli; cli.build(); {check}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
