"""The only file that times a step of each arm, and the norms in it alone; a race of its own, after the trainings."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..bench import timing
from . import network
from .arms import ARMS, EPS
from .corpus import Corpus
from .plan import Setting

REFERENCE = "transformers"
"""The model's own norm, LlamaRMSNorm: the same formula in torch's operators; timed, not trained."""
Call = Callable[[], object]


def measure(setting: Setting, corpus: Corpus, seconds: float) -> dict[str, Any]:
    """Seconds of a training step and of its norms alone, forward and backward, on one thread; the arms take turns.

    Ratios are medians of quotients within a round, with their quartiles; ``norms`` are all of a step's norms, on inputs
    of its shape that are in the cache. "none" is the step without any, and is timed whether it is an arm or not.
    """
    arms = list(dict.fromkeys(["none", *setting.arms]))
    with network.one_thread():
        steps = {arm: _step(setting, arm, corpus) for arm in arms}
        norms = {arm: _norms(setting, ARMS[arm].make) for arm in arms if arm != "none"}
        norms[REFERENCE] = _norms(setting, _theirs)
        step_times = timing.measure(steps, 0.75 * seconds)
        norm_times = timing.measure(norms, 0.25 * seconds)
    return {
        "seconds": seconds,
        "steps": {arm: _numbers(step_times, arm) for arm in arms},
        "norms": {arm: _numbers(norm_times, arm) for arm in norms},
        "norms_in_a_step": 2 * setting.layers + 1,
        "rows": setting.batch * setting.context,
        "columns": setting.width,
    }


def _numbers(times: Mapping[str, timing.Timing], name: str) -> dict[str, Any]:
    mine = times[name]
    return {
        "median_s": mine.median,
        "quartiles_s": list(mine.quartiles),
        "rounds": len(mine.seconds),
        "ratios": {other: _quartiles(mine.quotients(theirs)) for other, theirs in times.items()},
    }


def _quartiles(values: Sequence[float]) -> list[float]:
    """The second is the median."""
    return statistics.quantiles(values, n=4, method="inclusive")


def _step(setting: Setting, arm: str, corpus: Corpus) -> Call:
    model = network.build(setting, arm, seed=0)
    optimizer = network.optimizer_of(model)
    windows = corpus.windows(corpus.draws(setting.context, setting.batch, 1, seed=0)[0], setting.context)

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        network.loss_of(model, windows).backward()
        optimizer.step()  # at a rate of 0: the work of a step, and the model stays as it was

    return call


def _norms(setting: Setting, make: Callable[[int], torch.nn.Module]) -> Call:
    layers = [make(setting.width) for _ in range(2 * setting.layers + 1)]
    generator = torch.Generator().manual_seed(0)
    shape = (setting.batch, setting.context, setting.width)
    x = torch.randn(shape, generator=generator).requires_grad_()
    gradient = torch.randn(shape, generator=generator)

    def call() -> None:
        for layer in layers:
            torch.autograd.grad(layer(x), [x, *layer.parameters()], gradient)

    return call


def _theirs(features: int) -> torch.nn.Module:
    llama: Any = importlib.import_module("transformers.models.llama.modeling_llama")
    norm: torch.nn.Module = llama.LlamaRMSNorm(features, EPS)
    return norm
