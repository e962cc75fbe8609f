"""Proves that a gradient doesn't depend on which others are asked for, of every function, with and without weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pytest
import torch
from oracle import same_bits
from torch import Tensor

import rmsnorm

N = 129
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Case:
    """``call`` takes ``rows`` tensors of the input's shape, ``shared`` ones of a sample, and ``weights``, or None."""

    call: Callable[..., Any]
    rows: int
    weights: int = 0
    shared: int = 0
    alone: bool = True
    """Whether the weight may be all that learns. With memory="lean" the sum is a constant then, and kept, exactly."""


def turned(q: Tensor, k: Tensor, v: Tensor | None, w: Tensor | None) -> Any:
    """Heads of 16 columns, of which 8 are turned."""
    angle = torch.arange(q.shape[-2] * 8, dtype=q.dtype).view(-1, 8) / 16
    cos, sin = angle.cos(), angle.sin()
    if v is None and w is None:
        return rmsnorm.rope(q, k, cos, sin)
    return rmsnorm.heads_rms_norm_rope(q, k, cos, sin, v, w, 1e-5)


def modulated(x: Tensor, r: Tensor, scale: Any, shift: Any, gate: Any, w: Any, statistic: str = "rms") -> Any:
    return rmsnorm.modulated_norm(
        x, N, w, 1e-5, scale=scale, shift=shift, residual=r, gate=gate, statistic=statistic
    )  # fmt: skip


CASES = {
    "rms": Case(lambda x, w: rmsnorm.rms_norm(x, N, w, 1e-5), 1, 1),
    "rms, lean": Case(lambda x, w: rmsnorm.rms_norm(x, N, w, 1e-5, memory="lean"), 1, 1),
    "add": Case(lambda x, r, w: rmsnorm.add_rms_norm(x, r, N, w, 1e-5), 2, 1),
    "add, lean": Case(lambda x, r, w: rmsnorm.add_rms_norm(x, r, N, w, 1e-5, memory="lean"), 2, 1, 0, False),
    "gated": Case(lambda x, g, w: rmsnorm.gated_rms_norm(x, g, N, w, 1e-5), 2, 1),
    "gated before": Case(lambda x, g, w: rmsnorm.gated_rms_norm(x, g, N, w, 1e-5, norm_before_gate=False), 2, 1),
    "layer": Case(lambda x, w, b: rmsnorm.layer_norm(x, N, w, b), 1, 2),
    "sandwich": Case(lambda x, r, v, w: rmsnorm.sandwich_rms_norm(x, r, N, v, w, 1e-5), 2, 2),
    "norm, add": Case(lambda x, r, w: rmsnorm.rms_norm_add(x, r, N, w, 1e-5), 2, 1),
    "bias": Case(lambda x, w, b: rmsnorm.rms_norm(x, N, w, 1e-5, bias=b), 1, 2),
    "partial": Case(lambda x, w, b: rmsnorm.rms_norm(x, N, w, 1e-5, bias=b, partial=0.3, return_rstd=True), 1, 2),
    "unrounded": Case(lambda x, r, w, b: rmsnorm.add_rms_norm(x, r, N, w, 1e-5, bias=b, round_sum=False), 2, 2),
    "l2": Case(lambda x, w: rmsnorm.l2_norm(x, N, w), 1, 1),
    "modulated": Case(modulated, 2, 1, 3),
    "modulated, layer": Case(lambda *tensors: modulated(*tensors, None, statistic="layer"), 2, 0, 3),
    "gated add": Case(rmsnorm.gated_add, 2, 0, 1),
    "heads": Case(turned, 2, 2),
}


def made(name: str, count: int, dtype: torch.dtype) -> list[Tensor]:
    """The tensors, with as many rows as asked for in two samples."""
    case, generator = CASES[name], torch.Generator().manual_seed(count)
    heads = name == "heads"
    row, sample, weight = ((2, 3, count, 16), (), (16,)) if heads else ((2, count, N), (2, 1, N), (N,))
    sizes = [row] * case.rows + [sample] * case.shared + [weight] * case.weights
    return [(torch.randn(size, generator=generator, dtype=torch.float64) + 0.25).to(dtype) for size in sizes]


def gradients(name: str, tensors: Sequence[Tensor | None], wanted: Sequence[int]) -> dict[int, Tensor]:
    """By the numbers of the tensors."""
    given = [None if t is None else t.detach().clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    outputs = CASES[name].call(*given)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(7)
    grads = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in outputs]
    depends = [(y, g) for y, g in zip(outputs, grads, strict=True) if y.requires_grad]
    found = torch.autograd.grad([y for y, _ in depends], [given[i] for i in wanted], [g for _, g in depends])  # type: ignore[misc]
    return dict(zip(wanted, found, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_subsets(name, dtype):
    """Any of the gradients is that which comes with all, bit for bit; with any of the weights left out, and one row."""
    case = CASES[name]
    for count in (1, 70):
        whole = made(name, count, dtype)
        numbers = range(len(whole))
        weights = list(numbers)[len(whole) - case.weights :]
        for left in (left for k in range(len(weights) + 1) for left in combinations(weights, k)):
            tensors = [None if i in left else t for i, t in enumerate(whole)]
            there = [i for i in numbers if i not in left]
            every = gradients(name, tensors, there)
            for wanted in (wanted for k in range(1, len(there)) for wanted in combinations(there, k)):
                if not case.alone and wanted[0] >= case.rows:
                    continue
                for i, gradient in gradients(name, tensors, wanted).items():
                    assert same_bits(gradient, every[i]), (count, left, wanted, i)


def test_modulations_shared_unlike():
    """A scale of each sample beside a shift of all, or the other way round: gradients are sums over their own rows."""
    x, *_ = made("modulated", 5, torch.float32)
    one, two, other = (
        torch.randn(size, generator=torch.Generator().manual_seed(3)) for size in ((1, 1, N), (2, 1, N), (2, 5, N))
    )
    for given in ((two, one, one), (one, two, two), (one, other, two), (other, two, one)):
        scale, shift, gate = leaves = [t.clone().requires_grad_() for t in given]
        outputs = modulated(x, x + 1, scale, shift, gate, None)
        found = torch.autograd.grad(outputs, leaves, [x, x])
        wide = [t.double().requires_grad_() for t in given]
        total = x.double() + 1 + wide[2] * x
        y = total * (total.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * (1 + wide[0]) + wide[1]
        wanted = torch.autograd.grad((y, total), wide, [x.double(), x.double()])
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_no_rows(name):
    """What no row has is 0 where it is a sum over rows: weights, and what rows share."""
    tensors = [t[..., :0, :] if t.dim() > 2 and t.shape[-2] != 1 else t for t in made(name, 2, torch.float32)]
    for sample in (2, 1):
        given = [t[:sample] if t.dim() == 3 and t.shape[-2] == 1 else t for t in tensors]
        for i, gradient in gradients(name, given, range(len(given))).items():
            assert gradient.shape == given[i].shape
            assert gradient.count_nonzero() == 0, i
