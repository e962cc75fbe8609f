"""The only file that looks into a model: sizes by layer, and what BatchNorm's statistics do to a language model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import network
from .arms import batch_norms
from .corpus import Corpus
from .plan import Setting

ESTIMATES = 16
"""Training batches that re-estimate BatchNorm's statistics, with the weights as they ended."""


@dataclass(frozen=True)
class Layers:
    """One step, seen from inside; a number for each decoder layer, from the embedding up."""

    step: int
    activation: list[float]
    """Root mean square of the residual stream after the layer."""
    gradient: list[float]
    """Norm of the gradient of the layer's parameters."""


@dataclass(frozen=True)
class Statistics:
    """Held-out loss of a trained BatchNorm model, by whose mean and variance it uses."""

    running: float
    """What evaluation does: averages kept during training."""
    estimated: float
    """Taken anew from training text after the last step: no lag."""
    batch: float
    """What training does: those of the scored batch itself, later bytes of each window included."""


@contextmanager
def activations(model: Any) -> Iterator[list[float]]:
    """Collects, while it is open, the rms of the residual stream after each layer."""
    found: list[float] = []

    def keep(layer: nn.Module, args: Any, output: Any) -> None:
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        found.append(hidden.detach().square().mean().sqrt().item())

    hooks = [layer.register_forward_hook(keep) for layer in model.model.layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def gradients(model: Any) -> list[float]:
    """The norm of each layer's gradient, after a backward."""
    return [
        torch.nn.utils.get_total_norm([p.grad for p in layer.parameters() if p.grad is not None]).item()
        for layer in model.model.layers
    ]


@torch.no_grad()
def held_out_loss(model: nn.Module, windows: Tensor, batch: int) -> float:
    """Mean nats per byte, in batches of the size that training has; in the mode that the model is in."""
    sums = [network.loss_of(model, some).double() * len(some) for some in windows.split(batch)]
    return float(torch.stack(sums).sum() / len(windows))


def statistics(model: nn.Module, setting: Setting, corpus: Corpus, windows: Tensor) -> dict[str, float] | None:
    """The three losses of a BatchNorm model; None for a model without BatchNorm."""
    if not batch_norms(model):
        return None
    batches = corpus.draws(setting.context, setting.batch, ESTIMATES, seed=10**6)  # of no run
    anew = copy.deepcopy(model).train()
    for norm in batch_norms(anew):
        norm.reset_running_stats()
        norm.momentum = None  # the plain average of what it sees
    with torch.no_grad():
        for places in batches:
            network.loss_of(anew, corpus.windows(places, setting.context))
    return asdict(
        Statistics(
            running=held_out_loss(model.eval(), windows, setting.batch),
            estimated=held_out_loss(anew.eval(), windows, setting.batch),
            batch=held_out_loss(copy.deepcopy(model).train(), windows, setting.batch),
        )
    )


@torch.no_grad()
def leak(model: nn.Module, windows: Tensor) -> dict[str, float]:
    """Changes the last byte that the first window's model reads, in training mode; how far do logits move that must
    not know it? ``future``: earlier positions of the same window; ``others``: the other windows of the batch."""
    probe = copy.deepcopy(model).train()
    read = windows[:, :-1].clone()
    before = probe(input_ids=read).logits
    read[0, -1] = (read[0, -1] + 1) % network.BYTES
    moved = (probe(input_ids=read).logits - before).abs()
    return {
        "future": moved[0, :-1].max().item(),
        "others": moved[1:].max().item() if len(read) > 1 else 0.0,
        "itself": moved[0, -1].max().item(),
    }
