"""The only file that hands tensors to C++ as objects: everyday norms, and kernels of any form, past torch's dispatcher.

From Python to an operator and back takes 1.3 µs, this 0.2 (``csrc/handed_ops.cpp``). What the dispatcher does besides
is asked there: whether a mode or a profiler watches, whether a tracer records, whether a tensor shows what its memory
holds. In a single call, as each question from Python is one of its own.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler
from torch.overrides import has_torch_function_variadic

from . import _arguments, _native, _ops

_Call = Callable[..., Any]
KINDS = {"rms_norm": 0, "add_rms_norm": 1, "rms_norm_add": 2, "sandwich_rms_norm": 3, "layer_norm": 6}
"""Forms that are served, by the names of their operators: numbers of ``csrc/called.h``."""
FEW = 32768
"""Elements of a row or a few, for one thread: up to there 1/rms is sooner found again than kept."""
recorder: list[_Call] = []
"""What records ``few``: ``_eager.py`` has it."""


def _made() -> tuple[_Call, ...]:
    """The functions in C++, or none: without the library, on a torch without DLPack's exchange table or whose contexts
    keep what they keep elsewhere, on other Pythons than CPython."""
    if not all(hasattr(torch._C._FunctionBase, name) for name in ("to_save", "materialize_grads")):
        return ()
    try:
        api, table = ctypes.pythonapi, Tensor.__dlpack_c_exchange_api__
        pointer, make = api.PyCapsule_GetPointer, api.PyCFunction_NewEx
        pointer.argtypes, pointer.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
        make.argtypes, make.restype = [ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p], ctypes.py_object
        functions = [ctypes.cast(getattr(api, name), ctypes.c_void_p).value for name in _FUNCTIONS.split()]
        given = [*functions, *map(id, _OBJECTS), *_inside()]
        method = _hand(pointer(table, b"dlpack_exchange_api"), given)
    except (AttributeError, ValueError):
        return ()
    size = 4 * ctypes.sizeof(ctypes.c_void_p)  # of PyMethodDef
    return (make(method, recorder, None), make(method + size, None, None)) if method else ()


def _hand(table: int, given: Sequence[int | None]) -> int | None:
    """Fills in what C++ knows of Python; the address of what makes functions of Python's, or None."""
    method: int | None = _native.ask("handed", table, (ctypes.c_void_p * len(given))(*given), len(given))
    return method


def _inside() -> list[int | None]:
    """The addresses of torch's functions in C++, and where in an object its ``at::Tensor`` lies, which is the address
    that ``_cdata`` says. Zeros, if one of them isn't there."""
    tensor, word = torch.empty(0), ctypes.sizeof(ctypes.c_size_t)
    words = [*(ctypes.c_size_t * (Tensor.__basicsize__ // word)).from_address(id(tensor))]
    library = ctypes.CDLL(torch._C.__file__)  # and what it is linked to
    found = [ctypes.cast(one, ctypes.c_void_p).value for name in _INSIDE if (one := getattr(library, name, None))]
    complete = len(found) == len(_INSIDE) and tensor._cdata in words
    key = int(torch._C.DispatchKey.PreDispatch)  # type: ignore[call-overload]
    return [*found, words.index(tensor._cdata) * word, key] if complete else [0] * (len(_INSIDE) + 2)


def _empty(sizes: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="cpu")


# As `Python` in csrc/python.h has them.
_FUNCTIONS = (
    "PyFloat_AsDouble PyLong_AsLongLong PySequence_Size PySequence_GetItem PyObject_Type PyObject_CallFunctionObjArgs "
    "PyTuple_Pack PyTuple_New PyLong_FromLongLong PyFloat_FromDouble PyTuple_SetItem PyObject_GetAttr PyObject_SetAttr "
    "PyErr_Occurred PyErr_Clear Py_IncRef Py_DecRef PyEval_SaveThread PyEval_RestoreThread"
)
_INSIDE = (
    *("_Z16THPVariable_WrapRKN2at10TensorBaseE", "_ZN2at6native6is_negERKNS_6TensorE"),
    *("_ZN2at6native12is_inferenceERKNS_6TensorE", "_ZNK3c1010TensorImpl13requires_gradEv", "_ZN2at12hasCallbacksEv"),
    "_ZN3c104impl28tls_is_dispatch_key_includedENS_11DispatchKeyE",
)
_OBJECTS = (
    *(None, True, False, int, float, 0, -1, FEW, _arguments.MEMORY[0]),
    *(Tensor, torch.nn.Parameter, torch.float32, torch.float64, torch.bfloat16, torch.float16),
    *(getattr(torch._C._dynamo.guards, "_empty_strided_cpu", _empty), _ops.increment_versions),
    *(torch._C.TensorBase.is_neg, has_torch_function_variadic, torch.is_grad_enabled),
    *(torch._C._are_functorch_transforms_active, torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state),
    *(torch._C.TensorBase.is_inference, torch.is_inference_mode_enabled),
    *(torch._C._dispatch_tls_is_dispatch_key_included, torch._C.DispatchKey.PreDispatch),
    *(profiler, "_is_profiler_enabled", forward_ad, "_current_level"),
    *("to_save", "materialize_grads", "eps", "requires_grad"),
)
_functions = _made()
norm: _Call = _functions[0] if _functions else lambda *given: None
"""``(kind, normalized_shape, eps, offset, round_first, out, memory, next_eps, input, residual, weight, next_weight)``,
of which the last may be left out: what the form returns, or None, where the long way is to be asked. It takes whatever
it is given, but must not be called while dynamo traces. With ``out`` beside a residual the sum goes to the residual's
place, and the shape is the weight's, or the last size. The next weight is LayerNorm's bias."""
few = _functions[1:]
"""The forward of what ``recorder`` has, ``(context, input, weight)``."""
# As csrc/straight_ops.cpp has them; the names of what a kernel needs from elsewhere.
_LETTERS = {"Tensor": "T", "Tensor?": "t", "Tensor(a!)": "w", "Tensor(b!)": "w", "int": "i", "float": "f"}
_LETTERS |= {"bool": "b", "ScalarType?": "y", "dims": "d", "eps": "e"}


def straight(name: str, schema: str, **letters: str) -> _Call:
    """What calls an operator's kernel, ``(normalized_shape, *arguments but for dims)``: the results, or None, where the
    operator is to be asked. As ``norm``, it raises nothing, and must not be called while dynamo traces.

    ``letters`` are those of arguments, by their names, that the schema doesn't tell.
    """
    given, _, returned = schema.partition(" -> ")
    kinds = re.findall(r"([^ ,]+) (\w+)", given[1:-1])
    takes = "".join(letters.get(label) or _LETTERS.get(label) or _LETTERS.get(kind, "?") for kind, label in kinds)
    row = ctypes.c_void_p()
    asked = name.encode(), takes.encode(), returned.count("Tensor"), ctypes.byref(row)
    method = _native.ask("straight", *asked) if _functions else None
    return ctypes.pythonapi.PyCFunction_NewEx(method, row.value, None) if method else lambda *given: None
