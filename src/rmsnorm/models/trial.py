"""The only file that runs a stranger's norm and ours side by side, and says how far apart they are."""

from __future__ import annotations

import copy
import inspect
import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import numbers
from .binding import Binding, Types
from .reads import Unfit

# Bounds in units of a type's eps. Forward, relative to each output: in float32 their sum, root and products round, up
# to 4 in all; in a half type one rounding of x·r may fall the other way, and the weight passes it on. A gate brings an
# exponential and a product more, on both sides: twice that.
FORWARD = {torch.float32: 4.0, torch.bfloat16: 2.0, torch.float16: 2.0}
# That happens to 0.0001 of float16 outputs. Another order of casts changes 0.2 of them; samples of 2000 need some room.
NOT_IDENTICAL = 0.005
# Backward, relative to the largest gradient of the row (dx) or of all (dw), in the coarser type's eps: theirs is
# rounded at every step of its chain. A forgotten term would be as large as the gradient.
BACKWARD = 16.0
LEADING: dict[int, tuple[tuple[int, ...], ...]] = {
    0: ((),),
    1: ((8,), (5,)),
    2: ((2, 4), (3, 2)),
    3: ((2, 2, 2), (1, 2, 3)),
    4: ((2, 2, 1, 2), (1, 2, 3, 1)),
}
"""Sizes of the other dimensions by their number: two of each, as one may happen to be another size of the module."""
WIDTH = 64
"""Of norms that have no weight and no size."""


def weights(module: nn.Module) -> dict[str, Tensor]:
    """The module's own floating parameters and buffers, but for numbers."""
    return {name: t for name, t in tensors(module).items() if t.is_floating_point() and t.dim()}


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """All of the module's own parameters and buffers."""
    return {name: t for name, t in {**module._parameters, **module._buffers}.items() if t is not None}


def _spaces(module: nn.Module) -> tuple[object, ...]:
    return module, vars(module), module._parameters, module._buffers


