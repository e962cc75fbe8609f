"""The only file that tries a norm on what models rarely give it: extreme numbers, another eps, and an open ear."""

from __future__ import annotations

import torch
from torch import nn

from . import looks, trial
from .binding import Binding, Types
from .numbers import eps_of
from .reads import Unfit


def check_subnormal(once: trial.Trial) -> None:
    """Such numbers have few bits, of which products lose some: half a number may be lost, and not all of it."""
    if once.inputs()[0].abs().min() > 0 or once.binding.recipe.centred or once.binding.recipe.gate:
        return  # without an eps theirs divides by a root that underflows; a mean or a gate's product has few bits
    least = torch.finfo(once.x_type).smallest_normal / 64
    inputs = [t.sign() * least if i == 0 else t for i, t in enumerate(once.inputs())]
    if trial.forward(once, inputs).far * torch.finfo(once.x_type).eps > 0.5:
        raise Unfit("it does something else with subnormal numbers")


def check_training(once: trial.Trial) -> None:
    """In either mode, for one may be set later; and backward, where the module is compared with itself: whether its
    gradients are ours is another question, which not everybody asks."""
    mode, inputs, found = once.module.training, once.inputs(gradient=True), []
    grad = trial.normal(*inputs[0].shape, seed=7)
    for training in (True, False):
        once.module.training = training
        output = once.theirs(inputs)
        gradients = torch.autograd.grad(output, inputs[0], grad.to(output.dtype)) if output.requires_grad else ()
        found.append(tuple(map(torch.Tensor.tolist, gradients)))
        if trial.forward(once).part > 1 or found[0] != found[-1]:
            raise Unfit("it does something else in training, or in eval()")
    once.module.training = mode


def check_looks(once: trial.Trial) -> None:
    own = [*once.shape, *(size for t in trial.tensors(once.module).values() for size in t.shape)]
    for training in (True, False):
        once.module.training = training
        inputs = once.inputs()
        with looks.Looks(size for size in own if size > 1) as seen:
            type(once.module).forward(once.module, *inputs)
        if seen.seen:
            raise Unfit(min(seen.seen))


def check_extremes(once: trial.Trial) -> None:
    """Rows with one large number, huge ones, and such that hold no numbers; weights that are large, and negative."""
    spike, huge, nan = (once.inputs() for _ in range(3))
    axis = 1 if once.binding.layout == "channels" else -1
    spike[0].copy_(0.3 * trial.normal(*spike[0].shape)).select(axis, 0).fill_(8.0)
    huge[0].mul_(1.0 if once.x_type is torch.float16 else 1e4)
    nan[0].select(axis, 0).fill_(float("nan"))
    rows = [("one large number", spike), ("large numbers", huge), ("NaN", nan)]
    for words, inputs in rows[bool(once.binding.recipe.gate) :]:  # a gate's small products have few bits
        # Theirs adds the small squares to that of the large number in float32: up to 8 eps. A clamp is 100,000.
        if trial.forward(once, inputs).part > 4:
            raise Unfit(f"it does something else with rows with {words}")
    weights = [t for t in (once.weight, once.bias) if t is not None]
    numbers = [t for t in trial.tensors(once.module).values() if not t.dim() and t.is_floating_point()]
    for what, changed, factors in (("weights", weights, (-8.0, -1 / 8)), ("numbers of its own", numbers, (16, 1 / 16))):
        for factor in factors:
            with torch.no_grad():
                for tensor in changed:
                    tensor.mul_(factor)
            if changed and trial.forward(once).part > 1:
                raise Unfit(f"it does something else with large or negative {what}")


def check_eps(module: nn.Module, binding: Binding, types: Types) -> None:
    """With others than that in force: one may be set later."""
    eps = eps_of(module, binding)
    for factor in (2.0**-12, 2.0**12):
        if (
            isinstance(binding.eps, str)
            and eps
            and trial.forward(trial.Trial(module, binding, types, eps * factor)).part > 1
        ):
            raise Unfit(f"it does something else with another {binding.eps}")
