"""The only file that trains: one run from its seed, or from its checkpoint, to its outcome."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import checkpoint, network, probes
from .corpus import Corpus
from .plan import Run, Setting, Trained

KEPT_EVERY = 40
"""Steps between checkpoints: a kill costs ten seconds at most, and ten megabytes are written so often."""
SMOOTH = 20
"""Steps whose mean counts as the training loss."""
HOPELESS = math.log(network.BYTES)
"""Nats per byte of a model that knows nothing. Whoever is above it after the warm-up has diverged."""
LOOKS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
"""When, as a part of the steps, a run is looked at layer by layer."""

Tell = Callable[[int], None]


@dataclass
class Outcome:
    """What one run gave. Losses are nats per byte."""

    arm: str
    rate: float
    seed: int
    stable: bool = False
    """It reached its end, and knows more than how frequent each letter is."""
    diverged_at: int | None = None
    """The step at which it was given up: a loss that isn't finite, or worse than knowing nothing."""
    train_loss: float | None = None
    """Mean over the last steps."""
    held_out: float | None = None
    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    """See :class:`probes.Layers`."""
    statistics: dict[str, float] | None = None
    """See :class:`probes.Statistics`."""
    leak: dict[str, float] | None = None
    """See :func:`probes.leak`."""

    @property
    def trained(self) -> Trained:
        return Trained(Run(self.arm, self.rate, self.seed), self.held_out, self.stable)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def train(setting: Setting, run: Run, corpus: Corpus, kept: Path, tell: Tell = lambda step: None) -> Outcome:
    """One run; the same bits whether it was interrupted or not, whatever else the machine does.

    Args:
        kept: its checkpoint, read if it is there.
        tell: hears the number of steps that are done.

    Raises:
        OSError: the checkpoint can't be written.
        Refused: the checkpoint can't be used.
    """
    with network.one_thread():
        model = network.build(setting, run.arm, run.seed)
        optimizer = network.optimizer_of(model)
        outcome = Outcome(run.arm, run.rate, run.seed)
        if kept.exists():
            history = checkpoint.load(kept, model, optimizer, setting, run)
            outcome.losses, outcome.gradient_norms, outcome.layers = (history[name] for name in _HISTORY)
        draws = corpus.draws(setting.context, setting.batch, setting.steps, run.seed)
        looks = {min(setting.steps - 1, round(part * setting.steps)) for part in LOOKS}
        for step in range(len(outcome.losses), setting.steps):
            for group in optimizer.param_groups:
                group["lr"] = network.rate_at(step, setting.steps, run.rate)
            windows = corpus.windows(draws[step], setting.context)
            _step(outcome, step, model, optimizer, windows, look=step in looks)
            if _hopeless(outcome.losses, setting.steps):
                outcome.diverged_at = step
                return outcome
            if (step + 1) % KEPT_EVERY == 0:
                history = {name: getattr(outcome, name) for name in _HISTORY}
                checkpoint.save(kept, model, optimizer, history, setting, run)
            tell(step + 1)
        _score(outcome, model, setting, corpus)
    return outcome


_HISTORY = ("losses", "gradient_norms", "layers")


def _step(
    outcome: Outcome,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    windows: torch.Tensor,
    *,
    look: bool,
) -> None:
    optimizer.zero_grad(set_to_none=True)
    if look:
        with probes.activations(model) as sizes:
            loss = network.loss_of(model, windows)
    else:
        loss = network.loss_of(model, windows)
    loss.backward()
    outcome.losses.append(loss.item())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    outcome.gradient_norms.append(torch.nn.utils.get_total_norm(gradients).item())
    if look:
        outcome.layers.append(asdict(probes.Layers(step, sizes, probes.gradients(model))))
    optimizer.step()


def _hopeless(losses: list[float], steps: int) -> bool:
    if not math.isfinite(losses[-1]):
        return True
    recent = losses[-SMOOTH:]
    return len(losses) > network.WARM_UP * steps + SMOOTH and statistics.fmean(recent) > HOPELESS


def _score(outcome: Outcome, model: torch.nn.Module, setting: Setting, corpus: Corpus) -> None:
    windows = corpus.held_out(setting.context, setting.windows)
    outcome.train_loss = statistics.fmean(outcome.losses[-SMOOTH:])
    loss = probes.held_out_loss(model.eval(), windows, setting.batch)
    if not math.isfinite(loss):
        outcome.diverged_at = setting.steps
        return
    outcome.held_out = loss
    outcome.stable = loss < corpus.letters()
    outcome.statistics = probes.statistics(model, setting, corpus, windows)
    outcome.leak = probes.leak(model, windows[: setting.batch])
