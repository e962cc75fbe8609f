"""The only file that asks a module what it computes: random rows, through a copy of it and through every recipe.

A name proves nothing: classes called RMSNorm round in different places, and classes are changed at run time. So a
module is what it does. First its copy gets a random weight and an eps that shows in every row; the recipe that follows
it there is then proven with the module's own eps, in all types, forward and backward. Everything runs on the CPU.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations, product
from typing import Any

import torch
from torch import Tensor, nn

from .binding import TYPES, Binding, Types, apply
from .recipes import RECIPES, Recipe

EPS_NAMES = ("variance_epsilon", "eps", "epsilon", "rms_norm_eps", "norm_eps", "layer_norm_eps")
CONSPICUOUS = 0.37
# Bounds in units of a type's eps. Forward, relative to each output: in float32 their sum, root and products round, up
# to 4 in all; in a half type one rounding of x·r may fall the other way, and the weight passes it on.
FORWARD = {torch.float32: 4.0, torch.bfloat16: 2.0, torch.float16: 2.0}
# That happens to 0.0001 of float16 outputs. Another order of casts changes 0.2 of them; samples of 2000 need some room.
NOT_IDENTICAL = 0.005
# Backward, relative to the largest gradient of the row (dx) or of all (dw), in the coarser type's eps: theirs is
# rounded at every step of its chain. A forgotten term would be as large as the gradient.
BACKWARD = 16.0


class Refused(Exception):
    """Why a module is left as it is."""


def examine(
    module: nn.Module, *, layer_norm: bool, verify: bool, first: Recipe | None = None
) -> tuple[Binding, dict[str, float]]:
    """The binding that reproduces the module, and the differences seen; candidates with recipe ``first`` come first.

    Raises:
        Refused: nothing reproduces it, or it can't be asked.
    """
    refuse_unasked(module)
    candidates = sorted(_candidates(module), key=lambda one: (one.recipe.centred, one.recipe is not first))
    partial: list[tuple[Binding, dict[str, float]]] = []
    nearest, shortest = "", float("inf")
    try:
        for candidate in candidates:
            apart = _distance(module, candidate)
            if apart <= 1 and candidate.recipe.centred and not layer_norm:
                raise Refused("it is a LayerNorm; patch(model, layer_norm=True) takes it")
            if apart <= 1:
                partial.append(_prove(module, candidate, verify))
                if partial[-1][0].complete():
                    return partial[-1]
            if apart < shortest:
                nearest, shortest = candidate.recipe.meaning, apart
    except Refused:
        raise
    except Exception as error:  # a stranger's forward may raise anything
        reason = str(error).partition("\n")[0]
        raise Refused(f"it can't be probed: {type(error).__name__}: {reason}") from error
    if partial:  # right in some types, as all meanings are in float32
        return max(partial, key=lambda one: len(one[0].proven))
    raise Refused(f"no recipe reproduces it (nearest: {nearest!r}, {shortest:.0f} times as far as rounding goes)")


def refuse_unasked(module: nn.Module) -> None:
    """Raises Refused for what can be told without running anything."""
    if "forward" in vars(module):
        forward = vars(module)["forward"]
        by = inspect.getmodule(getattr(forward, "func", forward))
        raise Refused(f"its forward was replaced before, by {getattr(by, '__name__', 'somebody')}")
    if module._modules:
        raise Refused("it has modules inside")
    if not _eps_names(module):
        raise Refused("it has no attribute for eps")
    own = _weights(module)
    if len(own) > 2:
        raise Refused(f"it has {len(own)} weights")
    if odd := {tensor.dtype for tensor in own.values()} - set(TYPES):
        raise Refused(f"its weight is {odd.pop()}")


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """The module's own floating parameters and buffers."""
    own = {**module._parameters, **module._buffers}
    return {name: t for name, t in own.items() if t is not None and t.is_floating_point() and t.dim()}


def _eps_names(module: nn.Module) -> list[str]:
    """Attributes that may hold eps, the likely ones first."""
    likely = [name for name in EPS_NAMES if hasattr(module, name)]
    return [*likely, *(n for n, v in vars(module).items() if type(v) is float and 0 <= v < 1 and n not in likely)]


def _candidates(module: nn.Module) -> Iterator[Binding]:
    own = list(_weights(module))
    for recipe, eps in product(RECIPES.values(), _eps_names(module)):
        for count in range(3) if recipe.centred else (int(recipe.weight),):
            for names in permutations(own, count):
                weight, bias = (*names, None, None)[:2]
                yield Binding(recipe, weight, bias, eps)


def _distance(module: nn.Module, candidate: Binding) -> float:
    """How far the candidate is from the module with a conspicuous eps, in its own type and in float32; at most 1 if
    rounding explains it."""
    own = next((tensor.dtype for tensor in _weights(module).values()), torch.float32)
    return max(
        max(_forward(_Trial(module, candidate, (dtype, dtype), CONSPICUOUS))) for dtype in {own: 0, torch.float32: 0}
    )


