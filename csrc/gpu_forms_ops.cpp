// The only file with a GPU's operators of the sandwich, norm + add and the quantised norm: gpu/forms.py, by the rules
// of gpu_ops.cpp.
#include "gpu_steps.h"

namespace rmsnorm::gpu {
namespace {

using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct Sandwich {
  OptionalTensor output, sum, rstd, next_rstd;
};

// Only `twice` there is an output.
std::optional<Sandwich> sandwich(bool keep, bool twice, const Tensor& input, const Tensor& residual,
                                 const OptionalTensor& weight, const OptionalTensor& next_weight, int64_t dims,
                                 double eps, double next_eps, double offset, bool round_first) {
  Input in(input, dims);
  if (!in || eps < 0 || next_eps < 0 || !in.fits(weight) || !in.like(residual)) return std::nullopt;
  const int64_t span = in.span;
  if (!in.fits(next_weight) || (weight && next_weight && in.span != span)) return std::nullopt;
  for (const OptionalTensor* gain : {&weight, &next_weight})
    if (*gain && round_first && promoted(in.type, known_type(rmsnorm::code_of(**gain))) != in.type) return std::nullopt;
  const Tile tile(in.columns, Tiles::forward);
  Sandwich found;
  found.sum = in.room(in.type);
  if (twice) found.output = in.room(in.type);
  if (keep) found.rstd = in.statistic(wide(in.type));
  if (keep && twice) found.next_rstd = in.statistic(wide(in.type));
  const Matrix x(&input, in.columns), other(&residual, in.columns);
  const Row first(address(weight)), second(address(next_weight));
  Launch launch(Kernel::sandwich, in.index, tile.warps);
  x.push(launch), other.push(launch), first.push(launch), second.push(launch);
  for (const OptionalTensor* one : {&found.output, &found.sum, &found.rstd, &found.next_rstd})
    push(launch, address(*one));
  launch.count(in.rows), launch.integer(in.columns), launch.number(1.0 / static_cast<double>(in.columns));
  launch.number(eps), launch.number(next_eps);
  launch.offset(offset), launch.constant(round_first);
  launch.constant(tile.rows), launch.constant(tile.block), launch.constant(in.columns > tile.block);
  run(launch, ceil(in.rows, tile.rows), in.span);
  return found;
}

Tensor rms_norm_add(Tensor input, Tensor residual, OptionalTensor weight, int64_t dims, double eps, double offset,
                    bool round_first) {
  const auto attempt = [&]() -> OptionalTensor {
    const auto found =
        sandwich(false, false, input, residual, weight, std::nullopt, dims, eps, eps, offset, round_first);
    return found ? found->sum : std::nullopt;
  };
  return or_python<Tensor>("rmsnorm::_python_rms_norm_add", attempt, input, residual, weight, dims, eps, offset,
                           round_first);
}

Two rms_norm_add_forward(Tensor input, Tensor residual, OptionalTensor weight, int64_t dims, double eps, double offset,
                         bool round_first) {
  const auto attempt = [&]() -> std::optional<Two> {
    const auto found =
        sandwich(true, false, input, residual, weight, std::nullopt, dims, eps, eps, offset, round_first);
    if (!found) return std::nullopt;
    return Two{*found->sum, *found->rstd};
  };
  return or_python<Two>("rmsnorm::_python_rms_norm_add_forward", attempt, input, residual, weight, dims, eps, offset,
                        round_first);
}

Two rms_norm_add_backward(Tensor grad, Tensor input, Tensor rstd, OptionalTensor weight, int64_t dims, double eps,
                          double offset, bool need_input, bool need_weight) {
  const auto attempt = [&] {
    return norm_backward(grad, std::nullopt, input, rstd, weight, dims, eps, offset, need_input, need_weight);
  };
  return or_python<Two>("rmsnorm::_python_rms_norm_add_backward", attempt, grad, input, rstd, weight, dims, eps, offset,
                        need_input, need_weight);
}

Two sandwich_rms_norm(Tensor input, Tensor residual, OptionalTensor weight, OptionalTensor next_weight, int64_t dims,
                      double eps, double offset, bool round_first, std::optional<double> next_eps) {
  const auto attempt = [&]() -> std::optional<Two> {
    const auto found = sandwich(false, true, input, residual, weight, next_weight, dims, eps, next_eps.value_or(eps),
                                offset, round_first);
    if (!found) return std::nullopt;
    return Two{*found->output, *found->sum};
  };
  return or_python<Two>("rmsnorm::_python_sandwich_rms_norm", attempt, input, residual, weight, next_weight, dims, eps,
                        offset, round_first, next_eps);
}

Four sandwich_rms_norm_forward(Tensor input, Tensor residual, OptionalTensor weight, OptionalTensor next_weight,
                               int64_t dims, double eps, double offset, bool round_first,
                               std::optional<double> next_eps) {
  const auto attempt = [&]() -> std::optional<Four> {
    const auto found = sandwich(true, true, input, residual, weight, next_weight, dims, eps, next_eps.value_or(eps),
                                offset, round_first);
    if (!found) return std::nullopt;
    return Four{*found->output, *found->sum, *found->rstd, *found->next_rstd};
  };
  return or_python<Four>("rmsnorm::_python_sandwich_rms_norm_forward", attempt, input, residual, weight, next_weight,
                         dims, eps, offset, round_first, next_eps);
}

// The gradients of the two norms, one after the other: that of the sum is rounded, being the residual's.
Four sandwich_rms_norm_backward(Tensor grad, OptionalTensor grad_sum, Tensor input, Tensor sum, Tensor rstd,
                                Tensor next_rstd, OptionalTensor weight, OptionalTensor next_weight, int64_t dims,
                                double eps, double offset, std::optional<double> next_eps, bool need_input,
                                bool need_residual, bool need_weight, bool need_next_weight) {
  const auto attempt = [&]() -> std::optional<Four> {
    const Input in(input, dims);
    if (!in) return std::nullopt;
    const bool first = need_input || need_weight;
    const auto last = norm_backward(grad, grad_sum, sum, next_rstd, next_weight, dims, next_eps.value_or(eps), offset,
                                    first || need_residual, need_next_weight);
    if (!last) return std::nullopt;
    const auto& [ds, dnext] = *last;
    if (!first) return Four{in.none(), ds, in.none(), dnext};
    const auto ahead = norm_backward(ds, std::nullopt, input, rstd, weight, dims, eps, offset, need_input, need_weight);
    if (!ahead) return std::nullopt;
    return Four{std::get<0>(*ahead), need_residual ? ds : in.none(), std::get<1>(*ahead), dnext};
  };
  return or_python<Four>("rmsnorm::_python_sandwich_rms_norm_backward", attempt, grad, grad_sum, input, sum, rstd,
                         next_rstd, weight, next_weight, dims, eps, offset, next_eps, need_input, need_residual,
                         need_weight, need_next_weight);
}

Three quantised_rms_norm(Tensor input, OptionalTensor residual, OptionalTensor gate, OptionalTensor weight,
                         int64_t dims, double eps, double offset, bool round_first, bool norm_before_gate, bool silu,
                         bool e4m3) {
  const auto attempt = [&]() -> std::optional<Three> {
    Input in(input, dims);
    if (!in || eps < 0 || in.type == Type::f64 || !in.fits(weight)) return std::nullopt;
    if ((residual && !in.like(*residual)) || (gate && !in.like(*gate))) return std::nullopt;
    More more;
    more.gate = Matrix(address(gate), in.columns);
    const Step activation = silu ? Step::silu : Step::sigmoid;
    const Step load = gate && !norm_before_gate ? activation : Step::plain;
    const Step store = gate && norm_before_gate ? activation : Step::plain;
    const Tile tile(in.columns, gate ? Tiles::forward_more : Tiles::forward);
    const bool wider = store == Step::plain && round_first && weight &&
                       promoted(in.type, known_type(rmsnorm::code_of(*weight))) != in.type;
    const int32_t kind = e4m3 ? aoti_torch_dtype_float8_e4m3fn() : aoti_torch_dtype_int8();
    const Tensor codes = in.room(in.sizes.data, in.sizes.count, kind), scale = in.statistic(wide(in.type));
    OptionalTensor sum;
    if (residual) sum = in.room(in.type);
    const Matrix x(&input, in.columns), other(address(residual), in.columns);
    const Row gain(address(weight));
    Launch launch(Kernel::quantised, in.index, tile.warps);
    x.push(launch), other.push(launch), gain.push(launch);
    launch.pointer(codes.data_ptr(), aoti_torch_dtype_uint8());  // the kernel writes bytes
    push(launch, &scale), push(launch, address(sum)), push_more(launch, gate ? &more : nullptr);
    launch.count(in.rows), launch.integer(in.columns), launch.number(1.0 / static_cast<double>(in.columns));
    launch.number(eps);
    launch.constant(static_cast<int>(load)), launch.constant(static_cast<int>(store)), launch.offset(offset);
    launch.constant(round_first), launch.constant(wider), launch.constant(e4m3);
    launch.constant(tile.rows), launch.constant(tile.block), launch.constant(in.columns > tile.block);
    run(launch, ceil(in.rows, tile.rows), in.span);
    return Three{codes, scale, in.or_none(sum)};
  };
  return or_python<Three>("rmsnorm::_python_quantised_rms_norm", attempt, input, residual, gate, weight, dims, eps,
                          offset, round_first, norm_before_gate, silu, e4m3);
}

}  // namespace

const std::vector<Served> forms_operators = {
    {"rms_norm_add", TORCH_BOX(&rms_norm_add)},
    {"rms_norm_add_forward", TORCH_BOX(&rms_norm_add_forward)},
    {"rms_norm_add_backward", TORCH_BOX(&rms_norm_add_backward)},
    {"sandwich_rms_norm", TORCH_BOX(&sandwich_rms_norm)},
    {"sandwich_rms_norm_forward", TORCH_BOX(&sandwich_rms_norm_forward)},
    {"sandwich_rms_norm_backward", TORCH_BOX(&sandwich_rms_norm_backward)},
    {"quantised_rms_norm", TORCH_BOX(&quantised_rms_norm)},
};

}  // namespace rmsnorm::gpu