def takes_gate(module: nn.Module) -> bool:
    """Whether its forward takes two tensors: it has no default for the second, or calls it a gate."""
    _, *parameters = inspect.signature(type(module).forward).parameters.values()
    return len(parameters) == 2 and (parameters[1].default is inspect.Parameter.empty or "gate" in parameters[1].name)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Whatever the default type and device are."""
    dice = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=dice, dtype=torch.float32, device="cpu")


class Trial:
    """A copy of the module with random weights, and rows for it. ``types`` are of weight, input and gate."""

    def __init__(
        self, module: nn.Module, binding: Binding, types: Types, eps: float | None = None, width: int | None = None
    ) -> None:
        self.binding, self.types = binding, types
        self.x_type = types[1] or torch.float32
        own = [(seed, name, t) for seed, (name, t) in enumerate(tensors(module).items()) if t.is_floating_point()]
        # A lone one is 0.3: 1.3 is rounded in bfloat16 and float16, and what type a sum has must show.
        draws = {name: normal(*t.shape, seed=n).clamp(*((-1, -1) if t.numel() == 1 else (-9, 9))) for n, name, t in own}
        values = {name: (1 + 0.7 * draw).to(types[0] or types[1]) for name, draw in draws.items()}
        values |= {name: nn.Parameter(value) for name, value in values.items() if name in module._parameters}
        # In place of copies of the weights: torch can't copy a DTensor that begins inside of its storage (rank 1's).
        self.module: Any = copy.deepcopy(module, {id(t): values[name] for _, name, t in own})
        if any(ours is theirs for ours, theirs in zip(_spaces(self.module), _spaces(module), strict=True)):
            raise Unfit("its copy is itself")  # what is tried would change the model
        value: Any
        for name, value in values.items():
            (self.module._parameters if name in module._parameters else self.module._buffers)[name] = value
        if eps is not None and isinstance(binding.eps, str):
            setattr(self.module, binding.eps, eps)
        self.weight = getattr(self.module, binding.weight) if binding.weight else None
        self.bias = getattr(self.module, binding.bias) if binding.bias else None
        self.shape = torch.Size([width]) if width else _normalised(module, binding, self.weight)
        self.heads = self.weight.shape[-3] if binding.layout == "heads" and self.weight is not None else 1

    def rows(self, *, gradient: bool = False) -> list[Tensor]:
        """Rows of many sizes, and the gates for them: ``[rows, *normalised]`` each.

        From those that eps drowns to those that it leaves alone, and from the smallest numbers, whose squares are 0, to
        1e4, whose squares are too large for float16. For gradients those in the middle, as those of smaller rows
        overflow in float16.
        """
        columns, x_type = self.shape.numel(), self.x_type
        least = 1e-3 if x_type is torch.float16 else 1e-5
        recipe, eps = self.binding.recipe, numbers.eps_of(self.module, self.binding)
        square = recipe.floor(columns, eps) if recipe.floors else eps
        root = max(square or 0.0, 0.0 if recipe.floors and not gradient else least**2) ** 0.5
        sizes = [0.3 * root, root, 3 * root, 1.0, 30.0]
        if not gradient:
            # Without an eps their root of a square that underflows is wrong, which ours isn't.
            # A product with a gate or a weight must not be subnormal: it would have few bits, and theirs other ones.
            many = 4096 if recipe.gate or x_type is not torch.float16 else 8
            smallest = [0.0, torch.finfo(x_type).smallest_normal * many] if square else [1.0, 1.0]
            sizes = [*smallest, *sizes, 1e4]
        sizes *= max(2, 400 // columns)
        whole = 8 * self.heads
        sizes = (sizes * self.heads)[: max(len(sizes) // whole, 1) * whole]
        x = torch.stack([size * normal(columns, seed=i) for i, size in enumerate(sizes)])
        rows = [x, 2 * normal(*x.shape, seed=-1)][: 1 + bool(self.binding.recipe.gate)]
        return [r.to(t).view(-1, *self.shape) for r, t in zip(rows, self.types[1:], strict=False)]

    def inputs(self, leading: tuple[int, ...] | None = None, *, gradient: bool = False) -> list[Tensor]:
        """The rows shaped so: as many as fit. By default all of them, in as many dimensions as the weight asks for."""
        rows = self.rows(gradient=gradient)
        if leading is None:
            leading = self._leading(len(rows[0]))
        count = torch.Size(leading).numel()
        shaped = [r[len(r) - count :].reshape(*leading, *self.shape) for r in rows]
        if self.binding.layout == "channels":
            shaped = [r.movedim(-1, 1).contiguous() for r in shaped]
        return [r.clone().requires_grad_(gradient) for r in shaped]

    def _leading(self, rows: int) -> tuple[int, ...]:
        """The other sizes of an input with so many rows, in as many dimensions as the module takes."""
        options: list[tuple[int, ...]]
        if self.binding.layout == "heads":
            options = [(1, self.heads, rows // self.heads)]
        elif self.binding.layout == "channels":
            shape = torch.Size([]) if self.weight is None else self.weight.shape
            counts = [len(shape) - (shape[0] == 1)] if len(shape) > 1 else [3, 2, 1]
            options = [((1,) * (n - 2) + (2, rows // 2))[-n:] if n > 1 else (rows,) for n in counts]
        else:
            options = [(2, rows // 2), (rows,), (1, 2, rows // 2)]
        for option in options[:-1]:
            x = torch.ones(*option, *self.shape, dtype=self.x_type)
            x = x.movedim(-1, 1) if self.binding.layout == "channels" else x
            with torch.no_grad(), suppress(RuntimeError, ValueError, IndexError, TypeError, AssertionError):
                if self.theirs([x, *[x] * bool(self.binding.recipe.gate)]).shape == x.shape:
                    return option
        return options[-1]

    def theirs(self, inputs: list[Tensor]) -> Tensor:
        """What the module's own forward makes of (a copy of) the rows."""
        given = [t.clone() for t in inputs]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's RMSNorm warns of mixed types
            output = type(self.module).forward(self.module, *given)
        if not isinstance(output, Tensor):
            raise Unfit(f"it returns a {type(output).__name__}, not a tensor")
        if any(bool(((a != b) & ~b.isnan()).any()) for a, b in zip(given, inputs, strict=True)):
            raise Unfit("it writes into its input")
        return output

    def ours(self, inputs: list[Tensor]) -> Tensor:
        """What the recipe makes of them."""
        return numbers.apply(self.module, self.binding, self.weight, *(t.clone() for t in inputs))


