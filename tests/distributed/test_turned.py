"""Proves that query and key may lie on several ranks, cut by sample, head or token; cosines follow the tokens."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from oracle import gains
from pool import Ranks, mesh
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import rmsnorm

pytestmark = pytest.mark.xdist_group("distributed")  # one process has the ranks

BATCH, HEADS, KEY_HEADS, TOKENS, COLUMNS = 4, 8, 2, 6, 16


def problem(dtype: torch.dtype, batched: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    angle = (BATCH, TOKENS, COLUMNS) if batched else (1, TOKENS, COLUMNS)
    sizes = ((BATCH, HEADS, TOKENS, COLUMNS), (BATCH, KEY_HEADS, TOKENS, COLUMNS), angle, angle)
    tensors = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    return [*tensors, gains(COLUMNS, dtype=dtype)]


def results(normed: bool, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, weight: Tensor) -> list[Tensor]:
    leaves = [query.requires_grad_(), key.requires_grad_(), *([weight.requires_grad_()] if normed else [])]
    if normed:
        outputs = rmsnorm.heads_rms_norm_rope(query, key, cos, sin, weight, weight, 1e-6, casting_mode="llama")
    else:
        outputs = rmsnorm.rope(query, key, cos, sin)
    return [*outputs, *torch.autograd.grad(outputs, leaves, [o.detach() for o in outputs])]


def on_ranks(size: int, dim: int | None, batched: bool, normed: bool, dtype: torch.dtype) -> None:
    placement = Replicate() if dim is None else Shard(dim)
    whole = problem(dtype, batched)
    device_mesh = mesh(size)
    tensors = [distribute_tensor(t, device_mesh, [placement], src_data_rank=None) for t in whole[:2]]
    tensors += [distribute_tensor(t, device_mesh, [Replicate()], src_data_rank=None) for t in whole[2:]]
    for got, wanted in zip(results(normed, *tensors), results(normed, *whole), strict=True):
        assert isinstance(got, DTensor)
        if wanted.dim() == 4:
            assert torch.equal(got.full_tensor(), wanted)  # a head is a rank's own
        else:
            torch.testing.assert_close(got.full_tensor(), wanted)


@pytest.mark.parametrize("normed", [True, False], ids=["normed", "turned"])
@pytest.mark.parametrize("dim", [None, 0, 1, 2])
def test_sharded(ranks: Ranks, dim: int | None, normed: bool) -> None:
    for batched, dtype in product((True, False), (torch.float32, torch.bfloat16)):
        ranks.run(on_ranks, 4, dim, batched, normed, dtype)


def cut() -> str:
    x = distribute_tensor(torch.ones(2, 2, 3, 4), mesh(4), [Shard(3)], src_data_rank=None)
    c = distribute_tensor(torch.ones(3, 4), mesh(4), [Replicate()], src_data_rank=None)
    with pytest.raises(RuntimeError) as error:
        rmsnorm.rope(x, x, c, c)
    return str(error.value)


def test_heads_are_not_cut(ranks: Ranks) -> None:
    for said in ranks.run(cut):
        assert said == "rope: query is placed [Shard(dim=3)], which cuts heads; shard another dimension"
