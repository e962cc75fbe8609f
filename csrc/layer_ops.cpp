// The only file with LayerNorm's operators: RMSNorm's kernels with the other statistic, and a bias.
#include "run.h"

namespace rmsnorm {
namespace {

// A weight or bias has the sizes of the normalised dimensions, and no more.
void check(const OptionalTensor& tensor, int64_t dims) {
  require(!tensor || tensor->dim() == dims, "rmsnorm: weight and bias must have ", dims, " dimensions");
}

Gain given_or(const OptionalTensor& tensor, double value, const Tensor& input, const Shape& shape) {
  return tensor ? Gain(tensor, 0.0, input, shape, Gain::kForwardWide) : Gain(value, type_of(input), shape.columns);
}

void norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, int64_t dims, double eps,
          const Tensor& output, const Tensor* mean, const Tensor* rstd) {
  check(weight, dims), check(bias, dims);
  STD_TORCH_CHECK(!(eps < 0), "rmsnorm: LayerNorm has no floor, which a negative eps is to the kernels");
  const Shape shape(input, dims);
  Forward f = {};
  f.eps = eps, f.layer = true;
  if (!weight && !bias) {
    run_forward(f, input, nullptr, Gain(), shape, output, nullptr, rstd, mean);
    return;
  }
  // Neither changes a bit: a gain of 1, and -0, which leaves even the sign of a zero.
  const Gain gain = given_or(weight, 1.0, input, shape), added = given_or(bias, -0.0, input, shape);
  f.bias = added.rows.data;
  run_forward(f, input, nullptr, gain, shape, output, nullptr, rstd, mean);
}

Tensor layer_norm(Tensor input, OptionalTensor weight, OptionalTensor bias, int64_t dims, double eps) {
  Tensor output = empty_like(input, type_of(input));
  norm(input, weight, bias, dims, eps, output, nullptr, nullptr);
  return output;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(Tensor input, OptionalTensor weight, OptionalTensor bias,
                                                      int64_t dims, double eps) {
  const Type type = type_of(input);
  Tensor output = empty_like(input, type);
  Tensor mean = empty_statistic(input, dims, Type::f64), rstd = empty_statistic(input, dims, wide(type));
  norm(input, weight, bias, dims, eps, output, &mean, &rstd);
  return {output, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Tensor grad, Tensor input, Tensor mean, Tensor rstd,
                                                       OptionalTensor weight, OptionalTensor bias, int64_t dims,
                                                       double eps, bool need_input, bool need_weight, bool need_bias) {
  check_same(grad, input, "grad");
  check(weight, dims), check(bias, dims);
  const Type type = type_of(input);
  const Shape shape(input, dims);
  const Gain gain(weight, 0.0, input, shape, Gain::kBackward);
  if (bias) check_weight(*bias, input, shape);
  need_weight = need_weight && weight, need_bias = need_bias && bias;
  Backward b = {};
  b.eps = eps, b.gain = gain.rows, b.layer = true, b.need_input = need_input, b.need_weight = need_weight || need_bias;
  const Tensor grad_input = need_input ? empty_like(input, type) : none(type);
  const Tensor grad_weight = need_weight ? empty_like(*weight, type_of(*weight)) : none(type);
  const Tensor grad_bias = need_bias ? empty_like(*bias, type_of(*bias)) : none(type);
  run_backward(*gain.target, b, &grad, nullptr, input, nullptr, rstd, &mean, shape, grad_input, nullptr,
               {need_weight ? &grad_weight : nullptr, need_bias ? &grad_bias : nullptr});
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rmsnorm, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("layer_norm_forward", TORCH_BOX(&layer_norm_forward));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}

}  // namespace rmsnorm
