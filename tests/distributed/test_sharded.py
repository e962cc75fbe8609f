"""Proves that a norm of sharded tensors is the norm of the whole ones: values, gradients, where they are placed, and
what travels for them, which is nothing, or a number per row.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forms import FORMS, Judge
from oracle import same_bits
from pool import Wire, mesh
from torch import Tensor
from torch.distributed.tensor import Partial, Placement, Replicate, Shard, distribute_tensor

pytestmark = pytest.mark.xdist_group("distributed")  # one process has the ranks

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
WHOLE = Replicate()

# name -> shape of the input, shape of the mesh, placements. Each shape has 70 columns or heads of 35 (3 ranks, 4 ranks:
# uneven), and 5 or 3 rows (4 ranks: one has none).
ROWS = {
    "2 ranks": ((6, 70), (2,), [Shard(0)]),
    "2 ranks, uneven": ((5, 70), (2,), [Shard(0)]),
    "3 ranks, sequence": ((2, 4, 70), (3,), [Shard(1)]),
    "4 ranks, one without rows": ((3, 2, 70), (4,), [Shard(0)]),
    "2 x 2 ranks, batch and sequence": ((3, 5, 70), (2, 2), [Shard(0), Shard(1)]),
    "2 x 2 ranks, sequence twice": ((2, 3, 70), (2, 2), [Shard(1), Shard(1)]),
    "2 x 2 ranks, copies": ((5, 70), (2, 2), [Replicate(), Shard(0)]),
    "2 ranks, all copies": ((5, 70), (2,), [Replicate()]),
}
COLUMNS = {
    "2 ranks": ((6, 70), (2,), [Shard(1)]),
    "3 ranks, uneven": ((5, 70), (3,), [Shard(1)]),
    "4 ranks, uneven": ((2, 3, 70), (4,), [Shard(2)]),
    "4 ranks, one without columns": ((6, 3), (4,), [Shard(1)]),
    "no rows": ((0, 70), (2,), [Shard(1)]),
    "2 x 2 ranks, rows and columns": ((5, 70), (2, 2), [Shard(0), Shard(1)]),
    "2 x 2 ranks, copies": ((5, 70), (2, 2), [Replicate(), Shard(1)]),
    "2 x 2 ranks, columns twice": ((5, 70), (2, 2), [Shard(1), Shard(1)]),
    "2 x 2 ranks, some without rows": ((1, 70), (2, 2), [Shard(0), Shard(1)]),
}


def random(shape: tuple[int, ...], count: int, dtype: torch.dtype) -> list[Tensor]:
    """Rows of different sizes, from one where eps matters to 2^5."""
    generator = torch.Generator().manual_seed(sum(shape) + count)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]
    if len(shape) > 1:
        tensors = [t * 2.0 ** torch.randint(-7, 6, (*shape[:-1], 1), generator=generator) for t in tensors]
    return [t.to(dtype) for t in tensors]


def problem(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, list[Tensor], list[Tensor]]:
    """The form, its tensors, and a gradient for each output."""
    form = FORMS[name]
    if max(form.dims, form.weight_dims) > len(shape) - 1:
        shape = (*shape[:-1], 2, shape[-1] // 2)
    tensors = random(shape, form.alike, dtype) + random(shape[len(shape) - form.weight_dims :], form.weights, dtype)
    return form, tensors, random(shape, 2, dtype)


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor()


def solve(
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    ranks: tuple[int, ...],
    placements: list[Placement],
    alike: bool,
) -> dict[str, Any] | None:
    """On a rank: what it finds, or None outside of the mesh. ``alike`` splits the weight as the columns are split."""
    form, tensors, grads = problem(name, shape, dtype)
    here, x = mesh(*ranks), tensors[0]
    outer = x.dim() - form.weight_dims
    split = [Shard(p.dim - outer) if alike and p.is_shard() and p.dim >= outer else WHOLE for p in placements]
    placed = [placements] * form.alike + [split] * form.weights
    args = [
        distribute_tensor(t, here, p, src_data_rank=None).requires_grad_() for t, p in zip(tensors, placed, strict=True)
    ]
    with Wire() as forward:
        outputs = form(*args)
    if here.get_coordinate() is None:  # such a rank computes nothing; its backward fails in torch's to_local
        return None
    given = [distribute_tensor(g, here, placements, src_data_rank=None) for g in grads[: len(outputs)]]
    with Wire() as backward:
        found = torch.autograd.grad(outputs, args, given)
    return {
        "outputs": [whole(y.detach()) for y in outputs],
        "gradients": [whole(g) for g in found],
        "parts": [g.to_local() for g in found],
        "placed": [y.placements for y in outputs],
        "gradients placed": [g.placements for g in found],
        "forward": forward.collectives,
        "backward": backward.collectives,
        "here": [t.to_local().detach() for t in (*args, *given)],
    }


def plain(form: Any, tensors: list[Tensor], grads: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Outputs and gradients of plain tensors."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    outputs = form(*leaves)
    return outputs, torch.autograd.grad(outputs, leaves, grads[: len(outputs)])


def judge(name: str, dtype: torch.dtype, shape: tuple[int, ...], found: dict[str, Any], parts: int = 1) -> None:
    """Asserts that outputs and gradients are the truth's, within ``Judge``'s bounds."""
    form, tensors, grads = problem(name, shape, dtype)
    wide = [t.double().requires_grad_() for t in tensors]
    truth = form.truth(dtype, *wide)
    gradients = torch.autograd.grad(truth, wide, [g.double() for g in grads[: len(truth)]])
    bounds = Judge(dtype, form)
    bias = tensors[-1].double().abs() if form.weights == 2 else 0.0
    for got, right in zip(found["outputs"], truth, strict=True):
        assert bounds.output(got, right.detach(), right.detach().abs() + 2 * bias) <= 1
    for i, (got, right) in enumerate(zip(found["gradients"], gradients, strict=True)):
        of_weight = i >= form.alike
        dims = right.dim() if of_weight else form.dims
        assert bounds.gradient(got, right, dims, parts if of_weight else 1) <= 1, f"gradient {i}"


@pytest.mark.parametrize("layout", ROWS)
@pytest.mark.parametrize("name", FORMS)
def test_rows(ranks, name, layout):
    """The bits of the whole, and nothing travels. A weight's gradient is a sum of what each rank's rows give."""
    shape, size, placements = ROWS[layout]
    form = FORMS[name]
    cut = any(p.is_shard() and p.dim >= len(shape) - form.weight_dims for p in placements)
    for dtype in DTYPES:
        _, tensors, grads = problem(name, shape, dtype)
        if any(p.is_shard() and p.dim >= tensors[0].dim() - form.dims for p in placements):
            pytest.skip("these are columns of this form")
        outputs, gradients = plain(form, tensors, grads)
        for found in filter(None, ranks.run(solve, name, dtype, shape, size, placements, cut)):
            assert found["forward"] == found["backward"] == []
            for got, want in zip(found["outputs"], outputs, strict=True):
                assert same_bits(got, want)
            for i, (got, want) in enumerate(zip(found["gradients"], gradients, strict=True)):
                if i < form.alike:
                    assert same_bits(got, want), f"gradient {i}"
            assert found["placed"] == [tuple(placements)] * len(outputs)
            assert found["gradients placed"][: form.alike] == [tuple(placements)] * form.alike
            first, weight_dims = tensors[0].dim(), form.weight_dims
            wanted = tuple(
                WHOLE
                if p == WHOLE
                else Partial()
                if p.dim < first - weight_dims
                else Shard(p.dim - first + weight_dims)
                for p in placements
            )
            assert found["gradients placed"][form.alike :] == [wanted] * form.weights
            own = plain(form, found["here"][: len(tensors)], found["here"][len(tensors) :])[1]
            for part, want in zip(found["parts"], own, strict=True):
                assert same_bits(part, want)
            judge(name, dtype, shape, found, parts=max(size) ** len(size))


@pytest.mark.parametrize("alike", [False, True], ids=["weight whole", "weight split"])
@pytest.mark.parametrize("layout", COLUMNS)
@pytest.mark.parametrize("name", FORMS)
def test_columns(ranks, name, layout, alike):
    """The truth, for an all-reduce of one number per row each way; of LayerNorm's two, in fp64. Nothing else."""
    shape, size, placements = COLUMNS[layout]
    form = FORMS[name]
    if alike and not form.weights:
        pytest.skip("no weight")
    placements = list(placements)
    if form.dims == 2 and "2 ranks" in layout:  # the other of the two normalised dimensions
        placements = [Shard(len(shape) - 1) if p.is_shard() and p.dim == len(shape) - 1 else p for p in placements]
    for dtype in DTYPES:
        _, tensors, _ = problem(name, shape, dtype)
        first = tensors[0].dim() - form.dims
        placements = [
            Shard(tensors[0].dim() - 1) if p.is_shard() and p.dim == len(shape) - 1 else p for p in placements
        ]
        count = sum(p.is_shard() and p.dim >= first for p in placements)
        number = 16 if name.startswith("layer") else 8 if dtype is torch.float64 else 4
        for found in filter(None, ranks.run(solve, name, dtype, shape, size, placements, alike)):
            rows = found["here"][0].shape[:first].numel()
            wanted = [("all_reduce", rows * number)] * count if rows else []
            assert (found["forward"], found["backward"]) == (wanted, wanted)
            assert found["placed"] == [tuple(placements)] * len(found["outputs"])
            assert found["gradients placed"][: form.alike] == [tuple(placements)] * form.alike
            judge(name, dtype, shape, found, parts=max(size))
