"""The only file that writes C++: how code that Inductor compiles calls our kernels, past torch's dispatcher.

From Python to an operator and back takes 3 µs, as long as the norm of four rows of 4096; Inductor's own kernels are
called in less than one, with pointers. ``csrc/graph_ops.cpp`` takes those, too.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from . import _native

SYMBOL = "rmsnorm_rows_1"
"""The entry of the library; its number changes with the struct below, as compiled code is kept on disk."""
KINDS = {"rms_norm": 0, "add_rms_norm": 1, "rms_norm_add": 2, "sandwich_rms_norm": 3}
_TYPES = {None: 0, torch.float32: 1, torch.float64: 2, torch.bfloat16: 3, torch.float16: 4}
_NUMBERS = ["kind", "type", "output_type", "weight_type", "next_weight_type", "round_first", "rows", "columns"]
_FLOATS = ["eps", "next_eps", "offset"]
_READ = ["x", "residual", "weight", "next_weight"]
_WRITTEN = ["output", "sum", "rstd", "next_rstd"]

# The library is asked for by name, not by its path: compiled code outlives an installation.
PREAMBLE = f"""
#include <cstdint>
#include <stdexcept>
#include <dlfcn.h>
namespace rmsnorm {{
struct Rows {{
  int64_t {", ".join(_NUMBERS)};
  double {", ".join(_FLOATS)};
  const void {", ".join("*" + name for name in _READ)};
  void {", ".join("*" + name for name in _WRITTEN)};
  void (*rest)(void*, int64_t, int64_t, void*);
  void* context;
}};
static void run(const Rows& rows) {{
  static const auto kernel = (void (*)(const void*))dlsym(RTLD_DEFAULT, "{SYMBOL}");
  if (!kernel) throw std::runtime_error("rmsnorm: made for another version of the library; compile it anew");
  kernel(&rows);
}}
}}  // namespace rmsnorm
"""


def ready() -> bool:
    """Whether the library is there, and found by its name from now on."""
    return _native.publish(SYMBOL)


def is_known(dtype: torch.dtype) -> bool:
    return dtype in _TYPES


def statement(values: Mapping[str, str | int | float | bool | torch.dtype | None]) -> str:
    """C++ that runs a call: fields of the struct by their names, as text of C++'s or as Python has them."""
    fields = [*_NUMBERS, *_FLOATS, *_READ, *_WRITTEN, "rest", "context"]
    assert set(values) <= set(fields), values
    return (
        f"rmsnorm::run({{{', '.join(f'.{name} = {_text(name, values[name])}' for name in fields if name in values)}}});"
    )


def _text(name: str, value: str | int | float | bool | torch.dtype | None) -> str:
    if name.endswith("type"):
        return str(_TYPES[value])  # type: ignore[index]
    if isinstance(value, str):
        return value
    return repr(float(value)) if name in _FLOATS else str(int(value))  # type: ignore[arg-type]
