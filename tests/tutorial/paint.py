"""How fast the lesson is in Chromium: first paint, all there, and for each control the time from an event to the paint.

    python tests/tutorial/paint.py     # on a quiet machine; needs Chromium, as the tests do

No test, as a clock says as much about the machine's other work as about the page.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

from selenium import webdriver

from rmsnorm.tutorial import build

FLAGS = "--headless=new --no-sandbox --disable-gpu --hide-scrollbars"
LOAD = """
const [page] = performance.getEntriesByType("navigation");
const [paint] = performance.getEntriesByName("first-contentful-paint");
return [paint?.startTime ?? NaN, page.loadEventEnd]"""
# From just before the event to the frame after the one in which its drawing is painted.
TURN = """
const [panel, done] = arguments, times = [];
document.querySelector(`#${panel} .question button`)?.click();
const controls = [...document.querySelectorAll(`#${panel} input[type=range]`)];
(async () => {
  for (const input of controls) for (let i = 0; i < 10; i++) {
    await new Promise(next => setTimeout(next, 30));
    const start = performance.now();
    input.value = i % 2 ? input.min : input.max;
    input.dispatchEvent(new Event("input", { bubbles: true }));
    await new Promise(next => requestAnimationFrame(() => setTimeout(next)));
    times.push(performance.now() - start);
  }
  done(times);
})()"""


def main(loads: int = 5) -> None:
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in FLAGS.split():
        options.add_argument(flag)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "en.html")
        page.write_text(build.page("en", {}), encoding="utf-8")
        driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
        try:
            seen = []
            for _ in range(loads):
                driver.get("about:blank")
                driver.get(page.as_uri())
                driver.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 100))")
                seen.append(driver.execute_script(LOAD))
            first, whole = (statistics.median(one) for one in zip(*seen, strict=True))
            print(f"first paint {first:.0f} ms, complete {whole:.0f} ms: medians of {loads} loads")
            everything = []
            for panel in build.PANELS:
                times = driver.execute_async_script(TURN, panel)
                everything += times
                if times:  # the others have no slider
                    middle, worst = statistics.median(times), max(times)
                    print(f"{panel:<12} {middle:5.1f} ms, at worst {worst:.1f}, of {len(times)} events")
            print(f"{'all':<12} {statistics.median(everything):5.1f} ms, at worst {max(everything):.1f}")
        finally:
            driver.quit()


if __name__ == "__main__":
    sys.exit(main())
