"""The forms of the norm that are sharded in tests, and their truth: the formulas in fp64, in torch's own operators.

Nothing of rmsnorm computes a truth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import gated_oracle
import torch
import torch.nn.functional as F
from oracle import ulp
from torch import Tensor

import rmsnorm
from rmsnorm.forms.floored import floored_rms_norm

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
        floor = self.options.get("floor")
        y = s / (mean + EPS if floor is None else mean.clamp_min(floor)).sqrt()
        y = y if weight is None else y * (weight + offset)
        return (y, s) if self.alike == 2 else (y,)


def floored(input: Tensor, shape: Any, weight: Tensor, *, eps: float, floor: float) -> Tensor:
    return floored_rms_norm(input, shape, weight, floor)


RMS, ADD, GATED, LAYER = rmsnorm.rms_norm, rmsnorm.add_rms_norm, rmsnorm.gated_rms_norm, rmsnorm.layer_norm
FORMS = {
    "rms": Form(RMS),
    "rms, no weight": Form(RMS, weights=0),
    "rms, offset": Form(RMS, options={"offset": 1.0}),
    "rms, floor": Form(floored, options={"floor": 0.01}),
    "rms, llama": Form(RMS, options={"casting_mode": "llama"}),
    "rms, lean": Form(RMS, options={"memory": "lean"}),
    "rms, two dimensions": Form(RMS, dims=2, weight_dims=2),
    "rms, weight per head": Form(RMS, weight_dims=2),
    "add": Form(ADD, alike=2),
    "add, no weight, llama": Form(ADD, alike=2, weights=0, options={"casting_mode": "llama"}),
    "add, lean, offset": Form(ADD, alike=2, options={"memory": "lean", "offset": 1.0}),
    "layer": Form(LAYER, weights=2),
    "layer, no weight": Form(LAYER, weights=0),
    "gated": Form(GATED, alike=2),
    "gated before, sigmoid, offset": Form(
        GATED, alike=2, options={"norm_before_gate": False, "activation": "sigmoid", "offset": 1.0}
    ),
    "gated, llama": Form(GATED, alike=2, options={"casting_mode": "llama"}),
}


@dataclass(frozen=True)
class Truth:
    """The results in fp64, and the sizes by which errors in them are measured."""

    outputs: list[Tensor]
    output_sizes: list[Tensor]
    gradients: list[Tensor]
    gradient_sizes: list[Tensor]


def random(shape: tuple[int, ...], count: int, dtype: torch.dtype) -> list[Tensor]:
    """Rows of different sizes, from one where eps matters to 2^5."""
    generator = torch.Generator().manual_seed(sum(shape) + count)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]
    if len(shape) > 1:
        tensors = [t * 2.0 ** torch.randint(-7, 6, (*shape[:-1], 1), generator=generator) for t in tensors]
    return [t.to(dtype) for t in tensors]


def problem(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Form, list[Tensor], list[Tensor]]:
    """The form, its tensors, and a gradient for each output. Heads are the row's halves."""
    form = FORMS[name]
    if max(form.dims, form.weight_dims) > len(shape) - 1:
        shape = (*shape[:-1], 2, shape[-1] // 2)
    tensors = random(shape, form.alike, dtype) + random(shape[len(shape) - form.weight_dims :], form.weights, dtype)
    return form, tensors, random(shape, 2, dtype)


@cache
def truth(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Truth:
    """Solves the problem.

    A gradient is a sum, over the outputs j, of grad_j·∂y_j/∂x_i, and cancels, so its error is measured by the sum of
    their magnitudes: of a weight's element its own, otherwise the largest of the row, as derivatives cancel, too.
    An output is measured by itself and what was taken from it: a bias, or the mean.
    """
    form, tensors, grads = problem(name, shape, dtype)
    wide = tuple(t.double() for t in tensors)
    row = tuple(range(-form.dims, 0))
    outputs = form.truth(dtype, *wide)
    jacobians = torch.func.jacrev(partial(form.truth, dtype), argnums=tuple(range(len(wide))))(*wide)
    gradients, sizes = [], []
    for i, tensor in enumerate(wide):
        gradient, size = torch.zeros_like(tensor), torch.zeros_like(tensor)
        for grad, of_output in zip(grads, jacobians, strict=False):
            jacobian, flat = of_output[i].reshape(grad.numel(), tensor.numel()), grad.double().flatten()
            gradient += (flat @ jacobian).view(tensor.shape)
            size += (flat.abs() @ jacobian.abs()).view(tensor.shape)
        gradients.append(gradient)
        sizes.append(size.amax(row, keepdim=True).expand(size.shape) if i < form.alike and size.numel() else size)
    taken = torch.zeros((), dtype=torch.float64)
    if form.norm is rmsnorm.layer_norm:
        mean = wide[0].mean(row, keepdim=True)
        taken = mean.abs() / ((wide[0] - mean).square().mean(row, keepdim=True) + EPS).sqrt()
        taken = taken * wide[1].abs() + 2 * wide[2].abs() if form.weights else taken
    return Truth(list(outputs), [y.abs() + taken for y in outputs], gradients, sizes)


def error(got: Tensor, right: Tensor, size: Tensor) -> float:
    """The largest error, in ulps of ``size``."""
    if not got.numel():
        return 0.0
    return float(((got.double() - right).abs() / torch.from_numpy(ulp(size.numpy(), got.dtype))).max())


def output_ulps(form: Form, dtype: torch.dtype) -> float:
    """How far an output may be from the truth.

    fp32 and the half types keep the contract, whose 2 ulp leave room for the ranks' fp32 sums, rounded once per rank.
    fp64 is summed by torch's operators, here and in the truth. Mode llama rounds two or three times, half an ulp each,
    of values up to twice as large.
    """
    if form.options.get("casting_mode") == "llama" and dtype is not torch.float64:
        return 3.1
    return {torch.float32: 2.0, torch.float64: 16.0, torch.bfloat16: 0.51}[dtype]


def gradient_ulps(form: Form, dtype: torch.dtype) -> float:
    """The same of a gradient: 2 ulp, and one where mode llama rounds the rows that the weight's is summed from."""
    return 16.0 if dtype is torch.float64 else 3.0 if form.options.get("casting_mode") == "llama" else 2.0
