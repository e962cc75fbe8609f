"""Proves that our layers work in torch's parallel plans: tensor and sequence parallel, and FSDP2 across them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pool import Wire, mesh
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.testing import assert_close
from trained import ROWS, STEPS, Model, batch, model, trained_alone, whole

pytestmark = pytest.mark.xdist_group("distributed")  # one process has the ranks


def plan(trained: Model, here: Any) -> Model:
    """Tensor parallel matrices between norms of sequences, as in torch's tutorial of Megatron's scheme."""
    rows = SequenceParallel()
    parallelize_module(
        trained,
        here,
        {
            "": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Shard(1)),
            "blocks.*.norm": rows,
            "blocks.*.up": ColwiseParallel(input_layouts=Shard(1)),
            "blocks.*.down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
            "layer_norm": rows,
            "gated": rows,
            "last": rows,
        },
    )
    return trained


def tensor_parallel(ranks: int) -> dict[str, Any] | None:
    here = mesh(ranks)
    if here.get_coordinate() is None:
        return None
    planned = plan(model(), here)
    x, target = (distribute_tensor(t, here, [Shard(1)], src_data_rank=None) for t in batch(0))
    with Wire() as forward:
        y = planned(x)
    loss = (y - target).square().sum()
    with Wire() as backward:
        loss.backward()
    gradients = {n: p.grad for n, p in planned.named_parameters()}
    return {
        "output": y.full_tensor().detach(),
        "gradients": {n: g.full_tensor() for n, g in gradients.items()},
        "placed": {n: g.placements for n, g in gradients.items()},
        "forward": sorted(name for name, _ in forward.collectives),
        "backward": sorted(name for name, _ in backward.collectives),
    }


@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallel(ranks, size):
    """Only matrices talk: what they gather and scatter for two blocks is all. Five rows are uneven for both sizes."""
    trained = model()
    x, target = batch(0)
    y = trained(x)
    (y - target).square().sum().backward()
    for found in filter(None, ranks.run(tensor_parallel, size)):
        assert_close(found["output"], y)
        for name, parameter in trained.named_parameters():
            assert_close(found["gradients"][name], parameter.grad, rtol=1e-5, atol=1e-5 * parameter.grad.abs().max())
        assert found["forward"] == sorted(["all_gather_into_tensor", "reduce_scatter_tensor"] * 2)
        assert found["backward"] == found["forward"]


def in_two_dimensions() -> dict[str, Tensor]:
    """That plan in pairs of ranks, and FSDP2 across the pairs."""
    here = mesh(2, 2)
    planned = plan(model(), here["tp"])
    for part in (*planned.blocks, planned):
        fully_shard(part, mesh=here["dp"])
    assert planned.last.weight.placements == (Shard(0), Replicate())
    optimizer = torch.optim.AdamW(planned.parameters(), lr=1e-2)
    mine = slice(here["dp"].get_local_rank() * ROWS // 2, (here["dp"].get_local_rank() + 1) * ROWS // 2)
    for step in range(STEPS):
        x, target = (
            distribute_tensor(t[mine].contiguous(), here["tp"], [Shard(1)], src_data_rank=None) for t in batch(step)
        )
        (planned(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole(planned)


def test_in_two_dimensions(ranks):
    """Within what Adam makes of fp32's roundings, as in test_training.py."""
    alone = trained_alone()
    for found in ranks.run(in_two_dimensions):
        assert found.keys() == alone.keys()
        for name, parameter in found.items():
            assert_close(parameter, alone[name], rtol=0, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def even_batch() -> list[Tensor]:
    """Four positions, as torch takes a plain tensor to be one of equal parts."""
    return [t[:, :4].contiguous() for t in batch(0)]


def sequence_parallel(how: str) -> tuple[Tensor, Tensor, Any] | None:
    """The layer alone in torch's SequenceParallel, given what its users give it."""
    here = mesh(2)
    if here.get_coordinate() is None:
        return None
    layer = parallelize_module(copy.deepcopy(model().blocks[0].norm), here, SequenceParallel())
    x, residual = (distribute_tensor(t, here, [Shard(1)], src_data_rank=None) for t in even_batch())
    if how == "plain":  # a plain tensor is this rank's part; the residual is not touched, so it must be a DTensor
        y, s = layer(x.to_local(), residual=residual)
    elif how == "sharded":
        y, s = layer(x, residual=residual)
    else:
        y, s = layer(x.redistribute(placements=[Replicate()]), residual=residual)
    return y.full_tensor().detach(), s.full_tensor().detach(), (y.placements, s.placements)


@pytest.mark.parametrize("how", ["plain", "sharded", "replicated"])
def test_sequence_parallel(ranks, how):
    """Bits of the whole: torch takes a plain tensor as this rank's part, and shards what is not."""
    wanted = model().blocks[0].norm(*even_batch())
    for *found, placements in filter(None, ranks.run(sequence_parallel, how)):
        assert_close(found, list(wanted), rtol=0, atol=0)
        assert placements == ((Shard(1),),) * 2
