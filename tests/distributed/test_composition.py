"""Proves that norms of sharded tensors compose with torch's other machinery: compile, checkpointing, derivatives."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from forms import FORMS, problem
from oracle import same_bits
from pool import mesh
from torch import Tensor
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import rmsnorm

pytestmark = pytest.mark.xdist_group("distributed")  # one process has the ranks

PLACEMENTS = {"rows": Shard(0), "columns": Shard(1)}
NAMES = ["rms", "rms, llama", "add", "layer", "gated", "gated before, sigmoid, offset"]
SHAPES = ((6, 70), (4, 70), (6, 34))


def arguments(name: str, shape: tuple[int, ...], placement: Placement) -> tuple[Any, list[Any], list[Any]]:
    """The form, its tensors as leaves on two ranks, and a gradient for each output."""
    form, tensors, grads = problem(name, shape, torch.float32)
    placed = [[placement]] * form.alike + [[Replicate()]] * form.weights
    leaves = [
        distribute_tensor(t, mesh(2), p, src_data_rank=None).requires_grad_()
        for t, p in zip(tensors, placed, strict=True)
    ]
    given = [distribute_tensor(g, mesh(2), [placement], src_data_rank=None) for g in grads]
    return form, leaves, given


def found(norm: Any, leaves: list[Any], given: list[Any]) -> tuple[list[Tensor], list[Any]]:
    """Outputs and gradients as whole tensors, and how all are placed."""
    outputs = norm(*leaves)
    gradients = torch.autograd.grad(outputs, leaves, given[: len(outputs)])
    tensors = [t.detach() for t in (*outputs, *gradients)]
    return [t.full_tensor() for t in tensors], [t.placements for t in tensors]


def compiled(name: str, backend: str, shapes: tuple[tuple[int, ...], ...]) -> list[Any] | None:
    """For placements and shapes, one after the other: found by the compiled norm, and by the eager one."""
    if mesh(2).get_coordinate() is None:
        return None
    torch._dynamo.reset()
    norm = torch.compile(FORMS[name], fullgraph=True, backend=backend)
    pairs = []
    for placement, shape in product(PLACEMENTS.values(), shapes):
        _, leaves, given = arguments(name, shape, placement)
        pairs.append((found(norm, leaves, given), found(FORMS[name], leaves, given)))
    return pairs


# Inductor, which takes ten seconds, has the forms' common ground; what is traced for it is the same. A form takes
# nearly as long: `make test` has two of them, one without a neighbour and one with.
ALWAYS = ("rms", "aot_eager"), ("gated", "aot_eager")
GRAPHS = [*((name, "aot_eager", SHAPES) for name in NAMES), ("rms", "inductor", SHAPES[:1])]
CELLS = [
    pytest.param(*cell, id="-".join(cell[:2]), marks=[] if cell[:2] in ALWAYS else pytest.mark.heavy) for cell in GRAPHS
]


@pytest.mark.parametrize(("name", "backend", "shapes"), CELLS)
def test_compiled(ranks, name, backend, shapes):
    """One graph, also where later shapes and placements make sizes and dimensions symbols.

    Graphs sum in fp64 or fp32 in another order, so a few units of fp32 are allowed.
    """
    for pairs in filter(None, ranks.run(compiled, name, backend, shapes)):
        for (got, got_placed), (wanted, placed) in pairs:
            assert_close(got, wanted, rtol=1e-5, atol=1e-5)
            assert got_placed == placed


def checkpointed(name: str, placement: Placement) -> list[Any] | None:
    if mesh(2).get_coordinate() is None:
        return None
    form, leaves, given = arguments(name, SHAPES[0], placement)

    def again(*tensors: Any) -> Any:
        return checkpoint(form, *tensors, use_reentrant=False)

    return [found(again, leaves, given), found(form, leaves, given)]


@pytest.mark.parametrize("where", PLACEMENTS)
@pytest.mark.parametrize("name", NAMES)
def test_checkpointed(ranks, name, where):
    """Activation checkpointing gives each bit again."""
    for (got, got_placed), (wanted, placed) in filter(None, ranks.run(checkpointed, name, PLACEMENTS[where])):
        assert all(map(same_bits, got, wanted))
        assert got_placed == placed


def second_derivatives(name: str, placement: Placement) -> list[Tensor] | None:
    """The gradient of a gradient's squares."""
    if mesh(2).get_coordinate() is None:
        return None
    form, leaves, given = arguments(name, SHAPES[0], placement)
    return [t.full_tensor() for t in twice(form, leaves, given)]


