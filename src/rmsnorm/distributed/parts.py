"""The only file that knows which part of a smaller tensor belongs to the part of the input that a rank has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

_Placements = tuple[Placement, ...]


def place(tensor: Any, placements: _Placements) -> Any:
    return tensor if tensor.placements == placements else _moved(tensor, placements)


class _Place(torch.autograd.Function):
    """``redistribute``, whose gradient stays where it is: torch's would gather that of a replicated tensor."""

    @staticmethod
    def forward(ctx: Any, tensor: DTensor, placements: _Placements) -> DTensor:
        ctx.set_materialize_grads(False)
        return tensor.redistribute(placements=placements)

    @staticmethod
    def backward(ctx: Any, grad: DTensor | None) -> tuple[DTensor | None, None]:
        return grad, None


_moved: Callable[..., DTensor] = _Place.apply


def of_weight(name: str, label: str, weight: DTensor, dim: int, placements: _Placements) -> Tensor:
    """This rank's part of a weight: what belongs to its part of the input, which has ``dim`` dimensions."""
    outer = dim - weight.dim()
    rows = [isinstance(p, Shard) and p.dim < outer for p in placements]
    # Looked up, not computed: in graphs p.dim is a symbol once another placement has been compiled.
    split: dict[Placement, Placement] = {Shard(outer + i): Shard(i) for i in range(weight.dim())}
    wanted = tuple(split.get(p, Replicate()) for p in placements)
    for have, want in zip(weight.placements, wanted, strict=True):
        # What several dimensions of the mesh split is cut in their order: all of its cuts are there, or none.
        cuts = [h for h, w in zip(weight.placements, wanted, strict=True) if w == want]
        if have != want and not (have.is_replicate() and all(h.is_replicate() for h in cuts)):
            raise RuntimeError(
                f"{name}: input is placed {list(placements)} and {label} {list(weight.placements)}; {label} must be "
                f"replicated or split as input is: {label}.redistribute(placements={list(wanted)})"
            )
    return place(weight, wanted).to_local(
        grad_placements=[Partial() if r else w for r, w in zip(rows, wanted, strict=True)]
    )


def of_shared(tensor: DTensor, placements: _Placements) -> Tensor:
    """This rank's part of what has sizes of 1 where rows share it: all of it there, else as the input is split."""
    wanted = tuple(p if isinstance(p, Shard) and tensor.shape[p.dim] != 1 else Replicate() for p in placements)
    partial = [
        Partial() if w.is_replicate() and isinstance(p, Shard) else w for p, w in zip(placements, wanted, strict=True)
    ]
    return place(tensor, wanted).to_local(grad_placements=partial)
