"""The only file that speaks ONNX: what ``torch.onnx.export`` sees in place of our operators.

ONNX has had the operator ``RMSNormalization`` since opset 23, and torch's exporter has it for ``aten::rms_norm``. It
rounds to the input's type before the gain, and runtimes differ in what they do inside a half type. So it is given wide
inputs, and every rounding of ours is a ``Cast`` of its own: the graph has our meaning in any runtime. One thing is
lost: by default (``stash_type``) ONNX takes the mean square in float32 for a float64 input too.

Older opsets have no such operator. torch then writes ``x · Reciprocal(Sqrt(…))``; onnxruntime (1.32) fuses
``x / Sqrt(ReduceMean(Pow(x, 2)) + eps) · w`` alone, so that is what is written here.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference

RMS_NORMALIZATION = 23


def rms_norm(input: Tensor, weight: Tensor | None, dims: int, eps: float, offset: float, round_first: bool) -> Tensor:
    """``reference.rms_norm`` around ``RMSNormalization``, or around a chain that onnxruntime takes for it."""
    if eps < 0:  # a floor, which the operator doesn't have
        return reference.rms_norm(input, weight, dims, eps, offset, round_first)[0]
    wide = input.to(reference.accumulation_dtype(input.dtype))
    # In a wide type both casting modes are one function, and what RMSNormalization means. Its weight has the sizes of
    # the normalised dimensions and no more.
    if weight is None or weight.dim() > dims or (round_first and not wide.dtype == input.dtype == weight.dtype):
        return reference.apply_gain(_normalise(wide, None, dims, eps), input, weight, offset, round_first)
    return _normalise(wide, reference.gain(weight, wide, offset), dims, eps).to(input.dtype)


def normalised(
    input: Tensor, weight: Tensor | None, dims: int, eps: float, offset: float, round_first: bool, *_: Any
) -> tuple[Tensor, Any]:
    """The same in the place of ``reference.rms_norm``, for forms that are made of it."""
    return rms_norm(input, weight, dims, eps, offset, round_first), None


def _normalise(wide: Tensor, gain: Tensor | None, dims: int, eps: float) -> Tensor:
    if _opset() >= RMS_NORMALIZATION:
        return F.rms_norm(wide, wide.shape[wide.dim() - dims :], gain, eps)
    root = torch.sqrt(wide.pow(2).mean(tuple(range(-dims, 0)), keepdim=True) + eps)
    return wide / root if gain is None else wide / root * gain


def _opset() -> int:
    """The opset that is asked for. Only the caller of ``torch.export`` knows it: it is in no global, so it is read from
    that frame. Where dynamo traces, and frames can't be looked at, torch's own operator is as right, if not as fast."""
    if torch.compiler.is_dynamo_compiling():
        return RMS_NORMALIZATION
    if torch._C._get_tracing_state() is not None:
        from torch.onnx._internal.torchscript_exporter._globals import GLOBALS

        return GLOBALS.export_onnx_opset_version
    frame = sys._getframe()
    while frame := frame.f_back:  # type: ignore[assignment]
        if frame.f_code.co_name == "export_compat" and (asked := frame.f_locals.get("opset_version")) is not None:
            return int(asked)
    return RMS_NORMALIZATION
