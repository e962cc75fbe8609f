"""The only file that says whether a tensor may be written to, and words why not: ``out``, and norms in place."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _arguments, _autograd, _ops, reference


def check_out(out: Tensor, input: Tensor, weight: Tensor | None, round_first: bool) -> None:
    """Raises for what is no tensor, or none that the result can be written to."""
    _arguments.check_tensors("rms_norm", out=out)
    _arguments.check_dense("rms_norm", out=out)
    dtype = reference.result_dtype(input, weight, round_first)
    if out.shape != input.shape or out.dtype is not dtype or out.device != input.device:
        raise RuntimeError(
            f"rms_norm: out must have shape {list(input.shape)}, dtype {dtype} and device {input.device}, but has "
            f"shape {list(out.shape)}, dtype {out.dtype} and device {out.device}; it is never resized or converted"
        )
    if _ops.is_expanded(out):
        raise RuntimeError(
            f"rms_norm: several elements of out (shape {list(out.shape)}, strides {list(out.stride())}) are a single "
            "memory location; it was expanded: pass a tensor of its own, e.g. torch.empty_like(input)"
        )
    if not torch.compiler.is_compiling() and (out.is_neg() or out.is_conj()):
        raise RuntimeError(
            f"rms_norm: out is a {'negated' if out.is_neg() else 'conjugate'} view, whose memory holds other values "
            "than it shows; pass a tensor of its own, e.g. torch.empty_like(input), and copy from it"
        )
    check_may_change("rms_norm", "out", out)
    if _autograd.learns(input, weight, out):
        raise RuntimeError(
            "rms_norm: out= does not support automatic differentiation, but one of the arguments requires grad; "
            "drop out=, or call it under torch.no_grad()"
        )


def check_may_change(name: str, label: str, tensor: Tensor) -> None:
    """Raises RuntimeError where torch's operators do: a backward that kept the tensor could not know of the change."""
    if not torch.compiler.is_compiling() and tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{name}: {label} was made under torch.inference_mode(), and may be written to there alone; pass "
            f"{label}.clone(), or call it under torch.inference_mode()"
        )
