"""The only file that runs a stranger's norm and ours side by side, and says how far apart they are."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .binding import Binding, Types, apply

# Bounds in units of a type's eps. Forward, relative to each output: in float32 their sum, root and products round, up
# to 4 in all; in a half type one rounding of x·r may fall the other way, and the weight passes it on. A gate brings an
# exponential and a product more, on both sides: twice that.
FORWARD = {torch.float32: 4.0, torch.bfloat16: 2.0, torch.float16: 2.0}
# That happens to 0.0001 of float16 outputs. Another order of casts changes 0.2 of them; samples of 2000 need some room.
NOT_IDENTICAL = 0.005
# Backward, relative to the largest gradient of the row (dx) or of all (dw), in the coarser type's eps: theirs is
# rounded at every step of its chain. A forgotten term would be as large as the gradient.
BACKWARD = 16.0


class Unfit(Exception):
    """The module does something that no norm does."""


def weights(module: nn.Module) -> dict[str, Tensor]:
    """The module's own floating parameters and buffers."""
    own = {**module._parameters, **module._buffers}
    return {name: t for name, t in own.items() if t is not None and t.is_floating_point() and t.dim()}


def takes_gate(module: nn.Module) -> bool:
    """Whether its forward takes two tensors: it has no default for the second, or calls it a gate."""
    _, *parameters = inspect.signature(type(module).forward).parameters.values()
    return len(parameters) == 2 and (parameters[1].default is inspect.Parameter.empty or "gate" in parameters[1].name)


class Trial:
    """A copy of the module with random weights, and rows for it. ``types`` are of weight, input and gate."""

    def __init__(self, module: nn.Module, binding: Binding, types: Types, eps: float | None = None) -> None:
        dice = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=dice, dtype=torch.float32, device="cpu")  # whatever the defaults are

        self.binding = binding
        self.module: Any = copy.deepcopy(module)
        for name, tensor in weights(module).items():
            value = (1 + 0.7 * normal(*tensor.shape)).to(types[0] or types[1])
            if name in module._parameters:
                self.module._parameters[name] = nn.Parameter(value)
            else:
                self.module._buffers[name] = value
        if eps is not None:
            setattr(self.module, binding.eps, eps)
        self.weight = getattr(self.module, binding.weight) if binding.weight else None
        self.bias = getattr(self.module, binding.bias) if binding.bias else None
        shape = getattr(module, "normalized_shape", (64,)) if self.weight is None else self.weight.shape
        columns = torch.Size(shape).numel()
        self.blocks = max(2, 400 // columns)
        # Five sizes of rows, from those that eps drowns to those that it leaves alone. In float16 the gradients of
        # smaller ones would overflow.
        least = 1e-3 if types[1] is torch.float16 else 1e-5
        root = max(getattr(self.module, binding.eps) or 0.0, least**2) ** 0.5
        sizes = [0.3 * root, root, 3 * root, 1.0, 30.0] * self.blocks
        x = torch.stack([size * normal(columns) for size in sizes])
        rows = [x, 2 * normal(*x.shape)][: 1 + bool(binding.recipe.gate)]
        self.inputs = [
            r.to(t).view(1, len(sizes), *shape).requires_grad_() for r, t in zip(rows, types[1:], strict=False)
        ]
        self.grad = normal(*self.inputs[0].shape) / 4

    def theirs(self, view: Callable[[Tensor], Tensor] = torch.clone) -> Tensor:
        """What the module's own forward makes of (a view of) the rows."""
        inputs = [view(t) for t in self.inputs]
        before = inputs[0].detach().clone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's RMSNorm warns of mixed types
            output: Tensor = type(self.module).forward(self.module, *inputs)
        if not torch.equal(inputs[0].detach(), before):
            raise Unfit("it writes into its input")
        return output

    def ours(self, view: Callable[[Tensor], Tensor] = torch.clone) -> Tensor:
        """What the recipe makes of them."""
        return apply(self.module, self.binding, self.weight, *(view(t) for t in self.inputs))


@dataclass(frozen=True)
class Difference:
    """Between two outputs."""

    far: float
    """The largest, in eps of the coarser type of input and output."""
    share: float
    """Of outputs that aren't identical."""
    part: float
    """Of what is allowed; above 1, rounding doesn't explain it."""


def forward(trial: Trial, view: Callable[[Tensor], Tensor] = torch.clone) -> Difference:
    """How far apart the outputs are."""
    with torch.no_grad():
        theirs, ours = trial.theirs(view), trial.ours(view)
    if (theirs.dtype, theirs.shape) != (ours.dtype, ours.shape):
        return Difference(float("inf"), 1.0, float("inf"))
    coarse = max(trial.inputs[0].dtype, ours.dtype, key=_eps)
    size = theirs.abs().float()
    if (
        trial.binding.recipe.centred or trial.bias is not None
    ):  # these cancel: errors are relative to what was subtracted
        size = size.amax(-1, keepdim=True)
    far = _largest(ours, theirs, size, _eps(coarse))
    share = float((theirs != ours).double().mean())
    allowed = FORWARD[coarse] * (2 if trial.binding.recipe.gate else 1)
    return Difference(far, share, max(far / allowed, share / NOT_IDENTICAL * (coarse is not torch.float32)))


def backward(trial: Trial) -> float:
    """The largest difference of a gradient, as a part of the allowed."""
    wanted = [*trial.inputs, *(t for t in (trial.weight, trial.bias) if isinstance(t, nn.Parameter))]
    theirs, ours = (
        torch.autograd.grad(output, wanted, trial.grad.to(output.dtype), allow_unused=True)
        for output in (trial.theirs(), trial.ours())
    )
    worst = 0.0
    for tensor, one, other in zip(wanted, theirs, ours, strict=True):
        if one is None or other is None:
            return float("inf")
        rowwise = any(tensor is x for x in trial.inputs)
        size = one.abs().float().flatten(2).amax(-1) if rowwise else one.abs().float().max()
        size = size.view(*size.shape, *[1] * (one.dim() - size.dim()))
        coarse = max(*(t.dtype for t in trial.inputs), tensor.dtype, key=_eps)
        worst = max(worst, _largest(other, one, size, _eps(coarse)) / BACKWARD)
    return worst


def same_in_other_shapes(trial: Trial) -> bool:
    """Whether [batch, 1, size] is served too.

    Raises:
        Unfit: the module does something else with inputs of two or four dimensions.
    """
    plain, heads = (lambda x: x[0]), (lambda x: x.unflatten(1, (trial.blocks, 5)).transpose(1, 2))
    for view in (plain, heads):
        try:
            trial.theirs(view)
        except (RuntimeError, ValueError, IndexError):
            continue  # nor does the model call it so
        if forward(trial, view).part > 1:
            raise Unfit("it does something else with inputs of two or four dimensions")
    return forward(trial, lambda x: x.transpose(0, 1)).part <= 1


def _largest(ours: Tensor, theirs: Tensor, size: Tensor, eps: float) -> float:
    """The largest difference in units of eps, relative to a size; infinite where one isn't finite and the other is."""
    tiny = torch.finfo(ours.dtype).smallest_normal
    apart = (ours.double() - theirs.double()).abs() / (size.double().clamp_min(tiny) * eps)
    apart = torch.where(ours.isfinite() | theirs.isfinite(), apart, 0.0)
    return float(apart.nan_to_num(nan=float("inf")).max())


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps
