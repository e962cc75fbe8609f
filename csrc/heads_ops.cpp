// The only file with the operators of heads that are turned: query and key in one call, normed before or not.
//
// Rows are walked with the tokens outside and the heads inside: the heads of a token lie side by side where a
// projection wrote them, and share its cosines and sines. So what is kept of a row is [*, tokens, heads, 1].
#include "run.h"

namespace rmsnorm {
namespace {

// The dimensions of x, [*, heads, tokens, head_dim], in the order in which rows are walked.
std::array<int64_t, kMaxDims> walked(int64_t dims) {
  std::array<int64_t, kMaxDims> order;
  for (int64_t d = 0; d < dims; ++d) order[d] = d;
  std::swap(order[dims - 3], order[dims - 2]);
  return order;
}

// Cosines or sines, [*, tokens, turned], which are broadcast over the heads, and over dimensions that they lack.
struct Angles {
  Tensor tensor;
  std::array<int64_t, kMaxDims> stride = {};  // bytes, by the dimensions of x

  Angles(const Tensor& given, const Tensor& x) : tensor(with_plain_rows(given, given.dim() - 1)) {
    const auto sizes = tensor.sizes(), strides = tensor.strides(), whole = x.sizes();
    const int64_t bytes = size_of(type_of(tensor)), dims = static_cast<int64_t>(whole.size());
    bool same = tensor.is_cpu();
    int64_t of_x = dims - 2;
    for (int64_t d = static_cast<int64_t>(sizes.size()) - 2; d >= 0; --d, of_x -= of_x == dims - 2 ? 2 : 1) {
      same = same && of_x >= 0 && (sizes[d] == 1 || sizes[d] == whole[of_x]);
      if (same && sizes[d] != 1) stride[of_x] = strides[d] * bytes;
    }
    require(same, "rmsnorm: cos and sin must be on the CPU, and broadcast to [*, tokens, turned] of query and key");
  }
};

// One of the two tensors, and what it is turned by.
struct Rows {
  Tensor x;
  Angles cos, sin;
  Forward f = {};

  Rows(const Tensor& given, const Tensor& cosines, const Tensor& sines, bool interleaved, Turn turn)
      : x((check(given, cosines, sines), with_plain_rows(given, given.dim() - 1))), cos(cosines, x), sin(sines, x) {
    f.columns = x.size(x.dim() - 1), f.input = f.output = type_of(x), f.turn = turn, f.interleaved = interleaved;
    f.angle = type_of(cos.tensor), f.turned = cosines.size(cosines.dim() - 1);
    require(f.angle == type_of(sin.tensor) && (f.angle == f.input || (f.angle == Type::f32 && size_of(f.input) == 2)),
            "rmsnorm: no native kernel for cos and sin of these types");
  }

  static void check(const Tensor& x, const Tensor& cos, const Tensor& sin) {
    require(x.dim() >= 3 && cos.dim() >= 2 && sin.dim() >= 2,
            "rmsnorm: query and key must be [*, heads, tokens, head_dim], cos and sin [*, tokens, turned]");
    check_dims(x.dim());
    const int64_t turned = cos.size(cos.dim() - 1);
    require(sin.size(sin.dim() - 1) == turned && turned % 2 == 0 && turned <= x.size(x.dim() - 1),
            "rmsnorm: cos and sin must have as many columns, an even number that head_dim has, too");
  }

  // Of tensors of x's sizes, beside cosines at `c` and sines at `s`.
  template <int N>
  Operands<N> operands(const std::array<const Tensor*, N>& tensors, int c, int s) const {
    Operands<N> operands;
    const int64_t outer = x.dim() - 1;
    const auto order = walked(x.dim());
    std::array<const int64_t*, N> strides = {};
    for (int k = 0; k < N; ++k) {
      if (!tensors[k]) continue;
      operands.data[k] = data_of(*tensors[k]);
      strides[k] = tensors[k]->strides().data();
    }
    operands.data[c] = data_of(cos.tensor);
    operands.data[s] = data_of(sin.tensor);
    const auto sizes = x.sizes();
    for (int64_t i = 0; i < outer; ++i) {
      const int64_t d = order[i];
      std::array<int64_t, N> step = {};
      for (int k = 0; k < N; ++k)
        if (tensors[k]) step[k] = strides[k][d] * size_of(f.input);
      step[c] = cos.stride[d], step[s] = sin.stride[d];
      operands.push(sizes[d], step);
    }
    return operands;
  }

