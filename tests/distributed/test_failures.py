"""Proves what users see when things go wrong between ranks: torch's error for a lost one, ours for bad placements."""

from __future__ import annotations

import os
import re
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracle import same_bits
from pool import Ranks, mesh
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication

import rmsnorm

pytestmark = pytest.mark.xdist_group("distributed")  # one process has the ranks

TIME_OUT = 4.0


def norm_with_lost_rank(backward: bool, dies: bool) -> tuple[float, str]:
    """Rank 1 leaves, or falls silent, before the forward or the backward; the others say how long they waited and
    what they were told."""
    x = distribute_tensor(torch.ones(4, 12), mesh(3), [Shard(1)], src_data_rank=None).requires_grad_()
    y = rmsnorm.rms_norm(x, (12,)) if backward else None
    dist.barrier()
    if dist.get_rank() == 1:
        if dies:
            os._exit(1)
        time.sleep(4 * TIME_OUT)
        raise RuntimeError("silent")
    began = time.monotonic()
    try:
        (rmsnorm.rms_norm(x, (12,)) if y is None else y).sum().backward()
    except (RuntimeError, dist.DistBackendError) as error:
        return time.monotonic() - began, str(error)
    raise AssertionError("the lost rank was not missed")


@pytest.mark.parametrize("dies", [True, False], ids=["dies", "silent"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_lost_rank(tmp_path, backward, dies):
    """The other two have torch's own error: gloo's time-out, or a broken connection where the rank is gone."""
    three = Ranks(3, tmp_path, seconds=TIME_OUT)
    try:
        three.send(norm_with_lost_rank, backward, dies)
        told = []
        for rank in (0, 2):
            answer, failure = three.answer(rank)
            assert failure is None, failure
            waited, message = answer
            # One waiting rank's error may follow from another's, so there may be two time-outs; one is to spare.
            assert waited < 3 * TIME_OUT
            told.append(message)
        # A rank beside the lost one is told so at once. The other may wait for that one, which has left the
        # collective, until its own time is up.
        assert not dies or not all("timed out" in message.lower() for message in told), told
    finally:
        three.close()


def placed(tensor: Tensor, *placements: Any, ranks: tuple[int, ...] = (2,)) -> Any:
    return distribute_tensor(tensor, mesh(*ranks), placements, src_data_rank=None)


X, W = torch.ones(4, 6), torch.ones(6)
ROWS, COLUMNS, WHOLE = Shard(0), Shard(1), Replicate()
ERRORS = {
    "weight is plain": (
        lambda: rmsnorm.rms_norm(placed(X, ROWS), (6,), W),
        r"rms_norm: weight is a plain tensor of shape \[6\] and input a DTensor .*distribute_tensor\(weight, mesh,",
    ),
    "input is plain": (
        lambda: rmsnorm.rms_norm(X, (6,), placed(W, WHOLE)),
        r"rms_norm: input is a plain tensor of shape \[4, 6\] and weight a DTensor .*distribute_tensor\(input, mesh",
    ),
    "residual is plain": (
        lambda: rmsnorm.add_rms_norm(placed(X, ROWS), X, (6,)),
        r"add_rms_norm: residual is a plain tensor of shape \[4, 6\] and input a DTensor",
    ),
    "two meshes": (
        lambda: rmsnorm.rms_norm(placed(X, ROWS), (6,), placed(W, WHOLE, WHOLE, ranks=(2, 2))),
        r"rms_norm: all tensors must be on one DeviceMesh, but there are .*redistribute them",
    ),
    "sharded unlike": (
        lambda: rmsnorm.add_rms_norm(placed(X, ROWS), placed(X, COLUMNS), (6,)),
        r"add_rms_norm: input and its like must be replicated or sharded alike, .*residual.redistribute\(placements=in",
    ),
    "gate sharded unlike": (
        lambda: rmsnorm.gated_rms_norm(placed(X, ROWS), placed(X, COLUMNS), (6,)),
        r"gated_rms_norm: input and its like must be replicated or sharded alike, .*gate \[Shard\(dim=1\)\]",
    ),
    "weight split, rows whole": (
        lambda: rmsnorm.rms_norm(placed(X, ROWS), (6,), placed(W, Shard(0))),
        r"rms_norm: input is placed \[Shard\(dim=0\)\] and weight \[Shard\(dim=0\)\]; weight must be replicated or "
        r"split as input is: weight.redistribute\(placements=\[Replicate\(\)\]\)",
    ),
    "bias split, rows whole": (
        lambda: rmsnorm.layer_norm(placed(X, ROWS), (6,), placed(W, WHOLE), placed(W, Shard(0))),
        r"layer_norm: input is placed .* and bias \[Shard\(dim=0\)\]",
    ),
    "group cut": (
        lambda: rmsnorm.gated_rms_norm(placed(X, COLUMNS), placed(X, COLUMNS), (6,), group_size=2),
        r"gated_rms_norm: group_size 2 must divide the part of the last dimension of input that a rank has, 3 of 6",
    ),
    "out": (
        lambda: rmsnorm.rms_norm(placed(X, ROWS), (6,), out=placed(X, ROWS)),
        r"rms_norm: out= is for plain tensors, and there is a DTensor among the arguments; drop it",
    ),
    "shape": (
        lambda: rmsnorm.rms_norm(placed(X, ROWS), (5,)),
        r"rms_norm: Given normalized_shape=\[5\], expected input with shape \[\*, 5\], but got input of size \[4, 6\]",
    ),
    "part's shape": (  # what a user who thinks of the local part writes
        lambda: rmsnorm.rms_norm(placed(X, COLUMNS), (3,)),
        r"rms_norm: Given normalized_shape=\[3\], .* but got input of size \[4, 6\]",
    ),
}


def message(name: str) -> str | None:
    """What the call raises; nothing is asked of the other ranks before."""
    try:
        ERRORS[name][0]()
    except RuntimeError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", ERRORS)
def test_errors(ranks, name):
    """One clear line on every rank, also outside of the mesh."""
    for found in ranks.run(message, name):
        assert found is not None
        assert re.match(ERRORS[name][1], found), found
        assert "\n" not in found


def of_one_number() -> str | None:
    try:
        rmsnorm.layer_norm(placed(X, COLUMNS), (6,), placed(torch.ones(1), WHOLE))
    except RuntimeError as error:
        return str(error)
    return None


def test_a_weight_of_layer_norm_that_would_broadcast(ranks):
    """In torch's own words, which have lines about placements behind them."""
    for found in ranks.run(of_one_number):
        assert found is not None
        assert found.startswith("Expected weight to be of same shape as normalized_shape, but got weight of shape")


def of_partial_sums(placement: Any) -> tuple[Tensor, Tensor, Any] | None:
    """The norm of sums that have not been added up: each rank of two has half of ``x``."""
    here = mesh(2)
    if here.get_coordinate() is None:
        return None
    x = torch.arange(1.0, 25.0).view(4, 6)
    halves = placed(x / 2, WHOLE).to_local()
    given = DTensor.from_local(halves, here, [Partial()]).requires_grad_()
    other = placed(x, placement)
    y, s = rmsnorm.add_rms_norm(given, other, (6,))
    y.sum().backward()
    return y.full_tensor().detach(), given.grad.full_tensor(), s.placements


@pytest.mark.parametrize("placement", [ROWS, WHOLE], ids=str)
def test_partial_sums(ranks, placement):
    """They are added first: to where the other tensor is, or to copies."""
    x = torch.arange(1.0, 25.0).view(4, 6).requires_grad_()
    y, _ = rmsnorm.add_rms_norm(x, x.detach(), (6,))
    y.sum().backward()
    for output, gradient, where in filter(None, ranks.run(of_partial_sums, placement)):
        assert same_bits(output, y.detach())
        assert same_bits(gradient, x.grad)
        assert where == (placement,)


def with_plain_weight() -> tuple[Tensor, Any] | None:
    here = mesh(2)
    if here.get_coordinate() is None:
        return None
    with implicit_replication():
        y = rmsnorm.rms_norm(placed(X, ROWS), (6,), 3.0 * W)
    return y.full_tensor(), y.placements


def test_implicit_replication(ranks):
    """torch's context for plain tensors among DTensors is ours, too."""
    for output, where in filter(None, ranks.run(with_plain_weight)):
        assert same_bits(output, rmsnorm.rms_norm(X, (6,), 3.0 * W))
        assert where == (ROWS,)
