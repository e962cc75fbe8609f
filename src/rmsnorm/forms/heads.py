"""The only file with the rotary embedding that users call: behind the norm of each head, and without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _arguments, _everyday, _foreign, functional
from . import calls, heads_ops
from .served import Served

_normed = Served(heads_ops.HEADS_RMS_NORM_ROPE, calls.plain_norm)
_turned = Served(heads_ops.ROPE)
_DIMS = {"query": 3, "key": 3, "cos": 2, "sin": 2}
_HALF = (torch.bfloat16, torch.float16)


def heads_rms_norm_rope(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_weight: Tensor | None = None,
    key_weight: Tensor | None = None,
    eps: float | None = None,
    *,  # torch.jit.script stops here, and shows this line: record with torch.jit.trace instead
    offset: float = 0.0,
    casting_mode: str = "torch",
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""RMS normalisation of each head of query and key, then rotary embedding (RoPE): both tensors in one call.

        y = rms_norm(head)          z = y · cos + rotate(y) · sin

    with ``rotate((a, b)) = (-b, a)``, of the columns ``j`` and ``j + h`` of the h·2 that are turned, or of neighbours.
    The results are those of :func:`rmsnorm.rms_norm`, then :func:`rmsnorm.rope`, bit for bit. As models do, each
    rounds: the norm to its own type, ``y · cos``, ``rotate(y) · sin`` and their sum to the promoted type of y and cos;
    if that is wider than y, the sum is then rounded to y's.

    | model | options |
    |---|---|
    | Qwen3 | ``casting_mode="llama"`` |
    | Gemma 3 | ``offset=1.0`` |
    | OLMo 2, OLMo 3 | none: they norm all heads as one row. :func:`rmsnorm.rms_norm` first, then :func:`rmsnorm.rope` |

    Args:
        query: ``[*, heads, tokens, head_dim]``, in any strides. What a projection wrote is read where it lies:
            ``q_proj(x).view(batch, tokens, -1, head_dim).transpose(1, 2)``.
        key: the same with any number of heads.
        cos, sin: ``[*, tokens, turned]``, broadcast over the heads and as ``*`` allows. Column j is what column j of a
            head is multiplied by. An even number ``turned`` below head_dim leaves the last columns as they are.
        query_weight, key_weight: ``[head_dim]``, or None for no gain.
        eps, offset, casting_mode: as in :func:`rmsnorm.rms_norm`.
        interleaved: pairs are neighbours (GLM, Cohere, GPT-J), not columns of two halves (Llama, Qwen3, Gemma).

    Returns:
        ``(query, key)``, of the types that the norms have, and laid out as a projection writes them, the heads of a
        token side by side: what attention makes of them then needs no copy before the next projection.

    Raises:
        RuntimeError: as :func:`rmsnorm.rms_norm`; shapes that don't fit; types that aren't real and floating.
        ValueError: an unknown casting mode, or an eps below 0.

    Native on CPUs for cos and sin of query's type, or of fp32 beside half types; gradients of cos and sin are the
    definition's. On GPUs Triton serves the same types: docs/gpu.md.

    Examples:
        >>> x, quarter = torch.tensor([[[3.0, 4.0]]]), (torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
        >>> heads_rms_norm_rope(x, x, *quarter, eps=0.0)[0]
        tensor([[[-1.1314,  0.8485]]])

    Source: Su et al. 2021, arXiv 2104.09864 (RoPE); Henry et al. 2020, arXiv 2010.04245 (norms of query and key).
    """
    tensors = query, key, cos, sin, query_weight, key_weight
    try:
        if type(eps) in _everyday.NUMBERS and type(offset) in _everyday.NUMBERS and eps >= 0:  # type: ignore[operator]
            options = eps, offset, functional.ROUND_FIRST[casting_mode], interleaved
            if both := calls.everyday(_normed, tensors, options):
                return both
    except (KeyError, TypeError, RuntimeError, ValueError):
        pass
    if has_torch_function_variadic(*tensors) and _arguments.are_objects(*tensors):
        given = _arguments.given(offset=(offset, 0.0), casting_mode=(casting_mode, "torch"))
        given |= _arguments.given(interleaved=(interleaved, False))
        return _everyday.unpacked(handle_torch_function(heads_rms_norm_rope, tensors, *tensors, eps, **given), 2)
    name = "heads_rms_norm_rope"
    native, least, round_first = _checked(_resolve, name, tensors, eps, casting_mode)
    offset = _arguments.as_number(name, "offset", offset)
    if least < 0:
        raise ValueError(f"{name}: eps must be 0 or more, but is {eps}")
    if _everyday.distributed(*tensors):
        from ..distributed import heads

        named: dict[str, Any] = {"offset": offset, "casting_mode": casting_mode, "interleaved": interleaved, "eps": eps}
        weights = {"query_weight": query_weight, "key_weight": key_weight}
        return heads.turned(name, lambda *local: heads_rms_norm_rope(*local, **named), tensors[:4], weights)
    both = _normed(native, *tensors, least, offset, round_first, bool(interleaved))
    return both[0], both[1]


