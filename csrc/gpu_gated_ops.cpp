// The only file with a GPU's operators of the gated norm: gpu/neighbours.py, by the rules of gpu_ops.cpp.
#include "gpu_steps.h"

namespace rmsnorm::gpu {
namespace {

using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

// The gate's steps, behind the norm or ahead of it.
Steps gating(const More& more, bool behind, bool silu) {
  Steps steps = {&more};
  (behind ? steps.store : steps.load) = silu ? Step::silu : Step::sigmoid;
  return steps;
}

std::optional<Normed> gated(const Tensor& input, const Tensor& gate, const OptionalTensor& weight, int64_t dims,
                            Norm norm, bool norm_before_gate, bool silu) {
  Input in(input, dims);
  if (!in || norm.eps < 0 || !in.fits(weight) || !in.like(gate)) return std::nullopt;
  More more;
  more.gate = Matrix(&gate, in.columns);
  if (norm_before_gate) norm.dtype = in.type;
  return forward(in, nullptr, weight, norm, gating(more, norm_before_gate, silu));
}

Tensor gated_rms_norm(Tensor input, Tensor gate, OptionalTensor weight, int64_t dims, double eps, double offset,
                      bool round_first, bool norm_before_gate, bool silu) {
  const auto attempt = [&]() -> OptionalTensor {
    const auto results = gated(input, gate, weight, dims, {eps, offset, round_first, false}, norm_before_gate, silu);
    if (!results) return std::nullopt;
    return results->output;
  };
  return or_python<Tensor>("rmsnorm::_python_gated_rms_norm", attempt, input, gate, weight, dims, eps, offset,
                           round_first, norm_before_gate, silu);
}

Two gated_rms_norm_forward(Tensor input, Tensor gate, OptionalTensor weight, int64_t dims, double eps, double offset,
                           bool round_first, bool norm_before_gate, bool silu) {
  const auto attempt = [&]() -> std::optional<Two> {
    const auto results = gated(input, gate, weight, dims, {eps, offset, round_first, true}, norm_before_gate, silu);
    if (!results) return std::nullopt;
    return Two{results->output, *results->rstd};
  };
  return or_python<Two>("rmsnorm::_python_gated_rms_norm_forward", attempt, input, gate, weight, dims, eps, offset,
                        round_first, norm_before_gate, silu);
}

Three gated_rms_norm_backward(Tensor grad, Tensor input, Tensor gate, Tensor rstd, OptionalTensor weight, int64_t dims,
                              double eps, double offset, bool norm_before_gate, bool silu, bool need_input,
                              bool need_gate, bool need_weight) {
  const auto attempt = [&]() -> std::optional<Three> {
    Input in(input, dims);
    if (!in || !in.fits(weight) || !in.like(gate) || !in.like(grad)) return std::nullopt;
    const Tensor dgate = need_gate ? in.room_like(gate) : in.none();
    More more;
    more.gate = Matrix(&gate, in.columns), more.dgate = need_gate ? &dgate : nullptr;
    const auto found =
        derive(in, &grad, nullptr, &rstd, weight, offset, need_input,
               {need_weight && weight ? &*weight : nullptr, nullptr, nullptr}, gating(more, norm_before_gate, silu));
    return Three{found.input, dgate, in.or_none(found.sums[0])};
  };
  return or_python<Three>("rmsnorm::_python_gated_rms_norm_backward", attempt, grad, input, gate, rstd, weight, dims,
                          eps, offset, norm_before_gate, silu, need_input, need_gate, need_weight);
}

}  // namespace

const std::vector<Served> gated_operators = {
    {"gated_rms_norm", TORCH_BOX(&gated_rms_norm)},
    {"gated_rms_norm_forward", TORCH_BOX(&gated_rms_norm_forward)},
    {"gated_rms_norm_backward", TORCH_BOX(&gated_rms_norm_backward)},
};

}  // namespace rmsnorm::gpu
