// The only file that runs a norm over tensors: says what a kernel is asked, hands rows to the threads, and adds up what
// they found of a weight's gradient.
#pragma once

#include <memory>

#include "gain.h"

namespace rmsnorm {

// Operands are given by their tensors; null where the call has none.
template <int N>
Operands<N> operands_of(const Tensor& input, int64_t outer, const std::array<const Tensor*, N>& tensors) {
  Operands<N> operands;
  std::array<const int64_t*, N> strides = {};
  std::array<int64_t, N> bytes = {};
  for (int k = 0; k < N; ++k) {
    if (!tensors[k]) continue;
    operands.data[k] = data_of(*tensors[k]);
    strides[k] = tensors[k]->strides().data();
    bytes[k] = size_of(type_of(*tensors[k]));
  }
  const auto sizes = input.sizes();
  for (int64_t d = 0; d < outer; ++d) {
    std::array<int64_t, N> step = {};
    for (int k = 0; k < N; ++k)
      if (tensors[k]) step[k] = strides[k][d] * bytes[k];
    operands.push(sizes[d], step);
  }
  return operands;
}

// A gated call, whose gain is that or ones, in the wide type and the kernels' own order, forward and backward.
inline Forward gated(bool silu, bool gate_first, bool round_first, const OptionalTensor& weight, Type input) {
  Forward f = {};
  f.gate = silu ? Gate::silu : Gate::sigmoid, f.gate_first = gate_first, f.round_first = round_first;
  f.round_product = round_first && weight && type_of(*weight) == input;
  return f;
}

// Forward, for all rows of operands that are known.
inline void run_forward(const Forward& f, const Operands<kForwardOperands>& operands, const Target& target,
                        const Statistics& kept) {
  const int64_t bytes = scratch_bytes(f);
  parallel(operands.rows, grain_rows(f.columns), [&](int64_t begin, int64_t end) {
    const Lines scratch = bytes ? Lines(bytes) : Lines();
    forward_rows(target, f, operands, kept, scratch.get(), begin, end);
  });
}

// The same, where what is kept is tensors.
inline void run_forward(const Forward& f, const Operands<kForwardOperands>& operands, const Target& target,
                        const Tensor* rstd, const Tensor* mean, const Tensor* first_rstd = nullptr) {
  const auto data = [](const Tensor* kept) { return kept ? data_of(*kept) : nullptr; };
  run_forward(f, operands, target, {data(rstd), data(first_rstd), reinterpret_cast<double*>(data(mean))});
}

// Calls run(operands), with what tensors say filled in in `f`. `other` is the gate if there is one, else the residual
// or null; the type of the output is in `f`, and there may be none.
template <class Run>
void with_operands(Forward& f, const Tensor& input, const Tensor* other, const Gain& gain, const Shape& shape,
                   const Tensor* output, const Tensor* sum, const Run& run) {
  OptionalTensor copies[2];
  const Tensor& x = plain_rows(input, shape.outer, copies[0]);
  const Tensor* second = other ? &plain_rows(*other, shape.outer, copies[1]) : nullptr;
  const bool gated = f.gate != Gate::none;
  f.columns = shape.columns, f.input = type_of(input);
  f.add = other && !gated && !f.add_after && !f.twice;
  f.gain_type = gain.type, f.gain = gain.rows;
  run(operands_of<kForwardOperands>(x, shape.outer,
                                    {&x, output, gated ? nullptr : second, sum, gated ? second : nullptr}));
}

// 1/rms of each of so many rows, one behind the other, as forward finds it.
inline std::unique_ptr<char[]> inverse_rms(Type type, const char* data, int64_t rows, int64_t columns, double eps) {
  std::unique_ptr<char[]> rstd(new char[rows * size_of(wide(type))]);
  Forward f = {};
  f.columns = f.counted = f.divisor = columns, f.eps = eps;
  f.general = true, f.input = f.x = f.residual = f.sum = type, f.output = Type::none;
  Operands<kForwardOperands> operands;
  operands.data = {const_cast<char*>(data)};
  operands.push(rows, {columns * size_of(type)});
  run_forward(f, operands, current_target(), Statistics{rstd.get(), nullptr, nullptr});
  return rstd;
}

// Forward, of tensors, whose part of `f` is filled in here; `first_rstd` is for two norms.
inline void run_forward(Forward& f, const Tensor& input, const Tensor* other, const Gain& gain, const Shape& shape,
                        const Tensor& output, const Tensor* sum, const Tensor* rstd, const Tensor* mean,
                        const Tensor* first_rstd = nullptr) {
  f.output = type_of(output);
  with_operands(f, input, other, gain, shape, &output, sum,
                [&](const auto& operands) { run_forward(f, operands, *gain.target, rstd, mean, first_rstd); });
}

// Where the gradient of a weight, or of a bias, goes; nobody wants it if there is no data.
struct GradWeight {
  char* data = nullptr;
  Type type = Type::none;
  int64_t count = 0;
  GradWeight() = default;
  GradWeight(char* data, Type type, int64_t count) : data(data), type(type), count(count) {}
  explicit GradWeight(const Tensor* tensor) {
    if (tensor) data = data_of(*tensor), type = type_of(*tensor), count = tensor->numel();
  }
};

// Of two weights, or of a weight and a bias: threads begin once for both.
inline void finish_weights(const Target& target, const std::array<Summands, 2>& summands,
                           const std::array<GradWeight, 2>& to) {
  const auto count = [&](int k) { return to[k].data ? to[k].count : 0; };
  const Summands& any = summands[to[0].data ? 0 : 1];
  parallel(std::max(count(0), count(1)), grain_rows(any.totals_count + any.parts_count),
           [&](int64_t begin, int64_t end) {
             for (int k = 0; k < 2; ++k)
               if (begin < count(k)) target.finish(summands[k], begin, std::min(end, count(k)), to[k].type, to[k].data);
           });
}

// Backward, for all rows of operands that are known. The weight's gradient, and the bias's, come as totals per chunk:
// finish() adds those of the columns asked for.
inline void run_backward(const Target& target, const Backward& b, const Operands<kBackwardOperands>& operands,
                         const char* rstd, const double* means, const std::array<GradWeight, 2>& grad_weights,
                         const Around* around = nullptr) {
  const int64_t grain = grain_rows(b.columns), bytes = scratch_bytes(b, operands.rows, around);
  const auto room = [&] { return bytes ? Lines(bytes) : Lines(); };
  if (!b.need_weight && !b.need_bias) {
    parallel(operands.rows, grain, [&](int64_t begin, int64_t end) {
      const auto scratch = room();
      backward_rows(target, b, operands, rstd, means, scratch.get(), nullptr, {}, begin, end, around);
    });
    return;
  }
  const int64_t rows = operands.rows, each = chunk_rows(b, rows), chunks = (rows + each - 1) / each;
  if (rows > 0 && rows <= kFlush && grad_rows(b) == 1 && grad_weights[0].data) {
    const auto scratch = room();
    const GradWeight& to = grad_weights[0];
    // A sum of fp32 lies where it goes: 16 KiB of L1 less, of 4096 columns.
    const bool there = to.type == Type::f32 && b.input == Type::f32 && grad_stride(b) == b.columns * size_of(to.type);
    const Lines own = there ? Lines() : Lines::zeros(grad_stride(b));
    char* const partial = there ? to.data : own.get();
    if (there) std::fill_n(partial, grad_stride(b), 0);
    backward_rows(target, b, operands, rstd, means, scratch.get(), partial, {}, 0, rows, around);
    target.finish_one(b.input, partial, b.columns, to.type, to.data);
    return;
  }
  Totals totals(b, chunks, grad_rows(b), each);
  parallel(chunks, std::max<int64_t>(1, grain / each), [&](int64_t begin, int64_t end) {
    const auto scratch = room();
    const Lines partial = Lines::zeros(grad_rows(b) * grad_stride(b));
    for (int64_t chunk = begin; chunk < end; ++chunk)
      backward_rows(target, b, operands, rstd, means, scratch.get(), partial.get(), totals.of(chunk, begin, end),
                    chunk * each, std::min(rows, (chunk + 1) * each), around);
  });
  finish_weights(target, {totals.summands(0), totals.summands(grad_rows(b) - 1)}, grad_weights);
}

// The same of tensors.
inline void run_backward(const Target& target, Backward b, const Tensor* grad, const Tensor* grad_sum,
                         const Tensor& input, const Tensor* gate, const Tensor& rstd, const Tensor* mean,
                         const Shape& shape, const Tensor& grad_input, const Tensor* grad_gate,
                         const std::array<const Tensor*, 2>& grad_weights) {
  b.columns = shape.columns, b.input = type_of(input), b.add = grad_sum && b.need_input, b.need_gate = grad_gate;
  if (!b.need_input && !b.need_gate && !b.need_weight && !b.need_bias) return;
  check_statistic(rstd, input, shape, wide(b.input), "rstd");
  if (mean) check_statistic(*mean, input, shape, Type::f64, "mean");
  const Tensor x = with_plain_rows(input, shape.outer), r = with_plain_rows(rstd, 0);
  const OptionalTensor dy = with_plain_rows(grad, shape.outer);
  const OptionalTensor ds = with_plain_rows(b.add ? grad_sum : nullptr, shape.outer);
  const OptionalTensor m = with_plain_rows(mean, 0), g = with_plain_rows(gate, shape.outer);
  const auto operands = operands_of<kBackwardOperands>(
      x, shape.outer, {&x, address(dy), b.need_input ? &grad_input : nullptr, address(ds), address(g), grad_gate});
  run_backward(target, b, operands, data_of(r), m ? reinterpret_cast<const double*>(data_of(*m)) : nullptr,
               {GradWeight(grad_weights[0]), GradWeight(grad_weights[1])});
}

}  // namespace rmsnorm
