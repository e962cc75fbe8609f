"""Headless Chromium for the lesson: one for all of its tests.

Selenium and not Playwright: it drives Debian's Chromium with Debian's chromedriver, which are of one version, while
Playwright wants the build it brings. Without Chromium the tests are skipped; with RMSNORM_BROWSER=1, as .ci/run has it,
they fail.
"""

from __future__ import annotations

import json
import os
import shutil
from types import SimpleNamespace

import pytest

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
)
SLOW = 120  # seconds; an idle machine needs 2


def missing(message: str) -> None:
    if os.environ.get("RMSNORM_BROWSER") == "1":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    """A fresh Chromium that remembers every request and every message of the console."""
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(programs):
        missing("no chromium and chromedriver here: apt-get install chromium chromium-driver")
    try:
        from selenium import webdriver
    except ModuleNotFoundError:
        missing("selenium isn't installed")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    driver.set_page_load_timeout(SLOW)
    driver.set_script_timeout(SLOW)
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The folder of the pages, with numbers of a made-up model and machine."""
    from rmsnorm.tutorial import build

    folder = tmp_path_factory.mktemp("lesson")
    for name, page in build.pages(MEASURED).items():
        (folder / name).write_text(page, encoding="utf-8")
    return folder


SEEN = {"tokens": 3, "rms": [0.1, 3.0, 9.0], "largest": [1.0, 661.7, 200.0], "share": [0.01, 0.02, 0.03]}
MEASURED = {
    "machine": "a machine, 2026-01-01",
    "cost": {"seconds": {"rmsnorm": 1e-3, "copy_": 8e-4}, "shape": "4096 × 4096", "dtype": "float32"},
    "ulps": {"bfloat16": 0.5},
    "depth": {"all": SEEN, "rest": {**SEEN, "largest": [1.0, 200.0, 255.0]}},
}


@pytest.fixture(scope="session")
def script(chromium, tmp_path_factory):
    """Calls a function of the lesson's modules in Chromium, ``script("numbers.round", 1.1, "bfloat16")``, or runs an
    expression with all of them as ``lesson`` and the arguments as ``a``, ``b``, and so on.

    Numbers cross as JSON, which keeps every bit of a double; what JSON has no word for crosses as a string.
    """
    from rmsnorm.tutorial import build

    modules = build.MODULES[:-1]
    bring = "".join(f'import * as {name} from "{name}";' for name in modules)
    page = tmp_path_factory.mktemp("script") / "script.html"
    page.write_text(
        f'<meta charset="utf-8"><script type="importmap">{build.script(build.imports())}</script>'
        f'<script type="module">{bring}window.lesson = {{ {", ".join(modules)} }};</script>'
    )
    address = page.as_uri()

    def call(code: str, *arguments):
        if chromium.current_url != address:
            chromium.get(address)
        found = chromium.execute_script(
            """
            const plain = (key, value) => ArrayBuffer.isView(value) ? [...value]
              : Object.is(value, -0) || (typeof value === "number" && !Number.isFinite(value))
                ? (value === 0 ? "-0" : String(value)) : value;
            const code = new Function("lesson", "values", `const [a, b, c, d, e] = values; return ${arguments[0]}`);
            return JSON.stringify(code(lesson, arguments[1]), plain) ?? "null";""",
            code if "(" in code else f"lesson.{code}(...values)",
            arguments,
        )
        return unstrung(json.loads(found))

    return call


def unstrung(value):
    """Numbers that crossed as strings, as numbers; objects with attributes."""
    if isinstance(value, list):
        return [unstrung(one) for one in value]
    if isinstance(value, dict):
        return {key: unstrung(one) for key, one in value.items()}
    return (
        {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf"), "-0": -0.0}.get(value, value)
        if isinstance(value, str)
        else value
    )


@pytest.fixture
def quick(monkeypatch):
    """No model, a short race on a machine that is quiet."""

    from rmsnorm.models import loading
    from rmsnorm.tutorial import measured

    def none():
        raise loading.Unusable("no model here")

    monkeypatch.setattr(measured, "SECONDS", 0.01)
    monkeypatch.setattr(measured, "BUSY", 1e9)
    monkeypatch.setattr(measured, "model", none)
    monkeypatch.setattr(measured, "COLS", 64)


@pytest.fixture
def figure(script):
    """What a figure computes with some controls set, the others as they start: ``figure("eps", size=1)``."""

    def compute(name: str, data=None, **controls):
        state = {key: control["start"] for key, control in script(f"lesson.{name}.controls.valueOf()").items()}
        return SimpleNamespace(**script(f"{name}.compute", state | controls, data or {}))

    return compute