def rope(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,  # torch.jit.script stops here, and shows this line: record with torch.jit.trace instead
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Rotary embedding (RoPE) of query and key in one call, without a norm: Llama, Mistral, Qwen2, GLM, OLMo 2.

        z = x · cos + rotate(x) · sin

    The roundings are those of :func:`rmsnorm.heads_rms_norm_rope`: with cos and sin of query's type the results are
    those of the lines that models have, bit for bit.

    Args:
        query, key, cos, sin, interleaved: as in :func:`rmsnorm.heads_rms_norm_rope`.

    GLM hands over cosines of which the first half counts, for each pair one:
    ``cos[..., :n // 2].repeat_interleave(2, -1)`` is what ``interleaved=True`` wants.

    Returns:
        ``(query, key)``, of their own types, laid out as those of :func:`rmsnorm.heads_rms_norm_rope`.

    Raises:
        RuntimeError: shapes that don't fit; types that aren't real and floating.

    Examples:
        >>> x, quarter = torch.tensor([[[3.0, 4.0]]]), (torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
        >>> rope(x, x, *quarter)[0]
        tensor([[[-4.,  3.]]])

    Source: Su et al. 2021, arXiv 2104.09864.
    """
    tensors = query, key, cos, sin
    if both := calls.everyday(_turned, tensors, (interleaved,)):
        return both
    if has_torch_function_variadic(*tensors) and _arguments.are_objects(*tensors):
        given = _arguments.given(interleaved=(interleaved, False))
        return _everyday.unpacked(handle_torch_function(rope, tensors, *tensors, **given), 2)
    native = _checked(_fits, "rope", *tensors)
    if _everyday.distributed(*tensors):
        from ..distributed import heads

        return heads.turned("rope", lambda *local: rope(*local, interleaved=interleaved), tensors, {})
    both = _turned(native, *tensors, bool(interleaved))
    return both[0], both[1]


def _checked(check: Callable[..., Any], *arguments: Any) -> Any:
    """Sizes are numbers to a check, whoever traces."""
    if is_dynamo_compiling() or torch._C._get_tracing_state() is None:
        return check(*arguments)
    with _foreign.untraced():
        return check(*arguments)


def _resolve(name: str, tensors: tuple[Any, ...], eps: float | None, casting_mode: str) -> tuple[bool, float, bool]:
    """``(native, eps, round_first)``."""
    native, size = _fits(name, *tensors[:4]), tuple(tensors[0].shape[-1:])
    _, least, round_first, _ = functional._resolve(name, tensors[0], size, None, eps, casting_mode)
    for x, label, weight in zip(tensors[:2], ("query_weight", "key_weight"), tensors[4:], strict=True):
        if weight is not None:
            _check_weight(name, label, weight, size)
            native &= functional._resolve(name, x, size, weight, eps, casting_mode, label=label)[3]
            _arguments.check_real(name, **{label: weight})
            native &= not round_first or weight.dtype is x.dtype
    return native, least, round_first


def _fits(name: str, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Raises for tensors that don't fit; returns whether a kernel has their types."""
    named = {"query": query, "key": key, "cos": cos, "sin": sin}
    _arguments.check_tensors(name, **named)
    _arguments.check_dense(name, **named)
    for label, tensor in named.items():
        _arguments.check_real(name, **{label: tensor})
        if tensor.dim() < _DIMS[label]:
            wanted = "[*, heads, tokens, head_dim]" if label in ("query", "key") else "[*, tokens, turned]"
            raise RuntimeError(f"{name}: {label} must be {wanted}, but has shape {list(tensor.shape)}")
        if tensor.device != query.device:
            raise RuntimeError(f"{name}: query is on {query.device} and {label} on {tensor.device}; move one of them")
    lead, (tokens, columns) = query.shape[:-3], query.shape[-2:]
    if key.shape[:-3] != lead or key.shape[-2:] != (tokens, columns):
        raise RuntimeError(
            f"{name}: key must have the shape of query but for the number of heads, {[*lead, 'heads', tokens, columns]}"
            f", but has shape {list(key.shape)}"
        )
    turned = cos.shape[-1]
    if sin.shape[-1] != turned or turned % 2 or turned > columns:
        raise RuntimeError(
            f"{name}: cos and sin must have as many columns each, an even number of at most head_dim, {columns}, but "
            f"have shapes {list(cos.shape)} and {list(sin.shape)}; repeat what belongs to a pair for both its columns"
        )
    shape = *lead, tokens
    for label, angle in (("cos", cos), ("sin", sin)):
        sizes = angle.shape[:-1]
        if len(sizes) > len(shape) or not calls.broadcasts(reversed(sizes), reversed(shape)):
            remedy = (
                f"it has no dimension of heads: index or squeeze that, e.g. {label}[:, 0]"
                if len(sizes) >= len(shape) and calls.broadcasts(sizes[-1:], (tokens,))
                else f"pass the angles of these {tokens} tokens, a row each"
            )
            raise RuntimeError(
                f"{name}: {label} must be broadcast over the heads to {[*shape, turned]}, but has shape "
                f"{list(angle.shape)}; {remedy}"
            )
    same = cos.dtype is sin.dtype and cos.dtype is query.dtype
    wide = cos.dtype is sin.dtype and cos.dtype is torch.float32 and query.dtype in _HALF
    return query.dtype in functional._NATIVE_TYPES and (same or wide)


def _check_weight(name: str, label: str, weight: Any, size: tuple[int, ...]) -> None:
    _arguments.check_tensors(name, **{label: weight})
    _arguments.check_dense(name, **{label: weight})
    if weight.shape != size:
        raise RuntimeError(
            f"{name}: {label} must have the size of a head, {list(size)}, but has shape {list(weight.shape)}; a norm "
            "over all heads is rms_norm's, before they are told apart"
        )
