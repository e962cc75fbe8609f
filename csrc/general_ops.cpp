// The only file with the operators of the norm in general, and of add + norm in place.
#include "places.h"
#include "run.h"

namespace rmsnorm {
namespace {

using OptionalType = std::optional<ScalarType>;

Type promoted(Type a, Type b) { return a == b ? a : a == Type::f64 || b == Type::f64 ? Type::f64 : Type::f32; }

Type named(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::Double: return Type::f64;
    case ScalarType::BFloat16: return Type::bf16;
    default:
      require(type == ScalarType::Half, "rmsnorm: no native kernel for an output of this dtype");
      return Type::f16;
  }
}

// Two types that a kernel meets in one row: a half type isn't the other's, nor one of float64's.
void check_pair(Type row, Type other) {
  require(row == other || (row == Type::f32 ? other != Type::f64 : other == Type::f32),
          "rmsnorm: no native kernel for these two dtypes in one row");
}

// What a call asks for.
struct Asked {
  int64_t dims;
  double eps, offset = 0.0;
  bool round_first = false;
  int64_t counted = -1;
  bool mean = true, store = true, round_sum = true;
  OptionalType out = std::nullopt;
  bool keep = true;  // 1/rms is returned
};

void check_bias(const OptionalTensor& bias, const OptionalTensor& weight, int64_t dims) {
  require(!bias || (bias->dim() == dims && (!weight || weight->dim() == dims)),
          "rmsnorm: no native kernel for a bias of several rows, or beside a weight of several");
}

// How many columns count: all, or the first ones.
int64_t columns_of(int64_t counted, const Shape& shape) {
  require(counted <= shape.columns, "rmsnorm: there are ", shape.columns, " columns, not ", counted);
  return counted < 0 ? shape.columns : counted;
}

struct Results {
  OptionalTensor output, sum, rstd;  // those that are asked for
};

// The tensors may be there already: those that are read.
Results norm(const Tensor& input, const Tensor* residual, const OptionalTensor& weight, const OptionalTensor& bias,
             const Asked& a, bool in_place = false) {
  const Shape shape(input, a.dims);
  check_bias(bias, weight, a.dims);
  Forward f = {};
  f.x = type_of(input), f.residual = residual ? type_of(*residual) : f.x, f.sum = promoted(f.x, f.residual);
  // A sum that isn't rounded is a row of fp32.
  const Type row = residual && !a.round_sum && size_of(f.sum) == 2 ? Type::f32 : f.sum;
  const Type own = weight && a.round_first ? promoted(f.sum, type_of(*weight)) : f.sum;
  f.output = !a.store ? Type::none : a.out ? named(*a.out) : own;
  if (residual) check_sizes(*residual, input, "residual");
  if (residual) check_pair(row, f.x), check_pair(row, f.residual);
  if (a.store) check_pair(f.sum, f.output);
  // Beside an fp64 residual the row is of fp64, and so is what is added to the weight.
  const Type met = f.sum == Type::f64 ? f.sum : f.x;
  const auto gain_for = [&](const OptionalTensor& tensor, double offset) {
    return Gain(tensor, offset, input, met, shape, Gain::kForward);
  };
  const Gain gain = gain_for(weight, a.offset), added = gain_for(bias, 0.0);
  f.bias = added.rows.data, f.bias_type = added.type;
  f.eps = a.eps, f.round_first = a.round_first;
  f.counted = columns_of(a.counted, shape), f.divisor = a.mean ? f.counted : 1;
  // What asks for nothing more has the plain norm's kernels, and the unrounded sum of half types its own.
  const bool alike = f.x == f.residual && f.output == own && !bias && f.counted == shape.columns;
  f.unrounded = row != f.sum && alike && gain.type == f.sum;
  f.general = f.unrounded || row != f.x || !alike;
  Results results;
  results.output = in_place ? input : a.store ? empty_like(input, f.output) : none(f.sum);
  if (residual) results.sum = in_place ? *residual : empty_like(input, f.sum);
  if (a.keep) results.rstd = empty_statistic(input, a.dims, wide(row));
  with_operands(f, input, residual, gain, shape, a.store ? &*results.output : nullptr, address(results.sum),
                [&](const auto& operands) {
                  if (!f.unrounded) f.input = row;
                  run_forward(f, operands, *gain.target, address(results.rstd), nullptr);
                });
  return results;
}

std::tuple<Tensor, Tensor> general_rms_norm(Tensor input, OptionalTensor weight, OptionalTensor bias, int64_t dims,
                                            double eps, double offset, bool round_first, int64_t counted, bool mean,
                                            bool store, OptionalType out_dtype) {
  const auto [output, sum, rstd] =
      norm(input, nullptr, weight, bias, {dims, eps, offset, round_first, counted, mean, store, true, out_dtype});
  return {*output, *rstd};
}

Tensor general_rms_norm_weighted(Tensor input, Tensor weight, OptionalTensor bias, double eps, OptionalType out_dtype) {
  const Asked asked = {.dims = weight.dim(), .eps = eps, .out = out_dtype, .keep = false};
  return *norm(input, nullptr, weight, bias, asked).output;
}

std::tuple<Tensor, Tensor, Tensor> general_add_rms_norm(Tensor input, Tensor residual, OptionalTensor weight,
                                                        OptionalTensor bias, int64_t dims, double eps, double offset,
                                                        bool round_first, int64_t counted, bool round_sum,
                                                        OptionalType out_dtype) {
  const Asked asked = {dims, eps, offset, round_first, counted, true, true, round_sum, out_dtype};
  const auto [output, sum, rstd] = norm(input, &residual, weight, bias, asked);
  return {*output, *sum, *rstd};
}

std::tuple<Tensor, Tensor> general_add_rms_norm_weighted(Tensor input, Tensor residual, Tensor weight,
                                                         OptionalTensor bias, double eps, bool round_sum,
                                                         OptionalType out_dtype) {
  const Asked asked = {.dims = weight.dim(), .eps = eps, .round_sum = round_sum, .out = out_dtype, .keep = false};
  const auto [output, sum, rstd] = norm(input, &residual, weight, bias, asked);
  return {*output, *sum};
}

void add_rms_norm_(Tensor input, Tensor residual, OptionalTensor weight, int64_t dims, double eps, double offset,
                   bool round_first, bool round_sum) {
  check_sizes(residual, input, "residual");
  const Type type = type_of(input), sum = type_of(residual);
  require(promoted(type, sum) == sum, "rmsnorm: residual must have the dtype of the sum");
  const Extent first(input), second(residual);
  const auto is_apart = [&](const Extent& other) { return are_beside(other, first) && are_beside(other, second); };
  const bool read = !weight || input.numel() == 0 || weight->numel() == 0 || is_apart(Extent(*weight));
  require(
      read && are_apart(input, first, residual, second),
      "rmsnorm: input and residual are written to, and must not share memory: within themselves, with each other or "
      "with the weight");
  const Asked asked = {dims, eps, offset, round_first, -1, true, true, round_sum, scalar_of(type), false};
  const int64_t outer = Shape(input, dims).outer;
  if (has_plain_rows(input, outer) && has_plain_rows(residual, outer)) {
    norm(input, &residual, weight, std::nullopt, asked, true);
    return;
  }
  const auto results = norm(input, &residual, weight, std::nullopt, asked);
  torch::stable::copy_(input, *results.output), torch::stable::copy_(residual, *results.sum);
}

void add_rms_norm_weighted_(Tensor input, Tensor residual, Tensor weight, double eps, bool round_sum) {
  const int64_t dims = weight.dim();
  add_rms_norm_(std::move(input), std::move(residual), std::move(weight), dims, eps, 0.0, false, round_sum);
}

// Ones of the columns that count and zeros of the others, as a gain in the kernels' own order; null where all count.
std::unique_ptr<char[]> mask_of(int64_t counted, int64_t columns, Type type, const Target& target) {
  if (counted == columns) return nullptr;
  const auto filled = [&](auto one) {
    std::unique_ptr<char[]> mask(new char[padded(columns) * sizeof one]());
    std::fill_n(reinterpret_cast<decltype(one)*>(mask.get()), counted, one);
    return mask;
  };
  if (type == Type::f64) return filled(1.0);
  auto mask = filled(1.0f);
  if (size_of(type) > 2) return mask;
  std::unique_ptr<char[]> own(new char[padded(columns) * sizeof(float)]);
  target.make_gain(type, Type::f32, mask.get(), 0.0, Type::f32, own.get(), columns);
  return own;
}

// The gradients of what is normalised, of the weight and of the bias.
std::tuple<Tensor, Tensor, Tensor> backward(const OptionalTensor& grad, const OptionalTensor& grad_sum,
                                            const OptionalTensor& grad_rstd, const Tensor& x, const Tensor& rstd,
                                            const OptionalTensor& weight, const OptionalTensor& bias, int64_t dims,
                                            double eps, double offset, int64_t counted, bool mean, bool need_input,
                                            bool need_weight, bool need_bias) {
  const Type type = type_of(x);
  const Shape shape(x, dims);
  counted = columns_of(counted, shape);
  if (grad) check_sizes(*grad, x, "grad"), check_pair(type, type_of(*grad));
  if (grad_sum) check_same(*grad_sum, x, "grad_sum");
  need_weight = need_weight && weight, need_bias = need_bias && bias;
  check_bias(bias, weight, dims);
  const Gain gain(weight, offset, x, shape, Gain::kBackward);
  Backward b = {};
  b.eps = eps, b.gain = gain.rows, b.need_input = need_input, b.need_weight = need_weight, b.need_bias = need_bias;
  b.counted = counted, b.divisor = mean ? counted : 1, b.grad = grad ? type_of(*grad) : Type::none;
  // What asks for nothing more has the plain norm's kernels.
  b.general = b.grad != type || b.divisor != shape.columns || grad_rstd || need_bias;
  const auto mask = mask_of(counted, shape.columns, type, *gain.target);
  b.mask = mask.get();
  const Tensor grad_input = need_input ? empty_like(x, type) : none(type);
  const Tensor grad_weight = need_weight ? empty_like(*weight, type_of(*weight)) : none(type);
  const Tensor grad_bias = need_bias ? empty_like(*bias, type_of(*bias)) : none(type);
  OptionalTensor arrives;
  if (grad_rstd) {
    check_statistic(*grad_rstd, x, shape, wide(type), "the gradient of rstd");
    arrives = empty_statistic(x, dims, Type::f64);
    torch::stable::copy_(*arrives, *grad_rstd);
  }
  run_backward(*gain.target, b, address(grad), address(grad_sum), x, nullptr, rstd, address(arrives), shape, grad_input,
               nullptr, {need_weight ? &grad_weight : nullptr, need_bias ? &grad_bias : nullptr});
  return {grad_input, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor> general_rms_norm_backward(OptionalTensor grad, OptionalTensor grad_rstd,
                                                             Tensor input, Tensor rstd, OptionalTensor weight,
                                                             OptionalTensor bias, int64_t dims, double eps,
                                                             double offset, int64_t counted, bool mean, bool need_input,
                                                             bool need_weight, bool need_bias) {
  return backward(grad, std::nullopt, grad_rstd, input, rstd, weight, bias, dims, eps, offset, counted, mean,
                  need_input, need_weight, need_bias);
}

std::tuple<Tensor, Tensor, Tensor> general_add_rms_norm_backward(OptionalTensor grad, OptionalTensor grad_sum,
                                                                 OptionalTensor grad_rstd, Tensor sum, Tensor rstd,
                                                                 OptionalTensor weight, OptionalTensor bias,
                                                                 int64_t dims, double eps, double offset,
                                                                 int64_t counted, bool need_input, bool need_weight,
                                                                 bool need_bias) {
  return backward(grad, grad_sum, grad_rstd, sum, rstd, weight, bias, dims, eps, offset, counted, true, need_input,
                  need_weight, need_bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rmsnorm, CPU, m) {
  serve(m, "general_rms_norm", TORCH_BOX(&general_rms_norm));
  m.impl("general_rms_norm_forward", TORCH_BOX(&general_rms_norm));
  serve(m, "general_rms_norm_weighted", TORCH_BOX(&general_rms_norm_weighted));
  serve(m, "add_rms_norm_", TORCH_BOX(&add_rms_norm_));
  serve(m, "add_rms_norm_weighted_", TORCH_BOX(&add_rms_norm_weighted_));
  m.impl("general_rms_norm_backward", TORCH_BOX(&general_rms_norm_backward));
  serve(m, "general_add_rms_norm", TORCH_BOX(&general_add_rms_norm));
  m.impl("general_add_rms_norm_forward", TORCH_BOX(&general_add_rms_norm));
  serve(m, "general_add_rms_norm_weighted", TORCH_BOX(&general_add_rms_norm_weighted));
  m.impl("general_add_rms_norm_backward", TORCH_BOX(&general_add_rms_norm_backward));
}

}  // namespace rmsnorm
