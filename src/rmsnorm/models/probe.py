"""The only file that asks a module what it computes: random rows, through a copy of it and through every recipe.

A name proves nothing: classes called RMSNorm round in different places, and classes are changed at run time. So a
module is what it does. First its copy gets a random weight and an eps that shows in every row; the recipe that follows
it there is then proven with the module's own eps, in all types, forward and backward. Everything runs on the CPU.
``conditions.py`` finds out where the proof holds.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from . import classes, conditions, trial
from .binding import TYPES, Binding, Types
from .reads import Unfit
from .recipes import RECIPES, Recipe

EPS_NAMES = ("variance_epsilon", "eps", "epsilon", "rms_norm_eps", "norm_eps", "layer_norm_eps")
CONSPICUOUS = 0.37
LITERALS = (1e-6, 1e-5, 1e-8, 1e-12)
"""What stands in the formulas of norms without an attribute for eps."""


class Refused(Exception):
    """Why a module is left as it is."""


@dataclass(frozen=True)
class Proof:
    """A binding, and the differences from the module's own forward that were seen."""

    binding: Binding
    errors: dict[str, float]


def examine(module: nn.Module, *, layer_norm: bool, verify: bool, first: Recipe | None = None) -> Proof:
    """The binding that reproduces the module. Candidates with the recipe ``first`` come first.

    Raises:
        Refused: nothing reproduces it, or it can't be asked.
    """
    module = classes.bare(module)
    refuse_unasked(module)
    candidates = _in_order(module, first)
    partial: list[Proof] = []
    nearest, shortest, raised, unproven = "", float("inf"), "", ""
    for candidate in candidates:
        try:
            distance = _distance(module, candidate)
            if distance < shortest:
                nearest, shortest = candidate.recipe.meaning, distance
            if distance <= 1 and candidate.recipe.centred and not layer_norm:
                raise Refused("it is a LayerNorm; patch(model, layer_norm=True) takes it")
            if distance <= 1:
                if not (proof := _prove(module, candidate, verify)):
                    unproven = unproven or candidate.recipe.meaning
                    continue
                if proof.binding.complete():
                    return proof
                partial.append(proof)
        except Refused:
            raise
        except Unfit as unfit:
            raise Refused(str(unfit)) from unfit
        except Exception as error:  # a stranger's forward may raise anything; other candidates ask it otherwise
            raised = raised or _unprobed(error)
    if partial:  # right in some types: in float32, many meanings are one
        return max(partial, key=lambda one: len(one.binding.proven))
    if unproven:
        raise Refused(f"{unproven!r} follows it, but not backward or not with its own eps")
    if raised and (shortest <= 1 or not nearest):
        raise Refused(raised)
    raise Refused("no recipe reproduces it" + (f"; the nearest is {nearest!r}" if nearest else ""))


def _unprobed(error: Exception) -> str:
    return f"it can't be probed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"


def refuse_unasked(module: nn.Module) -> None:
    """Raises Refused for what can be told without running anything."""
    if "forward" in vars(module):
        forward = vars(module)["forward"]
        by = inspect.getmodule(getattr(forward, "func", forward))
        raise Refused(f"its forward was replaced before, by {getattr(by, '__name__', 'somebody')}")
    if not inspect.isfunction(type(module).forward) or type(module).forward is not type(module).forward:
        raise Refused("its forward is no function")
    if module._modules:
        raise Refused("it has modules inside")
    own = trial.weights(module)
    if len(own) > 2:
        raise Refused(f"it has {len(own)} weights")
    if odd := {tensor.dtype for tensor in own.values()} - set(TYPES):
        raise Refused(f"its weight is {odd.pop()}")
    if any(tensor.is_meta for tensor in own.values()):
        raise Refused("its weight is on the device meta, without values; patch the model when it is loaded")
    if any(isinstance(tensor, FakeTensor) for tensor in own.values()):
        raise Refused("its weight is a FakeTensor, without values; patch the model before torch.export and the like")


def _eps_names(module: nn.Module) -> list[str]:
    """Attributes that may hold eps, the likely ones first."""
    likely = [name for name in EPS_NAMES if isinstance(getattr(module, name, ""), float | int | None)]
    return [*likely, *(n for n, v in vars(module).items() if type(v) is float and 0 <= v < 1 and n not in likely)]


