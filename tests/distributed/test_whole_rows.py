"""Proves that forms whose rows lie on several ranks as wholes are what they are on one: values, gradients, placements.

Unlike those of ``forms.py`` they have no norm of rows that are cut in two, and say so.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from oracle import same_bits
from pool import mesh
from test_sharded import ROWS, WHOLE, whole
from torch import Tensor
from torch.distributed.tensor import Placement, Shard, distribute_tensor

import rmsnorm

pytestmark = pytest.mark.xdist_group("distributed")  # one process has the ranks

SIZE = (70,)


def general(*tensors: Tensor) -> Any:
    """Everything that one call takes."""
    x, residual, weight, bias = tensors
    more: dict[str, Any] = {"partial": 0.5, "return_rstd": True, "out_dtype": torch.float64, "round_sum": False}
    return rmsnorm.add_rms_norm(x, residual, SIZE, weight, 1e-5, bias=bias, offset=1.0, **more)


# name -> how many rows, how many weights, and what is made of them.
CASES: dict[str, tuple[int, int, Callable[..., Any]]] = {
    "sandwich": (2, 2, lambda x, r, v, w: rmsnorm.sandwich_rms_norm(x, r, SIZE, v, w, 1e-5)),
    "norm, add": (2, 1, lambda x, r, w: rmsnorm.rms_norm_add(x, r, SIZE, w, 1e-5)),
    "bias": (1, 2, lambda x, w, b: rmsnorm.rms_norm(x, SIZE, w, 1e-5, bias=b)),
    "bias alone": (1, 1, lambda x, b: rmsnorm.rms_norm(x, SIZE, None, 1e-5, bias=b)),
    "partial": (1, 1, lambda x, w: rmsnorm.rms_norm(x, SIZE, w, 1e-5, partial=0.3)),
    "output in bf16": (1, 1, lambda x, w: rmsnorm.rms_norm(x, SIZE, w, 1e-5, out_dtype=torch.bfloat16)),
    "factor too": (1, 1, lambda x, w: rmsnorm.rms_norm(x, SIZE, w, 1e-5, return_rstd=True)),
    "unrounded sum": (2, 1, lambda x, r, w: rmsnorm.add_rms_norm(x, r, SIZE, w, 1e-5, round_sum=False)),
    "general": (2, 2, general),
    "wider residual": (
        2,
        1,
        lambda x, r, w: rmsnorm.add_rms_norm(x, r.double(), SIZE, w, 1e-5, out_dtype=torch.float64),
    ),
    "factor": (1, 0, lambda x: rmsnorm.inverse_rms(x, SIZE, 1e-5)),
    "l2": (1, 1, lambda x, w: rmsnorm.l2_norm(x, SIZE, w)),
}


def listed(outputs: Any) -> tuple[Any, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def grads_for(outputs: tuple[Any, ...]) -> list[Tensor]:
    """A gradient for each output, the same on each rank."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in outputs]


def solve(
    name: str, tensors: list[Tensor], grid: tuple[int, ...], placements: list[Placement]
) -> tuple[list[Tensor], list[Any]] | None:
    """On a rank: outputs and gradients, and where the outputs lie; None outside of the mesh."""
    here, (rows, weights, function) = mesh(*grid), CASES[name]
    placed = [placements] * rows + [[WHOLE] * len(grid)] * weights
    args = [
        distribute_tensor(t, here, p, src_data_rank=None).requires_grad_() for t, p in zip(tensors, placed, strict=True)
    ]
    outputs = listed(function(*args))
    if here.get_coordinate() is None:
        return None
    given = [distribute_tensor(g, here, placements, src_data_rank=None) for g in grads_for(outputs)]
    each = torch.autograd.grad(outputs, args, given)
    return [whole(t.detach()) for t in (*outputs, *each)], [y.placements for y in outputs]


@pytest.mark.parametrize("layout", ROWS)
@pytest.mark.parametrize("name", CASES)
def test_rows(ranks, name, layout):
    """Rows anywhere: outputs and gradients of rows have the bits of the whole, the weights' are sums of parts."""
    shape, grid, placements = ROWS[layout]
    rows, weights, function = CASES[name]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=generator) for size in [shape] * rows + [SIZE] * weights]
    leaves = [t.clone().requires_grad_() for t in tensors]
    outputs = listed(function(*leaves))
    wanted = [*outputs, *torch.autograd.grad(outputs, leaves, grads_for(outputs))]
    answers = [answer for answer in ranks.run(solve, name, tensors, grid, placements) if answer]
    assert answers
    for found, placed in answers:
        assert placed == [tuple(placements)] * len(outputs)
        for i, (one, two) in enumerate(zip(found, wanted, strict=True)):
            if i < len(outputs) + rows:
                assert same_bits(one, two.detach()), i
            torch.testing.assert_close(one, two.detach())


