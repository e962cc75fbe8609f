// The only file with a GPU's operators of heads that are turned: gpu/heads.py, by the rules of gpu_ops.cpp.
#include "gpu_steps.h"

namespace rmsnorm::gpu {

using Two = std::tuple<Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

void Turn::push(Launch& launch, const Tensor& heads) const {
  const int64_t dims = heads.dim();
  launch.open(), cos.push(launch), sin.push(launch), launch.integer(rows), launch.integer(turned);
  launch.integer(heads.size(dims - 3)), launch.integer(heads.size(dims - 2)), launch.close();
}

namespace {

// The strides of sequences, tokens and heads; of those that there is one of, what they would be if that were
// contiguous. False if sequences have no single one.
bool strides_of(const Tensor& heads, Matrix& matrix) {
  const auto sizes = heads.sizes(), strides = heads.strides();
  const int64_t dims = static_cast<int64_t>(sizes.size()), columns = sizes[dims - 1];
  const auto stride = [&](int64_t d) { return sizes[d] > 1 ? strides[d] : columns; };
  matrix.tokens = stride(dims - 2), matrix.heads = stride(dims - 3), matrix.stride = columns;
  bool first = true;
  int64_t expected = 0;
  for (int64_t d = dims - 4; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (first) matrix.stride = strides[d], first = false;
    else if (strides[d] != expected) return false;
    expected = strides[d] * sizes[d];
  }
  return true;
}

}  // namespace

// A copy, where Matrix makes one, for the same reasons.
Matrix Turn::matrix(const Tensor* heads) {
  Matrix found;
  if (!heads) return found;
  found.of_heads = true, found.code = rmsnorm::code_of(*heads),
  found.data = held(heads->get(), heads->const_data_ptr());
  const int64_t columns = heads->size(heads->dim() - 1);
  const bool odd = columns % 16 != 0;
  bool good = strides_of(*heads, found) && (heads->stride(heads->dim() - 1) == 1 || columns == 1);
  good = good && (odd || aligned(found.data));
  if (!good || (found.stride % 16 || found.tokens % 16 || found.heads % 16) != odd) {
    found.copy = copied(*heads), found.data = found.copy->const_data_ptr();
    strides_of(*found.copy, found);
  }
  return found;
}

Tensor Turn::room(const Input& input) {
  const int64_t dims = input.sizes.count;
  std::array<int64_t, kMaxDims> shape = {};
  std::copy_n(input.sizes.data, dims, shape.data());
  std::swap(shape[dims - 3], shape[dims - 2]);
  return torch::stable::transpose(input.room(shape.data(), dims, input.type), dims - 3, dims - 2);
}

namespace {

// Whether these are cosines or sines of the tokens, for every sequence or for each one.
bool angles(const Input& in, const Tensor& angle, int64_t turned, bool every) {
  const Sizes own(angle);
  const int64_t whole = in.sizes.count - 1, tokens = in.sizes.data[in.sizes.count - 2];
  if (own.count < 2 || own.data[own.count - 1] != turned || own.data[own.count - 2] != tokens) return false;
  if (!every) return own.count == whole && std::equal(own.data, own.data + whole - 2, in.sizes.data);
  return own.count <= whole + 1 && std::all_of(own.data, own.data + own.count - 2, [](int64_t n) { return n == 1; });
}

// Nothing where the kernels don't take the tensors, or angles that are laid out for sequences.
std::optional<Turn> turning(Input& in, const Tensor& key, const Tensor& cos, const Tensor& sin, bool interleaved,
                            const OptionalTensor& query_weight = std::nullopt,
                            const OptionalTensor& key_weight = std::nullopt) {
  if (!in || in.sizes.count < 3 || in.columns > tiles().widest[Tiles::backward_f64]) return std::nullopt;
  const Type angle = known_type(rmsnorm::code_of(cos));
  const bool alike = angle == in.type || (angle == Type::f32 && size_of(in.type) == 2);
  if (!alike || known_type(rmsnorm::code_of(sin)) != angle || !in.beside(cos) || !in.beside(sin)) return std::nullopt;
  const Sizes other(key);
  if (known_type(rmsnorm::code_of(key)) != in.type || !in.beside(key) || key.numel() == 0) return std::nullopt;
  if (other.count != in.sizes.count || other.data[other.count - 1] != in.columns ||
      other.data[other.count - 2] != in.sizes.data[other.count - 2] ||
      !std::equal(other.data, other.data + other.count - 3, in.sizes.data))
    return std::nullopt;
  for (const OptionalTensor* weight : {&query_weight, &key_weight})
    if (*weight && ((*weight)->dim() != 1 || !in.fits(**weight))) return std::nullopt;
  const int64_t turned = cos.size(cos.dim() - 1);
  const bool every = angles(in, cos, turned, true) && angles(in, sin, turned, true);
  if (!every && !(angles(in, cos, turned, false) && angles(in, sin, turned, false))) return std::nullopt;
  Turn turn;
  turn.cos = Row(&cos), turn.sin = Row(&sin), turn.interleaved = interleaved;
  turn.turned = turned, turn.rows = cos.numel() / std::max<int64_t>(turned, 1);
  if (turned == 0) return std::nullopt;
  return turn;
}

struct HeadNorm {
  double eps, offset;
  bool round_first;
};

// The heads turned, normed before if there is a norm.
Tensor turned(const Tensor& heads, const Turn& turn, const Tensor* rstd = nullptr,
              const OptionalTensor& weight = std::nullopt, const HeadNorm* norm = nullptr, bool back = false) {
  const Input in(heads, 1);
  const Tensor to = Turn::room(in);
  const Tile tile(in.columns, Tiles::forward);
  const int64_t rows = std::max<int64_t>(1, tile.rows / 2);  // as two of its columns are loaded for each
  const Matrix x = Turn::matrix(&heads), z = Turn::matrix(&to);
  const Row gain(address(weight));
  Launch launch(Kernel::turn, in.index, tile.warps);
  x.push(launch), turn.push(launch, heads), gain.push(launch), z.push(launch), push(launch, rstd);
  launch.count(in.rows), launch.integer(in.columns), launch.number(1.0 / static_cast<double>(in.columns));
  launch.number(norm ? norm->eps : 0.0);
  launch.constant(norm != nullptr), launch.constant(back), launch.constant(turn.interleaved);
  launch.offset(norm ? norm->offset : 0.0), launch.constant(norm && norm->round_first);
  launch.constant(rows), launch.constant(tile.block);
  run(launch, ceil(in.rows, rows));
  return to;
}

template <bool forward>
Two rope(Tensor query, Tensor key, Tensor cos, Tensor sin, bool interleaved) {
  const auto attempt = [&]() -> std::optional<Two> {
    Input in(query, 1);
    const auto turn = turning(in, key, cos, sin, interleaved);
    if (!turn) return std::nullopt;
    return Two{turned(query, *turn), turned(key, *turn)};
  };
  return or_python<Two>(forward ? "rmsnorm::_python_rope_forward" : "rmsnorm::_python_rope", attempt, query, key, cos,
                        sin, interleaved);
}

Two rope_backward(Tensor grad_query, Tensor grad_key, Tensor cos, Tensor sin, bool interleaved, bool need_query,
                  bool need_key) {
  const auto attempt = [&]() -> std::optional<Two> {
    Input in(grad_query, 1);
    const auto turn = turning(in, grad_key, cos, sin, interleaved);
    if (!turn) return std::nullopt;
    const auto back = [&](const Tensor& grad) { return turned(grad, *turn, nullptr, std::nullopt, nullptr, true); };
    const Tensor dq = need_query ? back(grad_query) : in.none();
    return Two{dq, need_key ? back(grad_key) : in.none()};
  };
  return or_python<Two>("rmsnorm::_python_rope_backward", attempt, grad_query, grad_key, cos, sin, interleaved,
                        need_query, need_key);
}

// A number for each head of a token, in the order in which those were written.
Tensor head_statistic(const Tensor& heads) {
  const Input in(heads, 1);
  const int64_t dims = in.sizes.count;
  std::array<int64_t, kMaxDims> shape = {};
  std::copy_n(in.sizes.data, dims, shape.data());
  std::swap(shape[dims - 3], shape[dims - 2]), shape[dims - 1] = 1;
  return in.room(shape.data(), dims, wide(in.type));
}

struct Normed2 {
  Tensor query, key;
  OptionalTensor query_rstd, key_rstd;
};

std::optional<Normed2> normed(bool keep, const Tensor& query, const Tensor& key, const Tensor& cos, const Tensor& sin,
                              const OptionalTensor& query_weight, const OptionalTensor& key_weight,
                              const HeadNorm& norm, bool interleaved) {
  Input in(query, 1);
  if (norm.eps < 0) return std::nullopt;
  const auto turn = turning(in, key, cos, sin, interleaved, query_weight, key_weight);
  if (!turn) return std::nullopt;
  for (const OptionalTensor* gain : {&query_weight, &key_weight})
    if (*gain && norm.round_first && promoted(in.type, known_type(rmsnorm::code_of(**gain))) != in.type)
      return std::nullopt;
  OptionalTensor first, second;
  if (keep) first = head_statistic(query), second = head_statistic(key);
  const Tensor q = turned(query, *turn, address(first), query_weight, &norm);
  return Normed2{q, turned(key, *turn, address(second), key_weight, &norm), first, second};
}

Two heads_rms_norm_rope(Tensor query, Tensor key, Tensor cos, Tensor sin, OptionalTensor query_weight,
                        OptionalTensor key_weight, double eps, double offset, bool round_first, bool interleaved) {
  const auto attempt = [&]() -> std::optional<Two> {
    const auto found =
        normed(false, query, key, cos, sin, query_weight, key_weight, {eps, offset, round_first}, interleaved);
    if (!found) return std::nullopt;
    return Two{found->query, found->key};
  };
  return or_python<Two>("rmsnorm::_python_heads_rms_norm_rope", attempt, query, key, cos, sin, query_weight, key_weight,
                        eps, offset, round_first, interleaved);
}

Four heads_rms_norm_rope_forward(Tensor query, Tensor key, Tensor cos, Tensor sin, OptionalTensor query_weight,
                                 OptionalTensor key_weight, double eps, double offset, bool round_first,
                                 bool interleaved) {
  const auto attempt = [&]() -> std::optional<Four> {
    const auto found =
        normed(true, query, key, cos, sin, query_weight, key_weight, {eps, offset, round_first}, interleaved);
    if (!found) return std::nullopt;
    return Four{found->query, found->key, *found->query_rstd, *found->key_rstd};
  };
  return or_python<Four>("rmsnorm::_python_heads_rms_norm_rope_forward", attempt, query, key, cos, sin, query_weight,
                         key_weight, eps, offset, round_first, interleaved);
}

Four heads_rms_norm_rope_backward(Tensor grad_query, Tensor grad_key, Tensor query, Tensor key, Tensor cos, Tensor sin,
                                  Tensor query_rstd, Tensor key_rstd, OptionalTensor query_weight,
                                  OptionalTensor key_weight, double eps, double offset, bool interleaved,
                                  bool need_query, bool need_key, bool need_query_weight, bool need_key_weight) {
  const auto attempt = [&]() -> std::optional<Four> {
    Input in(query, 1);
    const auto turn = turning(in, key, cos, sin, interleaved, query_weight, key_weight);
    const Input other(key, 1);
    if (!turn || !in.like(grad_query) || !other.like(grad_key)) return std::nullopt;
    Steps steps;
    steps.turn = &*turn;
    const auto q = derive(in, &grad_query, nullptr, &query_rstd, query_weight, offset, need_query,
                          {need_query_weight ? address(query_weight) : nullptr, nullptr, nullptr}, steps);
    const auto k = derive(other, &grad_key, nullptr, &key_rstd, key_weight, offset, need_key,
                          {need_key_weight ? address(key_weight) : nullptr, nullptr, nullptr}, steps);
    return Four{q.input, k.input, in.or_none(q.sums[0]), in.or_none(k.sums[0])};
  };
  return or_python<Four>("rmsnorm::_python_heads_rms_norm_rope_backward", attempt, grad_query, grad_key, query, key,
                         cos, sin, query_rstd, key_rstd, query_weight, key_weight, eps, offset, interleaved, need_query,
                         need_key, need_query_weight, need_key_weight);
}

}  // namespace

const std::vector<Served> heads_operators = {
    {"rope", TORCH_BOX(&rope<false>)},
    {"rope_forward", TORCH_BOX(&rope<true>)},
    {"rope_backward", TORCH_BOX(&rope_backward)},
    {"heads_rms_norm_rope", TORCH_BOX(&heads_rms_norm_rope)},
    {"heads_rms_norm_rope_forward", TORCH_BOX(&heads_rms_norm_rope_forward)},
    {"heads_rms_norm_rope_backward", TORCH_BOX(&heads_rms_norm_rope_backward)},
};

}  // namespace rmsnorm::gpu
