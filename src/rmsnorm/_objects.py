"""The only file that writes C++ which takes tensors as Python has them: what a graph's code would ask of each before a
kernel, and room for what it writes, in one call.

Of a row of 4096, where a kernel takes 0.7 µs, Inductor's wrapper looks at the sizes of each tensor in 0.3, and asks for
memory in 0.45; here that is 0.03 and 0.3. For sizes that are known when it is compiled.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch._inductor.async_compile import get_compile_threads
from torch._inductor.codecache import CppPythonBindingsCodeCache, LambdaFuture

Shape = tuple[Sequence[Any], Sequence[Any]]
"""Sizes and strides: numbers, or Inductor's symbols."""
COMPILED = "rmsnorm_compiled"
IMPORT = f"from rmsnorm._objects import compiled as {COMPILED}"
"""How a wrapper comes to :func:`compiled`, and calls it."""

# A tensor as DLPack 1 lays it out, and the beginning of torch's table of functions (csrc/python.h has both, too).
_LOOKS = """
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <initializer_list>
#include <stdexcept>
#include <string>
namespace rmsnorm {
struct View {
  char* data;
  int32_t device_type, device_id, ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct Table {
  uint32_t major, minor;
  const void *previous, *allocate, *own, *to_object;
  int (*view)(void*, View*);
};
inline const Table* find() {
  PyObject* const torch = PyImport_ImportModule("torch");
  PyObject* const tensor = torch ? PyObject_GetAttrString(torch, "Tensor") : nullptr;
  PyObject* const table = tensor ? PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__") : nullptr;
  const void* const found = table ? PyCapsule_GetPointer(table, "dlpack_exchange_api") : nullptr;
  for (PyObject* one : {torch, tensor, table}) Py_XDECREF(one);
  if (!found) throw std::runtime_error("rmsnorm: this torch shows no tensors; compile it anew");
  return static_cast<const Table*>(found);
}
inline View look(PyObject* tensor) {
  static const Table* const table = find();
  View view;
  if (table->view(tensor, &view)) throw std::runtime_error("rmsnorm: torch doesn't show a tensor");
  return view;
}
inline char* given(const char* name, PyObject* tensor, std::initializer_list<int64_t> sizes,
                   std::initializer_list<int64_t> strides) {
  const View view = look(tensor);
  bool same = view.ndim == static_cast<int32_t>(sizes.size());
  for (int32_t d = 0; same && d < view.ndim; ++d) {
    const int64_t size = sizes.begin()[d];
    same = view.shape[d] == size && (size == 1 || view.strides[d] == strides.begin()[d]);
  }
  if (!same) throw std::runtime_error("rmsnorm: compiled for other sizes or strides of " + std::string(name));
  return view.data + view.byte_offset;
}
template <int count>
struct Made {
  explicit Made(PyObject* rooms) {
    for (int i = 0; i < count; ++i) {
      tensors[i] = PyObject_Call(PyTuple_GET_ITEM(rooms, 0), PyTuple_GET_ITEM(rooms, i + 1), nullptr);
      if (!tensors[i]) return;
    }
  }
  Made(const Made&) = delete;
  ~Made() {
    for (PyObject* tensor : tensors) Py_XDECREF(tensor);
  }
  explicit operator bool() const { return tensors[count - 1]; }
  char* operator[](int i) const { return look(tensors[i]).data; }
  PyObject* hand_on() {
    if constexpr (count == 1) return Py_NewRef(tensors[0]);
    PyObject* const all = PyTuple_New(count);
    for (int i = 0; all && i < count; ++i) PyTuple_SET_ITEM(all, i, Py_NewRef(tensors[i]));
    return all;
  }
  PyObject* tensors[count] = {};
};
}  // namespace rmsnorm
"""


class _Objects(CppPythonBindingsCodeCache):
    """Code whose function takes and returns objects, as Inductor's own class for wrappers in C++ has it."""

    cache: dict[str, Any] = {}  # noqa: RUF012 - Inductor's
    call_entry_function = "return kernel({});"
    extra_parse_arg = """
template <> inline PyObject* parse_arg<PyObject*>(PyObject* args, size_t n) {{ return PyTuple_GET_ITEM(args, n); }}
"""


def serves(shapes: Collection[Shape]) -> bool:
    """Whether they are known, none of them is empty, and torch shows tensors to C++."""
    fixed = all(isinstance(one, int) or one.is_Integer for shape in shapes for values in shape for one in values)
    return fixed and all(0 not in sizes for sizes, _ in shapes) and hasattr(torch.Tensor, "__dlpack_c_exchange_api__")


def asks(line: Any, names: Sequence[str]) -> bool:
    """Whether Inductor's wrapper would look there at sizes and strides of one of these, as the kernel does."""
    return type(line).__name__ == "AssertSizeStrideLine" and line.name in names


def compiled(wrapper: Any, arguments: int, code: str) -> Any:
    """What :func:`code` becomes, or its future: code of Inductor's calls this, with its ``async_compile``."""
    types = ["PyObject*"] * arguments
    if get_compile_threads() <= 1:
        return _Objects.load_pybinding(types, code)
    return LambdaFuture(_Objects.load_pybinding_async(types, code, submit_fn=wrapper.submit))


def code(preamble: str, statement: str, read: Mapping[str, Shape], written: Sequence[str]) -> str:
    """C++ of a ``kernel(rooms, *read)``, which returns what is written: ``statement`` has pointers by these names.

    Rooms are a function that makes a tensor, and its arguments for each.
    """
    parameters = "".join(f", PyObject* {label}_given" for label in read)
    lines = [f"rmsnorm::Made<{len(written)}> made(rooms);", "if (!made) return nullptr;"]
    for label, (sizes, strides) in read.items():
        lines.append(
            f'const void* const {label} = rmsnorm::given("{label}", {label}_given, {_list(sizes)}, {_list(strides)});'
        )
    lines += [f"void* const {label} = made[{i}];" for i, label in enumerate(written)]
    body = "\n  ".join([*lines, statement, "return made.hand_on();"])
    return f'{_LOOKS}{preamble}\nextern "C" PyObject* kernel(PyObject* rooms{parameters}) {{\n  {body}\n}}\n'


def _list(values: Sequence[int]) -> str:
    return f"{{{', '.join(map(str, values))}}}"
