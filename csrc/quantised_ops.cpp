// The only file with the operators of quantised norms: the forward kernels of every form, whose rows are quantised
// while they are in the first cache and never written.
#include "run.h"

namespace rmsnorm {
namespace {

// Rows [begin, end): as many at a time as stay in the first cache.
void quantise_rows(const Target& target, const Forward& f, const Operands<kForwardOperands>& operands, bool e4m3,
                   char* codes, float* scales, int64_t begin, int64_t end) {
  const ForwardKernel kernel = target.forward(f);
  Cursor<kForwardOperands> cursor(operands, begin);
  ForwardRows rows = {};
  const int64_t row_bytes = padded(f.columns) * size_of(f.output), most = block_rows(f.input, f.columns);
  const std::unique_ptr<char[]> outputs(new char[most * row_bytes]);
  const std::unique_ptr<char[]> scratch(f.gate_first ? new char[scratch_bytes(f)] : nullptr);
  rows.scratch = scratch.get();
  for (int64_t row = begin; row < end; row += rows.count) {
    rows.count = std::min(most, end - row);
    cursor.take(rows.count, {rows.input, rows.output, rows.residual, rows.sum, rows.gate});
    for (int64_t r = 0; r < rows.count; ++r) rows.output[r] = outputs.get() + r * row_bytes;
    take_weight(f.gain, row, rows.count, rows.gain);
    kernel(f, rows);
    for (int64_t r = 0; r < rows.count; ++r)
      target.quantise(f.output, rows.output[r], f.columns, e4m3, codes + (row + r) * f.columns, scales + row + r);
  }
}

std::tuple<Tensor, Tensor, Tensor> quantised_rms_norm(Tensor input, OptionalTensor residual, OptionalTensor gate,
                                                      OptionalTensor weight, int64_t dims, double eps, double offset,
                                                      bool round_first, bool norm_before_gate, bool silu, bool e4m3) {
  require(!residual || !gate, "rmsnorm: a residual or a gate, not both");
  if (residual) check_same(*residual, input, "residual");
  if (gate) check_same(*gate, input, "gate");
  const Type type = type_of(input);
  require(type != Type::f64, "rmsnorm: no quantiser for float64");
  const Shape shape(input, dims);
  Forward f = gate ? gated(silu, !norm_before_gate, round_first, weight, type) : Forward{};
  f.eps = eps, f.round_first = round_first;
  const Gain gain = gate ? gain_or_ones(weight, offset, input, shape, Gain::kBackward)
                         : Gain(weight, offset, input, shape, Gain::kForward);
  const bool promoted = round_first && weight && type_of(*weight) != type && (!gate || f.gate_first);
  f.output = promoted ? wide(type) : type;
  const auto sizes = input.sizes();
  const Tensor codes = empty(sizes.data(), static_cast<int64_t>(sizes.size()),
                             e4m3 ? aoti_torch_dtype_float8_e4m3fn() : aoti_torch_dtype_int8(), 1);
  const Tensor scale = empty_statistic(input, dims, Type::f32), sum = residual ? empty_like(input, type) : none(type);
  auto* to = data_of(codes);
  auto* scales = reinterpret_cast<float*>(data_of(scale));
  const Tensor* other = residual ? &*residual : gate ? &*gate : nullptr;
  with_operands(f, input, other, gain, shape, nullptr, residual ? &sum : nullptr, [&](const auto& operands) {
    parallel(operands.rows, grain_rows(shape.columns), [&](int64_t begin, int64_t end) {
      quantise_rows(*gain.target, f, operands, e4m3, to, scales, begin, end);
    });
  });
  return {codes, scale, sum};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rmsnorm, CPU, m) { serve(m, "quantised_rms_norm", TORCH_BOX(&quantised_rms_norm)); }

}  // namespace rmsnorm
