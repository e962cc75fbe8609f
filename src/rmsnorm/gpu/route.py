"""The only file that decides what serves a GPU: torch's fused kernel, ours in Triton, or the definition.

================================================================  ====================================
the call                                                          is served by
================================================================  ====================================
means what ``aten::_fused_rms_norm`` means (see ``_plain``)       torch; Triton if RMSNORM_CUDA=triton
any other of the four floating types: llama, offset, add, …       Triton
what Triton can't serve: no Triton, no such device, empty, …      torch if it can, else ``reference.py``
a floor (a negative eps)                                          ``reference.py``
================================================================  ====================================

Either way the same is kept for backward: x, the weight, one fp32 (fp64) per row. torch goes first where it can because
a call of ours took 52 µs of Python and torch's 9, though less of the device's time, and the call in C++ that there is
now (launcher.py) has not been timed on a GPU (docs/gpu.md). C++ decides an everyday call by the same rule. ROCm answers
to CUDA's name; other devices (MPS, …) have the definition. Triton is imported by the first call that needs it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import _ops, reference
from .._extras import extra_line

CHOICES = ("torch", "triton")
KEYS = ("CUDA", "XPU")
_TYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
_MOST_WEIGHT_ROWS = 65535  # the second dimension of a grid


@functools.cache
def choice() -> str:
    """What RMSNORM_CUDA says; read once.

    Raises:
        ValueError: it says something else than ``torch`` or ``triton``.
    """
    chosen = os.environ.get("RMSNORM_CUDA", "") or "torch"
    if chosen not in CHOICES:
        raise ValueError(f"RMSNORM_CUDA={chosen!r} is not a choice: set it to {' or '.join(CHOICES)}, or unset it")
    if chosen == "triton" and not has_triton():
        warnings.warn(f"RMSNORM_CUDA=triton has no effect: Triton is missing; {extra_line('gpu')}", stacklevel=2)
    return chosen


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def runs_triton(device: torch.device) -> bool:
    """Whether our Triton kernels run there: compute capability 8.0 or more, any ROCm, an XPU with fp64."""
    if not has_triton():
        return False
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "xpu" and bool(torch.xpu.get_device_properties(device).has_fp64)


def fused_by_torch(
    input: Tensor, weight: Tensor | None, dims: int, offset: float, round_first: bool, more: Tensor | None = None
) -> bool:
    """Whether torch's fused kernel has this meaning; ``more`` is what is added before or after."""
    return more is None and reference.is_torchs(input, weight, dims, offset, round_first)


def served(input: Tensor) -> bool:
    return input.dtype in _TYPES and runs_triton(input.device)


def fits(input: Tensor, weight: Tensor | None, dims: int) -> bool:
    """Whether the kernels take the weight."""
    if weight is None:
        return True
    if not reference.spans(weight, input, dims) or weight.device != input.device:
        return False
    narrower = weight.dtype is not torch.float64 or input.dtype is torch.float64
    rows = weight.numel() // max(1, input.shape[input.dim() - dims :].numel())
    return weight.dtype in _TYPES and narrower and rows <= _MOST_WEIGHT_ROWS


def route(input: Tensor, weight: Tensor | None, dims: int, fused: bool, eps: float = 0.0) -> str:
    """``"torch"``, ``"triton"`` or ``"reference"``; ``fused`` is what :func:`fused_by_torch` says."""
    _ops._check(input, weight, dims)
    if not input.numel() or eps < 0:
        return "reference"
    if fused and choice() == "torch":
        return "torch"
    return "triton" if served(input) and fits(input, weight, dims) else "torch" if fused else "reference"


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return nullcontext() if device.type == "cpu" else torch.accelerator.device_index(device.index)


def rms_norm_forward(
    input: Tensor,
    weight: Tensor | None,
    dims: int,
    eps: float,
    offset: float = 0.0,
    round_first: bool = False,
    keep: bool = True,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator. For the others: ``keep=False`` leaves 1/rms out, and a contiguous ``out`` may be written to."""
    where = route(input, weight, dims, fused_by_torch(input, weight, dims, offset, round_first), eps)
    if where == "torch":
        return torch.ops.aten._fused_rms_norm.default(input, input.shape[input.dim() - dims :], weight, eps)
    if where == "reference":
        return reference.rms_norm(input, weight, dims, eps, offset, round_first)
    from . import launch

    with on(input.device):
        output, _, rstd = launch.forward(input, None, weight, dims, eps, offset, round_first, keep, out)
    return output, rstd


def rms_norm(
    input: Tensor, weight: Tensor | None, dims: int, eps: float, offset: float = 0.0, round_first: bool = False
) -> Tensor:
    return rms_norm_forward(input, weight, dims, eps, offset, round_first, keep=False)[0]


def rms_norm_out(
    input: Tensor, weight: Tensor | None, dims: int, eps: float, offset: float, round_first: bool, out: Tensor
) -> None:
    _ops.check_out(out, input, weight, round_first)
    into = out if out.is_contiguous() and out.data_ptr() % 16 == 0 else None  # the order of a sum: see launch._matrix
    output, _ = rms_norm_forward(input, weight, dims, eps, offset, round_first, keep=False, out=into)
    if output is not out:
        out.copy_(output)


def rms_norm_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    input: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    need_weight = need_weight and weight is not None
    where = route(input, weight, dims, fused_by_torch(input, weight, dims, offset, False, grad_sum), eps)
    if where == "torch":
        needed = [need_input, need_weight]
        shape = input.shape[input.dim() - dims :]
        both = torch.ops.aten._fused_rms_norm_backward.default(grad, input, shape, rstd, weight, needed)
        dx, dw = (t if need else input.new_empty(0) for t, need in zip(both, needed, strict=True))
        return dx, dw
    arguments = grad, grad_sum, input, rstd, weight, dims, eps, offset, need_input, need_weight
    if where == "reference":
        return _ops._rms_norm_backward(*arguments)
    from . import backward

    with on(input.device):
        return backward.backward(*arguments)
