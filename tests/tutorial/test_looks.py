"""The lesson's colours: told apart by the colour-blind, and read on what they stand on."""

from __future__ import annotations

import re

import numpy as np
import pytest

pytest.importorskip("markdown_it")

from rmsnorm.tutorial import build

# Machado, Oliveira & Fernandes 2009: what a full protanope, deuteranope and tritanope see, in linear RGB.
BLIND = {
    "all cones": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def lab(colour: str, eye: list[list[float]]) -> np.ndarray:
    """CIE L*a*b* of a colour as an eye sees it."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(eye) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ seen
    f = np.cbrt(np.maximum(xyz / np.array([0.9505, 1, 1.089]), 1e-6))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("eye", BLIND)
@pytest.mark.parametrize("look", [0, 1], ids=["light", "dark"])
def test_the_norms_can_be_told_apart_by_the_colour_blind(eye, look):
    """A difference of 10 is seen at a glance; 2.3 is just noticeable."""
    named = dict.fromkeys(("rms", "layer", "batch"), "")
    found = {name: re.findall(rf"--{name}: (#\w{{6}})", build.read("style.css")) for name in named}
    colours = [lab(found[name][look], BLIND[eye]) for name in named]
    apart = [np.linalg.norm(a - b) for i, a in enumerate(colours) for b in colours[i + 1 :]]
    assert min(apart) > 10


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance."""
    whole = "".join(2 * digit for digit in colour[1:]) if len(colour) == 4 else colour[1:]
    rgb = np.array([int(whole[i : i + 2], 16) for i in (0, 2, 4)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


@pytest.mark.parametrize("look", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("ink", "papers"),
    [
        ("ink", "page wash good bad r0 r1 r2 r3"),
        ("soft", "page wash"),
        *[(name, "page wash") for name in ("accent", "rms", "layer", "batch", "guess")],
    ],
)
def test_words_can_be_read_on_what_they_stand_on(ink, papers, look):
    """WCAG's AA for words: 4.5 to 1."""
    css = build.read("style.css")
    value = {name: re.findall(rf"--{name}: (#\w+)", css)[look] for name in (ink, *papers.split())}
    for paper in papers.split():
        low, high = sorted(luminance(value[name]) for name in (ink, paper))
        assert (high + 0.05) / (low + 0.05) >= 4.5, paper
