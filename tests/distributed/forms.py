"""The forms of the norm that are sharded in tests, and their truth: the formulas in fp64, in torch's own operators.

Nothing of rmsnorm computes a truth. A result is judged by ``Judge``, in units of the output's type and of the type that
the arithmetic between is done in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gated_oracle
import torch
import torch.nn.functional as F
from oracle import ulp
from torch import Tensor

import rmsnorm

EPS = 1e-5


@dataclass(frozen=True)
class Form:
    """A function of ``alike`` tensors of the input's shape and ``weights`` of its last ``weight_dims`` dimensions."""

    norm: Callable[..., Any]
    alike: int = 1
    weights: int = 1
    weight_dims: int = 1
    dims: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The outputs, of plain tensors or of DTensors."""
        alike, weights = tensors[: self.alike], tensors[self.alike :]
        shape = tensors[0].shape[tensors[0].dim() - self.dims :]
        output = self.norm(*alike, shape, *weights, eps=EPS, **self.options)
        return output if isinstance(output, tuple) else (output,)

    def truth(self, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The same for fp64 tensors, without roundings but that of the sum, which is to ``dtype``."""
        x, *others = tensors
        if self.norm is rmsnorm.layer_norm:
            return (F.layer_norm(x, x.shape[x.dim() - self.dims :], *others, eps=EPS),)
        weight = others[self.alike - 1] if self.weights else None
        offset = self.options.get("offset", 0.0)
        if self.norm is rmsnorm.gated_rms_norm:
            silu = self.options.get("activation", "silu") == "silu"
            before, size = self.options.get("norm_before_gate", True), self.options.get("group_size")
            form = gated_oracle.Form(silu, before, size, offset, eps=EPS)
            return (gated_oracle.formula(form, x, others[0], weight),)
        s = x + others[0] if self.alike == 2 else x
        s = s + (s.to(dtype).double() - s).detach()  # rounding counts as the identity
        mean = s.square().mean(tuple(range(-self.dims, 0)), keepdim=True)
        y = s / (mean + EPS).sqrt()
        y = y if weight is None else y * (weight + offset)
        return (y, s) if self.alike == 2 else (y,)


RMS, ADD, GATED, LAYER = rmsnorm.rms_norm, rmsnorm.add_rms_norm, rmsnorm.gated_rms_norm, rmsnorm.layer_norm
FORMS = {
    "rms": Form(RMS),
    "rms, no weight": Form(RMS, weights=0),
    "rms, offset": Form(RMS, options={"offset": 1.0}),
    "rms, llama": Form(RMS, options={"casting_mode": "llama"}),
    "rms, two dimensions": Form(RMS, dims=2, weight_dims=2),
    "rms, weight per head": Form(RMS, weight_dims=2),
    "add": Form(ADD, alike=2),
    "add, no weight, llama": Form(ADD, alike=2, weights=0, options={"casting_mode": "llama"}),
    "layer": Form(LAYER, weights=2),
    "layer, no weight": Form(LAYER, weights=0),
    "gated": Form(GATED, alike=2),
    "gated before, sigmoid, offset": Form(
        GATED, alike=2, options={"norm_before_gate": False, "activation": "sigmoid", "offset": 1.0}
    ),
    "gated, llama": Form(GATED, alike=2, options={"casting_mode": "llama"}),
}


class Judge:
    """How far results may be from the truth.

    The output: ``ULPS`` of its type, where llama's rounding in between may add one of its own, times the weight. A row
    of fp64 is summed by torch's operators (5 ulp, as the reference). Gradients cancel, so they are judged by the row (a
    weight's by the whole): 32 units of the accumulation type, beside the rounding of each rank's part.
    """

    ULPS = {torch.float32: 2.0, torch.float64: 5.0, torch.bfloat16: 0.51, torch.float16: 0.51}  # noqa: RUF012

    def __init__(self, dtype: torch.dtype, form: Form) -> None:
        self.dtype = dtype
        self.rounded = form.options.get("casting_mode") == "llama" and dtype in (torch.bfloat16, torch.float16)

    def output(self, got: Tensor, truth: Tensor, terms: Tensor) -> float:
        """The error as a part of what is allowed. ``terms`` bounds what was added to an element, as a bias."""
        margin = self.ULPS[self.dtype] * self._ulp(terms)
        # Rounded twice, or three times with a gate: half an ulp each, of values up to twice as large.
        margin = 3.1 * self._ulp(terms) if self.rounded else margin
        return float(((got.double() - truth).abs() / margin).max()) if got.numel() else 0.0

    def gradient(self, got: Tensor, truth: Tensor, dims: int, parts: int = 1) -> float:
        """The same, where ``got`` is a sum of as many rounded parts."""
        largest = truth.abs().amax(tuple(range(-dims, 0)), keepdim=True) if truth.numel() else truth
        unit = torch.finfo(torch.float64 if self.dtype is torch.float64 else torch.float32).eps / 2
        margin = 0.501 * parts * self._ulp(largest if parts > 1 else truth) + 32 * unit * largest
        return float(((got.double() - truth).abs() / margin).max()) if got.numel() else 0.0

    def _ulp(self, values: Tensor) -> Tensor:
        return torch.from_numpy(ulp(values.detach().double().abs().numpy(), self.dtype))
