"""The only file with the short way of an everyday call: what can be left out when nothing unusual is going on.

Everyday: plain tensors, native kernels, no compiler, no transform, no mode. At 1 × 4096 the norm itself takes 0.7 µs,
and torch's way into an operator and out of it 2 to 3. What Python adds has to be little: 0.4 µs, where all questions of
``functional.py`` take 2.5. The plain norm's own stand there, in front of those.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _arguments, _autograd, _foreign, _graphs, _handed, _ops
from .forms import lean

_Call = Callable[..., Any]

# OpOverload.__call__ adds 0.5 µs to what it calls; names of a module's own are found sooner than attributes.
_native, _operator = _ops.native, _ops.rms_norm
PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None)})
NUMBERS = frozenset({float, int})
"""What is taken for a number at once: what else is one may be a tensor whose gradient would be lost."""
transforms_active = torch._C._are_functorch_transforms_active
_modes, _is_included = torch._C._len_torch_dispatch_stack, torch._C._dispatch_tls_is_dispatch_key_included
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
_tracing_state = torch._C._get_tracing_state
_add: _Call = _ops.add_rms_norm._op
_add_weighted: _Call = _ops.add_rms_norm_weighted._op
_add_rounded: _Call = _ops.add_rms_norm_rounded._op
ROUND_FIRST = _arguments.ROUND_FIRST
_as_objects: _Call = _handed.norm
_TYPES, _traced = _arguments.NATIVE_TYPES, _autograd.traced


def in_graph(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None,
    eps: float | None,
    offset: float,
    casting_mode: str,
    out: Tensor | None,
    memory: str | None,
) -> Tensor | None:
    """The output of an everyday call that dynamo traces, or None if more has to be asked first.

    Whatever code in a graph asks, of a global, a builtin, a default, each call of the graph asks again: ``F.rms_norm``
    has 38 guards so, a norm of ours 59 (65, if it asks ``type()``), and 131 where this asked as ``functional.py`` does,
    and each takes 20 ns.
    """
    if weight is None or eps is None or eps < 0 or out is not None or memory is not None:
        return None
    recorded = input.requires_grad or weight.requires_grad
    way = _usual_way(input.__class__, input.dtype, weight.__class__, weight.dtype, casting_mode, recorded)
    if (
        not way
        or has_torch_function_variadic(input, weight)
        or weight.device != input.device
        or (normalized_shape != weight.shape and (normalized_shape,) != weight.shape)  # noqa: PLR1714 - a list asks more
        or input.shape[-weight.dim() :] != weight.shape
    ):
        return None
    dims, round_first = weight.dim(), casting_mode == "llama"
    if _graphs.chosen == "inductor":
        return _foreign.rms_norm(input, weight, dims, eps, offset, round_first)
    if way == "recorded":
        output: Tensor = _traced(input, weight, dims, eps, offset, round_first)[0]
        return output
    return _operator(input, weight, dims, eps, offset, round_first)


def _usual_way(
    kind: type, dtype: torch.dtype, weight_kind: type, weight_dtype: torch.dtype, casting_mode: str, recorded: bool
) -> str:
    """Which operator serves, if nothing stands in its way; dynamo takes what it says for a constant."""
    _graphs.prepare()
    usual = (
        kind is Tensor
        and weight_kind in PLAIN
        and dtype in _TYPES
        and weight_dtype is dtype
        and casting_mode in ROUND_FIRST
        and not torch.compiler._is_exporting_flag
        and not transforms_active()
        and forward_ad._current_level < 0  # dynamo guards it for each graph, as it does transforms and the next
    )
    return "" if not usual else "recorded" if recorded and is_grad_enabled() else "plain"


_usual_way._dynamo_marked_constant = True  # type: ignore[attr-defined] # as _graphs.py says


def is_watched() -> bool:
    """Whether a mode hears of operators. It would record one that refuses its arguments, too, and run it again."""
    return _modes() > 0 or _is_included(_PRE_DISPATCH)  # the second: make_fx(pre_dispatch=True)


def ordinary(input: Tensor, tensors: tuple[Tensor | None, ...], watched: bool = False) -> bool:
    """Whether a call of these tensors is an everyday one, on the CPU, and nobody traces; ``watched``: a mode may."""
    return not (
        is_dynamo_compiling()
        or not _native
        or type(input) is not Tensor
        or not input.is_cpu
        or has_torch_function_variadic(*tensors)
        or transforms_active()
        or forward_ad._current_level >= 0
        or _tracing_state() is not None
        or (not watched and is_watched())
    )


def overridden(
    public: _Call, tensors: tuple[Any, ...], arguments: tuple[Any, ...], options: dict[str, Any], **named: Any
) -> Any:
    """What a class that overrides torch's functions makes of a call, which it sees by the public name.

    Jagged tensors look for the name of torch's norm, and know none of our options: such a call they see as any other of
    a function that they don't know, from within.
    """
    jagged = type(tensors[0]).__module__.startswith("torch.nested.")
    if options and jagged and not torch._C._len_torch_function_stack():
        with torch._C.DisableTorchFunctionSubclass():
            return public(*arguments, **named, **options)
    return handle_torch_function(public, tensors, *arguments, **named, **options)


def unpacked(found: Any, count: int) -> Any:
    """Of a graph's stand-in for several results each, which its caller may unpack; anything else as it is."""
    if count > 1 and isinstance(found, torch.fx.Proxy):
        return tuple(found[i] for i in range(count))  # type: ignore[index]
    return found


