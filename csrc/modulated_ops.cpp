// The only file with the operators of the modulated norm (AdaLN) and of the gated add.
#include <cstring>

#include "modulated_rows.h"
#include "modulation.h"

namespace rmsnorm {
namespace {

Forward add_of(const OptionalTensor& gate, const Tensor& input, const Shape& shape, bool round_first) {
  Forward f = {};
  f.columns = shape.columns, f.input = f.output = f.modulation = type_of(input);
  f.modulate = Modulate::add, f.round_first = round_first;
  if (gate) {
    sharing(*gate, input, shape);
    f.modulation = modulation_type(*gate, input, round_first);
  }
  return f;
}

void run(const ModulatedForward& m, const std::array<const Tensor*, kModulatedOperands>& tensors, const Shape& shape,
         const Tensor* mean, const Tensor* rstd) {
  const Plain<kModulatedOperands> plain(tensors, shape.outer);
  const Tensor& x = *plain.addresses[kModX];
  const auto operands = shared_operands<kModulatedOperands>(x, shape.outer, plain.addresses);
  const Statistics kept = {rstd ? data_of(*rstd) : nullptr, nullptr,
                           mean ? reinterpret_cast<double*>(data_of(*mean)) : nullptr};
  const Target& target = current_target();
  parallel(operands.rows, grain_rows(shape.columns), [&](int64_t begin, int64_t end) {
    const Lines scratch(m.normed ? modulated_scratch(m.norm) : 0);
    modulated_forward_rows(target, m, operands, kept, scratch.get(), begin, end);
  });
}

using Two = std::tuple<Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Four norm(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& gate, const Tensor& scale,
          const OptionalTensor& shift, const OptionalTensor& weight, int64_t dims, double eps, bool round_first,
          bool layer, bool keep) {
  require(!weight, "rmsnorm: no native kernel for a weight beside a scale");
  require(residual || !gate, "rmsnorm: a gate is for what is added to a residual");
  const Shape shape(input, dims);
  const Type type = type_of(input);
  ModulatedForward m = {};
  m.normed = true, m.added = residual.has_value();
  if (residual) check_same(*residual, input, "residual");
  if (m.added) m.add = add_of(gate, input, shape, round_first);
  Forward& f = m.norm;
  f.columns = shape.columns, f.input = f.output = type, f.eps = eps, f.round_first = round_first, f.layer = layer;
  f.modulate = Modulate::norm, f.modulation = modulation_type(scale, input, round_first);
  m.shared = sharing(scale, input, shape);
  if (shift) {
    m.shared = std::min(m.shared, sharing(*shift, input, shape));
    require(type_of(*shift) == f.modulation, "rmsnorm: no native kernel for scale and shift of two types");
  }
  const auto alike = [&](const OptionalTensor& t) { return !t || sharing(*t, input, shape) == m.shared; };
  require(!keep || (alike(scale) && alike(shift) && alike(gate)),
          "rmsnorm: modulations are shared by other numbers of rows each");
  Tensor output = empty_like(input, type), sum = m.added ? empty_like(input, type) : none(type);
  Tensor mean = keep && layer ? empty_statistic(input, dims, Type::f64) : none(Type::f64);
  Tensor rstd = keep ? empty_statistic(input, dims, wide(type)) : none(wide(type));
  run(m, {&input, address(residual), address(gate), &scale, address(shift), m.added ? &sum : nullptr, &output}, shape,
      keep && layer ? &mean : nullptr, keep ? &rstd : nullptr);
  return {output, sum, mean, rstd};
}

Two modulated_norm(Tensor input, OptionalTensor residual, OptionalTensor gate, Tensor scale, OptionalTensor shift,
                   OptionalTensor weight, int64_t dims, double eps, double, bool round_first, bool layer) {
  auto [output, sum, mean, rstd] =
      norm(input, residual, gate, scale, shift, weight, dims, eps, round_first, layer, false);
  return {output, sum};
}

Four modulated_norm_forward(Tensor input, OptionalTensor residual, OptionalTensor gate, Tensor scale,
                            OptionalTensor shift, OptionalTensor weight, int64_t dims, double eps, double,
                            bool round_first, bool layer) {
  return norm(input, residual, gate, scale, shift, weight, dims, eps, round_first, layer, true);
}

// All rows. `grads` are those of scale, shift and gate, for `shared` rows each, or null.
void run(const ModulatedBackward& m, const std::array<const Tensor*, kModulatedGrads>& tensors, const Shape& shape,
         int64_t shared, const std::array<const Tensor*, kModulations>& grads) {
  const Backward& any = m.normed ? m.norm : m.add;
  const Plain<kModulatedGrads> plain(tensors, shape.outer);
  const auto operands = shared_operands<kModulatedGrads>(*plain.addresses[kBackGrad], shape.outer, plain.addresses);
  const Target& target = current_target();
  const int64_t rows = operands.rows, columns = shape.columns, grain = grain_rows(columns);
  if (rows == 0) {  // nothing is added up in what no row has
    for (const Tensor* grad : grads)
      if (grad) std::memset(data_of(*grad), 0, grad->numel() * grad->element_size());
    return;
  }
  const int64_t bytes = modulated_scratch(m);
  const auto room = [&] { return bytes ? Lines(bytes) : Lines(); };
  if (!m.norm.need_weight && !m.add.need_weight) {
    parallel(rows, grain, [&](int64_t begin, int64_t end) {
      const auto scratch = room();
      modulated_backward_rows(target, m, operands, nullptr, {}, scratch.get(), begin, end);
    });
    return;
  }
  // A chunk ends with the rows that share; of few, it is all of them.
  Backward alike = any;
  alike.gain.count = 1;
  const int64_t each = chunk_rows(alike, shared), chunks = (shared + each - 1) / each;
  const int64_t units = rows / shared * chunks;
  const auto finish = [&](const Totals& totals, int64_t gradient, int64_t group, int64_t begin, int64_t end) {
    for (int k = 0; k < kModulations; ++k)
      if (grads[k]) {
        char* to = data_of(*grads[k]) + group * columns * size_of(type_of(*grads[k]));
        target.finish(totals.summands(k, gradient), begin, end, type_of(*grads[k]), to);
      }
  };
  Totals all = chunks > 1 ? Totals(alike, chunks, kModulations, each, units / chunks) : Totals();
  parallel(units, std::max<int64_t>(1, grain / std::min(each, shared)), [&](int64_t begin, int64_t end) {
    const auto scratch = room();
    const Lines partial = Lines::zeros(kModulations * modulation_bytes(any));
    Totals own = chunks > 1 ? Totals() : Totals(alike, 1, kModulations, each);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t group = unit / chunks, first = group * shared + unit % chunks * each;
      modulated_backward_rows(target, m, operands, partial.get(),
                              chunks > 1 ? all.of(unit, begin, end) : own.of(0, 0, 1), scratch.get(), first,
                              std::min(first + each, (group + 1) * shared));
      if (chunks == 1) finish(own, 0, group, 0, columns);
    }
  });
  for (int64_t group = 0; chunks > 1 && group < units / chunks; ++group)
    parallel(columns, grain_rows(chunks), [&](int64_t begin, int64_t end) { finish(all, group, group, begin, end); });
}

Tensor room_for(bool need, const Tensor& tensor) {
  return need ? empty_like(tensor, type_of(tensor)) : none(type_of(tensor));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> modulated_norm_backward(
    Tensor grad, OptionalTensor grad_sum, Tensor input, OptionalTensor gate, Tensor scale, OptionalTensor shift,
    Tensor sum, Tensor mean, Tensor rstd, OptionalTensor weight, int64_t dims, double eps, double, bool layer,
    bool need_input, bool need_residual, bool need_gate, bool need_scale, bool need_shift, bool) {
  require(!weight, "rmsnorm: no native kernel for a weight beside a scale");
  const auto sizes = sum.sizes(), whole = input.sizes();
  const bool added = std::equal(sizes.begin(), sizes.end(), whole.begin(), whole.end());
  const Tensor& x = added ? sum : input;
  const Shape shape(x, dims);
  const Type type = type_of(x);
  check_same(grad, x, "grad");
  if (grad_sum) check_same(*grad_sum, x, "grad_sum");
  check_statistic(rstd, x, shape, wide(type), "rstd");
  if (layer) check_statistic(mean, x, shape, Type::f64, "mean");
  const int64_t shared = sharing(scale, x, shape);
  need_gate = need_gate && gate, need_shift = need_shift && shift, need_residual = need_residual && added;
  ModulatedBackward m = {};
  m.normed = true, m.added = added && (need_input || need_gate);
  const bool through = need_input || need_residual || need_gate;
  Backward& b = m.norm;
  b.columns = shape.columns, b.eps = eps, b.input = type, b.layer = layer, b.modulate = Modulate::norm;
  b.modulation = modulation_type(scale, x, false), b.need_input = through, b.add = grad_sum && through;
  b.need_weight = shared > 1 && (need_scale || need_shift);
  Backward& a = m.add;
  a.columns = shape.columns, a.input = type, a.modulate = Modulate::add, a.need_input = need_input;
  a.modulation = gate ? modulation_type(*gate, x, false) : type, a.need_weight = need_gate && shared > 1;
  const auto alike = [&](const OptionalTensor& t, const char* name) {
    require(!t || sharing(*t, x, shape) == shared, "rmsnorm: ", name, " must be shared by as many rows as scale");
  };
  alike(shift, "shift"), alike(gate, "gate");
  require(!shift || type_of(*shift) == b.modulation, "rmsnorm: shift must be of the type of scale");
  check_same(input, x, "input");
  const Tensor dx = room_for(need_input, x), dresidual = room_for(need_residual, x);
  const Tensor dscale = room_for(need_scale, scale), dshift = need_shift ? room_for(true, *shift) : none(type);
  const Tensor dgate = need_gate ? room_for(true, *gate) : none(type);
  const auto wanted = [](bool need, const Tensor& tensor) { return need ? &tensor : nullptr; };
  const bool own = shared == 1;
  // Without the gated add, what arrives at the sum is the residual's gradient, or that of x.
  const bool only = added && !m.added;
  const Tensor r = with_plain_rows(rstd, 0);  // hooks on what is saved may give it back in other strides
  const OptionalTensor middle = with_plain_rows(layer ? &mean : nullptr, 0);
  m.rstd = data_of(r);
  m.mean = middle ? reinterpret_cast<const double*>(data_of(*middle)) : nullptr;
  run(m,
      {m.added ? &input : nullptr, m.added ? address(gate) : nullptr, &scale, &x, &grad,
       b.add ? address(grad_sum) : nullptr, only ? wanted(need_residual, dresidual) : wanted(need_input, dx),
       only ? nullptr : wanted(need_residual, dresidual), wanted(own && need_scale, dscale),
       wanted(own && need_shift, dshift), wanted(own && need_gate, dgate)},
      shape, shared, {wanted(need_scale, dscale), wanted(need_shift, dshift), wanted(need_gate, dgate)});
  return {dx, dresidual, dgate, dscale, dshift, none(type)};
}

Tensor gated_add(Tensor input, Tensor residual, Tensor gate, bool round_first) {
  check_same(residual, input, "residual");
  const Shape shape(input, 1);
  ModulatedForward m = {};
  m.added = true, m.add = add_of(gate, input, shape, round_first);
  Tensor sum = empty_like(input, type_of(input));
  run(m, {&input, &residual, &gate, nullptr, nullptr, &sum, nullptr}, shape, nullptr, nullptr);
  return sum;
}

// residual's gradient is that of the sum, as it is.
Two gated_add_backward(Tensor grad, Tensor input, Tensor gate, bool need_input, bool need_gate) {
  check_same(grad, input, "grad");
  const Shape shape(input, 1);
  const int64_t shared = sharing(gate, input, shape);
  ModulatedBackward m = {};
  m.added = true;
  Backward& a = m.add;
  a.columns = shape.columns, a.input = type_of(input), a.modulate = Modulate::add, a.need_input = need_input;
  a.modulation = modulation_type(gate, input, false), a.need_weight = need_gate && shared > 1;
  const Tensor dx = room_for(need_input, input), dgate = room_for(need_gate, gate);
  const Tensor *to_x = need_input ? &dx : nullptr, *to_gate = need_gate ? &dgate : nullptr;
  run(m,
      {&input, &gate, nullptr, nullptr, &grad, nullptr, to_x, nullptr, nullptr, nullptr,
       shared == 1 ? to_gate : nullptr},
      shape, shared, {nullptr, nullptr, to_gate});
  return {dx, dgate};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rmsnorm, CPU, m) {
  serve(m, "modulated_norm", TORCH_BOX(&modulated_norm));
  m.impl("modulated_norm_forward", TORCH_BOX(&modulated_norm_forward));
  m.impl("modulated_norm_backward", TORCH_BOX(&modulated_norm_backward));
  serve(m, "gated_add", TORCH_BOX(&gated_add));
  m.impl("gated_add_forward", TORCH_BOX(&gated_add));
  m.impl("gated_add_backward", TORCH_BOX(&gated_add_backward));
}

}  // namespace rmsnorm