def cut(name: str, tensors: list[Tensor]) -> str | None:
    """On a rank: what is said of rows that lie on two."""
    here, (rows, _, function) = mesh(2), CASES[name]
    placed = [[Shard(1)] if i < rows else [WHOLE] for i in range(len(tensors))]
    try:
        function(*(distribute_tensor(t, here, p, src_data_rank=None) for t, p in zip(tensors, placed, strict=True)))
    except RuntimeError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", CASES)
def test_cut_rows(ranks, name):
    rows, weights, _ = CASES[name]
    said = ranks.run(cut, name, [torch.ones(4, *SIZE)] * rows + [torch.ones(SIZE)] * weights)
    assert any("this form has no norm of rows on several ranks" in (each or "") for each in said), said


def modulated(tensors: list[Tensor], grads: list[Tensor], dim: int) -> list[Tensor] | None:
    """On a rank: outputs and gradients of the modulated norm and the gated add, sharded over samples or tokens."""
    here = mesh(2)
    own = [Shard(dim)]
    placed = [own, own] + [own if t.shape[dim] > 1 else [WHOLE] for t in tensors[2:]]
    args = [
        distribute_tensor(t, here, p, src_data_rank=None).requires_grad_() for t, p in zip(tensors, placed, strict=True)
    ]
    outputs = in_one_pass(*args)
    if here.get_coordinate() is None:
        return None
    given = [distribute_tensor(g, here, own, src_data_rank=None) for g in grads]
    each = torch.autograd.grad(outputs, args, given)
    return [whole(t.detach()) for t in (*outputs, *each)]


def in_one_pass(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
    named = {"residual": residual, "gate": gate, "scale": scale, "shift": shift}
    y, s = rmsnorm.modulated_norm(x, x.shape[-1], None, 1e-5, statistic="layer", **named)
    return y, s, rmsnorm.gated_add(y, s, gate)


@pytest.mark.parametrize("dim", [0, 1])
def test_modulated(ranks, dim):
    """Modulations of samples: split as the samples are, or there as a whole, and their gradients partial sums."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *sizes: torch.randn(sizes, generator=generator)  # noqa: E731
    tensors = [*(draw(4, 6, 10) for _ in range(2)), *(draw(4, 1, 10) for _ in range(3))]
    grads = [draw(4, 6, 10) for _ in range(3)]
    leaves = [t.clone().requires_grad_() for t in tensors]
    outputs = in_one_pass(*leaves)
    wanted = [*outputs, *torch.autograd.grad(outputs, leaves, grads)]
    answers = [answer for answer in ranks.run(modulated, tensors, grads, dim) if answer]
    assert answers
    for answer, (i, two) in product(answers, enumerate(wanted)):
        if i < 5:
            assert same_bits(answer[i], two.detach())
        torch.testing.assert_close(answer[i], two.detach())


def grouped(columns: int, size: int, count: int, before: bool) -> tuple[list[Tensor], list[Any]] | None:
    """On a rank: the gated norm of groups, none of which lies on two ranks; a weight split as the columns are."""
    here, tensors = mesh(count), of_groups(columns)
    placed = [[Shard(1)], [Shard(1)], [Shard(0)]]
    args = [
        distribute_tensor(t, here, p, src_data_rank=None).requires_grad_() for t, p in zip(tensors, placed, strict=True)
    ]
    y = in_groups(*args, size=size, before=before)
    if here.get_coordinate() is None:
        return None
    each = torch.autograd.grad(y, args, distribute_tensor(tensors[0], here, [Shard(1)], src_data_rank=None))
    return [whole(t.detach()) for t in (y, *each)], [y.placements, *(t.placements for t in each)]


def of_groups(columns: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator) for size in ((5, columns), (5, columns), (columns,))]


def in_groups(*tensors: Tensor, size: int, before: bool) -> Any:
    x, gate, weight = tensors
    named: dict[str, Any] = {"group_size": size, "norm_before_gate": before}
    return rmsnorm.gated_rms_norm(x, gate, x.shape[1:], weight, 1e-5, **named)


@pytest.mark.parametrize("before", [True, False], ids=["norm first", "gate first"])
@pytest.mark.parametrize(("columns", "size", "count"), [(64, 16, 2), (64, 16, 4), (48, 16, 3), (6, 2, 4)])
def test_groups(ranks, columns, size, count, before):
    """Columns cut between groups, as tensor parallelism cuts Mamba-2's: nothing is to be put together, and the result
    has the columns of the whole, not those of a rank."""
    tensors = of_groups(columns)
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = in_groups(*leaves, size=size, before=before)
    wanted = [y, *torch.autograd.grad(y, leaves, tensors[0])]
    answers = [answer for answer in ranks.run(grouped, columns, size, count, before) if answer]
    assert len(answers) == count
    for found, placed in answers:
        assert placed == [(Shard(1),), (Shard(1),), (Shard(1),), (Shard(0),)]
        assert all(same_bits(one, two.detach()) for one, two in zip(found, wanted, strict=True))
