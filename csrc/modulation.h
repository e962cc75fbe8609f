// The only file that knows what a modulation is: a scale, shift or gate, and the rows that share it.
//
// It has the sizes of the input, but may have 1 for its last outer dimensions: the rows that differ in those alone lie
// one behind the other, and share it. All modulations of a call are shared alike, in Python's hands.
#pragma once

#include "rows.h"
#include "tensors.h"

namespace rmsnorm {

// How many rows share one; an error for what is neither.
inline int64_t sharing(const Tensor& modulation, const Tensor& input, const Shape& shape) {
  const auto sizes = modulation.sizes(), whole = input.sizes();
  bool fits = modulation.is_cpu() && sizes.size() == whole.size();
  int64_t shared = 1;
  bool alone = false;  // from here on
  for (size_t d = 0; fits && d < whole.size(); ++d) {
    const bool outer = static_cast<int64_t>(d) < shape.outer, same = sizes[d] == whole[d];
    fits = same ? !(alone && outer && whole[d] != 1) : outer && sizes[d] == 1;
    if (fits && !same) alone = true, shared *= whole[d];
  }
  require(fits, "rmsnorm: no native kernel for modulations of such sizes; call rmsnorm.modulated_norm");
  return shared;
}

// The type of modulations: the input's, or fp32 beside a half type where nothing is rounded between.
inline Type modulation_type(const Tensor& modulation, const Tensor& input, bool round_first) {
  const Type type = type_of(modulation), own = type_of(input);
  require(type == own || (type == Type::f32 && size_of(own) == 2 && !round_first),
          "rmsnorm: no native kernel for modulations of another type");
  return type;
}

// Operands whose rows several of the input's may share.
template <int N>
Operands<N> shared_operands(const Tensor& input, int64_t outer, const std::array<const Tensor*, N>& tensors) {
  Operands<N> operands;
  for (int k = 0; k < N; ++k)
    if (tensors[k]) operands.data[k] = data_of(*tensors[k]);
  for (int64_t d = 0; d < outer; ++d) {
    std::array<int64_t, N> step = {};
    for (int k = 0; k < N; ++k)
      if (tensors[k] && tensors[k]->size(d) == input.size(d))
        step[k] = tensors[k]->stride(d) * size_of(type_of(*tensors[k]));
    operands.push(input.size(d), step);
  }
  return operands;
}

// The tensors with rows that can be read in place.
template <int N>
struct Plain {
  std::array<OptionalTensor, N> tensors;
  std::array<const Tensor*, N> addresses;
  Plain(const std::array<const Tensor*, N>& given, int64_t outer) {
    for (int k = 0; k < N; ++k) tensors[k] = with_plain_rows(given[k], outer), addresses[k] = address(tensors[k]);
  }
};

}  // namespace rmsnorm
