// The only file that launches the norm's kernels on a GPU from C++: forward, backward, and the sums over rows.
//
// The rules are those of gpu/launch.py and gpu/backward.py, which launch the same in Python: tests/gpu/test_launcher.py
// holds the two to each other, argument by argument.
#include "gpu_steps.h"

namespace rmsnorm::gpu {

void More::push(Launch& launch, const Tensor* bias_sums, const Tensor* gate_sums) const {
  launch.open(Launch::kMore);
  gate.push(launch), scale.push(launch), shift.push(launch);
  const auto number = [&](int64_t value) { value < 0 ? launch.none() : launch.integer(value); };
  number(group), bias.push(launch), mean.push(launch), number(counted), grad_rstd.push(launch), input.push(launch);
  gpu::push(launch, dgate), gpu::push(launch, dsum);
  gpu::push(launch, bias_sums), gpu::push(launch, gate_sums);
  launch.close();
}

Normed forward(const Input& input, const Tensor* residual, const OptionalTensor& weight, const Norm& norm,
               const Steps& steps) {
  const Tile tile(input.columns, steps.more ? Tiles::forward_more : Tiles::forward);
  OptionalTensor sum = norm.sum;
  if (residual && !sum) sum = input.room(input.type);
  const Type added = sum ? known_type(rmsnorm::code_of(*sum)) : input.type;
  const bool rounds = weight && norm.round_first;
  const Type natural = rounds ? promoted(added, known_type(rmsnorm::code_of(*weight))) : added;
  OptionalTensor out = norm.out;
  if (!out) out = norm.store ? input.room(norm.dtype == Type::none ? natural : norm.dtype) : input.none(added);
  OptionalTensor rstd;
  if (norm.keep) rstd = input.statistic(wide(added));
  const Matrix x(&input.tensor, input.columns), other(residual, input.columns);
  const Row gain(address(weight));

  Launch launch(Kernel::forward, input.index, tile.warps);
  x.push(launch), other.push(launch), gain.push(launch);
  push(launch, norm.store ? &*out : nullptr), push(launch, address(sum)), push(launch, address(rstd));
  push_more(launch, steps.more);
  launch.count(input.rows), launch.integer(input.columns);
  launch.number(steps.part(input.columns)), launch.number(norm.eps);
  steps.push_constants(launch);
  launch.offset(norm.offset), launch.constant(norm.round_first);
  launch.constant(tile.rows), launch.constant(tile.block), launch.constant(input.columns > tile.block);
  run(launch, ceil(input.rows, tile.rows), input.span);
  return {*out, sum, rstd};
}

namespace {

// _Sums of gpu/backward.py.
struct Sums {
  Sums(const Input& input, const std::array<const Tensor*, 3>& like, int64_t rows, int64_t span, int64_t tile,
       bool group)
      : input(input) {
    const Tiles& t = tiles();
    const int64_t count = ceil(rows, tile);
    int64_t steps;
    if (group) {
      steps = std::min(t.steps, std::max(t.fewest_steps, ceil(count, t.group_partials[0])));
      steps = std::max(steps, ceil(count, t.group_partials[1]));
    } else {
      steps = std::max(t.fewest_steps, ceil(count, t.partials[input.columns > t.narrow]));
    }
    const bool wanted = like[0] || like[1] || like[2];
    chunk = wanted || group ? tile * steps : tile;
    const bool brief = steps <= t.steps && input.type != Type::f64;
    const Type kind = brief ? Type::f32 : Type::f64;
    const int64_t shape[] = {ceil(rows, chunk), span * input.columns};
    chunks = shape[0], width = shape[1];
    for (int i = 0; i < 3; ++i) {
      if (!like[i]) continue;
      total[i] = input.room_like(*like[i]);
      // A group of one chunk has nothing to fold.
      whole[i] = group && chunks == 1 && (brief || known_type(rmsnorm::code_of(*total[i])) == kind);
      partial[i] = whole[i] ? total[i] : input.room(shape, 2, kind);
    }
  }