  // [*, tokens, heads, 1], for what is kept.
  Tensor empty_statistic() const {
    const auto sizes = x.sizes();
    const auto order = walked(x.dim());
    std::array<int64_t, kMaxDims> walked_sizes;
    for (size_t d = 0; d + 1 < sizes.size(); ++d) walked_sizes[d] = sizes[order[d]];
    walked_sizes[sizes.size() - 1] = 1;
    return empty(walked_sizes.data(), x.dim(), wide(f.input));
  }

  // Of x's sizes, the heads of a token side by side, as a projection wrote them: attention lays out what it makes of
  // queries as it finds them, and the next projection reads that where it lies. Gradients go back there.
  Tensor empty_by_tokens() const { return empty(x.sizes().data(), x.dim(), f.input, walked(x.dim()).data()); }
};

// Turns rows as they come.
Tensor turn(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved, Turn direction) {
  const Rows rows(x, cos, sin, interleaved, direction);
  const Tensor output = rows.empty_by_tokens();
  run_forward(rows.f, rows.operands<kForwardOperands>({&rows.x, &output}, kGate, kResidual), current_target(), nullptr,
              nullptr);
  return output;
}

// Two tensors that differ in their number of heads, if in anything.
void check_both(const Tensor& query, const Tensor& key) {
  const auto q = query.sizes(), k = key.sizes();
  bool same = q.size() == k.size() && code_of(query) == code_of(key);
  for (size_t d = 0; same && d < q.size(); ++d) same = q[d] == k[d] || d + 3 == q.size();
  require(same, "rmsnorm: key must have the dtype and the shape of query, but for the number of heads");
}

std::tuple<Tensor, Tensor> rope(Tensor query, Tensor key, Tensor cos, Tensor sin, bool interleaved) {
  check_both(query, key);
  return {turn(query, cos, sin, interleaved, Turn::input), turn(key, cos, sin, interleaved, Turn::input)};
}

std::tuple<Tensor, Tensor> rope_backward(Tensor grad_query, Tensor grad_key, Tensor cos, Tensor sin, bool interleaved,
                                         bool need_query, bool need_key) {
  const auto back = [&](const Tensor& grad, bool need) {
    return need ? turn(grad, cos, sin, interleaved, Turn::back) : none(type_of(grad));
  };
  return {back(grad_query, need_query), back(grad_key, need_key)};
}

Gain gain_of(const OptionalTensor& weight, double offset, const Tensor& x, Gain::For use) {
  const Shape shape(x, 1);
  require(!weight || weight->dim() == 1, "rmsnorm: a weight must have the size of a head");
  return gain_or_ones(weight, offset, x, shape, use);
}

// Returns what is kept of the rows, if it is.
Tensor norm(const Tensor& x, const Tensor& cos, const Tensor& sin, const OptionalTensor& weight, double eps,
            double offset, bool round_first, bool interleaved, bool keep, Tensor& output) {
  Rows rows(x, cos, sin, interleaved, Turn::norm);
  const Gain gain = gain_of(weight, offset, x, Gain::kForward);
  require(!weight || !round_first || type_of(*weight) == rows.f.input,
          "rmsnorm: no native kernel for a weight of another type that multiplies a rounded value");
  output = rows.empty_by_tokens();
  const Tensor rstd = keep ? rows.empty_statistic() : none(Type::f32);
  rows.f.eps = eps, rows.f.round_first = round_first, rows.f.gain_type = gain.type, rows.f.gain = gain.rows;
  run_forward(rows.f, rows.operands<kForwardOperands>({&rows.x, &output}, kGate, kResidual), *gain.target,
              keep ? &rstd : nullptr, nullptr);
  return rstd;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> both(const Tensor& query, const Tensor& key, const Tensor& cos,
                                                const Tensor& sin, const OptionalTensor& query_weight,
                                                const OptionalTensor& key_weight, double eps, double offset,
                                                bool round_first, bool interleaved, bool keep) {
  check_both(query, key);
  Tensor q, k;
  Tensor q_rstd = norm(query, cos, sin, query_weight, eps, offset, round_first, interleaved, keep, q);
  Tensor k_rstd = norm(key, cos, sin, key_weight, eps, offset, round_first, interleaved, keep, k);
  return {q, k, q_rstd, k_rstd};
}

std::tuple<Tensor, Tensor> heads_rms_norm_rope(Tensor query, Tensor key, Tensor cos, Tensor sin,
                                               OptionalTensor query_weight, OptionalTensor key_weight, double eps,
                                               double offset, bool round_first, bool interleaved) {
  auto [q, k, q_rstd, k_rstd] =
      both(query, key, cos, sin, query_weight, key_weight, eps, offset, round_first, interleaved, false);
  return {q, k};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> heads_rms_norm_rope_forward(Tensor query, Tensor key, Tensor cos, Tensor sin,
                                                                       OptionalTensor query_weight,
                                                                       OptionalTensor key_weight, double eps,
                                                                       double offset, bool round_first,
                                                                       bool interleaved) {
  return both(query, key, cos, sin, query_weight, key_weight, eps, offset, round_first, interleaved, true);
}

// The gradients of x and of its weight.
std::tuple<Tensor, Tensor> norm_backward(const Tensor& grad, const Tensor& x, const Tensor& cos, const Tensor& sin,
                                         const Tensor& rstd, const OptionalTensor& weight, double eps, double offset,
                                         bool interleaved, bool need_input, bool need_weight) {
  check_same(grad, x, "grad");
  const Type type = type_of(x);
  need_weight = need_weight && weight;
  if (!need_input && !need_weight) return {none(type), none(type)};
  const Rows rows(x, cos, sin, interleaved, Turn::norm);
  const Gain gain = gain_of(weight, offset, x, Gain::kBackward);
  Backward b = {};
  b.columns = rows.f.columns, b.input = type, b.eps = eps, b.gain = gain.rows, b.turn = rows.f;
  b.need_input = true, b.need_weight = need_weight;
  const Tensor dy = with_plain_rows(grad, x.dim() - 1), r = with_plain_rows(rstd, 0);
  require(r.is_cpu() && type_of(r) == wide(type) && r.numel() * b.columns == x.numel(),
          "rmsnorm: what was kept must be what the forward operator returned for this input");
  const Tensor dx = rows.empty_by_tokens();
  const Tensor dw = need_weight ? empty_like(*weight, type_of(*weight)) : none(type);
  run_backward(*gain.target, b, rows.operands<kBackwardOperands>({&rows.x, &dy, &dx}, kXGate, kGradSum), data_of(r),
               nullptr, {GradWeight(need_weight ? &dw : nullptr), GradWeight()});
  return {need_input ? dx : none(type), dw};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> heads_rms_norm_rope_backward(
    Tensor grad_query, Tensor grad_key, Tensor query, Tensor key, Tensor cos, Tensor sin, Tensor query_rstd,
    Tensor key_rstd, OptionalTensor query_weight, OptionalTensor key_weight, double eps, double offset,
    bool interleaved, bool need_query, bool need_key, bool need_query_weight, bool need_key_weight) {
  auto [dq, dqw] = norm_backward(grad_query, query, cos, sin, query_rstd, query_weight, eps, offset, interleaved,
                                 need_query, need_query_weight);
  auto [dk, dkw] =
      norm_backward(grad_key, key, cos, sin, key_rstd, key_weight, eps, offset, interleaved, need_key, need_key_weight);
  return {dq, dk, dqw, dkw};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rmsnorm, CPU, m) {
  serve(m, "heads_rms_norm_rope", TORCH_BOX(&heads_rms_norm_rope));
  m.impl("heads_rms_norm_rope_forward", TORCH_BOX(&heads_rms_norm_rope_forward));
  m.impl("heads_rms_norm_rope_backward", TORCH_BOX(&heads_rms_norm_rope_backward));
  serve(m, "rope", TORCH_BOX(&rope));
  m.impl("rope_forward", TORCH_BOX(&rope));
  m.impl("rope_backward", TORCH_BOX(&rope_backward));
}

}  // namespace rmsnorm
