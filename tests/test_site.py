"""Proves that the site of `make docs` is whole, in both languages: no link is dead, nothing is fetched from elsewhere,
each public name has its entry, pages have the parts that GitHub shows, and the search finds words, from files as well.

RMSNORM_SITE names a site to check. Without it one is built, if `make docs` has installed its tools; else these tests
are skipped.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import time
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt
from test_reference import PUBLIC

ROOT = Path(__file__).parents[1]
BUILD = runpy.run_path(str(ROOT / "docs" / "site" / "build.py"))
TOOLS = ROOT / "build" / "docs" / "venv" / "bin" / "python"
LANGUAGES = BUILD["LANGUAGES"]
VOID = {"img", "link", "meta", "input", "br", "hr"}
PARTS = ("h2", "h3", "li", "pre", "table", "td", "img")
pytestmark = pytest.mark.xdist_group("browser")  # one process builds the site, 16 s, and has the browser


class Html(HTMLParser):
    """What a page links to, what it loads, its ids, and how many parts its article has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links, self.loads, self.ids, self.language = [], [], set(), ""
        self.counts, self.depth = dict.fromkeys(PARTS, 0), 0
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        have = dict(attributes)
        self.ids |= {have["id"]} if "id" in have else set()
        self.language = have.get("lang", "") if tag == "html" else self.language
        if tag == "a" and "href" in have:
            self.links.append(have["href"])
        elif tag == "link" and have.get("rel") not in ("prev", "next", "canonical", "alternate"):
            self.loads.append(have["href"])
        elif "src" in have:
            self.loads.append(have["src"])
        if tag == "article" or self.depth:
            self.depth += tag not in VOID
            if tag in self.counts:
                self.counts[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        if self.depth and tag not in VOID:
            self.depth -= 1


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if named := os.environ.get("RMSNORM_SITE"):
        return Path(named).absolute()
    if not TOOLS.exists():
        pytest.skip("no tools for the site here: make docs")
    # Two at once, as two people (or two processes of these tests) in one checkout may: neither disturbs the other.
    folders = [tmp_path_factory.mktemp("site") / name / "site" for name in ("first", "second")]
    how: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    builds = []
    for folder in folders:  # half a second apart: the second begins when the first one's tools read its pages
        builds.append(subprocess.Popen([TOOLS, ROOT / "docs" / "site" / "build.py", folder], **how))
        time.sleep(0.5)
    for build, printed in [(build, build.communicate(timeout=300)[0]) for build in builds]:
        assert build.returncode == 0, printed
        assert "warning" not in printed.lower()
    shutil.rmtree(folders[1])
    return folders[0]


@cache
def read(path: Path) -> Html:
    return Html(path.read_text())


def html_of(page: str, language: str) -> str:
    return f"{LANGUAGES[language]}/{BUILD['staged'](page).removesuffix('.md')}.html".lstrip("/")


def in_language(language: str) -> list[str]:
    """The pages of a site, as they are called in the repository."""
    left = BUILD["TRANSLATIONS"] if language == "zh" else BUILD["TRANSLATIONS"].values()
    return [page for page in BUILD["pages"]() if page not in left]


def test_no_link_is_dead(site):
    """To files and to anchors, of both sites; report.html of the study is a page of its own and has no links."""
    checked = 0
    for path in site.rglob("*.html"):
        for link in read(path).links:
            target, _, anchor = unquote(link).partition("#")
            if re.match(r"https?:|mailto:", target) or path.name == "404.html":
                continue
            file = (path.parent / target).resolve() if target else path
            file = file / "index.html" if file.is_dir() else file
            where = f"{path.relative_to(site)}: {link}"
            assert file.is_file(), where
            assert not anchor or file.suffix != ".html" or anchor in read(file).ids | {"__skip"}, where
            checked += 1
    assert checked > 1000


def test_nothing_is_fetched_from_elsewhere(site):
    for path in site.rglob("*.html"):
        for load in read(path).loads:
            if load.startswith("data:"):
                continue
            assert not re.match(r"\w+:|//", load), f"{path.name}: {load}"
            assert path.name == "404.html" or (path.parent / load.partition("?")[0]).is_file(), f"{path.name}: {load}"
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", path.read_text()), path.name


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_public_name_has_its_entry(site, language):
    page = read(site / html_of("reference", language))
    assert set(PUBLIC) - page.ids == set()
    text = (site / html_of("reference", language)).read_text()
    assert text.count("&gt;&gt;&gt;") >= len(PUBLIC), "an example isn't shown as code"
    assert ":func:" not in text
    assert ":class:" not in text


@pytest.mark.parametrize("language", LANGUAGES)
def test_navigation_has_each_page(site, language):
    home = site / html_of("README.md", language)
    assert read(home).language == language
    names = {(home.parent / link.partition("#")[0]).resolve() for link in read(home).links if link[:4] != "http"}
    for page in in_language(language):
        assert site.resolve() / html_of(page, language) in names, page
    text = home.read_text()
    for part, _ in BUILD["PARTS"]:
        assert part[language == "zh"] in text


def test_pages_have_the_parts_that_github_shows(site):
    """Two parsers of Markdown differ where a list or an indented block begins: as many of each part in both."""
    for language in LANGUAGES:
        for page in in_language(language):
            if page in ("reference", "examples/README.md"):  # made of more than the page
                continue
            shown = MarkdownIt("gfm-like", {"linkify": False}).render((ROOT / page).read_text())
            wanted = Html(f"<article>{shown}</article>").counts
            found = read(site / html_of(page, language)).counts
            assert found == wanted, f"{page}: {found} in the site, {wanted} on GitHub"


def test_errors_name_page_and_link():
    with pytest.raises(SystemExit, match=r"docs/hub.md: \(gone.md\) leads to no file"):
        BUILD["target"]("docs/hub.md", "gone.md", "en", set())


@pytest.mark.parametrize(
    ("page", "link", "language", "wanted"),
    [
        ("docs/hub.md", "models.md#limits", "en", "models.md#limits"),
        ("docs/study/README.md", "../../README.md", "en", "../index.md"),
        ("docs/explained.md", "explained.zh.md", "en", "zh/explained.html"),
        ("docs/explained.zh.md", "explained.md", "zh", "../explained.html"),
        ("docs/explained.zh.md", "../README.md#measured", "zh", "../index.html#measured"),
        ("README.zh-CN.md", "docs/explained.zh.md", "zh", "explained.md"),
        ("docs/scaling.md", "../examples/tensor_parallel.py", "en", "examples.md#tensor_parallelpy"),
        ("docs/study/README.md", "rates.png", "zh", "rates.png"),
        ("CHANGELOG.md", "https://example.org/a.md", "en", "https://example.org/a.md"),
    ],
)
def test_targets(page, link, language, wanted):
    assert BUILD["target"](page, link, language, set()) == wanted


@pytest.mark.parametrize(
    ("language", "word", "title"), [("en", "overflow", "Usual mistakes"), ("zh", "溢出", "常见错误")], ids=LANGUAGES
)
def test_search_finds_words_in_files(site, language, word, title, tmp_path):
    """Opened from the disk, without a server. The dialog is in a shadow tree."""
    webdriver = pytest.importorskip("selenium.webdriver")
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(programs):
        message = "no chromium and chromedriver here: apt-get install chromium chromium-driver"
        (pytest.fail if os.environ.get("RMSNORM_BROWSER") == "1" else pytest.skip)(message)
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={tmp_path}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    try:
        give_up = time.monotonic() + 120  # an idle machine needs 2 s
        found = ""
        while title not in found and time.monotonic() < give_up:
            browser.get((site / html_of("README.md", language)).as_uri())
            time.sleep(0.5)
            browser.find_element("css selector", "body").send_keys("/")
            time.sleep(0.5)
            browser.switch_to.active_element.send_keys(word)
            time.sleep(1)
            found = browser.execute_script(
                "return [...document.querySelectorAll('*')].map(e => e.shadowRoot?.textContent ?? '').join('')"
            )
        assert title in found, found[:500]
    finally:
        browser.quit()


def test_reference_has_a_place_for_each_public_name():
    listed = [f"rmsnorm.{name}" for names in BUILD["REFERENCE"].values() for name in names]
    assert len(listed) == len(set(listed))
    assert set(PUBLIC) - set(listed) == set()


def test_chinese_readers_are_told_what_is_in_english():
    """In the navigation and on top of the page, and nowhere else."""
    [*parts] = BUILD["settings"]("zh")["nav"]
    titles = {file: title for part in parts for page in next(iter(part.values())) for title, file in page.items()}
    for page in (page for _, part in BUILD["PARTS"] for page in part):
        translated = page in BUILD["TRANSLATIONS"]
        assert titles[BUILD["staged"](page)].endswith("（英文）") != translated, page
        if page == "reference":
            text = BUILD["reference"]("zh")
            assert "只有英文版" not in BUILD["reference"]("en")
        else:
            text = BUILD["stage"](BUILD["TRANSLATIONS"].get(page, page), "zh", set())
            assert "只有英文版" not in BUILD["stage"](page, "en", set())
        assert ("只有英文版" in text.partition("\n## ")[0]) != translated, page
    assert "英文" not in str(BUILD["settings"]("en")["nav"])
