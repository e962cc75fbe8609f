"""The only file that knows what the norms of other people's models mean: one table, and one way to compute a row of it.

A meaning is an algebra and a place for the roundings. In the formulas ``r(x) = 1/sqrt(mean(x²) + eps)``, ``f`` is "to
float32" and ``rd`` "rounded to the type of x". Names of attributes are no part of a meaning: ``probe.py`` finds them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..forms.floored import floored_rms_norm
from ..forms.gated import gated_rms_norm
from ..forms.layer_norm import layer_norm
from ..functional import rms_norm


@dataclass(frozen=True)
class Recipe:
    """One meaning, and the options of our functions that reproduce it."""

    meaning: str
    formula: str
    output: str
    """The type of the output."""
    casting_mode: str = "torch"
    offset: float = 0.0
    weight: tuple[bool, ...] = (True,)
    """Whether there is one; LayerNorm may do without."""
    own_gain: bool = False
    """1 + weight is formed in the weight's type, where half precision loses bits of it."""
    scaled_input: bool = False
    """The gain multiplies the input instead of the output."""
    gate: str = ""
    """Where a gate multiplies: before the norm or after it."""
    activation: str = "silu"
    """Of the gate."""
    centred: bool = False
    """LayerNorm: the mean is subtracted."""
    floors: str = ""
    """What eps is the least value of, instead of a number that is added: the ``"norm"`` of a row, the root of the sum
    of its squares, as in ``F.normalize``; or its ``"rms"``."""
    stepwise: bool = False
    """Behind ``F.normalize`` in float32, √n and the weight multiply one after the other, each product rounded."""
    unit: bool = False
    """Rows have the length 1 instead of the mean square 1."""

    def __call__(
        self,
        x: Tensor,
        gate: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float | None,
        shape: torch.Size,
        group: int | None,
        memory: str | None = None,
    ) -> Tensor:
        """The norm of ``x`` over its last dimensions, which have the sizes ``shape``, or over groups of the last."""
        if self.centred:
            assert eps is not None
            return layer_norm(x, shape, weight, bias, eps)
        if self.own_gain:
            assert weight is not None
            weight = 1.0 + weight
        if self.scaled_input:
            assert weight is not None
            x, weight = (x.float() * weight.float()).to(x.dtype), None
        steps = self.stepwise and not x.dtype is torch.float32 is (x.dtype if weight is None else weight.dtype)
        if self.unit or steps:
            size = shape.numel()
            gain, weight = weight, x.new_full((), size**-0.5, dtype=torch.float32).expand(shape)
            if self.unit and gain is not None:
                weight = weight * gain
            eps = None if eps is None else eps if self.floors else eps / size
        if self.floors:
            floor = self.floor(shape.numel(), eps)
            output = floored_rms_norm(x, shape, weight, floor, **self.options())
            if steps:
                output = output * shape.numel() ** 0.5
                output = output if gain is None else output * gain
        elif gate is None and group is None:
            output = rms_norm(x, shape, weight, eps, **self.options(), memory=memory)
        else:
            output = gated_rms_norm(
                x,
                gate,
                shape,
                weight,
                eps,
                activation=self.activation,
                norm_before_gate=self.gate != "before",
                group_size=group,
                **self.options(),
            )
        return output if bias is None else output + bias

    def adds(self) -> bool:
        """Whether :func:`rmsnorm.rms_norm` is all of it, and :func:`rmsnorm.add_rms_norm` does the same of a sum."""
        return not (self.own_gain or self.scaled_input or self.gate or self.centred or self.floors or self.unit)

    def options(self) -> dict[str, Any]:
        """Those of a norm of ours, but for what a module holds."""
        return {"offset": self.offset, "casting_mode": self.casting_mode}

    def floor(self, columns: int, eps: float | None) -> float:
        """What the mean square of so many columns is at least."""
        return (eps or NORMALIZE) ** 2 / (columns if self.floors == "norm" else 1)

    def __reduce__(self) -> tuple[Callable[[str], Recipe], tuple[str]]:
        return named, (self.meaning,)  # a pickled model takes the row of the version that reads it


NORMALIZE = 1e-12
"""The eps of ``F.normalize`` where nobody gives another."""
RECIPES = {
    recipe.meaning: recipe
    for recipe in (
        Recipe("round, then weight", "w · rd(f(x)·r) [+ b]", "promote(w, x)", casting_mode="llama"),
        Recipe("weight, then round", "rd(f(w) · f(x)·r)", "x"),
        Recipe("1 + weight", "rd((1 + f(w)) · f(x)·r)", "x", offset=1.0),
        Recipe("1 + weight in its type", "rd(f(1 + w) · f(x)·r)", "x", own_gain=True),
        Recipe(
            "1 + weight, then norm",
            "z = rd(f(x) · f(1 + w)); rd(f(z)·r(z))",
            "x",
            own_gain=True,
            scaled_input=True,
        ),
        Recipe("no weight", "rd(f(x)·r)", "x", weight=(False,)),
        Recipe(
            "gate, norm, round, weight",
            "z = f(x)·silu(f(g)); w · rd(z·r(z))",
            "promote(w, x)",
            casting_mode="llama",
            gate="before",
        ),
        Recipe("gate, norm", "z = f(x)·silu(f(g)); rd(f(w) · z·r(z))", "x", gate="before"),
        Recipe(
            "norm, round, weight, gate",
            "rd((w · rd(f(x)·r)) · silu(f(g)))",
            "x",
            casting_mode="llama",
            gate="after",
        ),
        Recipe("norm, gate", "rd(f(w) · f(x)·r · silu(f(g)))", "x", gate="after"),
        Recipe("norm, sigmoid gate", "rd(f(w) · f(x)·r · sigmoid(f(g)))", "x", gate="after", activation="sigmoid"),
        Recipe("unit length", "rd(f(x) / sqrt(sum(f(x)²) + eps))", "x", weight=(False,), unit=True),
        Recipe("normalize", "x / max(‖x‖, eps) · √n [· w]", "x", weight=(True, False), floors="norm"),
        Recipe("normalize, 1 + weight", "x / max(‖x‖, eps) · √n · (1 + w)", "x", floors="norm", offset=1.0),
        Recipe(
            "normalize, round, weight",
            "[w ·] rd(rd(f(x) / max(‖f(x)‖, eps)) · √n) [+ b]",
            "promote(w, x)",
            weight=(True, False),
            floors="norm",
            stepwise=True,
        ),
        Recipe(
            "normalize to unit length", "x / max(‖x‖, eps) [· w]", "x", weight=(True, False), floors="norm", unit=True
        ),
        Recipe("rms with a floor", "x / max(rms(x), eps) [· w]", "x", weight=(True, False), floors="rms"),
        Recipe(
            "LayerNorm",
            "rd(f(w) · (f(x) - mean)/sqrt(var + eps) + f(b))",
            "x",
            weight=(True, False),
            centred=True,
        ),
    )
}


def named(meaning: str) -> Recipe:
    """The row of the table."""
    return RECIPES[meaning]
