"""What the lesson's tests do in a browser: open a page, guess, press, drag, read numbers and the console."""

from __future__ import annotations

import json
from urllib.parse import urlsplit

import pytest

pytest.importorskip("markdown_it")
pytest.importorskip("selenium")

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from rmsnorm.tutorial import texts

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
    "passes": "7",
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


def options(panel: str, language: str) -> list[str]:
    """What a reader may guess."""
    start = f"{panel}.option."
    return [key.removeprefix(start) for key in texts.load(language) if key.startswith(start)]


def resize(driver, width: int, height: int = 900, dark: bool = False) -> None:
    """As a phone's browser reports it; a window of Chromium can't be narrower than 500 pixels."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": width < 500})
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


def swipe(driver, element, dx: int, dy: int) -> None:
    """By a finger, in steps, as a screen reports it."""
    driver.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
    painted(driver)
    box = driver.execute_script("return arguments[0].getBoundingClientRect()", element)
    x, y, steps = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, 10

    def touch(kind: str, *points: dict[str, float]) -> None:
        driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", {"x": x, "y": y})
    for i in range(1, steps + 1):
        touch("touchMove", {"x": x + dx * i / steps, "y": y + dy * i / steps})
    touch("touchEnd")
    painted(driver)


HANDS = {"mouse": (drag, WIDTHS["wide"]), "finger": (swipe, WIDTHS["phone"])}
"""What drags, and the width of the screen that it does so on."""
