"""The only file that says what a study is before it runs: what is trained, how large it is, what its words mean."""

from __future__ import annotations

import math

from . import network
from .arms import ARMS
from .plan import FULL, Setting

REHEARSAL = "A rehearsal: nothing here is a finding."


def rehearsal(setting: Setting) -> str:
    """What makes it one, and what doesn't: the first words of its results."""
    return (
        f"{REHEARSAL} The model is small, its training short, and {setting.seeds} seeds say little about noise; "
        f"`rmsnorm study` without --quick trains {FULL.layers} layers for {FULL.steps} steps with {FULL.seeds} seeds, "
        "in half an hour."
    )


def preface(setting: Setting) -> list[str]:
    """Paragraphs; each word that the results use is explained here, once."""
    s = setting
    size = sum(parameter.numel() for parameter in network.build(s, s.arms[0], 0).parameters())
    arms = "; ".join(f"`{name}`: {ARMS[name].title}" for name in s.arms)
    counts = "Arms whose bands overlap are not ranked."
    if not s.rehearsal:
        counts = "A difference of two arms, taken seed by seed, counts if 0 is outside its band."
    return [
        *([rehearsal(s)] if s.rehearsal else []),
        f"The model: a LLaMA of {s.layers} layers, {s.width} wide, {size:,} parameters. It reads {s.tokens:,} bytes "
        "and learns to predict the next byte.",
        f"An arm: what stands where that model has its norms, by its name in --arms and in results ({arms}). Each arm "
        f"is trained at {s.rates} learning rates or more, then with {s.seeds} seeds at its best one.",
        "Nats: the loss, how surprised the model is by a byte that it hasn't seen, on average; less is better. "
        f"Knowing nothing costs ln {network.BYTES} = {math.log(network.BYTES):.2f} nats.",
        f"A band, the number behind ±: where the mean over endless seeds lies, 95 times in 100. {counts}",
    ]