def _groupings(module: nn.Module) -> Iterator[tuple[str | None, bool]]:
    """None, and the attributes that may hold the size of a group, or (True) the number of groups."""
    yield None, False
    sizes = {tensor.shape[-1] for tensor in trial.weights(module).values() if tensor.dim() == 1}
    for name, value in vars(module).items():
        if type(value) is int and value > 1 and any(size > value and size % value == 0 for size in sizes):
            yield from ((name, False), (name, True))


def _layouts(module: nn.Module, weight: str | None) -> list[str]:
    """Those of ``binding.LAYOUTS`` that the weight's shape allows."""
    if weight is None:
        return ["last", "channels"]
    shape = trial.weights(module)[weight].shape
    if shape.numel() == 1 and len(shape) == 1:
        return ["number", "last"]  # a row of one column is tried as what it is, too
    if len(shape) == 1:
        return ["last", "channels"]
    if sum(size > 1 for size in shape) <= 1:
        return ["flat"] if shape[-1] > 1 else ["channels"]
    return ["last", "heads"] if len(shape) == 3 and shape[1] == 1 else ["last"]


def _candidates(module: nn.Module) -> Iterator[Binding]:
    names = [*trial.weights(module), None]
    gated = trial.takes_gate(module)
    for recipe in RECIPES.values():
        if bool(recipe.gate) is not gated:
            continue
        epses: list[str | float | None] = [*([None] if recipe.floors == "norm" else []), *_eps_names(module)]
        for eps, weight, bias in product(epses or LITERALS, names, reversed(names)):
            if (weight is not None) not in recipe.weight or (bias is not None and bias == weight):
                continue
            for layout in _layouts(module, weight):
                for group, counts in _groupings(module) if layout == "last" and not recipe.centred else [(None, False)]:
                    yield Binding(recipe, weight, bias, eps, group, counts, layout)


def _in_order(module: nn.Module, first: Recipe | None) -> list[Binding]:
    try:
        return sorted(_candidates(module), key=lambda one: (one.recipe.centred, one.recipe is not first))
    except Exception as error:  # of a property; of inspect, about a forward that wraps itself
        raise Refused(_unprobed(error)) from error


def _own_type(module: nn.Module) -> torch.dtype:
    return next((tensor.dtype for tensor in trial.weights(module).values()), torch.float32)


def _distance(module: nn.Module, candidate: Binding) -> float:
    """How far the candidate is from the module with a conspicuous eps, in its own type and in float32; at most 1 if
    rounding explains it."""
    types = dict.fromkeys((torch.float32, _own_type(module)))
    worst = 0.0
    for t in types:
        worst = max(worst, trial.forward(trial.Trial(module, candidate, (t, t, t), CONSPICUOUS)).part)
        if worst > 1:  # in float32 already
            break
    return worst


def _prove(module: nn.Module, candidate: Binding, verify: bool) -> Proof | None:
    """The candidate with the types that it reproduces at the module's own eps, and the differences."""
    proven: set[Types] = set()
    errors: dict[str, float] = {}
    for weight, x in product(TYPES if candidate.weight else (None,), TYPES):
        for gate in {x: 0, weight or x: 0} if candidate.recipe.gate else (None,):
            types = (weight, x, gate) if gate else (weight, x)
            try:
                once = trial.Trial(module, candidate, types)
                there = trial.forward(once)
                back = trial.backward(once) if verify and there.part <= 1 else 0.0
            except (RuntimeError, TypeError, ValueError):
                continue  # it doesn't take these types
            if max(there.part, back) > 1:
                continue
            proven.add(types)
            errors["gradient"] = max(back * trial.BACKWARD, errors.get("gradient", 0.0))
            if weight in (None, x):
                errors[str(x).removeprefix("torch.")] = there.far if x is torch.float32 else there.share
    own = _own_type(module)
    natural: Types = (own if candidate.weight else None, *[own] * (1 + bool(candidate.recipe.gate)))
    if natural not in proven:
        return None
    return Proof(conditions.find(module, replace(candidate, proven=frozenset(proven)), natural), errors)
