"""The only file that writes C++ of what is done around the kernel of a norm's gradients: casts, products, a rotation, a
few rows at a time, while they are in a cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP

from . import _called

_STEPS = (
    f"""
#include <torch/csrc/inductor/cpp_prefix.h>
{_called.ASK}"""
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
template <class T>
inline Floats rounded(const Floats& values) {
  if constexpr (std::is_same_v<T, float>) return values;
  else return at::vec::convert<float, 2, T, 1>(at::vec::convert<T, 1, float, 2>(values));
}
template <class T>
inline void turn_back(const T* grad, const T* cos, const T* sin, int64_t half, T* to) {
  each(0, half, [&](int64_t i, int64_t count) {
    const int64_t j = i + half;
    const auto a = load(grad + i, count), b = load(grad + j, count);
    const auto at_a = rounded<T>(a * load(cos + i, count)) + rounded<T>(b * load(sin + j, count));
    const auto at_b = rounded<T>(b * load(cos + j, count)) - rounded<T>(a * load(sin + i, count));
    store(to + i, at_a, count);
    store(to + j, at_b, count);
  });
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
        product = f"rmsnorm::load({local}, count) * rmsnorm::Floats(static_cast<float>({_called.number(scale)}))"
        asked = [] if "before" in steps else ask(cold)
        steps["after"] = [*asked, f"rmsnorm::store({local}, {product}, count);"]
    loop = f"rmsnorm::each(begin * {columns}, end * {columns}, [&](int64_t i, int64_t count)"
    code = [
        f"auto {name} = [&](int64_t begin, int64_t end, void* rows) {{ {loop} {{ {' '.join(lines)} }}); }};\n  "
        for name, lines in steps.items()
    ]
    fields = {name: f"rmsnorm::step<decltype({name})>" for name in steps}
    return _STEPS, "".join(code), fields | {f"{name}_context": f"&{name}" for name in steps}


def turned(
    dtype: torch.dtype, heads: int, tokens: int, columns: int, strides: Mapping[str, Sequence[int]]
) -> tuple[str, str, dict[str, str]]:
    """The same of heads whose gradient is turned back before the kernel; strides are by batch, head and token."""
    places = {
        name: f"static_cast<const {DTYPE_TO_CPP[dtype]}*>({name}) + batch * {a} + head * {b} + token * {c}"
        for name, (a, b, c) in strides.items()
    }
    to = f"static_cast<{DTYPE_TO_CPP[dtype]}*>(rows) + (row - begin) * {columns}"
    code = f"""auto before = [&](int64_t begin, int64_t end, void* rows) {{
    for (int64_t row = begin; row < end; ++row) {{
      const int64_t head = row % {heads}, token = row / {heads} % {tokens}, batch = row / {heads * tokens};
      rmsnorm::turn_back({places["grad"]}, {places["cos"]}, {places["sin"]}, {columns // 2}, {to});
    }}
  }};
  """
    return _STEPS, code, {"before": "rmsnorm::step<decltype(before)>", "before_context": "&before"}