def _prove(module: nn.Module, candidate: Binding, verify: bool) -> tuple[Binding, dict[str, float]]:
    """The candidate with the types that it reproduces at the module's own eps, and the differences."""
    proven: set[Types] = set()
    errors: dict[str, float] = {}
    for x_type, w_type in product(TYPES, TYPES if candidate.weight else [None]):
        try:
            trial = _Trial(module, candidate, (x_type, w_type))
            far, share = _forward(trial)
            back = _backward(trial) if verify else 0.0
        except (RuntimeError, TypeError, ValueError):
            continue  # it doesn't take these types
        if max(far, share, back) > 1:
            continue
        proven.add((x_type, w_type))
        if w_type in (None, x_type):
            name = str(x_type).removeprefix("torch.")
            errors[name] = far * FORWARD[x_type] if x_type is torch.float32 else share * NOT_IDENTICAL
            errors[f"{name} gradient"] = back * BACKWARD
    own = next((tensor.dtype for tensor in _weights(module).values()), torch.float32)
    if (own, own if candidate.weight else None) not in proven:
        raise Refused(f"{candidate.recipe.meaning!r} follows it, but not with its own eps or not backward")
    return replace(candidate, proven=frozenset(proven)), errors


class _Trial:
    """A copy of the module with random weights of a type, and rows of a type for it."""

    def __init__(self, module: nn.Module, binding: Binding, types: Types, eps: float | None = None) -> None:
        dice = torch.Generator().manual_seed(0)
        self.binding, self.types = binding, types
        self.module: Any = copy.deepcopy(module)
        for name, tensor in _weights(module).items():
            value = (1 + 0.7 * torch.randn(tensor.shape, generator=dice)).to(types[1] or types[0])
            if name in module._parameters:
                self.module._parameters[name] = nn.Parameter(value)
            else:
                self.module._buffers[name] = value
        if eps is not None:
            setattr(self.module, binding.eps, eps)
        self.weight = getattr(self.module, binding.weight) if binding.weight else None
        self.bias = getattr(self.module, binding.bias) if binding.bias else None
        shape = getattr(module, "normalized_shape", (64,)) if self.weight is None else self.weight.shape
        # Five sizes of rows, from those that eps drowns to those that it leaves alone. In float16 the gradients of
        # smaller ones would overflow.
        least = 1e-3 if types[0] is torch.float16 else 1e-5
        root = max(getattr(self.module, binding.eps) or 0.0, least**2) ** 0.5
        columns = torch.Size(shape).numel()
        rows = max(2, 400 // columns)
        sizes = torch.tensor([[0.3 * root], [root], [3 * root], [1.0], [30.0]]).repeat(rows, 1)
        x = (torch.randn(5 * rows, columns, generator=dice) * sizes).to(types[0])
        self.x = x.view(1, 5 * rows, *shape).requires_grad_()
        self.grad = torch.randn(self.x.shape, generator=dice) / 4

    def theirs(self) -> Tensor:
        x = self.x.clone()
        before = x.detach().clone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's RMSNorm warns of mixed types
            output: Tensor = type(self.module).forward(self.module, x)
        if not torch.equal(x.detach(), before):
            raise Refused("it writes into its input")
        return output

    def ours(self) -> Tensor:
        return apply(self.module, self.binding, self.x, self.weight)


def _forward(trial: _Trial) -> tuple[float, float]:
    """The largest difference, and the share of half-precision results that aren't identical: parts of the allowed."""
    with torch.no_grad():
        theirs, ours = trial.theirs(), trial.ours()
    if (theirs.dtype, theirs.shape) != (ours.dtype, ours.shape):
        return float("inf"), 0.0
    coarse = max(trial.x.dtype, ours.dtype, key=_eps)
    size = theirs.abs().float()
    if trial.binding.recipe.centred:  # x - mean cancels: errors are relative to what was subtracted
        size = size.amax(-1, keepdim=True)
    far = _largest(ours, theirs, size, _eps(coarse)) / FORWARD[coarse]
    return far, float((theirs != ours).double().mean()) / NOT_IDENTICAL if coarse is not torch.float32 else 0.0


def _backward(trial: _Trial) -> float:
    """The largest difference of a gradient, as a part of the allowed."""
    wanted = [trial.x, *(t for t in (trial.weight, trial.bias) if isinstance(t, nn.Parameter))]
    theirs, ours = (
        torch.autograd.grad(output, wanted, trial.grad.to(output.dtype), allow_unused=True)
        for output in (trial.theirs(), trial.ours())
    )
    worst = 0.0
    for tensor, one, other in zip(wanted, theirs, ours, strict=True):
        if one is None or other is None:
            return float("inf")
        size = one.abs().float()
        size = size.flatten(2).amax(-1).view(*size.shape[:2], *[1] * (size.dim() - 2)) if tensor is trial.x else size.max()
        coarse = max(trial.x.dtype, tensor.dtype, key=_eps)
        worst = max(worst, _largest(other, one, size, _eps(coarse)) / BACKWARD)
    return worst


def _largest(ours: Tensor, theirs: Tensor, size: Tensor, eps: float) -> float:
    """The largest difference in units of eps, relative to a size; infinite where one isn't finite and the other is."""
    tiny = torch.finfo(ours.dtype).smallest_normal
    apart = (ours.double() - theirs.double()).abs() / (size.double().clamp_min(tiny) * eps)
    apart = torch.where(ours.isfinite() | theirs.isfinite(), apart, 0.0)
    return float(apart.nan_to_num(nan=float("inf")).max())


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps
