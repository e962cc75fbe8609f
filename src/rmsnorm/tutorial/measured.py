"""The only file that measures for the lesson what a page can't compute: times, kernels' errors, a real model's numbers.

Everything is plain JSON. What could not be measured says why, under "why".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import rmsnorm

from .. import _smollm
from ..bench import cases, console, contenders, race
from ..models import loading
from .texts import load
from .ulp import errors

Json = dict[str, Any]
NAMES = ("rmsnorm", "rmsnorm.layer_norm", "F.layer_norm", "F.rms_norm", "copy_")
"""Contenders of the bench, ours first."""
SHAPES = (1, 128, 4096, 32768)
"""Rows that the page offers, each of COLS numbers."""
COLS = 4096
SECONDS = 1.0
BUSY = 0.5
"""Of each core: the load above which a clock says more about its neighbours."""


def machine() -> str:
    """What a reader must know of this machine, in a line."""
    here = console.machine()
    return f"{here['cpu']}, torch {here['torch']}, rmsnorm {here['rmsnorm']}, {here['date'][:10]}"


def cost(rows: int, dtype: str) -> Json:
    """Median seconds of a call by contender, after their outputs were compared.

    Args:
        rows: one of SHAPES.
        dtype: float32 or bfloat16.
    """
    here = console.machine()
    if here["load"] > BUSY * here["cores"]:
        return {"why": f"the machine is busy: load {here['load']:.1f} on {here['cores']} cores"}
    entered = [contenders.BY_NAME[name] for name in NAMES]
    result = race.race(cases.Case(rows, COLS, dtype), entered, SECONDS)
    seconds = {name: line.median_s for name, line in result.contenders.items()}
    return {"seconds": seconds, "shape": f"{rows} × {COLS}", "dtype": dtype, "machine": machine()}


def ulps() -> Json:
    """The largest error of any output of the kernels, in ulps, by type: 64 rows of 1024, gains around 1."""
    found = {}
    for name in ("bfloat16", "float16", "float32"):
        noise, dtype = torch.Generator().manual_seed(0), getattr(torch, name)
        x = torch.randn(64, 1024, generator=noise).to(dtype)
        w = (1 + 0.2 * torch.randn(1024, generator=noise)).to(dtype)
        exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * w.double()
        found[name] = errors(rmsnorm.rms_norm(x, (1024,), w, 1e-6), exact).max().item()
    return found


@lru_cache(maxsize=1)
def model() -> tuple[Any, Any]:
    """Tokenizer and model; loaded once, from disk."""
    return loading.load(loading.SMOLLM2, torch.float32)


def depth(sentence: str) -> Json:
    """What each of SmolLM2's norms is given, over all tokens and over all but the first."""
    try:
        tokenizer, smollm2 = model()
    except loading.Unusable as reason:
        return {"why": str(reason)}
    words = tokenizer(sentence or " ", return_tensors="pt")
    norms = _smollm.norms_of(smollm2)
    with torch.inference_mode(), _smollm.recorded(norms) as seen:
        smollm2(words["input_ids"])
    x = torch.stack([one[0] for one in seen.values()]).double()
    return {
        "all": profile(x),
        "rest": profile(x[:, 1:] if x.shape[1] > 1 else x),
        "sentence": sentence,
        "machine": machine(),
    }


def profile(x: Tensor) -> Json:
    """Size, largest value, and |mean| ÷ rms averaged over the tokens, by norm, of ``[norms, tokens, features]``."""
    rms = x.square().mean(-1).sqrt()
    return {
        "tokens": x.shape[1],
        "rms": x.square().mean((-1, -2)).sqrt().tolist(),
        "largest": x.abs().amax((-1, -2)).tolist(),
        "share": (x.mean(-1).abs() / rms).mean(-1).tolist(),
    }


def everything(progress: Callable[[str], None] = lambda what: None) -> Json:
    """All of it, for a page that is kept.

    Args:
        progress: hears what is measured next.
    """
    parts: dict[str, Callable[[], Any]] = {
        "machine": machine,
        "cost": lambda: cost(4096, "float32"),
        "ulps": ulps,
        "depth": lambda: depth(load("en")["depth.sentence.start"]),
    }
    found: Json = {}
    for name, measure in parts.items():
        progress(name)
        found[name] = measure()
    return found
