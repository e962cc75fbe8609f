// The only file with the gradients of a norm of which the output was kept, not the input.
#include <cstring>
#include <limits>

#include "run.h"

namespace rmsnorm {
namespace {

// 1 / gain, row by row in the gain's own order; 0 for a gain of 0, which columns beyond the last have, too.
template <class S>
void invert(const WeightRows& gain, char* inverse, int64_t stride, int64_t count) {
  for (int64_t row = 0; row < gain.count; ++row) {
    const S* from = reinterpret_cast<const S*>(gain.data + row * gain.stride);
    S* to = reinterpret_cast<S*>(inverse + row * stride);
    for (int64_t i = 0; i < count; ++i) to[i] = from[i] == S(0) ? S(0) : S(1) / from[i];
  }
}

std::tuple<Tensor, Tensor> add_rms_norm_lean_backward(Tensor grad, OptionalTensor grad_sum, OptionalTensor grad_rstd,
                                                      Tensor output, Tensor rstd, OptionalTensor weight, int64_t dims,
                                                      double offset, bool need_input, bool need_weight) {
  check_same(grad, output, "grad");
  if (grad_sum) check_same(*grad_sum, output, "grad_sum");
  const Type type = type_of(output);
  const Shape shape(output, dims);
  if (grad_rstd) check_statistic(*grad_rstd, output, shape, wide(type), "grad_rstd");
  const Gain gain = gain_or_ones(weight, offset, output, shape, Gain::kBackward);
  Backward b = {};
  // An input that needs no gradient beside a weight that does is the first layer's of a model, if any: not worth a
  // kernel of its own.
  b.gain = gain.rows, b.need_weight = need_weight && weight, b.need_input = need_input || b.need_weight;
  const int64_t stride = padded(shape.columns) * size_of(wide(type));
  const Lines inverse(gain.rows.count * stride);
  b.inverse = {inverse.get(), gain.rows.count, stride};
  const int64_t count = type == Type::bf16 ? padded(shape.columns) : shape.columns;
  if (output.numel() == 0) std::fill_n(inverse.get(), gain.rows.count * stride, 0);  // nor has the weight
  else if (type == Type::f64) invert<double>(gain.rows, inverse.get(), stride, count);
  else invert<float>(gain.rows, inverse.get(), stride, count);
  OptionalTensor more;  // in fp64, as a kernel reads what there is once a row beside 1/rms
  if (grad_rstd) {
    const Tensor given = with_plain_rows(*grad_rstd, 0);
    more = empty_statistic(output, dims, Type::f64);
    double* to = reinterpret_cast<double*>(data_of(*more));
    if (type == Type::f64) std::copy_n(reinterpret_cast<const double*>(data_of(given)), given.numel(), to);
    else std::copy_n(reinterpret_cast<const float*>(data_of(given)), given.numel(), to);
  }
  const Tensor grad_input = b.need_input ? empty_like(output, type) : none(type);
  const Tensor grad_weight = b.need_weight ? empty_like(*weight, type_of(*weight)) : none(type);
  run_backward(*gain.target, b, &grad, address(grad_sum), output, nullptr, rstd, address(more), shape, grad_input,
               nullptr, {b.need_weight ? &grad_weight : nullptr, nullptr});
  return {need_input ? grad_input : none(type), grad_weight};
}

std::tuple<Tensor, Tensor> rms_norm_lean_backward(Tensor grad, OptionalTensor grad_rstd, Tensor output, Tensor rstd,
                                                  OptionalTensor weight, int64_t dims, double offset, bool need_input,
                                                  bool need_weight) {
  return add_rms_norm_lean_backward(std::move(grad), std::nullopt, std::move(grad_rstd), std::move(output),
                                    std::move(rstd), std::move(weight), dims, offset, need_input, need_weight);
}

// Numbers without a sign compare as integers of their bits do, and a NaN is larger than all: lanes of them, which a
// compiler can keep in registers, take a tenth of the time of numbers that are compared one after the other.
template <class Bits, class S>
std::tuple<double, double> span_of(const char* weight, Type type, int64_t elements, double offset) {
  constexpr int64_t lanes = 8, most = 256;
  alignas(64) S formed[most];
  Bits smallest[lanes], largest[lanes] = {};
  std::fill_n(smallest, lanes, std::numeric_limits<Bits>::max());
  for (int64_t done = 0, count; done < elements; done += count) {
    count = std::min(most, elements - done);
    current_target().make_gain(Type::none, type, weight + done * size_of(type), offset, wide(type), formed, count);
    for (int64_t i = count; i % lanes; ++i) formed[i] = formed[0];
    for (int64_t i = 0; i < count; i += lanes) {
      for (int64_t k = 0; k < lanes; ++k) {
        Bits bits;
        std::memcpy(&bits, formed + i + k, sizeof(bits));
        bits &= std::numeric_limits<Bits>::max();
        smallest[k] = bits < smallest[k] ? bits : smallest[k];
        largest[k] = bits > largest[k] ? bits : largest[k];
      }
    }
  }
  S found[2];
  std::memcpy(found, std::min_element(smallest, smallest + lanes), sizeof(S));
  std::memcpy(found + 1, std::max_element(largest, largest + lanes), sizeof(S));
  return {found[0], found[1]};
}

// The smallest and the largest |offset + weight|, formed as the kernels form it; the largest is NaN if there is one.
std::tuple<double, double> gain_span(Tensor weight, double offset) {
  const Tensor plain = with_plain_rows(weight, 0);
  const Type type = type_of(plain);
  if (plain.numel() == 0) return {std::numeric_limits<double>::infinity(), 0.0};
  const char* data = data_of(plain);
  return type == Type::f64 ? span_of<int64_t, double>(data, type, plain.numel(), offset)
                           : span_of<int32_t, float>(data, type, plain.numel(), offset);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rmsnorm, CPU, m) {
  m.impl("rms_norm_lean_backward", TORCH_BOX(&rms_norm_lean_backward));
  m.impl("add_rms_norm_lean_backward", TORCH_BOX(&add_rms_norm_lean_backward));
  m.impl("gain_span", TORCH_BOX(&gain_span));
}

}  // namespace rmsnorm