def twice(form: Any, leaves: list[Any], given: list[Any]) -> tuple[Any, ...]:
    outputs = form(*leaves)
    gradients = torch.autograd.grad(outputs, leaves, given[: len(outputs)], create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves, materialize_grads=True)


@pytest.mark.parametrize("where", PLACEMENTS)
@pytest.mark.parametrize("name", [n for n in NAMES if "llama" not in n])
def test_second_derivatives(ranks, name, where):
    """Of a gradient penalty, within fp32's roundings of the formula's in fp64."""
    form, tensors, grads = problem(name, SHAPES[0], torch.float32)
    leaves = [t.double().requires_grad_() for t in tensors]
    wanted = twice(lambda *t: form.truth(torch.float64, *t), leaves, [g.double() for g in grads])
    for got in filter(None, ranks.run(second_derivatives, name, PLACEMENTS[where])):
        for tensor, right in zip(got, wanted, strict=True):
            # rows are as small as 2^-7, and a second derivative is a sum of terms of up to 1/rms²: row's size each
            assert_close(tensor.double(), right, rtol=1e-4, atol=1e-5 * float(right.abs().max()))


def installed() -> Any:
    """torch's own layer, with our kernels installed, of sharded rows and columns."""
    if mesh(2).get_coordinate() is None:
        return None
    x = problem("rms", SHAPES[0], torch.float32)[1][0]
    rmsnorm.install()
    try:
        results = []
        for placement in PLACEMENTS.values():
            model = distribute_module(torch.nn.RMSNorm(70), mesh(2))
            y = model(distribute_tensor(x, mesh(2), [placement], src_data_rank=None))
            results.append(y.full_tensor().detach())
        return results
    finally:
        rmsnorm.uninstall()


def test_installed(ranks):
    """install() leaves DTensor's own rules for torch's operator as they are."""
    x = problem("rms", SHAPES[0], torch.float32)[1][0]
    for results in filter(None, ranks.run(installed)):
        for got in results:
            assert_close(got, torch.nn.functional.rms_norm(x, (70,)))


def of_the_sum(placement: Placement) -> list[Tensor] | None:
    """The gradients of a sum whose norm nobody uses: of one in which a row has an infinity, and of the weight."""
    if mesh(2).get_coordinate() is None:
        return None
    x = torch.ones(2, 8)
    x[1, 1] = torch.inf
    rows = [
        distribute_tensor(t, mesh(2), [placement], src_data_rank=None).requires_grad_() for t in (x, torch.ones(2, 8))
    ]
    weight = distribute_tensor(torch.ones(8), mesh(2), [Replicate()], src_data_rank=None).requires_grad_()
    s = rmsnorm.add_rms_norm(*rows, 8, weight, 1e-6)[1]
    found = torch.autograd.grad(s.sum(), [*rows, weight], allow_unused=True)
    return [torch.zeros(8) if t is None else t.full_tensor() for t in found]


@pytest.mark.parametrize("where", PLACEMENTS)
def test_of_the_sum_alone(ranks, where):
    for dx, dr, dw in filter(None, ranks.run(of_the_sum, PLACEMENTS[where])):
        assert dx.eq(1).all()
        assert dr.eq(1).all()
        assert not dw.any()
