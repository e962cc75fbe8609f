// The only file with the gated norm's operators.
#include "run.h"

namespace rmsnorm {
namespace {

std::tuple<Tensor, Tensor> norm(const Tensor& input, const Tensor& gate, const OptionalTensor& weight, int64_t dims,
                                double eps, double offset, bool round_first, bool norm_before_gate, bool silu,
                                bool keep) {
  check_same(gate, input, "gate");
  const Shape shape(input, dims);
  const Type type = type_of(input);
  const bool same_type = !weight || type_of(*weight) == type;
  Forward f = gated(silu, !norm_before_gate, round_first, weight, type);
  f.eps = eps;
  Tensor output = empty_like(input, round_first && f.gate_first && !same_type ? wide(type) : type);
  Tensor rstd = keep ? empty_statistic(input, dims, wide(type)) : none(wide(type));
  run_forward(f, input, &gate, gain_or_ones(weight, offset, input, shape, Gain::kBackward), shape, output, nullptr,
              keep ? &rstd : nullptr, nullptr);
  return {output, rstd};
}

Tensor gated_rms_norm(Tensor input, Tensor gate, OptionalTensor weight, int64_t dims, double eps, double offset,
                      bool round_first, bool norm_before_gate, bool silu) {
  return std::get<0>(norm(input, gate, weight, dims, eps, offset, round_first, norm_before_gate, silu, false));
}

std::tuple<Tensor, Tensor> gated_rms_norm_forward(Tensor input, Tensor gate, OptionalTensor weight, int64_t dims,
                                                  double eps, double offset, bool round_first, bool norm_before_gate,
                                                  bool silu) {
  return norm(input, gate, weight, dims, eps, offset, round_first, norm_before_gate, silu, true);
}

std::tuple<Tensor, Tensor, Tensor> gated_rms_norm_backward(Tensor grad, Tensor input, Tensor gate, Tensor rstd,
                                                           OptionalTensor weight, int64_t dims, double eps,
                                                           double offset, bool norm_before_gate, bool silu,
                                                           bool need_input, bool need_gate, bool need_weight) {
  check_same(grad, input, "grad");
  check_same(gate, input, "gate");
  const Shape shape(input, dims);
  const Type type = type_of(input);
  const Gain gain = gain_or_ones(weight, offset, input, shape, Gain::kBackward);
  need_weight = need_weight && weight;
  Backward b = {};
  b.eps = eps, b.gain = gain.rows, b.need_input = need_input, b.need_weight = need_weight;
  b.gate = silu ? Gate::silu : Gate::sigmoid, b.gate_first = !norm_before_gate;
  const Tensor grad_input = need_input ? empty_like(input, type) : none(type);
  const Tensor grad_gate = need_gate ? empty_like(gate, type) : none(type);
  const Tensor grad_weight = need_weight ? empty_like(*weight, type_of(*weight)) : none(type);
  run_backward(*gain.target, b, &grad, nullptr, input, &gate, rstd, nullptr, shape, grad_input,
               need_gate ? &grad_gate : nullptr, {need_weight ? &grad_weight : nullptr, nullptr});
  return {grad_input, grad_gate, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rmsnorm, CPU, m) {
  serve(m, "gated_rms_norm", TORCH_BOX(&gated_rms_norm));
  m.impl("gated_rms_norm_forward", TORCH_BOX(&gated_rms_norm_forward));
  m.impl("gated_rms_norm_backward", TORCH_BOX(&gated_rms_norm_backward));
}

}  // namespace rmsnorm
