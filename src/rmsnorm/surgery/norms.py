"""The only file that says what each norm of a model is: its gain, its bias, its eps, and what it takes to lose them."""

from __future__ import annotations

import copy
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..forms.gated import GatedRMSNorm
from ..forms.layer_norm import LayerNorm
from ..models.binding import Binding, binding_of
from ..models.conditions import signature
from ..models.modes import undisturbed
from ..models.numbers import eps_of
from ..models.probe import EPS_NAMES, Refused, examine
from ..module import RMSNorm


@dataclass(frozen=True)
class Norm:
    """A norm, by the names of its attributes; :func:`gain` and :func:`bias` read them."""

    name: str
    """Its path in the model."""
    cls: str
    """The name of its class."""
    weight: str | None
    bias: str | None
    eps: float | None
    offset: float = 0.0
    """The gain is ``offset + weight``."""
    centred: bool = False
    """LayerNorm."""
    layout: str = "last"
    """One of ``LAYOUTS`` of models/binding.py."""
    plain: bool = True
    """Whether it is the mean square of the last dimension and nothing else: no gate, no groups, no floor."""
    refused: str = ""
    """Why it can't lose its gain, whoever reads it."""


def find(model: nn.Module) -> tuple[dict[str, Norm], dict[str, tuple[str, str]]]:
    """The norms of a model by name, and the modules that look like norms and aren't understood: class and reason."""
    norms: dict[str, Norm] = {}
    unknown: dict[str, tuple[str, str]] = {}
    seen: dict[Hashable, Binding | str] = {}
    with undisturbed():
        for name, module in model.named_modules():
            if own := _known(name, module):
                norms[name] = own
            elif _may_be_one(module):
                found = _asked(module, seen)
                cls = type(module).__name__
                if isinstance(found, str):
                    unknown[name] = cls, found
                else:
                    norms[name] = _from(name, module, found)
    return norms, unknown


def _may_be_one(module: nn.Module) -> bool:
    if "norm" not in type(module).__name__.lower() and not any(hasattr(module, name) for name in EPS_NAMES):
        return False
    home = type(module).__module__.partition(".")[0]
    return home != "torch" or isinstance(module, nn.RMSNorm | nn.LayerNorm)


def _asked(module: nn.Module, seen: dict[Hashable, Binding | str]) -> Binding | str:
    if bound := binding_of(module):
        return bound
    if any(t.dtype is torch.float64 for t in module._parameters.values() if t is not None):
        module = copy.deepcopy(module).float()  # proofs know the types that kernels have
    like = signature(module)
    if (found := seen.get(like)) is None or like is None:
        try:
            found = examine(module, layer_norm=True, verify=False).binding
        except Refused as refused:
            found = str(refused)
        seen[like] = found
    return found


def _from(name: str, module: nn.Module, binding: Binding) -> Norm:
    recipe = binding.recipe
    offset = 1.0 if recipe.own_gain else recipe.offset
    refused = "its gain multiplies its input, before it divides" if recipe.scaled_input else ""
    eps = eps_of(module, binding)
    plain = not (recipe.gate or recipe.floors or recipe.unit or binding.group) and binding.layout in ("last", "flat")
    cls = type(module).__name__
    weight, bias, layout = binding.weight, binding.bias, binding.layout
    return Norm(name, cls, weight, bias, eps, offset, recipe.centred, layout, plain, refused)


def _known(name: str, module: Any) -> Norm | None:
    """Of torch's own layers and of rmsnorm's, as they say themselves."""
    cls = type(module)
    if cls not in (nn.LayerNorm, LayerNorm, nn.RMSNorm, RMSNorm, GatedRMSNorm) or "forward" in vars(module):
        return None
    weight, bias = (key if getattr(module, key, None) is not None else None for key in ("weight", "bias"))
    plain = cls is not GatedRMSNorm and len(module.normalized_shape) == 1
    centred = cls in (nn.LayerNorm, LayerNorm)
    return Norm(name, cls.__name__, weight, bias, module.eps, getattr(module, "offset", 0.0), centred, plain=plain)


def gain(model: nn.Module, norm: Norm) -> Tensor | None:
    """The gain in fp64, in the weight's shape; None where there is none, or all of it is 1."""
    if norm.weight is None:
        return None
    weight: Tensor = getattr(model.get_submodule(norm.name), norm.weight)
    values = weight.detach().double() + norm.offset
    return None if bool((values == 1).all()) else values


def bias(model: nn.Module, norm: Norm) -> Tensor | None:
    """The bias in fp64; None where there is none, or all of it is 0."""
    if norm.bias is None:
        return None
    values: Tensor = getattr(model.get_submodule(norm.name), norm.bias).detach().to(torch.float64, copy=True)
    return values if bool(values.any()) else None


def channels(norm: Norm, model: nn.Module, output: Tensor, device: torch.device) -> Tensor:
    """Of each element of an output the index of its gain, ``[*output]`` in int64."""
    attribute = norm.weight or norm.bias
    if attribute is None:
        return torch.arange(output.shape[-1], device=device).expand(output.shape)
    weight: Tensor = getattr(model.get_submodule(norm.name), attribute)
    index = torch.arange(weight.numel(), device=device)
    if norm.layout == "channels":
        return index.view(-1, *(1,) * (output.dim() - 2)).expand(output.shape)
    if norm.layout == "number":
        return index.expand(output.shape)
    if norm.layout == "flat":
        return index.expand(output.shape)
    return index.view(weight.shape).expand(output.shape)


def eps_value(norm: Norm, dtype: torch.dtype) -> float:
    """The number that is added to the mean square of an input of this type."""
    if norm.eps is not None:
        return norm.eps
    return torch.finfo(torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype).eps
