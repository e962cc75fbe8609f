"""Proves that models with our norms train on several ranks as on one: DDP, FSDP2, checkpoints, and parallel plans."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pool import Wire, mesh
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import rmsnorm

pytestmark = pytest.mark.xdist_group("distributed")  # one process has the ranks

WIDTH, HIDDEN, ROWS, STEPS = 24, 56, 8, 3
FP32 = torch.float32


class Block(nn.Module):
    """A norm, a residual, and two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = rmsnorm.RMSNorm(WIDTH, eps=1e-5)
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        y, residual = self.norm(x, residual=residual)
        return self.down(nn.functional.silu(self.up(y))), residual


class Model(nn.Module):
    """Two blocks, and each kind of norm that has a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.layer_norm = rmsnorm.LayerNorm(WIDTH)
        self.gated = rmsnorm.GatedRMSNorm(WIDTH)
        self.last = rmsnorm.RMSNorm(WIDTH, offset=1.0)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        for block in self.blocks:
            x, residual = block(x, residual)
        return self.last(self.gated(self.layer_norm(x + residual), gate=residual))


def model() -> Model:
    """The same on each rank."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model()


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of ``[ROWS, 5, WIDTH]``."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn((2, ROWS, 5, WIDTH), generator=generator)
    return x, y


def train(trained: nn.Module, part: slice, pieces: int, synchronise: Any = lambda last: None) -> None:
    """Some steps of AdamW on ``part`` of each batch, in that many pieces."""
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
    for step in range(STEPS):
        for i, (x, y) in enumerate(zip(*(t[part].chunk(pieces) for t in batch(step)), strict=True)):
            synchronise(i == pieces - 1)
            (nn.functional.mse_loss(trained(x), y) / pieces).backward()
        optimizer.step()
        optimizer.zero_grad()


def share(ranks: int) -> slice:
    """This rank's rows of a batch."""
    each = ROWS // ranks
    return slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)


def whole(module: nn.Module) -> dict[str, Tensor]:
    """The parameters, gathered."""
    found = {n.removeprefix("module."): p.detach() for n, p in module.named_parameters()}
    return {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in found.items()}


def with_ddp(ranks: int, pieces: int) -> dict[str, Tensor] | None:
    here = mesh(ranks)
    if here.get_coordinate() is None:
        return None
    wrapped = DistributedDataParallel(model(), process_group=here.get_group())

    def synchronise(last: bool) -> None:
        wrapped.require_backward_grad_sync = last

    train(wrapped, share(ranks), pieces, synchronise)
    return whole(wrapped)


def with_fsdp(ranks: int, pieces: int, half: bool = False) -> dict[str, Tensor] | None:
    here = mesh(ranks)
    if here.get_coordinate() is None:
        return None
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=FP32) if half else MixedPrecisionPolicy()
    sharded = model()
    for part in (*sharded.blocks, sharded):
        fully_shard(part, mesh=here, mp_policy=policy)
    assert isinstance(sharded.last.weight, DTensor)
    assert sharded.last.weight.placements == (Shard(0),)
    train(sharded, share(ranks), pieces, sharded.set_requires_gradient_sync)
    return whole(sharded)


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    """Trained in this process, on whole batches."""
    trained = model()
    train(trained, slice(None), 1)
    return whole(trained)


@pytest.mark.parametrize("pieces", [1, 2], ids=["whole", "accumulated"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("how", [with_ddp, with_fsdp], ids=["DDP", "FSDP2"])
def test_data_parallel(ranks, alone, how, size, pieces):
    """Sums of the same numbers in another order: fp32 is off by 1e-6, which Adam makes a part of its step of 1e-2."""
    for found in filter(None, ranks.run(how, size, pieces)):
        assert found.keys() == alone.keys()
        for name, parameter in found.items():
            assert_close(parameter, alone[name], rtol=0, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def test_mixed_precision(ranks):
    """FSDP2 gives the norm weights in bf16, and inputs too: the model still learns what two ranks learn in fp32."""
    here, there = ranks.run(with_fsdp, 2, 1)[0], ranks.run(with_fsdp, 2, 1, True)[0]
    for name, parameter in there.items():
        assert parameter.dtype is FP32
        # Adam's first steps are ±1e-2 whatever the gradient's size: a few signs differ, most steps agree.
        assert (parameter - here[name]).abs().median() < 1e-3, name


def save(folder: Path) -> dict[str, Tensor] | None:
    """Saves what two ranks have trained."""
    here = mesh(2)
    if here.get_coordinate() is None:
        return None
    sharded = model()
    fully_shard(sharded, mesh=here)
    train(sharded, share(2), 1)
    dcp.save(get_model_state_dict(sharded), checkpoint_id=folder, process_group=here.get_group())
    return whole(sharded)


def load(folder: Path) -> dict[str, Tensor]:
    """Loads it on four."""
    sharded = Model()
    fully_shard(sharded, mesh=mesh(4))
    state = get_model_state_dict(sharded)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(sharded, state)
    return whole(sharded)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")  # dcp, as it is alone
def test_checkpoint(ranks, tmp_path):
    """Saved on two ranks, loaded on four, and on one without torch.distributed: each bit."""
    saved = ranks.run(save, tmp_path)[0]
    alone = Model()
    state = alone.state_dict()
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    alone.load_state_dict(state)
    for found in (*ranks.run(load, tmp_path), whole(alone)):
        assert found.keys() == saved.keys()
        for name, parameter in found.items():
            assert_close(parameter, saved[name], rtol=0, atol=0)


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
