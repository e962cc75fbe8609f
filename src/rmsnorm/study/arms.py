"""The only file that knows the arms: what stands where the model had its norms.

Every arm has eps 1e-5, gain 1 and bias 0 at the start, and the same initial weights elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..forms.layer_norm import LayerNorm
from ..module import RMSNorm

EPS = 1e-5
PARTIAL = 1 / 16  # of the features: the share that Zhang & Sennrich 2019 use for pRMSNorm


class BatchNorm(nn.BatchNorm1d):
    """Normalises each feature over the batch and the positions; evaluates with running statistics.

        y = (x - mean) / sqrt(var + eps) · weight + bias,   mean and var of x[:, :, i] over both other dimensions

    Shape: ``[batch, positions, features]`` to the same. Source: Ioffe & Szegedy 2015, arXiv 1502.03167.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalises ``input``."""
        return super().forward(input.flatten(0, -2)).view(input.shape)


class PartialRMSNorm(nn.Module):
    """pRMSNorm: the root mean square of the first features scales all of them.

        y = x / sqrt(mean(x[..., :k]²) + eps) · weight

    Source: Zhang & Sennrich 2019, arXiv 1910.07467, section 5.
    """

    def __init__(self, features: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.measured, self.eps = max(1, round(PARTIAL * features)), eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalises ``x``."""
        mean_square = x[..., : self.measured].square().mean(-1, keepdim=True)
        return x * (mean_square + self.eps).rsqrt() * self.weight


@dataclass(frozen=True)
class Arm:
    """What one group of runs has for a norm."""

    title: str
    make: Callable[[int], nn.Module]
    """From the number of features."""


ARMS = {
    "none": Arm("no norm", lambda features: nn.Identity()),
    "batch": Arm("BatchNorm", lambda features: BatchNorm(features, EPS)),
    "layer": Arm("LayerNorm", lambda features: LayerNorm(features, EPS)),
    "rms": Arm("RMSNorm", lambda features: RMSNorm(features, EPS)),
    "rms-plain": Arm("RMSNorm, no weight", lambda features: RMSNorm(features, EPS, elementwise_affine=False)),
    "prms": Arm("pRMSNorm, 1/16", lambda features: PartialRMSNorm(features, EPS)),
}


def run_name(arm: str, rate: float, seed: int) -> str:
    """A run, as it is shown: arms have one name wherever somebody reads it."""
    return f"{ARMS[arm].title} at {rate:g}, seed {seed}"


def chosen(text: str) -> tuple[str, ...]:
    """Arms as the command line gives them, in the order of the table; nothing means all.

    Raises:
        ValueError: one is unknown.
    """
    names = [name.strip() for name in text.split(",")] if text else list(ARMS)
    if unknown := [name for name in names if name not in ARMS]:
        raise ValueError(f"{unknown[0]!r} is not one of {', '.join(ARMS)}")
    return tuple(name for name in ARMS if name in names)


def replace_norms(model: nn.Module, make: Callable[[int], nn.Module]) -> int:
    """Puts another module where a LlamaRMSNorm is, the last one before the logits too; returns how many there were."""
    norms = {name: module for name, module in model.named_modules() if type(module).__name__ == "LlamaRMSNorm"}
    for name, module in norms.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, make(module.get_parameter("weight").numel()))
    return len(norms)


def batch_norms(model: nn.Module) -> list[BatchNorm]:
    """The layers whose training and evaluation differ."""
    return [module for module in model.modules() if isinstance(module, BatchNorm)]
