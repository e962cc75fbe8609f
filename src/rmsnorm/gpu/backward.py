"""The only file that launches the norm's backward kernels, and the sums over rows that follow them.

What a weight gets is a sum over all rows of its own: chunks of tiles add up in fp32, or fp64 if there are many, and
chunks in fp64, by a tree that follows from the sizes alone. A scale, a shift and a gate that rows share get the same of
their group of rows: whose chunks follow from its own rows, so that a sample's gradients are those of the sample alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import reference
from . import launch, triton_backward
from .launch import NARROW, _ceil, _in_a_row, _matrix
from .steps import PLAIN, Steps

if TYPE_CHECKING:
    from .heads import Turn

PARTIALS = 384, 256
"""Rows of partial sums of dW at most, if narrow and if not: programs of 4 or 8 warps, three or two for each
multiprocessor of an H100, which is how many their registers let it have."""
FEWEST_STEPS, STEPS = 4, 32
"""Tiles in a partial sum at least, and tiles that are added up in fp32 at most."""
GROUP_PARTIALS = 64, 8192
"""Chunks of a group of rows: as many as there may be tiles of fewer than STEPS, and at most."""
FOLD = 64, 32, 8
"""The last sum of dW: rows and columns of its tile, and warps. 16 × 64, with 4, took 6 µs more on an H200."""


class _Sums:
    """Sums over rows, for tensors ``like`` those wanted; None is not wanted."""

    def __init__(
        self, like: Sequence[Tensor | None], input: Tensor, sizes: tuple[int, int, int], tile: int, group: bool
    ):
        rows, columns, span = sizes
        tiles = _ceil(rows, tile)
        if group:
            few, most = GROUP_PARTIALS
            steps = max(min(STEPS, max(FEWEST_STEPS, _ceil(tiles, few))), _ceil(tiles, most))
        else:
            steps = max(FEWEST_STEPS, _ceil(tiles, PARTIALS[columns > NARROW]))
        wanted = any(t is not None for t in like)
        self.chunk = tile * steps if wanted or group else tile
        self.width = span * columns
        short = steps <= STEPS and input.dtype is not torch.float64
        kind = torch.float32 if short else torch.float64
        chunks = _ceil(rows, self.chunk)
        self.totals = [None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in like]
        # A group of one chunk has nothing to fold.
        self.whole = [group and chunks == 1 and t is not None and (short or t.dtype is kind) for t in like]
        self.partial = [
            total if whole or total is None else input.new_empty((chunks, self.width), dtype=kind)
            for total, whole in zip(self.totals, self.whole, strict=True)
        ]

    def folded(self, input: Tensor) -> list[Tensor]:
        """What is not wanted has the shape [0]."""
        depth, width, warps = FOLD
        for partial, total, whole in zip(self.partial, self.totals, self.whole, strict=True):
            if partial is not None and not whole:
                launch._launch(
                    triton_backward.fold,
                    (_ceil(self.width, width),),
                    (partial, total, len(partial), self.width),
                    {"DEPTH": depth, "BLOCK": width},
                    warps,
                )
        return [input.new_empty(0) if total is None else total for total in self.totals]


def backward(
    grad: Tensor | None,
    grad_sum: Tensor | None,
    input: Tensor,
    rstd: Tensor | None,
    weight: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    need_input: bool,
    need_weight: bool,
    turn: Turn | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator ``rms_norm_backward``: ``(grad_input, grad_weight)``, of shape [0] if not needed. Of heads that are
    turned, the first is as a projection wrote them."""
    like = (weight if need_weight else None,)
    dx, dw = derive(grad, grad_sum, input, rstd, weight, dims, offset, need_input, like, turn=turn)
    return dx, dw


def derive(
    grad: Tensor | None,
    grad_sum: Tensor | None,
    input: Tensor,
    rstd: Tensor | None,
    weight: Tensor | None,
    dims: int,
    offset: float,
    need_input: bool,
    like: tuple[Tensor | None, ...],
    steps: Steps = PLAIN,
    turn: Turn | None = None,
) -> list[Tensor]:
    """The gradient of the input, and sums over rows for tensors ``like`` these: of the gradient times x̂ for a weight or
    a scale, of the gradient for a bias or a shift, and for a gate that rows share."""
    more, group = steps.more, steps.more and steps.more.group
    rows, columns, span = launch._sizes(input, weight, dims)
    if group is not None:
        rows, span = group, rows // group
    block, tile, warps = launch.tile_of(columns, steps.way("backward", input.dtype))
    dx = input.new_empty(0) if not need_input else input.new_empty(input.shape) if turn is None else turn.room(input)
    wanted = (*like, None, None)[:3]
    sums = _Sums(wanted, input, (rows, columns, span), tile, group is not None)
    by_row = wanted[2], more and more.dgate, more and more.dsum
    rowwise = need_input or any(t is not None for t in by_row)
    weight, rstd = _in_a_row(weight), _in_a_row(rstd)
    of = _matrix if turn is None else turn.matrix
    g, x, part = None if grad is None else of(grad, columns), of(input, columns), 1 / (steps.number or columns)
    partial, *others = sums.partial
    if more is not None:
        more = more._replace(bias_sums=others[0], gate_sums=others[1])
    means = None
    if rowwise and columns > block and steps.load != "none":
        kind = reference.accumulation_dtype(input.dtype)
        means = input.new_empty((rows * span, 1 + steps.layer), dtype=kind)
        launch._launch(
            triton_backward.wide_means,
            (rows, span) if group is None else (rows * span, 1),
            (g, x, rstd, weight, means, more, columns, part),
            {**steps.named, "OFFSET": offset, "BLOCK": block},
            warps,
        )
    if rowwise or any(t is not None for t in sums.partial):
        chunks = _ceil(rows, sums.chunk), span
        by, into = turn and turn.by(input), dx if need_input else None
        launch._launch(
            triton_backward.backward,
            (*(chunks if group is None else chunks[::-1]), _ceil(columns, block)),
            (
                *(g, _matrix(grad_sum, columns), x, rstd, means, by, weight, into, partial, more),
                *(rows, columns, sums.chunk, part),
            ),
            {**steps.named, "ROWWISE": rowwise, "INTERLEAVED": bool(turn and turn.interleaved)}
            | {"OFFSET": offset, "ROWS": tile, "BLOCK": block, "STEPS": STEPS},
            warps,
        )
    return [dx, *sums.folded(input)[: len(like)]]
