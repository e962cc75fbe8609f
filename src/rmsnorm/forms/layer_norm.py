"""The only file with LayerNorm: RMSNorm's kernels with the other statistic, for the calls that they can serve.

torch has LayerNorm, and a formula for every compiler: what the kernels don't take (torch.compile, other devices and
types) is ``torch.nn.functional.layer_norm``. Under torch.func and in forward mode it is the formula: ``layer_ops.py``
says why; so it is of types that torch's doesn't take together, where the kernels don't serve.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.overrides import has_torch_function_variadic

from .. import _arguments, _everyday, _handed
from . import layer_ops
from .served import Served

_NAME = "layer_norm"
_served = Served(layer_ops.LAYER_NORM)
_plain: Any = _served.plain
_recorded: Any = _served.record


def layer_norm(  # noqa: PLR0911 - as in functional.py
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    r"""Layer normalisation over the last dimensions; a drop-in for ``torch.nn.functional.layer_norm``.

        y = (x - mean(x)) / sqrt(mean((x - mean(x))²) + eps) · weight + bias

    Mean and variance are found in one pass around a value of the row, in fp64 for fp32 (about twice that for fp64):
    rows whose mean is a million times their deviation lose nothing.

    Args:
        input: ``[*, *normalized_shape]``; float32, bfloat16, float16 and float64 run natively on CPU.
        normalized_shape: the sizes of the dimensions to normalise over; an int means the last one.
        weight, bias: ``[*normalized_shape]`` in any floating type, or None.
        eps: added to the variance, in squared units of the input.

    Returns:
        A tensor of the shape and dtype of ``input``, contiguous where it ran natively.

    Raises:
        RuntimeError: torch's own, for shapes and dtypes that don't fit.

    Examples:
        >>> layer_norm(torch.tensor([1.0, 2.0, 3.0, 6.0]), 4, eps=0.0)
        tensor([-1.0690, -0.5345,  0.0000,  1.6036])

    Source: Ba, Kiros & Hinton 2016, arXiv 1607.06450.
    """
    shape = normalized_shape if type(normalized_shape) is tuple else _arguments.as_shape(_NAME, normalized_shape)
    # The operator checks the rest; what it refuses is served, or worded, by torch.
    try:  # torch.jit.script stops here, and shows this line: record with torch.jit.trace instead
        if not is_dynamo_compiling():
            y = _handed.norm(_served.kind, shape, eps, 0.0, False, None, None, None, input, None, weight, bias)
            if y is not None:
                return y
        if (
            _everyday.ordinary(input, (input, weight, bias), True)
            and type(eps) in _everyday.NUMBERS
            and eps >= 0
            and input.shape[-len(shape) :] == shape
            and (not _everyday.is_watched() or _is_served(input, shape, weight, bias))
        ):
            if is_grad_enabled() and (
                input.requires_grad
                or (weight is not None and weight.requires_grad)
                or (bias is not None and bias.requires_grad)
            ):
                return _recorded(input, weight, bias, len(shape), eps)
            return _plain(input, weight, bias, len(shape), eps)
    except (RuntimeError, AttributeError):
        pass
    tensors = input, weight, bias
    if has_torch_function_variadic(*tensors) and _arguments.are_objects(*tensors):
        # A mode (torch.set_default_device is one) lets a call through to the kernel; a class knows torch's own name.
        plain = not is_dynamo_compiling() and all(type(t) in _everyday.PLAIN for t in tensors)
        if plain or not _are_torchs(*tensors):
            return _everyday.overridden(layer_norm, tensors, (input, shape, weight, bias, eps), {})
        return torch.nn.functional.layer_norm(input, shape, weight, bias, eps)
    _arguments.check_tensors(_NAME, input=input, weight=weight, bias=bias)
    eps = _arguments.as_number(_NAME, "eps", eps)
    if not input.is_nested:  # torch's layer_norm has a way for those
        _arguments.check_dense(_NAME, input=input, weight=weight, bias=bias)
    if ranks := _everyday.distributed(input, weight, bias):
        return ranks.layer_norm(layer_norm, input, shape, weight, bias, eps)
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if (transformed or not _are_torchs(*tensors)) and shape and input.shape[-len(shape) :] == shape:
        given = [t for t in tensors if t is not None]
        if all(t.shape == shape for t in given[1:]) and all(map(_arguments.is_real, given)):
            return layer_ops.composed(input, weight, bias, len(shape), eps)
    return torch.nn.functional.layer_norm(input, shape, weight, bias, eps)


def _is_served(input: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the operator takes them: whoever records it would run one that refuses them again."""
    given = [t for t in (weight, bias) if t is not None]
    known = _arguments.have_kernel(input.dtype, *(t.dtype for t in given))
    return known and all(t.shape == shape and t.device == input.device for t in given)


def _are_torchs(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether torch's LayerNorm takes their types together: one type, or float32 beside a half type. Who is no tensor
    (of a tracer, say) has none."""
    if not all(t is None or isinstance(t, Tensor) for t in (input, weight, bias)):
        return True
    types = {t.dtype for t in (weight, bias) if t is not None}
    halves = input.dtype in (torch.bfloat16, torch.float16)
    return types <= {input.dtype} or (halves and types == {torch.float32})


class LayerNorm(torch.nn.LayerNorm):
    r"""Layer normalisation; a drop-in for ``torch.nn.LayerNorm`` (and a subclass of it).

        y = (x - mean(x)) / sqrt(mean((x - mean(x))²) + eps) · weight + bias

    Args:
        normalized_shape: sizes of the last dimensions to normalise over; an int means the last one.
        eps: added to the variance, in squared units of the input.
        elementwise_affine: False for a layer without weight and bias.
        bias: False for a layer without bias.
        device, dtype: of weight and bias.

    Shape:
        ``[*, *normalized_shape]`` to the same; see :func:`rmsnorm.layer_norm`.

    Examples:
        >>> LayerNorm(4, eps=0.0)(torch.tensor([1.0, 2.0, 3.0, 6.0])).detach()
        tensor([-1.0690, -0.5345,  0.0000,  1.6036])
    """

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """What ``torch.jit.script`` compiles in its place: torch's layer with the same weights."""
        twin = torch.nn.LayerNorm.__new__(torch.nn.LayerNorm)
        vars(twin).update(vars(self))
        return twin

    def forward(self, input: Tensor) -> Tensor:
        """Normalises ``input``."""
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
