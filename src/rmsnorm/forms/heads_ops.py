"""The only file with the rows of rotary embedding: pairs of columns turned, behind the norm of heads or not.

With h half of the columns that are turned, and y a head, normed or as it came:

    half-split     z[j] = y[j]·cos[j] - y[j+h]·sin[j]      z[j+h] = y[j+h]·cos[j+h] + y[j]·sin[j+h]
    interleaved    the same of the columns 2i and 2i+1, not j and j+h

The products and their sum are torch's, in the promoted type of y and cos; the result is rounded to the type of y.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _foreign, _form, reference


def quarter(x: Tensor, interleaved: bool) -> Tensor:
    """Each pair turned by a quarter: ``(a, b)`` is ``(-b, a)`` then."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def _parts(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """What is turned, what is not, and the angles for each head."""
    (turned,), (columns,) = _foreign.sizes(cos, 1), _foreign.sizes(x, 1)
    rest = x[..., turned:] if turned < columns else None
    return x[..., :turned], rest, cos.unsqueeze(-3), sin.unsqueeze(-3)


def turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """``x``, ``[*, heads, tokens, head_dim]``, turned."""
    part, rest, cos, sin = _parts(x, cos, sin)
    part = reference.cast(part * cos + quarter(part, interleaved) * sin, x.dtype)
    return _laid(part if rest is None else torch.cat((part, rest), -1))


def turn_back(grad: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The gradient of what was turned, in a type that rounds nothing: the transposed matrix."""
    dtype = reference.promoted(reference.accumulation_dtype(grad.dtype), cos.dtype)
    part, rest, cos, sin = _parts(grad.to(dtype), cos.to(dtype), sin.to(dtype))
    part = part * cos - quarter(part * sin, interleaved)
    return part if rest is None else torch.cat((part, rest), -1)


def rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, **_: object) -> tuple[Tensor, Tensor]:
    return turn(query, cos, sin, interleaved), turn(key, cos, sin, interleaved)


def _rope_gradients(
    grads: Sequence[Tensor], saved: Sequence[Tensor], weights: Sequence[None], options: Sequence[bool]
) -> tuple[Tensor, ...]:
    return tuple(turn_back(grad, saved[0], saved[1], *options).to(grad.dtype) for grad in grads)


def heads_rms_norm_rope(
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
    normalise: Callable[..., tuple[Tensor, Tensor | None]] = reference.rms_norm,
) -> tuple[Tensor, ...]:
    """Returns ``(query, key, query_rstd, key_rstd)``; the last two are ``[*, tokens, heads, 1]``."""
    turned: list[Tensor] = []
    kept: list[Any] = []
    for x, weight in ((query, query_weight), (key, key_weight)):
        y, rstd = normalise(x, weight, 1, eps, offset, round_first)
        turned.append(turn(y, cos, sin, interleaved))
        kept.append(rstd if rstd is None else _walked(rstd))
    return *turned, *kept


def _walked(x: Tensor) -> Tensor:
    """In the order in which the kernels walk: the heads of a token lie side by side where a projection wrote them."""
    return x.transpose(-3, -2).contiguous()


def _laid(heads: Tensor) -> Tensor:
    """Where that projection wrote: attention lays out what it makes of queries as it finds them, so that the next
    projection reads it where it lies. Gradients go back there."""
    return _walked(heads).transpose(-3, -2)


def _gradients(
    grads: Sequence[Tensor],
    saved: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    options: tuple[float, float, bool],
) -> tuple[Tensor | None, ...]:
    eps, offset, interleaved = options
    both = [
        reference.rms_norm_backward(turn_back(grad, saved[2], saved[3], interleaved), x, weight, 1, eps, offset)
        for grad, x, weight in zip(grads, saved[:2], weights, strict=True)
    ]
    return both[0][0], both[1][0], both[0][1], both[1][1]


def _room(heads: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return _form.like(heads.transpose(-3, -2), dtype).transpose(-3, -2)


def _like(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    query_weight, key_weight, _, _, round_first, _ = arguments
    return (
        _room(query, reference.result_dtype(query, query_weight, round_first)),
        _room(key, reference.result_dtype(key, key_weight, round_first)),
        reference.empty_rstd(query.transpose(-3, -2), 1),
        reference.empty_rstd(key.transpose(-3, -2), 1),
    )


def _check(query: Tensor, *others: Any) -> None:
    if any(isinstance(t, Tensor) and t.device != query.device for t in others):
        raise RuntimeError(
            "rmsnorm: query, key, cos, sin and weights must be on one device; call rmsnorm.rope, which says more"
        )


HEADS_RMS_NORM_ROPE = _form.register(
    _form.Form(
        name="heads_rms_norm_rope",
        rows=("query", "key", "cos", "sin"),
        weights=("query_weight", "key_weight"),
        options="float eps, float offset, bool round_first, bool interleaved",
        outputs=("turned_query", "turned_key"),
        follows={f"turned_{x}": (x, "cos", "sin", f"{x}_weight") for x in ("query", "key")},
        kept=("query_rstd", "key_rstd"),
        define=heads_rms_norm_rope,
        like=_like,
        grads="Tensor grad_query, Tensor grad_key",
        gradients=_gradients,
        fixed=("cos", "sin"),
        laid=_laid,
        check=_check,
    )
)
ROPE = _form.register(
    _form.Form(
        name="rope",
        rows=("query", "key", "cos", "sin"),
        weights=(),
        options="bool interleaved",
        outputs=("turned_query", "turned_key"),
        follows={f"turned_{x}": (x, "cos", "sin") for x in ("query", "key")},
        kept=(),
        define=rope,
        like=lambda query, key, *arguments: (_room(query), _room(key)),
        saved=("cos", "sin"),
        grads="Tensor grad_query, Tensor grad_key",
        gradients=_rope_gradients,
        fixed=("cos", "sin"),
        sources=lambda grads, saved: grads,
        laid=_laid,
        check=_check,
    )
)
