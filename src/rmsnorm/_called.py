"""The only file that writes C++: how code that Inductor compiles calls our kernels, past torch's dispatcher.

From Python to an operator and back takes 3 µs, as long as the norm of four rows of 4096; Inductor's own kernels are
called in less than one, with pointers. ``csrc/graph_ops.cpp`` takes those, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, isnan

import torch

from . import _native

_TYPES = {None: 0, torch.float32: 1, torch.float64: 2, torch.bfloat16: 3, torch.float16: 4}
Value = str | int | float | bool | torch.dtype | None
"""Of a field: text of C++'s, or as Python has it."""


@dataclass(frozen=True)
class Entry:
    """A function of the library, and the struct that it takes."""

    symbol: str
    """Its number changes with the struct, as compiled code is kept on disk."""
    kinds: Mapping[str, int]
    """What it does, by the names of operators."""
    numbers: tuple[str, ...]
    floats: tuple[str, ...]
    read: tuple[str, ...]
    written: tuple[str, ...]
    more: Mapping[str, str]
    """Further fields, as C++ declares them."""

    @property
    def fields(self) -> tuple[str, ...]:
        return *self.numbers, *self.floats, *self.read, *self.written, *self.more

    @property
    def preamble(self) -> str:
        """C++ before :meth:`statement`. The library is asked for by name, not by its path: compiled code outlives an
        installation."""
        return f"""
#include <cstdint>
#include <stdexcept>
#include <dlfcn.h>
namespace rmsnorm {{
struct Call {{
  int64_t {", ".join(self.numbers)};
  double {", ".join(self.floats)};
  const void {", ".join("*" + name for name in self.read)};
  void {", ".join("*" + name for name in self.written)};
{"".join(f"  {field};{chr(10)}" for field in self.more.values())}}};
static void run(const Call& call) {{
  static const auto kernel = (void (*)(const void*))dlsym(RTLD_DEFAULT, "{self.symbol}");
  if (!kernel) throw std::runtime_error("rmsnorm: made for another version of the library; compile it anew");
  kernel(&call);
}}
}}  // namespace rmsnorm
"""

    def statement(self, values: Mapping[str, Value]) -> str:
        """C++ that runs a call: fields of the struct by their names."""
        assert set(values) <= set(self.fields), values
        given = (f".{name} = {self._text(name, values[name])}" for name in self.fields if name in values)
        return f"rmsnorm::run({{{', '.join(given)}}});"

    def _text(self, name: str, value: Value) -> str:
        if name.endswith("type"):
            return str(_TYPES[value])  # type: ignore[index]
        if isinstance(value, str):
            return value
        return number(float(value)) if name in self.floats else str(int(value))  # type: ignore[arg-type]


def number(value: float) -> str:
    """As C++ has it, infinity and NaN without a header."""
    if isfinite(value):
        return repr(value)
    return '__builtin_nan("")' if isnan(value) else "__builtin_inf()" if value > 0 else "-__builtin_inf()"


ROWS = Entry(
    symbol="rmsnorm_rows_2",
    kinds={
        "rms_norm": 0,
        "add_rms_norm": 1,
        "rms_norm_add": 2,
        "sandwich_rms_norm": 3,
        "rms_norm_times": 4,
        "scale_rms_norm": 5,
        "add_rms_norm_cast": 1,
    },
    numbers=(
        *("kind", "input_type", "output_type", "weight_type", "next_weight_type"),
        *("round_first", "rows", "columns"),
    ),
    floats=("eps", "next_eps", "offset", "factor"),
    read=("input", "residual", "weight", "next_weight"),
    written=("output", "sum", "rstd", "next_rstd"),
    more={"rest": "void (*rest)(void*, int64_t, int64_t, void*)", "context": "void* context"},
)
GRADIENTS = Entry(
    symbol="rmsnorm_gradients_3",
    kinds={
        "rms_norm_backward": 0,
        "rms_norm_add_backward": 0,
        "sandwich_rms_norm_backward": 1,
        "rounded_rms_norm_backward": 0,
        "rounded_sandwich_rms_norm_backward": 1,
        "around_rms_norm_backward": 0,
        "few_rms_norm_backward": 0,
        "turned_rms_norm_backward": 0,
    },
    numbers=("kind", "input_type", "weight_type", "next_weight_type", "round_sum", "rows", "columns"),
    floats=("eps", "next_eps", "offset"),
    read=("input", "sum", "grad", "grad_sum", "rstd", "next_rstd", "weight", "next_weight"),
    written=("grad_input", "grad_residual", "grad_weight", "grad_next_weight"),
    more={
        **{step: f"void (*{step})(void*, int64_t, int64_t, void*)" for step in ("before", "after")},
        **{step: f"void* {step}" for step in ("before_context", "after_context")},
    },
)

HEADS = Entry(
    symbol="rmsnorm_heads_1",
    kinds={"heads_rms_norm_rope": 0},
    numbers=(
        *("input_type", "weight_type", "angle_type", "round_first", "interleaved"),
        *("batch", "heads", "tokens", "columns", "turned", "input_batch", "input_head", "input_token"),
        *("cos_batch", "cos_token", "sin_batch", "sin_token"),
    ),
    floats=("eps", "offset"),
    read=("input", "cos", "sin", "weight"),
    written=("output", "rstd"),
    more={},
)


ASK = """
namespace rmsnorm {
template <class T>
inline void ask(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(from + i, 0, 2);
}
}  // namespace rmsnorm
"""
"""C++ that asks for elements to come into L2."""


def ready() -> bool:
    """Whether the library is there, and found by its name from now on."""
    return all(_native.publish(entry.symbol) for entry in (ROWS, GRADIENTS, HEADS))


def is_known(dtype: torch.dtype) -> bool:
    return dtype in _TYPES
