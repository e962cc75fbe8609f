"""The only file that knows who else may want a norm: tracers, exporters, and tensors with a dispatch of their own.

Our operators are nodes of graphs that stay in this process. What leaves it (TorchScript, ``torch.export``, ONNX) has to
run where nobody has heard of us, and to be trained there; and a subclass that unwraps itself knows torch's operators,
not ours. For them the norm is ``F.rms_norm`` where that means the same, else the formula of ``reference.py``: torch's
operators either way, with torch's derivatives. Inductor gets the same, if it is to write the code (``_graphs.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.compiler import is_dynamo_compiling

from . import _form, _graphs, _onnx, reference

# Those of torch's compiler: what they trace is compiled here, and our operators are its nodes.
COMPILERS = frozenset({Tensor, torch.nn.Parameter, type(None), FakeTensor, FunctionalTensor})
_NO_DISPATCH = Tensor.__torch_dispatch__


def wanted_by(*tensors: Any) -> bool:
    """Whether one of the above wants a norm of these tensors."""
    if torch.compiler._is_exporting_flag:
        return True
    if is_dynamo_compiling():
        if _graphs.hands_over():
            return True
    elif torch._C._get_tracing_state() is not None:
        return True
    for tensor in tensors:  # not any(...): 0.3 µs of each call
        cls = type(tensor)
        if cls not in COMPILERS and cls.__torch_dispatch__ is not _NO_DISPATCH:
            return True
    return False


def not_to_be_kept(*tensors: Tensor | None) -> bool:
    """Whether one was made in inference mode: it can't be kept for backward. The formula keeps others."""
    return not is_dynamo_compiling() and any(t is not None and t.is_inference() for t in tensors)


def rms_norm(input: Tensor, weight: Tensor | None, dims: int, eps: float, offset: float, round_first: bool) -> Tensor:
    """The norm in torch's operators; the arguments are those of the operator ``rms_norm``."""
    if torch.onnx.is_in_onnx_export():
        return _onnx.rms_norm(input, weight, dims, eps, offset, round_first)
    if eps >= 0 and reference.is_torchs(input, weight, dims, offset, round_first):
        return F.rms_norm(input, sizes(input, dims), weight, eps)
    return reference.rms_norm(input, weight, dims, eps, offset, round_first)[0]


def sizes(input: Tensor, dims: int) -> tuple[int, ...]:
    """The last sizes, as constants of the graph: to ``torch.jit.trace`` those of a tensor are tensors, too."""
    if is_dynamo_compiling():
        return tuple(input.shape[input.dim() - dims :])
    with untraced():
        return tuple(input.shape[input.dim() - dims :])


@contextmanager
def untraced() -> Iterator[None]:
    """Sizes are numbers here, to ``torch.jit.trace`` too."""
    state: Any = torch._C._get_tracing_state()
    trace: Any = torch._C._set_tracing_state  # type: ignore[attr-defined]
    trace(None)
    try:
        yield
    finally:
        trace(state)


def _traced(
    input: Tensor, weight: Tensor | None, dims: int, eps: float, offset: float = 0.0, round_first: bool = False
) -> Tensor:
    return rms_norm(input, weight, dims, eps, offset, round_first)


def _traced_weighted(input: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm(input, weight, weight.dim(), eps, 0.0, False)


def _traced_rounded(input: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm(input, weight, weight.dim(), eps, 0.0, True)


# While torch.jit.trace records, the operators of an everyday call come here: to ask in Python whether it does would
# cost each of them 50 ns. What is called inside is recorded in turn.
_form.library.impl("rms_norm", _traced, "Tracer")
_form.library.impl("rms_norm_weighted", _traced_weighted, "Tracer")
_form.library.impl("rms_norm_rounded", _traced_rounded, "Tracer")
