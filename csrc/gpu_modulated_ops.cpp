// The only file with a GPU's operators of the modulated norm and the gated add: gpu/neighbours.py, by the rules of
// gpu_ops.cpp.
#include "gpu_steps.h"

namespace rmsnorm::gpu {
namespace {

using Two = std::tuple<Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// How many rows of the input share a row of these, or -1 for what the kernels don't take: _group() of
// gpu/neighbours.py. The first is always given.
int64_t group_of(const Input& in, bool round_first, std::array<const Tensor*, 3> given) {
  const Sizes first(*given[0]);
  if (first.count != in.sizes.count) return -1;
  int64_t own = in.outer;
  while (own > 0 && first.data[own - 1] == 1) --own;
  for (int64_t d = 0; d < first.count; ++d)
    if (first.data[d] != (d >= own && d < in.outer ? 1 : in.sizes.data[d])) return -1;
  const Type also = round_first ? in.type : wide(in.type);
  for (const Tensor* tensor : given) {
    if (!tensor) continue;
    const Type kind = known_type(rmsnorm::code_of(*tensor));
    if (Sizes(*tensor) != first || (kind != in.type && kind != also) || !in.beside(*tensor)) return -1;
  }
  int64_t group = 1;
  for (int64_t d = own; d < in.outer; ++d) group *= in.sizes.data[d];
  return group;
}

std::optional<Four> modulated(bool keep, const Tensor& input, const OptionalTensor& residual,
                              const OptionalTensor& gate, const Tensor& scale, const OptionalTensor& shift,
                              const OptionalTensor& weight, int64_t dims, double eps, bool round_first, bool layer) {
  Input in(input, dims);
  if (!in || eps < 0 || weight || (residual && !in.like(*residual)) || (gate && !residual)) return std::nullopt;
  const int64_t group = group_of(in, round_first, {&scale, address(shift), address(gate)});
  if (group < 0) return std::nullopt;
  const bool kept = layer && keep;
  const Tensor mean = kept ? in.statistic(Type::f64) : keep ? in.none(Type::f64) : scale;
  More more;
  more.gate = Matrix(address(gate), in.columns), more.scale = Matrix(&scale, in.columns);
  more.shift = Matrix(address(shift), in.columns), more.group = group, more.mean = Row(kept ? &mean : nullptr);
  Steps steps = {&more};
  steps.load = !gate ? Step::plain : round_first ? Step::gated_each : Step::gated;
  steps.layer = layer, steps.store = round_first ? Step::each : Step::plain;
  const auto results = forward(in, address(residual), std::nullopt, {eps, 0.0, round_first, keep}, steps);
  return Four{results.output, in.or_none(results.sum), mean, results.rstd ? *results.rstd : results.output};
}

Two modulated_norm(Tensor input, OptionalTensor residual, OptionalTensor gate, Tensor scale, OptionalTensor shift,
                   OptionalTensor weight, int64_t dims, double eps, double offset, bool round_first, bool layer) {
  const auto attempt = [&]() -> std::optional<Two> {
    const auto found = modulated(false, input, residual, gate, scale, shift, weight, dims, eps, round_first, layer);
    if (!found) return std::nullopt;
    return Two{std::get<0>(*found), std::get<1>(*found)};
  };
  return or_python<Two>("rmsnorm::_python_modulated_norm", attempt, input, residual, gate, scale, shift, weight, dims,
                        eps, offset, round_first, layer);
}

Four modulated_norm_forward(Tensor input, OptionalTensor residual, OptionalTensor gate, Tensor scale,
                            OptionalTensor shift, OptionalTensor weight, int64_t dims, double eps, double offset,
                            bool round_first, bool layer) {
  const auto attempt = [&] {
    return modulated(true, input, residual, gate, scale, shift, weight, dims, eps, round_first, layer);
  };
  return or_python<Four>("rmsnorm::_python_modulated_norm_forward", attempt, input, residual, gate, scale, shift,
                         weight, dims, eps, offset, round_first, layer);
}

Six modulated_norm_backward(Tensor grad, OptionalTensor grad_sum, Tensor input, OptionalTensor gate, Tensor scale,
                            OptionalTensor shift, Tensor sum, Tensor mean, Tensor rstd, OptionalTensor weight,
                            int64_t dims, double eps, double offset, bool layer, bool need_input, bool need_residual,
                            bool need_gate, bool need_scale, bool need_shift, bool need_weight) {
  const auto attempt = [&]() -> std::optional<Six> {
    Input in(input, dims);
    if (!in || weight || !in.like(grad) || (grad_sum && !in.like(*grad_sum))) return std::nullopt;
    const bool added = in.like(sum);
    if (!added && (gate || sum.numel() > 0)) return std::nullopt;
    const int64_t group = group_of(in, false, {&scale, address(shift), address(gate)});
    if (group < 0) return std::nullopt;
    const bool apart = gate && need_residual;
    Tensor dsum = apart ? in.room(in.type) : in.none();
    More more;
    more.gate = Matrix(address(gate), in.columns), more.scale = Matrix(&scale, in.columns), more.group = group;
    more.mean = Row(layer ? &mean : nullptr), more.input = Matrix(gate ? &input : nullptr, in.columns);
    more.dsum = apart ? &dsum : nullptr;
    Steps steps = {&more, gate ? Step::gated : Step::plain};
    steps.layer = layer;
    const Input of(added ? sum : input, dims);
    const bool wanted = need_input || (!gate && need_residual);
    const auto found = derive(
        of, &grad, address(grad_sum), &rstd, std::nullopt, 0.0, wanted,
        {need_scale ? &scale : nullptr, need_shift ? address(shift) : nullptr, need_gate ? address(gate) : nullptr},
        steps);
    if (!gate && need_residual)  // no two outputs of an operator are one tensor
      dsum = need_input ? torch::stable::clone(found.input) : found.input;
    return Six{need_input ? found.input : in.none(),
               need_residual ? dsum : in.none(),
               in.or_none(found.sums[2]),
               in.or_none(found.sums[0]),
               in.or_none(found.sums[1]),
               in.none()};
  };
  return or_python<Six>("rmsnorm::_python_modulated_norm_backward", attempt, grad, grad_sum, input, gate, scale, shift,
                        sum, mean, rstd, weight, dims, eps, offset, layer, need_input, need_residual, need_gate,
                        need_scale, need_shift, need_weight);
}

OptionalTensor add(const Tensor& input, const Tensor& residual, const Tensor& gate, bool round_first) {
  Input in(input, 1);
  if (!in || !in.like(residual)) return std::nullopt;
  More more;
  more.group = group_of(in, round_first, {&gate, nullptr, nullptr});
  if (more.group < 0) return std::nullopt;
  const Tensor sum = in.room(in.type);
  const Tile tile(in.columns, Tiles::forward);
  const Matrix x(&input, in.columns), other(&residual, in.columns);
  more.gate = Matrix(&gate, in.columns);
  Launch launch(Kernel::add, in.index, tile.warps);
  x.push(launch), other.push(launch), push(launch, &sum), more.push(launch);
  launch.count(in.rows), launch.integer(in.columns);
  launch.constant(static_cast<int>(round_first ? Step::gated_each : Step::gated));
  launch.constant(tile.rows), launch.constant(tile.block);
  run(launch, ceil(in.rows, tile.rows), ceil(in.columns, tile.block));
  return sum;
}

template <bool keep>
Tensor gated_add(Tensor input, Tensor residual, Tensor gate, bool round_first) {
  return or_python<Tensor>(
      keep ? "rmsnorm::_python_gated_add_forward" : "rmsnorm::_python_gated_add",
      [&] { return add(input, residual, gate, round_first); }, input, residual, gate, round_first);
}

Two gated_add_backward(Tensor grad, Tensor input, Tensor gate, bool need_input, bool need_gate) {
  const auto attempt = [&]() -> std::optional<Two> {
    Input in(input, 1);
    if (!in || !in.like(grad)) return std::nullopt;
    const int64_t group = group_of(in, false, {&gate, nullptr, nullptr});
    if (group < 0) return std::nullopt;
    More more;
    more.gate = Matrix(&gate, in.columns), more.group = group, more.input = Matrix(&input, in.columns);
    const auto found = derive(in, &grad, nullptr, nullptr, std::nullopt, 0.0, need_input,
                              {nullptr, nullptr, need_gate ? &gate : nullptr}, {&more, Step::none});
    return Two{found.input, in.or_none(found.sums[2])};
  };
  return or_python<Two>("rmsnorm::_python_gated_add_backward", attempt, grad, input, gate, need_input, need_gate);
}

}  // namespace

const std::vector<Served> modulated_operators = {
    {"modulated_norm", TORCH_BOX(&modulated_norm)},
    {"modulated_norm_forward", TORCH_BOX(&modulated_norm_forward)},
    {"modulated_norm_backward", TORCH_BOX(&modulated_norm_backward)},
    {"gated_add", TORCH_BOX(&gated_add<false>)},
    {"gated_add_forward", TORCH_BOX(&gated_add<true>)},
    {"gated_add_backward", TORCH_BOX(&gated_add_backward)},
};

}  // namespace rmsnorm::gpu
