// The only file with the sandwich's operators: a norm whose output is added to the residual, and the norm of that sum.
#include "run.h"
#include "sandwich_backward.h"

namespace rmsnorm {
namespace {

bool is_of(const OptionalTensor& weight, const Tensor& input) { return weight && type_of(*weight) == type_of(input); }

bool few_rows(const Tensor& input, const Shape& shape) {
  return rmsnorm::few_rows(type_of(input), input.numel() / std::max<int64_t>(shape.columns, 1));
}

// The weight in place, or offset + weight or ones, in the wide type and the kernels' own order.
Gain gain_of(const OptionalTensor& weight, double offset, const Tensor& input, const Shape& shape, bool in_place,
             bool round_first) {
  require(!weight || !round_first || size_of(type_of(input)) > 2 || is_of(weight, input),
          "rmsnorm: no native kernel whose sum is wider than its input");
  if (in_place) return Gain(weight, 0.0, input, shape, Gain::kForward);
  return gain_or_ones(weight, offset, input, shape, Gain::kBackward);
}

void norm_add(const Tensor& input, const Tensor& residual, const OptionalTensor& weight, int64_t dims, double eps,
              double offset, bool round_first, const Tensor& sum, const Tensor* rstd) {
  check_same(residual, input, "residual");
  const Shape shape(input, dims);
  const bool in_place = few_rows(input, shape) && is_of(weight, input);
  const Gain gain = gain_of(weight, offset, input, shape, in_place, round_first);
  Forward f = {};
  f.offset = offset, f.eps = eps, f.round_first = round_first, f.add_after = true;
  run_forward(f, input, &residual, gain, shape, sum, nullptr, rstd, nullptr);
}

Tensor rms_norm_add(Tensor input, Tensor residual, OptionalTensor weight, int64_t dims, double eps, double offset,
                    bool round_first) {
  Tensor sum = empty_like(input, type_of(input));
  norm_add(input, residual, weight, dims, eps, offset, round_first, sum, nullptr);
  return sum;
}

std::tuple<Tensor, Tensor> rms_norm_add_forward(Tensor input, Tensor residual, OptionalTensor weight, int64_t dims,
                                                double eps, double offset, bool round_first) {
  Tensor sum = empty_like(input, type_of(input)), rstd = empty_statistic(input, dims, wide(type_of(input)));
  norm_add(input, residual, weight, dims, eps, offset, round_first, sum, &rstd);
  return {sum, rstd};
}

void sandwich(const Tensor& input, const Tensor& residual, const OptionalTensor& weight,
              const OptionalTensor& next_weight, int64_t dims, double eps, double offset, bool round_first,
              std::optional<double> next_eps, const Tensor& output, const Tensor& sum, const Tensor* rstd,
              const Tensor* next_rstd) {
  check_same(residual, input, "residual");
  const Shape shape(input, dims);
  const bool in_place = few_rows(input, shape) && is_of(weight, input) && is_of(next_weight, input);
  const Gain first = gain_of(weight, offset, input, shape, in_place, round_first);
  const Gain gain = gain_of(next_weight, offset, input, shape, in_place, round_first);
  Forward f = {};
  f.offset = offset, f.round_first = round_first, f.twice = true;
  f.first_gain = first.rows, f.first_eps = eps, f.eps = next_eps.value_or(eps);
  run_forward(f, input, &residual, gain, shape, output, &sum, next_rstd, nullptr, rstd);
}

std::tuple<Tensor, Tensor> sandwich_rms_norm(Tensor input, Tensor residual, OptionalTensor weight,
                                             OptionalTensor next_weight, int64_t dims, double eps, double offset,
                                             bool round_first, std::optional<double> next_eps) {
  Tensor output = empty_like(input, type_of(input)), sum = empty_like(input, type_of(input));
  sandwich(input, residual, weight, next_weight, dims, eps, offset, round_first, next_eps, output, sum, nullptr,
           nullptr);
  return {output, sum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sandwich_rms_norm_forward(Tensor input, Tensor residual,
                                                                     OptionalTensor weight, OptionalTensor next_weight,
                                                                     int64_t dims, double eps, double offset,
                                                                     bool round_first, std::optional<double> next_eps) {
  Tensor output = empty_like(input, type_of(input)), sum = empty_like(input, type_of(input));
  Tensor rstd = empty_statistic(input, dims, wide(type_of(input)));
  Tensor next_rstd = empty_statistic(input, dims, wide(type_of(input)));
  sandwich(input, residual, weight, next_weight, dims, eps, offset, round_first, next_eps, output, sum, &rstd,
           &next_rstd);
  return {output, sum, rstd, next_rstd};
}

// Both backward kernels over the same few rows: where ds is wanted, and weights are of one row each.
void run_both(const Target& target, SandwichBackward s, const std::array<const Tensor*, kSandwichOperands>& tensors,
              const std::array<const Tensor*, 2>& rstd, const Shape& shape,
              const std::array<const Tensor*, 2>& grad_weights) {
  std::array<OptionalTensor, kSandwichOperands> plain;
  std::array<const Tensor*, kSandwichOperands> addresses;
  for (int k = 0; k < kSandwichOperands; ++k) {
    plain[k] = with_plain_rows(tensors[k], shape.outer);
    addresses[k] = address(plain[k]);
  }
  const Tensor& x = *plain[kTheX];
  std::array<OptionalTensor, 2> statistics;
  for (int k = 0; k < 2; ++k) {
    statistics[k] = with_plain_rows(rstd[k], 0);
    s.rstd[k] = data_of(*statistics[k]);
    s.norm[k].columns = shape.columns, s.norm[k].input = type_of(x), s.norm[k].need_weight = grad_weights[k];
  }
  run_sandwich_backward(target, s, operands_of<kSandwichOperands>(x, shape.outer, addresses),
                        {GradWeight(grad_weights[0]), GradWeight(grad_weights[1])});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sandwich_rms_norm_backward(
    Tensor grad, OptionalTensor grad_sum, Tensor input, Tensor sum, Tensor rstd, Tensor next_rstd,
    OptionalTensor weight, OptionalTensor next_weight, int64_t dims, double eps, double offset,
    std::optional<double> next_eps, bool need_input, bool need_residual, bool need_weight, bool need_next_weight) {
  const Shape shape(input, dims);
  const Type type = type_of(input);
  const double last_eps = next_eps.value_or(eps);
  need_weight = need_weight && weight, need_next_weight = need_next_weight && next_weight;
  const auto single = [&](const OptionalTensor& w) { return !w || w->dim() <= dims; };
  if (!(need_input || need_weight) || !single(weight) || !single(next_weight) || shape.columns == 0) {
    const bool need_sum = need_input || need_residual || need_weight;
    auto [ds, next] = rms_norm_backward(grad, grad_sum, sum, next_rstd, next_weight, dims, last_eps, offset, need_sum,
                                        need_next_weight);
    if (!(need_input || need_weight)) return {none(type), ds, none(type), next};
    auto [dx, dw] =
        rms_norm_backward(ds, std::nullopt, input, rstd, weight, dims, eps, offset, need_input, need_weight);
    return {dx, need_residual ? ds : none(type), dw, next};
  }
  check_same(grad, input, "grad");
  check_same(sum, input, "sum");
  if (grad_sum) check_same(*grad_sum, input, "grad_sum");
  check_statistic(rstd, input, shape, wide(type), "rstd");
  check_statistic(next_rstd, input, shape, wide(type), "next_rstd");
  const Gain first(weight, offset, input, shape, Gain::kBackward);
  const Gain second(next_weight, offset, input, shape, Gain::kBackward);
  SandwichBackward s = {};
  s.norm[0].eps = eps, s.norm[0].gain = first.rows, s.norm[0].need_input = need_input;
  s.norm[1].eps = last_eps, s.norm[1].gain = second.rows, s.norm[1].need_input = true;
  s.norm[1].add = grad_sum.has_value();
  const auto room = [&](bool need) { return need ? empty_like(input, type) : none(type); };
  const Tensor grad_input = room(need_input), grad_residual = room(need_residual);
  const Tensor dw = need_weight ? empty_like(*weight, type_of(*weight)) : none(type);
  const Tensor next = need_next_weight ? empty_like(*next_weight, type_of(*next_weight)) : none(type);
  run_both(*first.target, s,
           {&input, &sum, &grad, address(grad_sum), need_input ? &grad_input : nullptr,
            need_residual ? &grad_residual : nullptr},
           {&rstd, &next_rstd}, shape, {need_weight ? &dw : nullptr, need_next_weight ? &next : nullptr});
  return {grad_input, grad_residual, dw, next};
}

// residual's gradient is that of the sum, as it is.
std::tuple<Tensor, Tensor> rms_norm_add_backward(Tensor grad, Tensor input, Tensor rstd, OptionalTensor weight,
                                                 int64_t dims, double eps, double offset, bool need_input,
                                                 bool need_weight) {
  return rms_norm_backward(std::move(grad), std::nullopt, std::move(input), std::move(rstd), std::move(weight), dims,
                           eps, offset, need_input, need_weight);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rmsnorm, CPU, m) {
  m.impl("rms_norm_add", TORCH_BOX(&rms_norm_add));
  m.impl("rms_norm_add_forward", TORCH_BOX(&rms_norm_add_forward));
  m.impl("rms_norm_add_backward", TORCH_BOX(&rms_norm_add_backward));
  m.impl("sandwich_rms_norm", TORCH_BOX(&sandwich_rms_norm));
  m.impl("sandwich_rms_norm_forward", TORCH_BOX(&sandwich_rms_norm_forward));
  m.impl("sandwich_rms_norm_backward", TORCH_BOX(&sandwich_rms_norm_backward));
}

}  // namespace rmsnorm
