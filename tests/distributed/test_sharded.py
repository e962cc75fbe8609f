"""Proves that a norm of sharded tensors is the norm of the whole ones: values, gradients, where they are placed, and
what travels for them, which is nothing, or a number per row.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forms import FORMS, error, gradient_ulps, output_ulps, problem, truth
from oracle import same_bits
from pool import Wire, mesh
from thinned import heavy_but
from torch import Tensor
from torch.distributed.tensor import Partial, Placement, Replicate, Shard, distribute_tensor

import rmsnorm

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
    "4 ranks, one without columns": ((6, 6), (4,), [Shard(1)]),
    "no rows": ((0, 70), (2,), [Shard(1)]),
    "2 x 2 ranks, rows and columns": ((5, 70), (2, 2), [Shard(0), Shard(1)]),
    "2 x 2 ranks, copies": ((5, 70), (2, 2), [Replicate(), Shard(1)]),
    "2 x 2 ranks, columns twice": ((5, 70), (2, 2), [Shard(1), Shard(1)]),
    "2 x 2 ranks, some without rows": ((1, 70), (2, 2), [Shard(0), Shard(1)]),
}


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


def judge(name: str, dtype: torch.dtype, shape: tuple[int, ...], found: dict[str, Any]) -> None:
    """Asserts that outputs and gradients are the truth's within 2 ulp, and what 16-bit roundings in between add."""
    form, right = FORMS[name], truth(name, shape, dtype)
    ulps = output_ulps(form, dtype)
    for got, y, size in zip(found["outputs"], right.outputs, right.output_sizes, strict=True):
        assert error(got, y, size) <= ulps, dtype
    for i, (got, grad, size) in enumerate(zip(found["gradients"], right.gradients, right.gradient_sizes, strict=True)):
        assert error(got, grad, size) <= gradient_ulps(form, dtype), (dtype, i)


def is_of_rows(name: str, layout: str) -> bool:
    """Whether the layout splits no columns of the form."""
    shape, _, placements = ROWS[layout]
    return all(p == WHOLE or p.dim < len(shape) - min(FORMS[name].dims, len(shape) - 1) for p in placements)


@pytest.mark.parametrize(("name", "layout"), [case for case in product(FORMS, ROWS) if is_of_rows(*case)])
def test_rows(ranks, name, layout):
    """The bits of the whole, and nothing travels. A weight's gradient is a sum of what each rank's rows give.

    It is right within 16 units of fp32 or fp64, as that of plain tensors; in bf16 each part is rounded, and their sum.
    """
    shape, grid, placements = ROWS[layout]
    form = FORMS[name]
    cut = any(p.is_shard() and p.dim >= len(shape) - form.weight_dims for p in placements)
    for dtype in DTYPES:
        _, tensors, grads = problem(name, shape, dtype)
        outer = tensors[0].dim() - form.weight_dims
        outputs, gradients = plain(form, tensors, grads)
        right, alike = truth(name, shape, dtype), form.alike
        for found in filter(None, ranks.run(solve, name, dtype, shape, grid, placements, cut)):
            assert found["forward"] == found["backward"] == []
            assert all(map(same_bits, found["outputs"], outputs))
            assert all(map(same_bits, found["gradients"][:alike], gradients[:alike]))
            assert found["placed"] == [tuple(placements)] * len(outputs)
            summed = [WHOLE if p == WHOLE else Partial() if p.dim < outer else Shard(p.dim - outer) for p in placements]
            assert found["gradients placed"] == [tuple(placements)] * alike + [tuple(summed)] * form.weights
            own = plain(form, found["here"][: len(tensors)], found["here"][len(tensors) :])[1]
            assert all(map(same_bits, found["parts"], own))
            judged = zip(found["gradients"], right.gradients, right.gradient_sizes, strict=True)
            for got, grad, size in list(judged)[alike:]:
                assert error(got, grad, size) <= (2.0 if dtype is torch.bfloat16 else 16.0), dtype


WEIGHTS = ("weight whole", "weight split")
# One of each kind; the others take as long again.
USUAL = ("2 ranks", "3 ranks, uneven", "4 ranks, one without columns", "2 x 2 ranks, rows and columns", "no rows")
CASES = [(n, w) for n, w in product(FORMS, WEIGHTS) if FORMS[n].weights or w == WEIGHTS[0]]


