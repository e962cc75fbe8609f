"""The only file that writes C++: how code that Inductor compiles calls our kernels, past torch's dispatcher.

From Python to an operator and back takes 3 µs, as long as the norm of four rows of 4096; Inductor's own kernels are
called in less than one, with pointers. ``csrc/graph_ops.cpp`` takes those, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP

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
        return repr(float(value)) if name in self.floats else str(int(value))  # type: ignore[arg-type]


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
    symbol="rmsnorm_gradients_2",
    kinds={
        "rms_norm_backward": 0,
        "rms_norm_add_backward": 0,
        "sandwich_rms_norm_backward": 1,
        "rounded_rms_norm_backward": 0,
        "rounded_sandwich_rms_norm_backward": 1,
        "around_rms_norm_backward": 0,
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
LOCAL = 65536
"""Bytes of rows that are normed before the rest is done with them, as ``csrc/graph_ops.cpp`` has it."""

_STEPS = (
    f"""
#include <torch/csrc/inductor/cpp_prefix.h>
{ASK}"""
    """
namespace rmsnorm {
using Floats = at::vec::VectorizedN<float, 2>;
template <class T>
inline Floats load(const T* from, int64_t count) {
  if constexpr (std::is_same_v<T, float>) return Floats::loadu(from, count);
  else return at::vec::convert<float, 2, T, 1>(at::vec::Vectorized<T>::loadu(from, count));
}
template <class T>
inline void store(T* to, const Floats& values, int64_t count) {
  if constexpr (std::is_same_v<T, float>) values.store(to, count);
  else at::vec::convert<T, 1, float, 2>(values).store(to, count);
}
template <class F>
inline void each(int64_t begin, int64_t end, F f) {
  constexpr int64_t size = Floats::size();
  for (; end - begin >= size; begin += size) f(begin, size);
  if (begin < end) f(begin, end - begin);
}
template <class F>
void step(void* context, int64_t begin, int64_t end, void* rows) {
  (*static_cast<F*>(context))(begin, end, rows);
}
}  // namespace rmsnorm
"""
)


def around(
    types: Mapping[str, torch.dtype], scale: float | None, columns: str, cold: Sequence[str]
) -> tuple[str, str, dict[str, str]]:
    """What is done around the kernel of gradients: C++ before functions, in them before the call, and its fields.

    Args:
        types: of ``input``, and of those that are read or written: ``grad``, ``other``, ``output``.
        scale: of the input's gradient.
        columns: of a row, as C++ has them.
        cold: what is read from memory, if other rows come. What the kernel reads of those is asked for in these loops,
            as a kernel that walks a row from its end meets no CPU that looks ahead (512x4096: scaled bfloat16 from
            1.24 of Inductor's time to 0.93, cast float32 from 1.19 to 1.02, a product's float32 from 0.83 to 0.69).
    """
    own = DTYPE_TO_CPP[types["input"]]
    local, steps = f"static_cast<{own}*>(rows) + i - begin * {columns}", {}

    def at(name: str, index: str = "i", kind: str = "const ") -> str:
        return f"static_cast<{kind}{DTYPE_TO_CPP[types.get(name, types['input'])]}*>({name}) + {index}"

    def ask(names: Sequence[str]) -> list[str]:
        return [f"rmsnorm::ask({at(name, f'i + (end - begin) * {columns}')}, count);" for name in names]

    def times(name: str) -> str:
        return f"g * rmsnorm::load({at(name)}, count)"

    if types["grad"] is not types["input"] or "other" in types:
        kernels = [name for name in cold if name != "grad"]
        steps["before"] = [*ask(kernels), f"const auto g = rmsnorm::load({at('grad')}, count);"]
        steps["before"] += [f"rmsnorm::store({local}, {times('other') if 'other' in types else 'g'}, count);"]
        if "output" in types:
            steps["before"] += [f"rmsnorm::store({at('grad_other', kind='')}, {times('output')}, count);"]
    if scale is not None:
        product = f"rmsnorm::load({local}, count) * rmsnorm::Floats(static_cast<float>({scale!r}))"
        asked = [] if "before" in steps else ask(cold)
        steps["after"] = [*asked, f"rmsnorm::store({local}, {product}, count);"]
    loop = f"rmsnorm::each(begin * {columns}, end * {columns}, [&](int64_t i, int64_t count)"
    code = [
        f"auto {name} = [&](int64_t begin, int64_t end, void* rows) {{ {loop} {{ {' '.join(lines)} }}); }};\n  "
        for name, lines in steps.items()
    ]
    fields = {name: f"rmsnorm::step<decltype({name})>" for name in steps}
    return _STEPS, "".join(code), fields | {f"{name}_context": f"&{name}" for name in steps}


def ready() -> bool:
    """Whether the library is there, and found by its name from now on."""
    return all(_native.publish(entry.symbol) for entry in (ROWS, GRADIENTS, HEADS))


def is_known(dtype: torch.dtype) -> bool:
    return dtype in _TYPES