  OptionalTensor folded(int i) const {
    if (total[i] && !whole[i]) {
      const Tiles& t = tiles();
      Launch launch(Kernel::fold, input.index, t.fold[2]);
      push(launch, &*partial[i]), push(launch, &*total[i]), launch.count(chunks), launch.integer(width);
      launch.constant(t.fold[0]), launch.constant(t.fold[1]);
      run(launch, ceil(width, t.fold[1]));
    }
    return total[i];
  }

  const Input& input;
  int64_t chunk, chunks, width;
  std::array<bool, 3> whole = {};
  std::array<OptionalTensor, 3> total, partial;
};

}  // namespace

Gradients derive(const Input& input, const Tensor* grad, const Tensor* grad_sum, const Tensor* rstd,
                 const OptionalTensor& weight, double offset, bool need_input, const std::array<const Tensor*, 3>& like,
                 const Steps& steps) {
  const More* more = steps.more;
  const bool group = more && more->group >= 0;
  int64_t rows = input.rows, span = input.span;
  const int64_t columns = input.columns;
  if (group) span = rows * span / more->group, rows = more->group;
  const bool f64 = input.type == Type::f64;
  const Tile tile(columns, more ? Tiles::backward_more : f64 ? Tiles::backward_f64 : Tiles::backward);
  const Turn* turn = steps.turn;
  const Tensor dx = !need_input ? input.none() : turn ? Turn::room(input) : input.room(input.type);
  const Sums sums(input, like, rows, span, tile.rows, group);
  const bool rowwise = need_input || like[2] || (more && (more->dgate || more->dsum));
  const Row gain(address(weight)), length(rstd);
  const auto of = [&](const Tensor* tensor) { return turn ? Turn::matrix(tensor) : Matrix(tensor, columns); };
  const Matrix h = of(grad), dsum(grad_sum, columns), x = of(&input.tensor);
  const auto push_others = [&](Launch& launch) {
    push_more(launch, more, address(sums.partial[1]), address(sums.partial[2]));
  };
  OptionalTensor means;
  if (rowwise && columns > tile.block && steps.load != Step::none) {
    const int64_t shape[] = {rows * span, steps.layer ? 2 : 1};
    means = input.room(shape, 2, wide(input.type));
    Launch launch(Kernel::wide_means, input.index, tile.warps);
    h.push(launch), x.push(launch), length.push(launch), gain.push(launch), push(launch, &*means), push_others(launch);
    launch.integer(columns), launch.number(steps.part(columns));
    steps.push_constants(launch);
    launch.offset(offset), launch.constant(tile.block);
    if (group) run(launch, rows * span);
    else run(launch, rows, span);
  }
  if (rowwise || sums.partial[0] || sums.partial[1]) {
    Launch launch(Kernel::backward, input.index, tile.warps);
    h.push(launch), dsum.push(launch), x.push(launch), length.push(launch), push(launch, address(means));
    if (turn) turn->push(launch, input.tensor);
    else launch.none();
    gain.push(launch), push(launch, need_input ? &dx : nullptr), push(launch, address(sums.partial[0]));
    push_others(launch);
    launch.count(rows), launch.integer(columns), launch.count(sums.chunk), launch.number(steps.part(columns));
    steps.push_constants(launch);
    launch.constant(rowwise), launch.constant(turn && turn->interleaved), launch.offset(offset);
    launch.constant(tile.rows), launch.constant(tile.block), launch.constant(tiles().steps);
    const int64_t across = ceil(columns, tile.block);
    if (group) run(launch, span, sums.chunks, across);
    else run(launch, sums.chunks, span, across);
  }
  return {dx, {sums.folded(0), sums.folded(1), sums.folded(2)}};
}

}  // namespace rmsnorm::gpu
