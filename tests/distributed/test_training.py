"""Proves that models with our norms train in data parallel as on one rank: DDP, FSDP2, and their checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pool import mesh
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from trained import ROWS, Model, model, train, trained_alone, whole

from rmsnorm.forms import lean

pytestmark = pytest.mark.xdist_group("distributed")  # one process has the ranks


def share(ranks: int) -> slice:
    """This rank's rows of a batch."""
    each = ROWS // ranks
    return slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)


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
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if half else MixedPrecisionPolicy()
    )
    sharded = model()
    for part in (*sharded.blocks, sharded):
        fully_shard(part, mesh=here, mp_policy=policy)
    assert isinstance(sharded.last.weight, DTensor)
    assert sharded.last.weight.placements == (Shard(0),)
    train(sharded, share(ranks), pieces, sharded.set_requires_gradient_sync)
    return whole(sharded)


@pytest.mark.parametrize("pieces", [1, 2], ids=["whole", "accumulated"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("how", [with_ddp, with_fsdp], ids=["DDP", "FSDP2"])
def test_data_parallel(ranks, how, size, pieces):
    """Sums of the same numbers in another order: fp32 is off by 1e-6, which Adam makes a part of its step of 1e-2."""
    alone = trained_alone()
    for found in filter(None, ranks.run(how, size, pieces)):
        assert found.keys() == alone.keys()
        for name, parameter in found.items():
            assert_close(parameter, alone[name], rtol=0, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def test_mixed_precision(ranks):
    """FSDP2 gives the norm weights in bf16, and inputs too: the model still learns what two ranks learn in fp32."""
    here, there = ranks.run(with_fsdp, 2, 1)[0], ranks.run(with_fsdp, 2, 1, True)[0]
    for name, parameter in there.items():
        assert parameter.dtype is torch.float32
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


def reason(ranks: int, at: int) -> str | None:
    here = mesh(ranks)
    if here.get_coordinate() is None:
        return None
    gains = torch.ones(8)
    gains[at] = 0
    return lean.why(distribute_tensor(gains, here, [Shard(0)]), 0.0, torch.float32, 8)


@pytest.mark.parametrize("at", [1, 6])
def test_ranks_agree_on_what_a_norm_keeps(ranks, at):
    """``patch(memory="lean")`` of a sharded model, whose gain of zero lies on one of them."""
    said = f"its smallest gain is 0, of element {at}, and float32 needs at least 1.2e-38 for x̂ = y / gain"
    assert ranks.run(reason, 2, at)[:2] == [said] * 2
