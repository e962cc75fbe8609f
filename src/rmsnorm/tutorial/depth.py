"""The only file that looks into a real model: what SmolLM2's 61 norms are given, on the reader's own sentence."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from .. import _smollm
from ..models import loading
from . import plots
from .panel import Choice, Number, Panel, Sentence


@dataclass(frozen=True)
class Profile:
    """By norm, in the order of the forward pass."""

    tokens: int
    rms: Tensor
    """Of all tokens together: [norms]."""
    largest: Tensor
    """The largest |value| of any token: [norms]."""
    mean_share: Tensor
    """|mean| ÷ rms, which is |cos θ|, averaged over the tokens: [norms]."""

    @property
    def numbers(self) -> dict[str, Number]:
        """First and last, and the extremes."""
        return {
            "tokens": self.tokens,
            "norms": len(self.rms),
            "first": self.rms[0].item(),
            "last": self.rms[-1].item(),
            "largest": self.largest.max().item(),
            "where": int(self.largest.argmax()) + 1,
            "share": f"{self.mean_share.mean().item():.1%}",
            "removed": f"{self.mean_share.square().mean().item():.2%}",
        }


@lru_cache(maxsize=1)
def model() -> tuple[Any, Any]:
    """Tokenizer and model; loaded once, from disk."""
    return loading.load(loading.SMOLLM2, torch.float32)


@lru_cache(maxsize=8)
def inputs_of_norms(sentence: str) -> tuple[Tensor, ...]:
    """What each norm is given: [tokens, 576], in order."""
    tokenizer, smollm2 = model()
    words = tokenizer(sentence, return_tensors="pt")
    norms = _smollm.norms_of(smollm2)
    with torch.inference_mode(), _smollm.recorded(norms) as seen:
        smollm2(words["input_ids"])
    return tuple(x[0] for x in seen.values())


def profile(sentence: str, tokens: str) -> Profile:
    """Size, largest value and share of the mean, by norm."""
    x = torch.stack(inputs_of_norms(sentence or " ")).double()
    if tokens == "rest" and x.shape[1] > 1:
        x = x[:, 1:]
    rms = x.square().mean(-1).sqrt()
    share = (x.mean(-1).abs() / rms).mean(-1)
    largest = x.abs().amax((-1, -2))
    whole = x.square().mean((-1, -2)).sqrt()
    return Profile(x.shape[1], whole, largest, share)


def draw(seen: Profile) -> Figure:
    """Two curves on one scale above, the share of the mean below."""
    figure, (sizes, share) = plots.axes(5.4, 2, 1, sharex=True, height_ratios=(1.4, 1))
    places = range(1, len(seen.rms) + 1)
    sizes.plot(places, seen.largest.numpy(), color=plots.COLOURS["x"], lw=2, label="largest |x|")
    sizes.plot(places, seen.rms.numpy(), color=plots.COLOURS["RMSNorm"], lw=2.6, label="rms")
    sizes.set(yscale="log", title="what the norms are given")
    sizes.legend(loc="upper left")
    share.fill_between(places, 100 * seen.mean_share.numpy(), color=plots.COLOURS["LayerNorm"], alpha=0.25)
    share.plot(places, 100 * seen.mean_share.numpy(), color=plots.COLOURS["LayerNorm"], lw=2)
    share.set(ylim=(0, 100), xlabel="norm, from the first layer to the last", title="|mean| / rms, in %")
    return figure


PANEL = Panel(
    name="depth",
    formula=(r"\dfrac{|\mathrm{mean}|}{\mathrm{rms}}=|\cos\theta|", r"\mathrm{rms}^2=\mathrm{mean}^2+\mathrm{std}^2"),
    options=("tiny", "half", "most"),
    right="tiny",
    controls={"tokens": Choice(("all", "rest"), "all"), "sentence": Sentence()},
    measure=profile,
    draw=draw,
    code=(inputs_of_norms, profile),
    slow=True,
)
