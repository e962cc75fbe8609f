"""The only file that keeps an unfinished run: one safetensors file with weights, buffers, optimiser and history.

One file, so that one rename makes it whole: the history is JSON in its header, with the run and the setting that it is
of. No random state is in it, as every batch of a run is drawn before its first step (corpus.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bench.export import replace
from .plan import Run, Setting

HISTORY = "history"
MOMENTS = ("exp_avg", "exp_avg_sq")


class Refused(Exception):
    """Why something on disk can't be used, in one line, with the remedy."""


def save(
    file: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: dict[str, Any],
    setting: Setting,
    run: Run,
) -> None:
    """Writes beside the file, then renames."""
    from safetensors.torch import save as serialise

    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {name: tensor for name, _, _, tensor in _moments(optimizer)}
    steps = {str(i): float(optimizer.state[p]["step"]) for i, p in enumerate(_parameters(optimizer))}
    origin = {"setting": setting.to_json(), "run": run.name}
    content = serialise(tensors, {HISTORY: json.dumps({"optimizer_steps": steps, "origin": origin, **history})})
    replace(file, content)


def load(file: Path, model: nn.Module, optimizer: torch.optim.Optimizer, setting: Setting, run: Run) -> dict[str, Any]:
    """Puts the state back and returns the history.

    Raises:
        Refused: the file is damaged, or of another run or setting.
    """
    from safetensors import SafetensorError, safe_open

    remedy = "remove it, and the run begins again"
    try:
        with safe_open(file, framework="pt") as kept:
            history: dict[str, Any] = json.loads(kept.metadata()[HISTORY])
            tensors = {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118 - not a dict
        origin = history.pop("origin")
        difference = setting.differs(origin["setting"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise Refused(f"{file} is damaged; {remedy}") from error
    if origin["run"] != run.name:
        difference = f"run {origin['run']!r}, not {run.name!r}"
    if difference:
        raise Refused(f"{file} is of another configuration: {difference}; {remedy}")
    steps = history.pop("optimizer_steps")
    for i, parameter in enumerate(_parameters(optimizer)):
        state = {name: torch.empty_like(parameter) for name in MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(steps[str(i)]), **state}
    for name, state, key, _ in _moments(optimizer):
        state[key] = tensors[name]
    model.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")})
    return history


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _moments(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, dict[str, Any], str, Tensor]]:
    """The optimiser's tensors: a name in the file, and where they are."""
    for i, parameter in enumerate(_parameters(optimizer)):
        state = optimizer.state[parameter]
        for key in MOMENTS:
            yield f"optimizer.{i}.{key}", state, key, state[key]
