"""The only file that validates arguments; the functions that users call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _arguments, _eager, _everyday, _handed, _ops, _serve, _writable, reference

if TYPE_CHECKING:
    from typing_extensions import TypedDict, Unpack

    class Further(TypedDict, total=False):
        bias: Tensor | None
        partial: float
        out_dtype: torch.dtype | None
        return_rstd: bool

    class FurtherOfAdd(Further, total=False):
        round_sum: bool


ROUND_FIRST, _EPS, _EPS_DOUBLE = _arguments.ROUND_FIRST, _arguments.EPS, _arguments.EPS_DOUBLE
MEMORY, _NATIVE_TYPES = _arguments.MEMORY, _arguments.NATIVE_TYPES
# Found sooner here; and OpOverload.__call__ adds 0.5 µs to what it calls.
_native, _transforms_active, _NUMBERS = _ops.native, _everyday.transforms_active, _everyday.NUMBERS
_written, _resolve, _as_shape = _ops.increment_versions, _arguments.resolve, _arguments.as_shape
_as_objects, _in_graph, _record = _handed.norm, _everyday.in_graph, _eager.record
_operator, _weighted, _rounded, _into, _weighted_into = (
    *(_ops.rms_norm._op, _ops.rms_norm_weighted._op, _ops.rms_norm_rounded._op),
    *(_ops.rms_norm_out._op, _ops.rms_norm_weighted_out._op),
)
# torch 2.10 ends the process where an operator is to write into such a view.
_CONJUGATE_ENDS_IT = torch.__version__.startswith("2.10.")
further: dict[str, Callable[..., Any]] = {}
"""Who serves further keywords, by the names of these functions: ``forms/general.py``, which enters itself here."""


def rms_norm(  # noqa: PLR0911, PLR0912 - each way out is one the caller would have waited for
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,  # torch.jit.script stops here, and shows this line: record with torch.jit.trace instead
    offset: float = 0.0,
    casting_mode: str = "torch",
    out: Tensor | None = None,
    memory: str | None = None,
    **more: Unpack[Further],  # torch.jit.script shows this line: record with torch.jit.trace instead
) -> Tensor:
    r"""Root mean square normalisation over the last dimensions; a drop-in for ``torch.nn.functional.rms_norm``.

        y = x / sqrt(mean(x²) + eps) · (offset + weight)

    The mean of the last ``len(normalized_shape)`` dimensions is computed in fp32 or better: fp64 for fp32 and fp64.

    Args:
        input: ``[*, *normalized_shape]``; float32, bfloat16, float16, float64 run natively on CPUs and GPUs
            (docs/gpu.md), complex types and other devices by the reference definition. Any strides.
        normalized_shape: the sizes of the dimensions to normalise over; an int means the last one.
        weight: ``[*normalized_shape]`` in any floating type, or None for no gain (``offset`` is then unused). With the
            sizes of more of the input's last dimensions, ``[heads, head_dim]`` say, each head has a gain of its own.
        eps: added to the mean square, in squared units of the input. None means the machine epsilon of the
            accumulation type (1.19e-7; 2.2e-16 for float64), as in torch. 0 is allowed.
        offset: added to the weight in fp32. 1.0 for Gemma and Qwen3-Next, whose stored weights are around 0.
        casting_mode: ``"torch"`` multiplies by the gain in the accumulation type and rounds once (torch, Gemma,
            OLMo 2, gpt-oss); ``"llama"`` rounds the normalised value to the input's type, then multiplies by the
            gain under type promotion (Llama, Mistral, Qwen, T5).
        out: a tensor to write to, of the output's shape and dtype; for inference only.
        memory: ``"lean"`` keeps the output for backward, which the next layer keeps anyway, instead of the input. The
            gradient then has the rounding of the output in it (docs/numerics.md). Looked at where one is recorded; on
            other devices than CPUs, in graphs, under transforms, and where a gain is (nearly) 0, the input is kept.
        bias: (as all that follow by keyword alone, and not beside ``out``) ``[*normalized_shape]``, added before the
            last rounding.
        partial: the mean is that of the first ``ceil(partial · n)`` of n columns (pRMSNorm): above 0 and at most 1.
        out_dtype: of the output, whose only rounding is then to that type: float32 in and bfloat16 out, say.
        return_rstd: whether to return ``(output, rstd)``, with the factor ``1 / rms(x)`` of each row as
            :func:`rmsnorm.inverse_rms` has it, which has a derivative, too.

    Returns:
        A contiguous tensor of the shape and dtype of ``input`` (or ``out``). With ``casting_mode="llama"`` and a
        wider weight, the promoted dtype.

    Raises:
        RuntimeError: shapes, dtypes or devices that don't fit; ``out`` together with gradients; ``out`` or ``memory``
            beside further keywords (``bias`` and on).
        ValueError: an unknown casting mode, ``memory`` or ``out_dtype``; a ``partial`` that isn't above 0 and at most
            1; an ``eps`` below 0 beside further keywords.

    Examples:
        >>> rms_norm(torch.tensor([0.1, 0.1, 0.2, 0.3]), 4, eps=0.0)
        tensor([0.5164, 0.5164, 1.0328, 1.5492])

    Source: Zhang & Sennrich 2019, arXiv 1910.07467.
    """
    if more:
        return further["rms_norm"](input, normalized_shape, weight, eps, offset, casting_mode, out, memory, **more)
    try:  # the operator checks the rest; what it refuses is served, or worded, the long way
        if is_dynamo_compiling():
            y = _in_graph(input, normalized_shape, weight, eps, offset, casting_mode, out, memory)
        else:
            first = ROUND_FIRST[casting_mode]
            y = _as_objects(0, normalized_shape, eps, offset, first, out, memory, None, input, None, weight)
        if y is not None:
            return y
        if (  # asked here: a call takes 2 % of all this
            not is_dynamo_compiling()
            and type(input) is Tensor
            and _native
            and not has_torch_function_variadic(input, weight)
            and not (_transforms_active() or _everyday.is_watched())
            and forward_ad._current_level < 0
            and type(offset) in _NUMBERS
            and (memory is None or memory in MEMORY)
        ):
            recorded = is_grad_enabled() and (input.requires_grad or (weight is not None and weight.requires_grad))
            shape = normalized_shape if type(normalized_shape) is tuple else _as_shape("rms_norm", normalized_shape)
            if shape == (input.shape[-len(shape) :] if weight is None else weight.shape):
                if eps is None:
                    eps = _EPS_DOUBLE if input.dtype is torch.float64 else _EPS
                elif type(eps) not in _NUMBERS or eps < 0.0:  # not 0: Python has an instruction for two floats
                    raise RuntimeError  # to the operators that is a floor
                if recorded:
                    return _record(input, weight, len(shape), eps, offset, first, out, memory)
                if out is not None:
                    if (
                        (type(out) is not Tensor or out.is_inference())
                        or (out.requires_grad and is_grad_enabled())
                        or (_CONJUGATE_ENDS_IT and out.is_conj())
                    ):
                        raise RuntimeError
                    if weight is not None and not offset and casting_mode == "torch":
                        _weighted_into(input, weight, eps, out)  # refuses what is negated: 60 ns less
                    elif out.is_neg():
                        raise RuntimeError
                    else:
                        _into(input, weight, len(shape), eps, offset, first, out)
                    _written((out,))  # an operator of ours doesn't tell autograd: 0.08 µs
                    return out
                if weight is not None and not offset:
                    return (_rounded if first else _weighted)(input, weight, eps)  # 0.7 µs less
                return _operator(input, weight, len(shape), eps, offset, first)
    except (RuntimeError, KeyError, AttributeError, TypeError, ValueError):
        pass
    if has_torch_function_variadic(input, weight, out) and _arguments.are_objects(input, weight, out):
        options = _arguments.given(offset=(offset, 0.0), casting_mode=(casting_mode, "torch"), out=(out, None))
        options |= _arguments.given(memory=(memory, None))
        # A tuple as torch's own has it: nested tensors count its sizes.
        given = input, (normalized_shape,) if isinstance(normalized_shape, int) else normalized_shape
        return _everyday.overridden(rms_norm, (input, weight, out), given, options, weight=weight, eps=eps)
    dims, eps, round_first, native = _resolve("rms_norm", input, normalized_shape, weight, eps, casting_mode, memory)
    if type(offset) is not float:
        offset = _arguments.as_number("rms_norm", "offset", offset)
    if not eps < 0 and (ranks := _everyday.distributed(input, weight, out)):
        return ranks.rms_norm(partial(rms_norm, memory=memory), input, weight, out, dims, eps, offset, casting_mode)
    if out is not None:
        _writable.check_out(out, input, weight, round_first)
    if eps < 0:  # added, as in torch; to the operators it would be a floor
        output = reference.rms_norm(input, weight, dims, 0.0, offset, round_first, reference.plus(eps))[0]
        return output if out is None else out.copy_(output)
    if out is not None and not _transforms_active() and forward_ad._current_level < 0:
        _ops.rms_norm_out(input, weight, dims, eps, offset, round_first, out)
        _ops.written(out)
        return out
    output = _serve.rms_norm(input, weight, dims, eps, offset, round_first, native, memory)
    return output if out is None else out.copy_(output)


def add_rms_norm(  # noqa: PLR0911 - as above
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,  # torch.jit.script stops here, and shows this line: record with torch.jit.trace instead
    offset: float = 0.0,
    casting_mode: str = "torch",
    memory: str | None = None,
    **more: Unpack[FurtherOfAdd],  # torch.jit.script shows this line: record with torch.jit.trace instead
) -> tuple[Tensor, Tensor]:
    r"""Residual add and RMS normalisation in one pass: ``s = input + residual``, ``y = rms_norm(s)``.

    The sum is rounded to its dtype and then normalised: the results are those of the two steps, one after the other.

    Args:
        input, residual: tensors of one shape ``[*, *normalized_shape]``. Of two dtypes, the sum has the promoted one.
        normalized_shape, weight, eps, offset, casting_mode, memory, bias, partial, out_dtype, return_rstd: as in
            :func:`rmsnorm.rms_norm`. A residual stream in float32 beside bfloat16 blocks:
            ``add_rms_norm(x, residual, …, out_dtype=torch.bfloat16)``, whose sum is float32.
        round_sum: False normalises the sum before it is rounded, in float32 for half types, as flashinfer's and
            sglang's kernels do. The sum that is returned, and kept for backward, is rounded all the same.

    Returns:
        ``(output, sum)``, both contiguous, or ``(output, sum, rstd)``. Any of them may be used in a loss.

    Raises:
        RuntimeError: as :func:`rmsnorm.rms_norm`, and for a residual of another shape (it is not broadcast) or device.
        ValueError: as :func:`rmsnorm.rms_norm`.

    Examples:
        >>> y, s = add_rms_norm(torch.tensor([0.1, 0.0, 0.1, 0.3]), torch.tensor([0.0, 0.1, 0.1, 0.0]), 4, eps=0.0)
        >>> s
        tensor([0.1000, 0.1000, 0.2000, 0.3000])

    Source: Zhang & Sennrich 2019, arXiv 1910.07467.
    """
    if more:
        given = offset, casting_mode, memory
        return further["add_rms_norm"](input, residual, normalized_shape, weight, eps, *given, **more)
    if both := _everyday.add_rms_norm(input, residual, normalized_shape, weight, eps, offset, casting_mode, memory):
        return both
    named: dict[str, Any] = {"offset": offset, "casting_mode": casting_mode, "memory": memory}
    if has_torch_function_variadic(input, residual) and _arguments.are_objects(input, residual):
        options = _arguments.given(offset=(offset, 0.0), casting_mode=(casting_mode, "torch"), memory=(memory, None))
        arguments = input, residual, normalized_shape
        both = handle_torch_function(add_rms_norm, (input, residual, weight), *arguments, weight, eps, **options)
        return _everyday.unpacked(both, 2)
    if has_torch_function_variadic(weight) and _arguments.are_objects(weight):  # the sum is none of its business
        sum = input + residual
        return rms_norm(sum, normalized_shape, weight, eps, **named), sum
    _arguments.check_tensors("add_rms_norm", input=input, residual=residual)
    _arguments.check_dense("add_rms_norm", input=input, residual=residual)
    if residual.shape != input.shape or residual.device != input.device:
        raise RuntimeError(
            f"add_rms_norm: residual must have the shape and device of input, {tuple(input.shape)} on {input.device}, "
            f"but is {tuple(residual.shape)} on {residual.device}; expand it first if broadcasting is meant"
        )
    dims, eps, round_first, native = _resolve(
        "add_rms_norm", input, normalized_shape, weight, eps, casting_mode, memory
    )
    if type(offset) is not float:
        offset = _arguments.as_number("add_rms_norm", "offset", offset)
    if not eps < 0 and (ranks := _everyday.distributed(input, residual, weight)):
        norm = partial(add_rms_norm, memory=memory)
        return ranks.add_rms_norm(norm, input, residual, weight, dims, eps, offset, casting_mode)
    alike = residual.dtype is input.dtype
    if not alike and residual.is_floating_point():  # torch promotes whole numbers
        _arguments.check_floating("add_rms_norm", residual=residual)
    native = native and alike and not eps < 0
    if both := _serve.add_rms_norm(input, residual, weight, dims, eps, offset, round_first, native, memory):
        return both
    sum = input + residual
    return rms_norm(sum, normalized_shape, weight, eps, **named), sum
