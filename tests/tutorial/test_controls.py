"""The lesson's controls in headless Chromium: each by keys and by mouse, what they give against the library."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
import torch.nn.functional as F
from browser import (
    HANDS,
    OVERLAPS,
    RIGHT,
    WIDTHS,
    drag,
    fresh,
    guess,
    number,
    numbers,
    painted,
    press,
    said,
    swipe,
    wait,
)
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

import rmsnorm

pytestmark = pytest.mark.xdist_group("browser")
by_hand = pytest.mark.parametrize(("move", "width"), HANDS.values(), ids=HANDS)


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
    assert number(chromium, "ruler.norms.batch.elsewhere") == "2"
    go_to("number")
    press(chromium, Keys.ARROW_UP)
    assert (
        number(chromium, "ruler.norms.batch.elsewhere") == "2"
    )  # b and a differ from the original now: c's two outputs
    go_to("guess-layer")
    press(chromium, Keys.ARROW_DOWN)
    press(chromium, Keys.ARROW_DOWN)
    assert not chromium.find_element(By.CSS_SELECTOR, "#layer .bench").is_displayed()  # looking is no guess
    press(chromium, Keys.SPACE)
    assert chromium.find_element(By.CSS_SELECTOR, "#layer .right input").get_attribute("value") == "same"
    assert chromium.find_elements(By.CSS_SELECTOR, "#layer .right.verdict")
    go_to("layer-factor")
    press(chromium, Keys.ARROW_RIGHT)
    assert numbers(chromium, "layer.input") == pytest.approx([1, 1, 2, 3], rel=1e-6)
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


@pytest.mark.heavy
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
        for handle in chromium.find_elements(By.CSS_SELECTOR, f"#{panel} .handle"):
            for move in (
                lambda handle=handle: handle.send_keys(Keys.ARROW_LEFT),
                lambda handle=handle: drag(chromium, handle, -40, 40),
            ):
                before, spoken = chromium.execute_script(seen), handle.get_attribute("aria-valuetext")
                move()
                painted(chromium)
                assert chromium.execute_script(seen) != before, handle.get_attribute("aria-label")
                assert handle.get_attribute("aria-valuetext") != spoken
    assert said(chromium) == []


@by_hand
def test_typed_numbers_and_dragged_bars_give_what_the_library_gives(chromium, built, move, width):
    fresh(chromium, built, width=width)
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
    move(chromium, bar, 0, -30)
    moved = numbers(chromium, "layer.input")[0]
    assert moved != before
    bar.send_keys(Keys.ARROW_DOWN)
    painted(chromium)
    assert numbers(chromium, "layer.input")[0] == pytest.approx(moved - 0.1, abs=1e-6)
    assert bar.get_attribute("aria-valuetext")
    given = torch.tensor(numbers(chromium, "layer.input"))
    assert numbers(chromium, "layer.y") == pytest.approx(rmsnorm.rms_norm(given, (4,), eps=1e-6).tolist(), rel=2**-22)


@by_hand
def test_a_dragged_cell_moves_the_tables(chromium, built, move, width):
    fresh(chromium, built, width=width)
    guess(chromium, "ruler", "all")
    cells = chromium.find_elements(By.CSS_SELECTOR, "#ruler .cells input")
    move(chromium, cells[6], 80, 0)
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


@by_hand
def test_the_sphere_is_turned_by_hand(chromium, built, move, width):
    fresh(chromium, built, width=width)
    guess(chromium, "sphere", "zero")
    ball = chromium.find_element(By.CSS_SELECTOR, "#sphere .ball")
    layer = number(chromium, "sphere.layer")
    before = [chromium.find_element(By.ID, f"sphere-{key}").get_attribute("aria-valuetext") for key in ("yaw", "pitch")]
    move(chromium, ball, 60, 40)
    after = [chromium.find_element(By.ID, f"sphere-{key}").get_attribute("aria-valuetext") for key in ("yaw", "pitch")]
    assert all(one != other for one, other in zip(before, after, strict=True))
    chromium.find_element(By.ID, "sphere-shift").send_keys(Keys.ARROW_RIGHT)
    painted(chromium)
    x = torch.tensor([1.2, -0.6, 0.3], dtype=torch.float64) + 1.25
    assert numbers(chromium, "sphere.root") == pytest.approx(rmsnorm.rms_norm(x, (3,), eps=0.0).tolist(), abs=1e-12)
    assert numbers(chromium, "sphere.layer") == pytest.approx([float(v) for v in layer.split(",")], abs=1e-12)


@by_hand
def test_the_vector_of_the_sphere_is_dragged(chromium, built, move, width):
    """Across the screen: seen from the front, (a, b, c) lies a to the right and c up; b, towards the eye, stays."""
    fresh(chromium, built, width=width)
    guess(chromium, "sphere", "zero")
    for name, key in (("shift", -4), ("yaw", -4), ("pitch", -5)):  # to 0
        chromium.find_element(By.ID, f"sphere-{name}").send_keys(*[Keys.ARROW_LEFT] * -key)
    painted(chromium)
    cells = chromium.find_elements(By.CSS_SELECTOR, "#sphere .cells input")
    tip = chromium.find_element(By.CSS_SELECTOR, "#sphere .handle")
    unit = 340 / 4.6  # pixels
    move(chromium, tip, 37, 0)
    x = [float(cell.get_attribute("value")) for cell in cells]
    assert x == pytest.approx([1.2 + 37 / unit, -0.6, 0.3], abs=0.02)
    tip.send_keys(Keys.ARROW_UP)
    painted(chromium)
    x[2] += 0.1
    assert [float(cell.get_attribute("value")) for cell in cells] == pytest.approx(x, abs=0.011)
    given = torch.tensor([float(cell.get_attribute("value")) for cell in cells], dtype=torch.float64)
    assert numbers(chromium, "sphere.root") == pytest.approx(rmsnorm.rms_norm(given, (3,), eps=0.0).tolist(), abs=1e-12)


@by_hand
def test_the_vector_whose_gradient_is_drawn_is_dragged(chromium, built, move, width):
    """From 75° by about 90 pixels to the left and 20 down, around a circle of 76: to another of the slider's stops."""
    fresh(chromium, built, width=width)
    guess(chromium, "gradient", "smaller")
    move(chromium, chromium.find_element(By.CSS_SELECTOR, "#gradient .handle"), -90, 20)
    angle = int(chromium.find_element(By.ID, "gradient-angle").get_attribute("aria-valuetext").rstrip("°"))
    tip = complex(76 * math.cos(math.radians(75)) - 90, 76 * math.sin(math.radians(75)) - 20)
    assert angle == pytest.approx(math.degrees(cmath.phase(tip)), abs=7.5)
    x = torch.tensor([math.cos(math.radians(angle)), math.sin(math.radians(angle))], dtype=torch.float64)
    x = (10 * math.sqrt(2) * x).requires_grad_()
    (dx,) = torch.autograd.grad(rmsnorm.rms_norm(x, (2,), eps=0.0), x, torch.tensor([0.9, 0.5], dtype=x.dtype))
    assert numbers(chromium, "gradient.dx") == pytest.approx(dx.tolist(), abs=1e-12)


@pytest.mark.parametrize(
    ("where", "dx", "dy", "scrolls"),
    [
        ("#ruler > p", 0, -200, True),
        ("#ruler .cells input", 0, -200, True),  # which is dragged sideways
        ("#ruler .cells input", 80, 0, False),
        ("#layer .handle", 0, -60, False),
        ("#layer figcaption", 0, -200, True),
        ("#sphere .ball", 0, -100, False),
        ("#sphere .handle", 0, -60, False),
        ("#gradient .handle", 0, 60, False),
    ],
)
def test_a_finger_scrolls_the_page_but_where_it_drags(chromium, built, where, dx, dy, scrolls):
    fresh(chromium, built, width=WIDTHS["phone"])
    guess(chromium, where.split()[0].removeprefix("#"))
    element = chromium.find_element(By.CSS_SELECTOR, where)
    chromium.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
    painted(chromium)
    before = chromium.execute_script("return scrollY")
    swipe(chromium, element, dx, dy)
    places = [before]
    while len(places) < 6 or len(set(places[-5:])) > 1:  # until it stands still
        painted(chromium)
        places.append(chromium.execute_script("return scrollY"))
    assert abs(places[-1] - before) > 50 if scrolls else abs(places[-1] - before) < 1, places


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
