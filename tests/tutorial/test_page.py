"""The lesson's pages in headless Chromium: whole, in both languages, folded on a phone; nothing is cut off.

Screenshots are kept where RMSNORM_SCREENSHOTS says, if it says so. RMSNORM_AXE names axe-core's axe.min.js (npm), with
which the pages are searched for what keeps people out; without it that test is skipped.
"""

from __future__ import annotations

import os
import re
from itertools import product
from pathlib import Path

import pytest
from browser import (
    CUT_OFF,
    LANGUAGES,
    OVERLAPS,
    RIGHT,
    WIDTHS,
    fetched,
    fresh,
    guess,
    options,
    painted,
    press,
    resize,
    said,
)
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from thinned import heavy_but

from rmsnorm.tutorial import build

pytestmark = pytest.mark.xdist_group("browser")


def keep(driver, name: str) -> None:
    """Takes a screenshot of each panel."""
    folder = os.environ.get("RMSNORM_SCREENSHOTS")
    for panel in build.PANELS if folder else ():
        driver.execute_script(f"document.getElementById('{panel}').scrollIntoView()")
        driver.save_screenshot(str(Path(folder, f"{name}-{panel}.png")))


@pytest.mark.parametrize(
    ("language", "width"), heavy_but([("en", "wide"), ("zh", "phone")], product(LANGUAGES, WIDTHS))
)
def test_a_page_is_whole(chromium, built, language, width):
    """Every panel opened by a wrong guess: it is marked, nothing is cut off or overlaps, asked for or complained of.

    It is 10 screens of a phone at most, before anything is opened and when everything was.
    """
    fresh(chromium, built, language, WIDTHS[width])
    assert chromium.find_element(By.TAG_NAME, "html").get_attribute("lang") == {"en": "en", "zh": "zh-Hans"}[language]
    screens = "return document.documentElement.scrollHeight / 844"
    assert chromium.execute_script(screens) <= 10
    for panel, right in RIGHT.items():
        wrong = next(o for o in options(panel, language) if o != right)
        assert not chromium.find_element(By.CSS_SELECTOR, f"#{panel} .bench").is_displayed()
        assert not chromium.find_elements(By.CSS_SELECTOR, f"#{panel} [data-number]")
        chromium.execute_script(f"document.querySelector('#{panel} input[value=\"{wrong}\"]').click()")
        assert chromium.execute_script("return document.getElementById('short').open") == (panel == list(RIGHT)[-1])
    painted(chromium)
    if width == "phone":
        assert chromium.execute_script(screens) <= 10
    chromium.execute_script("document.querySelectorAll('.bench').forEach(box => { box.open = true; })")
    painted(chromium)
    for panel in RIGHT:
        assert chromium.find_elements(By.CSS_SELECTOR, f"#{panel} .wrong.verdict"), panel
        assert chromium.find_elements(By.CSS_SELECTOR, f"#{panel} figure .flag"), panel
        assert chromium.find_elements(By.CSS_SELECTOR, f"#{panel} [data-number]"), panel
    assert chromium.execute_script(CUT_OFF) == []
    assert chromium.execute_script(OVERLAPS) == []
    assert chromium.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    words = chromium.find_element(By.ID, "score").text
    assert [int(one) for one in re.findall(r"\d+", words)].count(0) == 1, words
    keep(chromium, f"{language}-{width}")
    assert said(chromium) == []
    assert fetched(chromium) == set()


def test_both_languages_have_the_same_ids_and_controls(chromium, built):
    found = []
    for language in LANGUAGES:
        fresh(chromium, built, language)
        chromium.execute_script("document.querySelectorAll('.question button').forEach(b => b.click())")
        found.append(
            chromium.execute_script(
                "return [...document.querySelectorAll('[id], [data-number]')].map(e => e.id || e.dataset.number)"
            )
        )
    assert found[0] == found[1]
    assert len(found[0]) == len(set(found[0])) > 120