@pytest.mark.parametrize("layout", heavy_but(USUAL, COLUMNS))
@pytest.mark.parametrize(("name", "weight"), CASES)
def test_columns(ranks, name, weight, layout):
    """The truth, for an all-reduce of one number per row each way; of LayerNorm's two, in fp64. Nothing else."""
    shape, grid, placements = COLUMNS[layout]
    form, cut = FORMS[name], weight == "weight split"
    for dtype in DTYPES:
        dim = problem(name, shape, dtype)[1][0].dim()
        column = dim - (form.dims if layout == "2 ranks" else 1)  # two ranks split heads, where a row is two of them
        placed = tuple(Shard(column) if p == Shard(len(shape) - 1) else p for p in placements)
        reductions = sum(p == Shard(column) for p in placed)
        number = 16 if form.norm is rmsnorm.layer_norm else 8 if dtype is torch.float64 else 4
        for found in filter(None, ranks.run(solve, name, dtype, shape, grid, list(placed), cut)):
            rows = found["here"][0].shape[: dim - form.dims].numel()
            wanted = [("all_reduce", rows * number)] * reductions if rows else []
            assert found["backward"] == wanted
            # LayerNorm sums again, around the mean, where it hides the variance; of few fp64 numbers it may.
            again = form.norm is rmsnorm.layer_norm and dtype is torch.float64
            assert found["forward"] in ([wanted, wanted * 2] if again else [wanted])
            assert found["placed"] == [placed] * len(found["outputs"])
            assert found["gradients placed"][: form.alike] == [placed] * form.alike
            judge(name, dtype, shape, found)


def normalise(norm: Any, x: Tensor, grad: Tensor, options: dict[str, float]) -> tuple[Tensor, Tensor] | None:
    """On a rank: output and gradient of rows cut in two; None outside of the mesh."""
    here = mesh(2)
    args = [distribute_tensor(t, here, [Shard(1)], src_data_rank=None) for t in (x, grad)]
    input = args[0].requires_grad_()
    output = norm(input, x.shape[-1:], **options)
    if here.get_coordinate() is None:
        return None
    return whole(output.detach()), whole(*torch.autograd.grad(output, input, args[1]))


def test_far_rows(ranks):
    """Rows whose squares, or whose gradients with respect to them, fp32 can't hold. One such is enough to send fp64."""
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn((2, 9, 70), generator=generator, dtype=torch.float64)
    x *= torch.tensor([2.0**-140, 2.0**-120, 2.0**-31, 2.0**-28, 1.0, 2.0**30, 2.0**59, 2.0**100, 2.0**103])[:, None]
    for rows in ([6], [3], [2], range(9)):
        far = x[rows].float()
        wide = far.double()
        r = 1 / wide.square().mean(-1, keepdim=True).sqrt()
        g = 2.0**-20 * grad[rows] / r.clamp_min(1.0)  # fp32 can hold dx, and not the derivative by a sum of 2^124
        h = g.float().double()
        dx = r * (h - wide * r * (h * wide * r).mean(-1, keepdim=True))
        for found in filter(None, ranks.run(normalise, rmsnorm.rms_norm, far, g.float(), {"eps": 0.0})):
            assert error(found[0], wide * r, (wide * r).abs()) <= 2.0
            assert error(found[1], dx, (r * h).abs().amax(-1, keepdim=True)) <= 2.0


def test_mean_hides_variance(ranks):
    """LayerNorm of fp32 rows around 10^6: the sums are taken again, around the mean."""
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn((2, 5, 70), generator=generator)
    x += torch.tensor([0.0, 1e3, 1e6, -1e6, 3e6])[:, None]
    wide = x.double().requires_grad_()
    y = F.layer_norm(wide - wide.detach().mean(-1, keepdim=True), (70,), eps=1e-5)
    (dx,) = torch.autograd.grad(y, wide, grad.double())
    for output, found in filter(None, ranks.run(normalise, rmsnorm.layer_norm, x, grad, {"eps": 1e-5})):
        assert error(output, y.detach(), y.detach().abs().amax(-1, keepdim=True)) <= 2.0
        assert error(found, dx, dx.abs().amax(-1, keepdim=True)) <= 2.0


def kept(name: str) -> tuple[int, int] | None:
    """On a rank: bytes that are kept for the backward of columns cut in two, beside arguments and outputs; the rows."""
    form, tensors, _ = problem(name, (64, 70), torch.bfloat16)
    placed = [[Shard(1)]] * form.alike + [[WHOLE]] * form.weights
    here = mesh(2)
    args = [
        distribute_tensor(t, here, p, src_data_rank=None).requires_grad_() for t, p in zip(tensors, placed, strict=True)
    ]
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = form(*args)
    if here.get_coordinate() is None:
        return None
    known = {t.to_local().untyped_storage().data_ptr() for t in (*args, *outputs)}
    return sum(size for pointer, size in storages.items() if pointer not in known), tensors[0].shape[0]


@pytest.mark.parametrize("name", ["rms", "add", "layer", "gated"])
def test_kept_for_backward(ranks, name):
    """An fp64 number per row, of LayerNorm two, and the part of each weight that belongs to these columns."""
    form = FORMS[name]
    for size, rows in filter(None, ranks.run(kept, name)):
        numbers = 2 if form.norm is rmsnorm.layer_norm else 1
        assert size == rows * 8 * numbers + form.weights * 35 * 2
