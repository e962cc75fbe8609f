// The only file with RMSNorm's operators.
#include "ops.h"

#include "places.h"
#include "run.h"

namespace rmsnorm {
namespace {

// The type of the output: promoted under rounding first, where a half input meets another type.
Type output_type(Type input, const OptionalTensor& weight, bool round_first) {
  if (!weight || !round_first || type_of(*weight) == input) return input;
  return wide(input);
}

void norm(const Tensor& input, const Tensor* residual, const OptionalTensor& weight, int64_t dims, double eps,
          double offset, bool round_first, const Tensor& output, const Tensor* sum, const Tensor* rstd) {
  const Shape shape(input, dims);
  Forward f = {};
  f.eps = eps, f.round_first = round_first;
  run_forward(f, input, residual, Gain(weight, offset, input, shape, Gain::kForward), shape, output, sum, rstd,
              nullptr);
}

}  // namespace

Tensor rms_norm(Tensor input, OptionalTensor weight, int64_t dims, double eps, double offset, bool round_first) {
  Tensor output = empty_like(input, output_type(type_of(input), weight, round_first));
  norm(input, nullptr, weight, dims, eps, offset, round_first, output, nullptr, nullptr);
  return output;
}

namespace {

// Whether rows may be written while others are still to be read: nothing shared, or the very same elements.
bool may_write(const Tensor& out, const Extent& written, const Tensor& read) {
  const Extent from(read);
  if (are_beside(written, from)) return true;
  bool same = written.begin == from.begin && code_of(out) == code_of(read) && out.dim() == read.dim();
  for (int64_t d = 0; same && d < out.dim(); ++d) same = out.size(d) == 1 || out.stride(d) == read.stride(d);
  return same;
}

void rms_norm_out(Tensor input, OptionalTensor weight, int64_t dims, double eps, double offset, bool round_first,
                  Tensor out) {
  const Shape shape(input, dims);
  const auto sizes = out.sizes(), whole = input.sizes(), strides = out.strides();
  bool fits = out.is_cpu() && type_of(out) == output_type(type_of(input), weight, round_first) &&
              std::equal(sizes.begin(), sizes.end(), whole.begin(), whole.end());
  for (size_t d = 0; fits && d < sizes.size(); ++d) fits = strides[d] != 0 || sizes[d] <= 1;
  require(fits,
          "rmsnorm: out must be on the device of input, of its shape and the dtype of the result, and must not be "
          "expanded; call rmsnorm.rms_norm, which says more");
  const Extent written(out);
  bool direct = has_plain_rows(out, shape.outer) && may_write(out, written, input) &&
                (!weight || may_write(out, written, *weight));
  if (direct || out.numel() == 0) {
    norm(input, nullptr, weight, dims, eps, offset, round_first, out, nullptr, nullptr);
  } else {  // copy_ takes any strides
    torch::stable::copy_(out, rms_norm(input, weight, dims, eps, offset, round_first));
  }
}

void rms_norm_weighted_out(Tensor input, Tensor weight, double eps, Tensor out) {
  const int64_t dims = weight.dim();
  rms_norm_out(std::move(input), std::move(weight), dims, eps, 0.0, false, std::move(out));
}

// For negated views, whose memory holds other values than they show. To ask for them in Python took 60 ns of a call.
void rms_norm_negated_out(Tensor, Tensor, double, Tensor) {
  refuse("rmsnorm: a tensor is a negated view; call rmsnorm.rms_norm, which serves it, or says more");
}

}  // namespace

std::tuple<Tensor, Tensor> rms_norm_forward(Tensor input, OptionalTensor weight, int64_t dims, double eps,
                                            double offset, bool round_first) {
  Tensor output = empty_like(input, output_type(type_of(input), weight, round_first));
  Tensor rstd = empty_statistic(input, dims, wide(type_of(input)));
  norm(input, nullptr, weight, dims, eps, offset, round_first, output, nullptr, &rstd);
  return {output, rstd};
}

namespace {

std::tuple<Tensor, Tensor> add_rms_norm(Tensor input, Tensor residual, OptionalTensor weight, int64_t dims, double eps,
                                        double offset, bool round_first) {
  check_same(residual, input, "residual");
  Tensor output = empty_like(input, output_type(type_of(input), weight, round_first));
  Tensor sum = empty_like(input, type_of(input));
  norm(input, &residual, weight, dims, eps, offset, round_first, output, &sum, nullptr);
  return {output, sum};
}

std::tuple<Tensor, Tensor> add_rms_norm_weighted(Tensor input, Tensor residual, Tensor weight, double eps) {
  const int64_t dims = weight.dim();
  return add_rms_norm(std::move(input), std::move(residual), std::move(weight), dims, eps, 0.0, false);
}

std::tuple<Tensor, Tensor> add_rms_norm_rounded(Tensor input, Tensor residual, Tensor weight, double eps) {
  const int64_t dims = weight.dim();
  return add_rms_norm(std::move(input), std::move(residual), std::move(weight), dims, eps, 0.0, true);
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_forward(Tensor input, Tensor residual, OptionalTensor weight,
                                                        int64_t dims, double eps, double offset, bool round_first) {
  check_same(residual, input, "residual");
  Tensor output = empty_like(input, output_type(type_of(input), weight, round_first));
  Tensor sum = empty_like(input, type_of(input)), rstd = empty_statistic(input, dims, wide(type_of(input)));
  norm(input, &residual, weight, dims, eps, offset, round_first, output, &sum, &rstd);
  return {output, sum, rstd};
}

}  // namespace

std::tuple<Tensor, Tensor> rms_norm_backward(Tensor grad, OptionalTensor grad_sum, Tensor input, Tensor rstd,
                                             OptionalTensor weight, int64_t dims, double eps, double offset,
                                             bool need_input, bool need_weight) {
  check_same(grad, input, "grad");
  if (grad_sum) check_same(*grad_sum, input, "grad_sum");
  const Shape shape(input, dims);
  const Gain gain(weight, offset, input, shape, Gain::kBackward);
  Backward b = {};
  b.eps = eps, b.gain = gain.rows, b.need_input = need_input, b.need_weight = need_weight && weight;
  const Tensor grad_input = need_input ? empty_like(input, type_of(input)) : none(type_of(input));
  const Tensor grad_weight = b.need_weight ? empty_like(*weight, type_of(*weight)) : none(type_of(input));
  run_backward(*gain.target, b, &grad, grad_sum ? &*grad_sum : nullptr, input, nullptr, rstd, nullptr, shape,
               grad_input, nullptr, {b.need_weight ? &grad_weight : nullptr, nullptr});
  return {grad_input, grad_weight};
}

STABLE_TORCH_LIBRARY_IMPL(rmsnorm, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_out", TORCH_BOX(&rms_norm_out));
  m.impl("rms_norm_weighted_out", TORCH_BOX(&rms_norm_weighted_out));
  m.impl("rms_norm_forward", TORCH_BOX(&rms_norm_forward));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("add_rms_norm_weighted", TORCH_BOX(&add_rms_norm_weighted));
  m.impl("add_rms_norm_rounded", TORCH_BOX(&add_rms_norm_rounded));
  m.impl("add_rms_norm_forward", TORCH_BOX(&add_rms_norm_forward));
}

STABLE_TORCH_LIBRARY_IMPL(rmsnorm, Negative, m) { m.impl("rms_norm_weighted_out", TORCH_BOX(&rms_norm_negated_out)); }

}  // namespace rmsnorm

extern "C" __attribute__((visibility("default"))) int64_t rmsnorm_large_bytes() { return rmsnorm::large_bytes(); }

// Of the caches as the kernels take them: what info() prints.
extern "C" __attribute__((visibility("default"))) int64_t rmsnorm_cache_bytes(int level) {
  if (level == 1) return rmsnorm::first_cache_bytes();
  return level == 2 ? rmsnorm::second_cache_bytes() : rmsnorm::large_bytes().load();
}

extern "C" __attribute__((visibility("default"))) void rmsnorm_set_cache_bytes(int level, int64_t bytes) {
  (level == 2 ? rmsnorm::second_cache() : rmsnorm::large_bytes()) = bytes;
}
