// The only file with a GPU's operators of what a call may ask for beyond the plain norm, and of the lean backward:
// gpu/general.py, by the rules of gpu_ops.cpp.
#include <limits>

#include "gpu_steps.h"

namespace rmsnorm::gpu {
namespace {

using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using OptionalType = std::optional<ScalarType>;

// Whether there is a bias, and a row of it or of the weight for each head.
bool are_several(int64_t dims, const OptionalTensor& weight, const OptionalTensor& bias) {
  return bias && (bias->dim() > dims || (weight && weight->dim() > dims));
}

struct Options {
  int64_t counted;
  bool mean;
};

// The steps of a norm of this type, and eps as the kernels have it: without a sign, and for a floor no subnormal.
Steps general(More& more, bool filled, Type type, double& eps, Options options) {
  Steps steps;
  steps.floor = eps < 0;
  const double least =
      type == Type::f64 ? std::numeric_limits<double>::min() : double(std::numeric_limits<float>::min());
  if (steps.floor) eps = std::max(-eps, least);
  if (options.counted >= 0) more.counted = options.counted;
  steps.number = !options.mean ? 1 : std::max<int64_t>(options.counted, 0);
  if (filled || options.counted >= 0) steps.more = &more;
  return steps;
}

// Of a type that the kernels know, where one is asked for.
bool known(OptionalType type) { return !type || known_type(static_cast<int32_t>(*type)) != Type::none; }

Type named(OptionalType type) { return type ? known_type(static_cast<int32_t>(*type)) : Type::none; }

// Rows of the input's sizes, of any of our types.
bool rows_like(const Input& in, const Tensor& other) {
  return Sizes(other) == in.sizes && known_type(rmsnorm::code_of(other)) != Type::none && in.beside(other);
}

std::optional<Normed> normed(const Tensor& input, const Tensor* residual, const OptionalTensor& weight,
                             const OptionalTensor& bias, int64_t dims, double eps, double offset, bool round_first,
                             Options options, bool store, bool round_sum, OptionalType out_dtype) {
  Input in(input, dims);
  if (!in || !in.fits(weight) || !in.fits(bias) || are_several(dims, weight, bias) || options.counted == 0)
    return std::nullopt;
  if (!known(out_dtype) || (residual && !rows_like(in, *residual))) return std::nullopt;
  Norm norm = {eps, offset, round_first, true};
  Type added = in.type;
  if (residual) added = promoted(in.type, known_type(rmsnorm::code_of(*residual))), norm.sum = in.room(added);
  More more;
  more.bias = Row(address(bias));
  Steps steps = general(more, bias.has_value(), added, norm.eps, options);
  if (!round_sum) steps.load = Step::unrounded;
  norm.dtype = named(out_dtype), norm.store = store;
  return forward(in, residual, weight, norm, steps);
}

Two general_rms_norm(Tensor input, OptionalTensor weight, OptionalTensor bias, int64_t dims, double eps, double offset,
                     bool round_first, int64_t counted, bool mean, bool store, OptionalType out_dtype) {
  const auto attempt = [&]() -> std::optional<Two> {
    const auto found =
        normed(input, nullptr, weight, bias, dims, eps, offset, round_first, {counted, mean}, store, true, out_dtype);
    if (!found) return std::nullopt;
    return Two{found->output, *found->rstd};
  };
  return or_python<Two>("rmsnorm::_python_general_rms_norm", attempt, input, weight, bias, dims, eps, offset,
                        round_first, counted, mean, store, out_dtype);
}

Three general_add_rms_norm(Tensor input, Tensor residual, OptionalTensor weight, OptionalTensor bias, int64_t dims,
                           double eps, double offset, bool round_first, int64_t counted, bool round_sum,
                           OptionalType out_dtype) {
  const auto attempt = [&]() -> std::optional<Three> {
    const auto found = normed(input, &residual, weight, bias, dims, eps, offset, round_first, {counted, true}, true,
                              round_sum, out_dtype);
    if (!found) return std::nullopt;
    return Three{found->output, *found->sum, *found->rstd};
  };
  return or_python<Three>("rmsnorm::_python_general_add_rms_norm", attempt, input, residual, weight, bias, dims, eps,
                          offset, round_first, counted, round_sum, out_dtype);
}

// Of tensors that lie as a kernel writes, and of rows that it reads once, before it writes: added_in_place() of
// gpu/general.py.
bool in_place(const Tensor& input, const Tensor& residual, const OptionalTensor& weight, int64_t dims, double eps,
              double offset, bool round_first, bool round_sum) {
  Input in(input, dims);
  if (!in || eps < 0 || !in.fits(weight) || in.columns > tiles().widest[Tiles::forward]) return false;
  if (!rows_like(in, residual) || input.data_ptr() == residual.data_ptr()) return false;
  for (const Tensor* one : {&input, &residual})
    if (!one->is_contiguous() || !aligned(one->data_ptr())) return false;
  const Type kind = known_type(rmsnorm::code_of(residual));
  if (promoted(in.type, kind) != kind) return false;
  Norm norm = {eps, offset, round_first, false, input};
  norm.sum = residual;
  Steps steps;
  if (!round_sum) steps.load = Step::unrounded;
  forward(in, &residual, weight, norm, steps);
  return true;
}

void add_rms_norm_(Tensor input, Tensor residual, OptionalTensor weight, int64_t dims, double eps, double offset,
                   bool round_first, bool round_sum) {
  bool done = false;
  try {
    done = in_place(input, residual, weight, dims, eps, offset, round_first, round_sum);
  } catch (const Elsewhere&) {
  }
  if (!done)
    python<void>("rmsnorm::_python_add_rms_norm_", input, residual, weight, dims, eps, offset, round_first, round_sum);
}

// The gradients of the input, the weight and the bias, which aren't the same for each head.
std::optional<Three> derived(const OptionalTensor& grad, const OptionalTensor& grad_sum,
                             const OptionalTensor& grad_rstd, const Tensor& x, const Tensor& rstd,
                             const OptionalTensor& weight, const OptionalTensor& bias, int64_t dims, double eps,
                             double offset, Options options, bool need_input, bool need_weight, bool need_bias) {
  Input in(x, dims);
  if (!in || !in.fits(weight) || !in.fits(bias) || are_several(dims, weight, bias) || options.counted == 0)
    return std::nullopt;
  for (const OptionalTensor* one : {&grad, &grad_sum})
    if (*one && !rows_like(in, **one)) return std::nullopt;
  More more;
  more.grad_rstd = Row(address(grad_rstd));
  const bool learns_bias = need_bias && bias;
  const Steps steps = general(more, grad_rstd || learns_bias, in.type, eps, options);
  const auto found = derive(in, address(grad), address(grad_sum), &rstd, weight, offset, need_input,
                            {need_weight ? address(weight) : nullptr, learns_bias ? &*bias : nullptr, nullptr}, steps);
  return Three{found.input, in.or_none(found.sums[0]), in.or_none(found.sums[1])};
}

Three general_rms_norm_backward(OptionalTensor grad, OptionalTensor grad_rstd, Tensor input, Tensor rstd,
                                OptionalTensor weight, OptionalTensor bias, int64_t dims, double eps, double offset,
                                int64_t counted, bool mean, bool need_input, bool need_weight, bool need_bias) {
  const auto attempt = [&] {
    return derived(grad, std::nullopt, grad_rstd, input, rstd, weight, bias, dims, eps, offset, {counted, mean},
                   need_input, need_weight, need_bias);
  };
  return or_python<Three>("rmsnorm::_python_general_rms_norm_backward", attempt, grad, grad_rstd, input, rstd, weight,
                          bias, dims, eps, offset, counted, mean, need_input, need_weight, need_bias);
}

Three general_add_rms_norm_backward(OptionalTensor grad, OptionalTensor grad_sum, OptionalTensor grad_rstd, Tensor sum,
                                    Tensor rstd, OptionalTensor weight, OptionalTensor bias, int64_t dims, double eps,
                                    double offset, int64_t counted, bool need_input, bool need_weight, bool need_bias) {
  const auto attempt = [&] {
    return derived(grad, grad_sum, grad_rstd, sum, rstd, weight, bias, dims, eps, offset, {counted, true}, need_input,
                   need_weight, need_bias);
  };
  return or_python<Three>("rmsnorm::_python_general_add_rms_norm_backward", attempt, grad, grad_sum, grad_rstd, sum,
                          rstd, weight, bias, dims, eps, offset, counted, need_input, need_weight, need_bias);
}

std::optional<Two> lean(const Tensor& grad, const OptionalTensor& grad_sum, const OptionalTensor& grad_rstd,
                        const Tensor& output, const Tensor& rstd, const OptionalTensor& weight, int64_t dims,
                        double offset, bool need_input, bool need_weight) {
  Input in(output, dims);
  if (!in || !in.fits(weight) || !in.like(grad) || (grad_sum && !in.like(*grad_sum))) return std::nullopt;
  More more;
  more.grad_rstd = Row(address(grad_rstd));
  const Steps steps = {grad_rstd ? &more : nullptr, Step::lean};
  const auto found = derive(in, &grad, address(grad_sum), &rstd, weight, offset, need_input,
                            {need_weight ? address(weight) : nullptr, nullptr, nullptr}, steps);
  return Two{found.input, in.or_none(found.sums[0])};
}

Two rms_norm_lean_backward(Tensor grad, OptionalTensor grad_rstd, Tensor output, Tensor rstd, OptionalTensor weight,
                           int64_t dims, double offset, bool need_input, bool need_weight) {
  const auto attempt = [&] {
    return lean(grad, std::nullopt, grad_rstd, output, rstd, weight, dims, offset, need_input, need_weight);
  };
  return or_python<Two>("rmsnorm::_python_rms_norm_lean_backward", attempt, grad, grad_rstd, output, rstd, weight, dims,
                        offset, need_input, need_weight);
}

Two add_rms_norm_lean_backward(Tensor grad, OptionalTensor grad_sum, OptionalTensor grad_rstd, Tensor output,
                               Tensor rstd, OptionalTensor weight, int64_t dims, double offset, bool need_input,
                               bool need_weight) {
  const auto attempt = [&] {
    return lean(grad, grad_sum, grad_rstd, output, rstd, weight, dims, offset, need_input, need_weight);
  };
  return or_python<Two>("rmsnorm::_python_add_rms_norm_lean_backward", attempt, grad, grad_sum, grad_rstd, output, rstd,
                        weight, dims, offset, need_input, need_weight);
}

}  // namespace

const std::vector<Served> general_operators = {
    {"general_rms_norm", TORCH_BOX(&general_rms_norm)},
    {"general_rms_norm_forward", TORCH_BOX(&general_rms_norm)},
    {"general_rms_norm_backward", TORCH_BOX(&general_rms_norm_backward)},
    {"general_add_rms_norm", TORCH_BOX(&general_add_rms_norm)},
    {"general_add_rms_norm_forward", TORCH_BOX(&general_add_rms_norm)},
    {"general_add_rms_norm_backward", TORCH_BOX(&general_add_rms_norm_backward)},
    {"add_rms_norm_", TORCH_BOX(&add_rms_norm_)},
    {"rms_norm_lean_backward", TORCH_BOX(&rms_norm_lean_backward)},
    {"add_rms_norm_lean_backward", TORCH_BOX(&add_rms_norm_lean_backward)},
};

}  // namespace rmsnorm::gpu