def dims_of(input: Tensor, normalized_shape: Any, weight: Tensor | None, eps: float | None) -> int:
    """How many dimensions a call that is :func:`ordinary` normalises; 0 if more has to be asked first."""
    if type(eps) not in NUMBERS or eps < 0:  # type: ignore[operator] # to the operators that is a floor
        return 0
    shape = (normalized_shape,) if type(normalized_shape) is int else tuple(normalized_shape)  # a torch.Size, a list
    return len(shape) if shape == (input.shape[-len(shape) :] if weight is None else weight.shape) else 0


def add_rms_norm(  # noqa: PLR0911 - as in functional.py
    input: Tensor,
    residual: Tensor,
    normalized_shape: Any,
    weight: Tensor | None,
    eps: float | None,
    offset: float,
    casting_mode: str,
    memory: str | None = None,
) -> tuple[Tensor, Tensor] | None:
    """The results of an everyday call of ``rmsnorm.add_rms_norm``, or None if more has to be asked first.

    1 × 4096 takes 4.5 µs this way, 9.3 the other.
    """
    try:  # the operator checks the rest; what it refuses is served, or worded, the long way
        tensors = input, residual, weight
        round_first = ROUND_FIRST[casting_mode]
        if is_dynamo_compiling():
            return None
        both = _as_objects(1, normalized_shape, eps, offset, round_first, None, memory, None, input, residual, weight)
        if both is not None:
            return both
        if not ordinary(input, tensors) or type(residual) is not Tensor or type(weight) not in PLAIN:
            return None  # a weight with a dispatch of its own would make the sum one of its kind
        recorded = is_grad_enabled() and _autograd.needed(input, weight, residual)
        if type(offset) not in NUMBERS or not (dims := dims_of(input, normalized_shape, weight, eps)):
            return None
        if memory is not None and memory not in _arguments.MEMORY:
            return None
        if recorded:
            if memory is not None:  # what else may be kept is decided the long way
                assert eps is not None  # dims_of() asked
                return lean.everyday_add(input, residual, weight, dims, eps, offset, round_first)
            return _autograd.add_rms_norm(input, residual, weight, dims, eps, offset, round_first)[:2]
        if weight is None or offset:
            return _add(input, residual, weight, dims, eps, offset, round_first)
        return (_add_rounded if round_first else _add_weighted)(input, residual, weight, eps)  # 0.7 µs less
    except (RuntimeError, KeyError, AttributeError, TypeError, ValueError):
        return None


def distributed(*tensors: Tensor | None) -> ModuleType | None:
    """``distributed/placement.py``, if one of the tensors is a DTensor.

    There is none before somebody has imported torch.distributed.tensor: that takes half a second, and isn't ours to do.
    """
    if all(type(tensor) in PLAIN for tensor in tensors):
        return None
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
    if not any(isinstance(tensor, kind) for tensor in tensors):
        return None
    from .distributed import placement

    return placement
