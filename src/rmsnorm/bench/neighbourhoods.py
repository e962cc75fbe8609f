"""The only file that knows what stands beside a norm in models, and races it in one graph: ours against the formula.

Each neighbourhood is written once, as Llama's, Gemma's or Qwen's layers have it, around a norm that is given: ours, or
the lines that models have, of which Inductor makes code of its own. Both are compiled, for one shape each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import rms_norm
from .cases import DTYPES, Case
from .contenders import EPS, Call, Problem
from .race import TOLERANCE
from .timing import measure

Norm = Callable[[Tensor, Tensor], Tensor]
OURS, THEIRS = "ours", "Inductor's"
HEADS, HEAD = "heads: norm, rotation (Qwen3)", 64
"""Where heads are normed, and the columns of one."""


def _llama(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def _gemma(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * (1.0 + weight.float())).type_as(x)


def _our_llama(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight.shape, weight, EPS, casting_mode="llama")


def _our_gemma(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight.shape, weight, EPS, offset=1.0)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def _around(llama: Norm, gemma: Norm) -> dict[str, Callable[..., Any]]:
    """By their names, of an input, a residual or a gate, and two weights, which are a head's where heads are normed."""

    def alone(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Any:
        return llama(x, w)

    def add_norm(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Any:
        sum = x + r
        return llama(sum, w), sum

    def norm_add(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Any:
        return r + gemma(x, w)

    def sandwich(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Any:
        sum = r + gemma(x, w)
        return gemma(sum, v), sum

    def scaled(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Any:
        first = x * 24.0
        return gemma(first, w), first

    def heads(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Any:
        shape = 1, len(x), -1, HEAD
        cos, sin = (r.detach()[None, None, :, i : i + HEAD] for i in (0, HEAD))
        query = llama(x.view(shape), w).transpose(1, 2)
        key = llama(r.view(shape), v).transpose(1, 2)
        return _turned(query, cos, sin), _turned(key, cos, sin)

    def add_norm_cast(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Any:
        sum = x + r
        return llama(sum, w).to(torch.bfloat16 if x.dtype is torch.float32 else torch.float32), sum

    def product(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Any:
        return llama(x, w) * r

    def gate(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Any:
        return llama(x, w) * F.silu(r)

    return {
        "norm": alone,
        "add, norm (Llama, Qwen)": add_norm,
        "norm, add (Gemma, OLMo 2)": norm_add,
        "norm, add, norm (Gemma)": sandwich,
        "scale, norm (Gemma)": scaled,
        HEADS: heads,
        "add, norm, cast": add_norm_cast,
        "norm, product": product,
        "norm, gate (Qwen3-Next)": gate,
    }


NEIGHBOURHOODS = {OURS: _around(_our_llama, _our_gemma), THEIRS: _around(_llama, _gemma)}
NAMES = tuple(NEIGHBOURHOODS[OURS])


@dataclass
class Place:
    """One neighbourhood in one case, and what runs gave: time of ours ÷ time of Inductor's code."""

    name: str
    case: Case
    ratios: list[float] = field(default_factory=list)
    seconds: float = math.nan
    """Of Inductor's, in the last run."""


def places(names: Iterable[str], cases: Sequence[Case]) -> list[Place]:
    return [Place(name, case) for name in names for case in cases]


def races(asked: Sequence[Place], seconds: float) -> Iterator[tuple[float, float]]:
    """The ratio of each, and the time of Inductor's. For a process of its own.

    Raises:
        ArithmeticError: the two don't agree.
    """
    for place in asked:
        timings = measure(_bound(place), seconds)
        yield timings[OURS].ratio(timings[THEIRS]), timings[THEIRS].median


def summary(found: Iterable[Place]) -> str:
    """One sentence about all of them, whose every run counts."""
    ratios = [ratio for place in found for ratio in place.ratios]
    if not ratios:
        return "nothing was measured"
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    slower = sum(ratio > 1 for ratio in ratios)
    return f"geometric mean {mean:.2f}, largest {max(ratios):.2f}, above 1 in {slower} of {len(ratios)}"


def _bound(place: Place) -> dict[str, Call]:
    import torch._functorch.config as aot

    calls: dict[str, Call] = {}
    values: dict[str, Any] = {}
    torch._dynamo.reset()  # or the eighth shape would be eager
    for name, functions in NEIGHBOURHOODS.items():
        with aot.patch(donated_buffer=False):  # compiled so that backward can run twice on one graph
            columns = HEAD if place.name == HEADS else place.case.cols
            calls[name] = _call(functions[place.name], Problem(place.case), columns)
            values[name] = calls[name]()
    for mine, theirs in zip(*(_tensors(values[name]) for name in (OURS, THEIRS)), strict=True):
        difference = (mine.float() - theirs.float()).abs().max() / theirs.float().abs().max()
        types = mine.dtype, DTYPES[place.case.dtype]
        most = max(TOLERANCE[name] for name, dtype in DTYPES.items() if dtype in types)
        if not difference <= 2 * most:
            raise ArithmeticError(f"{place.name}: ours and the formula disagree at {place.case} by {difference:.1e}")
    return calls


def _call(function: Callable[..., Any], p: Problem, columns: int) -> Call:
    weight = p.weight.detach()[:columns]
    weights = [torch.nn.Parameter(one.clone(), requires_grad=p.records) for one in (weight, weight.flip(0))]
    leaves = [p.x, p.residual.requires_grad_(p.records), *weights]
    made = torch.compile(function, dynamic=False)
    if not p.records:

        def forward() -> Any:
            with torch.no_grad():
                return made(*leaves)

        return forward
    outputs = _tensors(made(*leaves))
    grads = [torch.ones_like(one) + p.grad.to(one.dtype).reshape(one.shape) for one in outputs]
    return partial(torch.autograd.grad, outputs, leaves, grads, retain_graph=True, allow_unused=True)


def _tensors(value: Any) -> list[Tensor]:
    return [one for one in (value if isinstance(value, tuple) else (value,)) if one is not None]
