"""The only file that launches the GPU kernels of heads that are turned, by the rules of forms.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import backward, launch, triton_heads

_Results = tuple[Tensor | None, ...] | None


class Turn:
    """What heads ``[*, heads, tokens, head_dim]`` are turned by, as the kernels have it."""

    def __init__(self, heads: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
        tokens, turned = heads.shape[-2], cos.shape[-1]
        whole = (*heads.shape[:-3], tokens, turned)
        # Cosines of the tokens serve every sequence; others are laid out for each.
        if {tuple(t.shape) for t in (cos, sin)} - {(1,) * n + (tokens, turned) for n in range(len(whole))}:
            cos, sin = cos.expand(whole), sin.expand(whole)
        self.rows = cos.shape[:-1].numel()
        self.cos, self.sin = (launch._in_a_row(t) for t in (cos, sin))
        self.interleaved = interleaved

    def by(self, heads: Tensor) -> tuple[Any, ...]:
        return self.cos, self.sin, self.rows, self.cos.shape[-1], *heads.shape[-3:-1]

    def matrix(self, heads: Tensor, columns: int) -> tuple[Any, ...]:
        """The tensor and its strides: a copy, where ``launch._matrix`` makes one, for the same reasons."""
        flat = heads.reshape(heads.shape[:-3].numel(), *heads.shape[-3:])
        if (flat.stride(3) != 1 and columns > 1) or (columns % 16 == 0 and flat.data_ptr() % 16):
            flat = flat.clone(memory_format=torch.contiguous_format)
        strides = self.strides(flat)
        if any(stride % 16 for stride in strides) is not bool(columns % 16):
            flat = flat.clone(memory_format=torch.contiguous_format)
            strides = self.strides(flat)
        return flat, *strides

    @staticmethod
    def strides(flat: Tensor) -> tuple[int, ...]:
        """Of sequences, tokens and heads; of those that there is one of, what it would be if that were contiguous."""
        return tuple(flat.stride(d) if flat.shape[d] > 1 else flat.shape[3] for d in (0, 2, 1))

    @staticmethod
    def room(heads: Tensor) -> Tensor:
        """Where a projection wrote."""
        return heads.new_empty(heads.transpose(-3, -2).shape).transpose(-3, -2)


def rope(keep: bool, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> _Results:
    if not _turns(query, cos, sin):
        return None
    turn = Turn(query, cos, sin, interleaved)
    return tuple(_turn(x, turn, turn.room(x)) for x in (query, key))


def rope_backward(
    grad_query: Tensor, grad_key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, *needs: bool
) -> _Results:
    if not _turns(grad_query, cos, sin):
        return None
    turn = Turn(grad_query, cos, sin, interleaved)
    return tuple(
        _turn(grad, turn, turn.room(grad), back=True) if need else grad.new_empty(0)
        for grad, need in zip((grad_query, grad_key), needs, strict=True)
    )


def heads_rms_norm_rope(
    keep: bool,
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    eps: float,
    offset: float,
    round_first: bool,
    interleaved: bool,
) -> _Results:
    pairs = (query, query_weight), (key, key_weight)
    wider = any(reference.result_dtype(x, weight, round_first) is not x.dtype for x, weight in pairs)
    if wider or eps < 0 or not _turns(query, cos, sin, query_weight, key_weight):
        return None
    turn = Turn(query, cos, sin, interleaved)
    turned, kept = [], []
    for x, weight in pairs:
        rstd = reference.empty_rstd(x.transpose(-3, -2), 1) if keep else None
        turned.append(_turn(x, turn, turn.room(x), rstd, launch._in_a_row(weight), (eps, offset, round_first)))
        kept.append(rstd)
    return *turned, *kept


def heads_rms_norm_rope_backward(
    grad_query: Tensor,
    grad_key: Tensor,
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_rstd: Tensor,
    key_rstd: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    eps: float,
    offset: float,
    interleaved: bool,
    need_query: bool,
    need_key: bool,
    need_query_weight: bool,
    need_key_weight: bool,
) -> _Results:
    if not _turns(query, cos, sin, query_weight, key_weight):
        return None
    turn = Turn(query, cos, sin, interleaved)
    norm = 1, eps, offset
    dq, dq_weight = backward.backward(
        grad_query, None, query, query_rstd, query_weight, *norm, need_query, need_query_weight, turn
    )
    dk, dk_weight = backward.backward(grad_key, None, key, key_rstd, key_weight, *norm, need_key, need_key_weight, turn)
    return dq, dk, dq_weight, dk_weight


def _turns(x: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor | None) -> bool:
    """Whether heads are held in registers, weights are of one head, and the types are those of the CPU's kernels."""
    alike = cos.dtype is x.dtype or (cos.dtype is torch.float32 and x.element_size() == 2)
    alike &= all(weight is None or weight.dim() == 1 for weight in weights)
    return alike and sin.dtype is cos.dtype and x.shape[-1] <= launch.WIDEST["backward, fp64"]


def _turn(
    x: Tensor,
    turn: Turn,
    to: Tensor,
    rstd: Tensor | None = None,
    weight: Tensor | None = None,
    norm: tuple[float, float, bool] | None = None,
    back: bool = False,
) -> Tensor:
    """``to``, with the heads turned, normed before if there are options of a norm: ``(eps, offset, round_first)``."""
    columns = x.shape[-1]
    block, tile, warps = launch.tile_of(columns, "forward")
    tile = max(1, tile // 2)  # as two of its columns are loaded for each
    eps, offset, round_first = norm or (0.0, 0.0, False)
    flat = to.reshape(to.shape[:-3].numel(), *to.shape[-3:])
    rows = x.numel() // columns
    launch._launch(
        triton_heads.turn,
        (launch._ceil(rows, tile),),
        (
            *(turn.matrix(x, columns), turn.by(x), weight, (flat, *turn.strides(flat)), rstd),
            *(rows, columns, 1 / columns, eps),
        ),
        {"NORM": norm is not None, "BACK": back, "INTERLEAVED": turn.interleaved}
        | {"OFFSET": offset, "ROUND_FIRST": round_first, "ROWS": tile, "BLOCK": block},
        warps,
    )
    return to