def test_a_right_guess_is_right_and_the_score_counts(chromium, built):
    fresh(chromium, built)
    guess(chromium, "ruler", "batch")
    guess(chromium, "eps", "zero")
    guess(chromium, "sphere")
    assert chromium.find_element(By.CSS_SELECTOR, "#ruler .verdict").text == "✓ Yes: only in BatchNorm"
    assert chromium.find_element(By.CSS_SELECTOR, "#eps .verdict").text == "✗ Not this time: NaN"
    assert chromium.find_element(By.CSS_SELECTOR, "#sphere .verdict").text == "→ Answer: when the mean is 0"
    assert chromium.find_element(By.ID, "score").text.startswith("1 of your 2 guesses")
    assert len(chromium.find_elements(By.CSS_SELECTOR, "#sheet tr")) == 3


def test_on_a_phone_one_figure_is_open_at_a_time(chromium, built):
    """And what the finger is on stays under it while another figure folds."""
    fresh(chromium, built, width=WIDTHS["phone"])
    is_open = "return [...document.querySelectorAll('.bench[open]')].map(box => box.parentElement.id)"
    for panel in ("ruler", "layer", "eps"):
        form = chromium.find_element(By.CSS_SELECTOR, f"#{panel} form")
        chromium.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", form)
        before = chromium.execute_script("return arguments[0].getBoundingClientRect().top", form)
        guess(chromium, panel)
        assert chromium.execute_script("return arguments[0].getBoundingClientRect().top", form) == pytest.approx(
            before, abs=1
        )
        assert chromium.execute_script(is_open) == [panel]
    chromium.find_element(By.CSS_SELECTOR, "#ruler .bench > summary").click()
    painted(chromium)
    assert chromium.execute_script(is_open) == ["ruler"]
    assert said(chromium) == []


def test_formulas_are_set_and_fit(chromium, built):
    """As MathML that is drawn: a fraction is higher than a letter. Nothing of the notation is left in the text."""
    for language in LANGUAGES:
        fresh(chromium, built, language, WIDTHS["phone"])
        for panel in RIGHT:
            guess(chromium, panel)
        high = "return [...document.querySelectorAll(arguments[0])].map(e => e.getBoundingClientRect().height)"
        assert min(chromium.execute_script(high, "math mfrac")) > max(chromium.execute_script(high, "math mi"))
        for nothing in ("$", "undefined", "[object"):  # of a text or a number that isn't there
            assert nothing not in chromium.find_element(By.TAG_NAME, "main").text


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_a_word_is_explained_on_focus(chromium, built, width):
    fresh(chromium, built, width=width)
    word = chromium.find_element(By.CSS_SELECTOR, "#ruler .term")
    tip = word.find_element(By.CLASS_NAME, "tip")
    meaning = chromium.find_element(By.ID, word.get_attribute("aria-describedby"))
    assert not tip.is_displayed()
    chromium.execute_script("arguments[0].focus()", word)
    assert tip.is_displayed()
    assert tip.text == meaning.text
    for place in ("start", "end"):  # of the screen: below the word, or above
        chromium.execute_script(f"arguments[0].scrollIntoView({{block: '{place}', behavior: 'instant'}})", word)
        painted(chromium)
        box = chromium.execute_script("return arguments[0].getBoundingClientRect()", tip)
        assert min(box["left"], box["top"]) >= 0
        assert box["right"] <= width
        assert box["bottom"] <= 900
    press(chromium, Keys.ESCAPE)
    assert not tip.is_displayed()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_axe_finds_nothing_serious(chromium, built, language, dark):
    place = os.environ.get("RMSNORM_AXE")
    if not place:
        pytest.skip("RMSNORM_AXE doesn't name axe-core's axe.min.js")
    fresh(chromium, built, language)
    resize(chromium, 1280, dark=dark)
    chromium.execute_script("document.querySelectorAll('.question button').forEach(b => b.click())")
    painted(chromium)
    chromium.execute_script(Path(place).read_text())
    found = chromium.execute_async_script("axe.run().then(arguments[0])")
    serious = [v for v in found["violations"] if v["impact"] in ("serious", "critical")]
    assert [(v["id"], [n["html"][:100] for n in v["nodes"]][:5]) for v in serious] == []