def _normalised(module: nn.Module, binding: Binding, weight: Tensor | None) -> torch.Size:
    if weight is not None and binding.layout != "number":
        last = {"last": weight.shape, "heads": weight.shape[-1:]}
        return last.get(binding.layout, torch.Size([weight.numel()]))
    shape = getattr(module, "normalized_shape", None)
    if isinstance(shape, tuple) and all(isinstance(size, int) for size in shape):
        return torch.Size(shape)
    settings = [(name, value) for name, value in vars(module).items() if name != binding.group]
    widths = [value for _, value in settings if type(value) is int and value > 1]
    roots = [(value, round(value**2)) for _, value in settings if type(value) is float and 1 < value < 1e4]
    widths = [n for value, n in roots if abs(n**0.5 - value) < 1e-9] or widths  # a scale of √n
    return torch.Size([max(widths, default=WIDTH)])


@dataclass(frozen=True)
class Difference:
    """Between two outputs."""

    far: float
    """The largest, in eps of the coarser type of input and output."""
    share: float
    """Of outputs that aren't identical."""
    part: float
    """Of what is allowed; above 1, rounding doesn't explain it."""


UNLIKE = Difference(float("inf"), 1.0, float("inf"))


def forward(trial: Trial, inputs: list[Tensor] | None = None) -> Difference:
    """How far apart the outputs are."""
    inputs = trial.inputs() if inputs is None else inputs
    with torch.no_grad():
        return compare(trial, trial.theirs(inputs), trial.ours(inputs))


def compare(trial: Trial, theirs: Tensor, ours: Tensor) -> Difference:
    """How far two outputs are apart."""
    if (theirs.dtype, theirs.shape) != (ours.dtype, ours.shape):
        return UNLIKE
    recipe = trial.binding.recipe
    coarse = max(trial.x_type, ours.dtype, key=_eps)
    size = theirs.abs().float()
    if recipe.centred or trial.bias is not None:  # these cancel: errors are relative to what was subtracted
        size = size.amax(1 if trial.binding.layout == "channels" else -1, keepdim=True)
    far = _largest(ours, theirs, size, _eps(coarse))
    share = float(((theirs != ours) & ~(theirs.isnan() & ours.isnan())).double().mean())
    allowed = FORWARD[coarse] * (2 if recipe.gate else 1)
    return Difference(far, share, max(far / allowed, share / NOT_IDENTICAL * (coarse is not torch.float32)))


def backward(trial: Trial) -> float:
    """The largest difference of a gradient, as a part of the allowed."""
    inputs = trial.inputs(gradient=True)
    wanted = [*inputs, *(t for t in (trial.weight, trial.bias) if isinstance(t, nn.Parameter))]
    grad = normal(*inputs[0].shape, seed=7) / 4
    theirs, ours = (
        torch.autograd.grad(output, wanted, grad.to(output.dtype), allow_unused=True)
        for output in (trial.theirs(inputs), trial.ours(inputs))
    )
    worst = 0.0
    dims = (1,) if trial.binding.layout == "channels" else tuple(range(-len(trial.shape), 0))
    for tensor, one, other in zip(wanted, theirs, ours, strict=True):
        if one is None or other is None:
            return float("inf")
        rowwise = any(tensor is x for x in inputs)
        size = one.abs().float().amax(dims, keepdim=True) if rowwise else one.abs().float().max()
        coarse = max(*(t.dtype for t in inputs), tensor.dtype, key=_eps)
        worst = max(worst, _largest(other, one, size, _eps(coarse)) / BACKWARD)
    return worst


def _largest(ours: Tensor, theirs: Tensor, size: Tensor, eps: float) -> float:
    """The largest difference in units of eps, relative to a size; infinite where one isn't finite and the other is."""
    if not ours.numel():
        return 0.0
    tiny = torch.finfo(ours.dtype).smallest_normal
    ours, theirs = ours.detach(), theirs.detach()
    apart = (ours.double() - theirs.double()).abs() / (size.double().clamp_min(tiny) * eps)
    apart = torch.where(ours.isfinite() | theirs.isfinite(), apart, 0.0)
    return float(apart.detach().nan_to_num(nan=float("inf")).max())


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps
