"""The only file that hands tensors to C++ as objects: everyday norms, past torch's dispatcher.

From Python to an operator and back takes 1.3 µs, this 0.2 (``csrc/handed_ops.cpp``). What the dispatcher does besides
is asked here: whether a mode or a profiler watches, whether a tracer records, whether a tensor shows what its memory
holds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import profiler

from . import _native, _ops

_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_modes, _tracing_state = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state
_is_neg, _written = torch._C.TensorBase.is_neg, _ops.increment_versions


def _made() -> Callable[..., Any] | None:
    """The function in C++, or None: without the library, on a torch without DLPack's exchange table, on other Pythons
    than CPython."""
    try:
        api, table = ctypes.pythonapi, Tensor.__dlpack_c_exchange_api__
        pointer, make = api.PyCapsule_GetPointer, api.PyCFunction_NewEx
        pointer.argtypes, pointer.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
        make.argtypes, make.restype = [ctypes.c_void_p] * 3, ctypes.py_object
        functions = [ctypes.cast(getattr(api, name), ctypes.c_void_p).value for name in _FUNCTIONS.split()]
        method = _native.handed(pointer(table, b"dlpack_exchange_api"), [*functions, *map(id, _OBJECTS)])
    except (AttributeError, ValueError):
        return None
    return make(method, None, None) if method else None


# As `Python` in csrc/handed_ops.cpp has them.
_FUNCTIONS = (
    "PyFloat_AsDouble PyLong_AsLongLong PySequence_Size PySequence_GetItem PyObject_Type PyObject_CallFunctionObjArgs "
    "PyTuple_Pack PyErr_Occurred PyErr_Clear Py_IncRef Py_DecRef PyEval_SaveThread PyEval_RestoreThread"
)
_OBJECTS = None, True, int, torch.empty_like, partial(torch.empty_like, memory_format=torch.contiguous_format)
_norm = _made() or (lambda *given: None)


def norm(
    input: Tensor,
    residual: Tensor | None,
    normalized_shape: Any,
    weight: Tensor | None,
    eps: float | None,
    offset: float,
    round_first: bool,
    out: Tensor | None,
) -> Any:
    """The output of a norm of a plain tensor that nobody records, with a residual ``(output, sum)``, or None: the
    operator is to be asked. With ``out`` beside a residual the sum goes to the residual's place."""
    if (
        _modes()
        or profiler._is_profiler_enabled
        or _tracing_state() is not None
        or _is_neg(input)
        or (weight is not None and (type(weight) not in _PLAIN or _is_neg(weight)))
        or (residual is not None and (type(residual) is not Tensor or _is_neg(residual)))
    ):
        return None
    if out is None:
        return _norm(input, residual, normalized_shape, weight, eps, offset, round_first, None)
    if type(out) is not Tensor or _is_neg(out) or (out.requires_grad and is_grad_enabled()):
        return None
    results = _norm(input, residual, normalized_shape, weight, eps, offset, round_first, out)
    if results is not None:
        _written((out,) if residual is None else (out, residual))
    return results
