// The only file that is called by code which Inductor has compiled: rows in plain pointers, past torch's dispatcher,
// and, while they are in a cache, what that code does with them; their gradients; and heads that are turned.
#include "called.h"
#include "run.h"
#include "sandwich_backward.h"

namespace rmsnorm {
namespace {

// Bytes of rows that are normed before the rest is done with them: they, and what they are made of, stay in L2.
constexpr int64_t kLocal = 65536;

// As src/rmsnorm/_called.py writes it, and the next: a field is 8 bytes. The gradients of a norm of x, or of a
// sandwich, whose sum is normed next.
struct Gradients {
  enum Kind : int64_t { kNorm, kSandwich } kind;
  int64_t input_type, weight_type, next_weight_type, round_sum, rows, columns;
  double eps, next_eps, offset;
  const char *input, *sum, *grad, *grad_sum, *rstd, *next_rstd, *weight, *next_weight;
  // Where 1/rms is null, it is found again.
  char *grad_input, *grad_residual, *grad_weight, *grad_next_weight;  // null where nobody wants it
  Around around;                                                      // of one norm's
};

// Heads of query or of key, which are normed and turned: [batch, heads, tokens, columns] with strides, in elements, to
// rows that lie by tokens. Cosines and sines are one for all heads.
struct Heads {
  int64_t input_type, weight_type, angle_type, round_first, interleaved;
  int64_t batch, heads, tokens, columns, turned;
  int64_t input_batch, input_head, input_token, cos_batch, cos_token, sin_batch, sin_token;
  double eps, offset;
  const char *input, *cos, *sin, *weight;
  char *output, *rstd;  // null where nobody wants it
};

Forward form_of(const Call& c) {
  Forward f = {};
  f.columns = c.columns, f.input = static_cast<Type>(c.input_type), f.output = static_cast<Type>(c.output_type);
  f.round_first = c.round_first, f.eps = c.eps, f.offset = c.offset;
  f.scale = c.kind == Call::kScaleNorm, f.factor = c.factor, f.layer = c.kind == Call::kLayerNorm;
  f.add = c.kind == Call::kAddNorm || f.scale, f.twice = c.kind == Call::kSandwich;
  f.times = c.kind == Call::kNormTimes, f.add_after = c.kind == Call::kNormAdd || f.times;
  if (f.twice) f.first_eps = c.eps, f.eps = c.next_eps;
  f.round_output = f.add && f.output != f.input;  // a cast behind the norm
  return f;
}

void run(const Call& c) {
  Forward f = form_of(c);
  const Type weight = static_cast<Type>(c.weight_type), next = static_cast<Type>(c.next_weight_type);
  const bool of_sum = f.add_after || f.twice;
  const bool few = few_rows(f.input, c.rows) && weight == f.input && (!f.twice || next == f.input);
  const auto gain_of = [&](Type type, const char* data) {
    if (!of_sum) return Gain(type, data, c.offset, f.input, c.columns, Gain::kForward);
    if (few) return Gain(type, data, 0.0, f.input, c.columns, Gain::kForward);
    if (type == Type::none) return Gain(1.0, f.input, padded(c.columns));
    return Gain(type, data, c.offset, f.input, c.columns, Gain::kBackward);
  };
  // Neither changes a bit of LayerNorm's: a gain of 1, and -0, which leaves even the sign of a zero.
  const auto of_layer = [&](Type type, const char* data, double value) {
    if (weight == Type::none && next == Type::none) return Gain();
    if (type == Type::none) return Gain(value, f.input, c.columns);
    return Gain(type, data, 0.0, f.input, c.columns, Gain::kForwardWide);
  };
  const Gain gain = f.layer ? of_layer(weight, c.weight, 1.0) : gain_of(weight, c.weight);
  const Gain second = f.layer ? of_layer(next, c.next_weight, -0.0) : f.twice ? gain_of(next, c.next_weight) : Gain();
  if (f.layer) f.bias = second.rows.data;
  f.gain_type = (f.twice ? second : gain).type, f.gain = (f.twice ? second : gain).rows, f.first_gain = gain.rows;
  // bf16 as Llama's models have it has a kernel of its own: 512x4096 takes 0.63 of the general one's.
  if (f.round_output && !(f.input == Type::bf16 && f.gain_type == f.input && f.round_first)) {
    f.general = true;
    f.x = f.residual = f.sum = f.input, f.counted = f.divisor = f.columns;
  }

  const int64_t row = c.columns * size_of(f.input), out_row = c.columns * size_of(f.output);
  const int64_t value = size_of(wide(f.input)), bytes = scratch_bytes(f);
  const auto at = [](auto* data, int64_t offset) { return data ? data + offset : nullptr; };
  const auto operands_of_rows = [&](int64_t begin, int64_t end, char* output) {
    Operands<kForwardOperands> operands;
    operands.data = {const_cast<char*>(c.input) + begin * row, output, const_cast<char*>(at(c.residual, begin * row)),
                     at(c.sum, begin * row), nullptr};
    operands.push(end - begin, {row, out_row, row, row, 0});
    return operands;
  };
  const auto kept_of_rows = [&](int64_t begin) {
    char *rstd = at(c.rstd, begin * value), *next_rstd = at(c.next_rstd, begin * value);
    return f.twice ? Statistics{next_rstd, rstd, nullptr} : Statistics{rstd, nullptr, nullptr};
  };
  make_ready(c.output, c.rows * out_row);
  make_ready(c.sum, c.rows * row);
  const int64_t most = std::max<int64_t>(block_rows(f.input, c.columns), kLocal / std::max<int64_t>(out_row, 1));
  const int64_t block = std::min(most, c.rows);
  parallel(c.rows, grain_rows(c.columns), [&](int64_t begin, int64_t end) {
    const bool local = c.rest && !c.output;
    const std::unique_ptr<char[]> memory(bytes || local ? new char[bytes + 63 + (local ? block * out_row + 64 : 0)]
                                                        : nullptr);
    char* const scratch = memory.get() + (-reinterpret_cast<uintptr_t>(memory.get()) & 63);
    if (!c.rest) {
      const auto operands = operands_of_rows(0, c.rows, c.output);
      return forward_rows(*gain.target, f, operands, kept_of_rows(0), scratch, begin, end);
    }
    for (int64_t first = begin; first < end; first += block) {
      const int64_t last = std::min(first + block, end);
      char* const output = local ? scratch + (bytes + 63) / 64 * 64 : c.output + first * out_row;
      const auto operands = operands_of_rows(first, last, output);
      forward_rows(*gain.target, f, operands, kept_of_rows(first), scratch, 0, last - first);
      c.rest(c.context, first, last, output);
    }
  });
}

void run(const Gradients& c) {
  const Type type = static_cast<Type>(c.input_type);
  const int64_t row = c.columns * size_of(type);
  const bool sandwich = c.kind == Gradients::kSandwich;
  const auto found = c.rstd ? nullptr : inverse_rms(type, c.input, c.rows, c.columns, c.eps);
  const auto next = c.next_rstd || !sandwich ? nullptr : inverse_rms(type, c.sum, c.rows, c.columns, c.next_eps);
  const char* const rstd = found ? found.get() : c.rstd;
  const auto gain_of = [&](int64_t weight, const char* data) {
    return Gain(static_cast<Type>(weight), data, c.offset, type, c.columns, Gain::kBackward);
  };
  const Gain gain = gain_of(c.weight_type, c.weight);
  Backward b = {};
  b.columns = c.columns, b.input = type, b.eps = c.eps, b.gain = gain.rows;
  b.need_input = c.grad_input, b.need_weight = c.grad_weight, b.add = c.grad_sum && c.grad_input;
  b.round_add = c.round_sum;
  for (char* data : {c.grad_input, c.grad_residual}) make_ready(data, c.rows * row);
  const auto to = [&](int64_t weight, char* data) { return GradWeight(data, static_cast<Type>(weight), c.columns); };
  const auto given = [](const char* data) { return const_cast<char*>(data); };
  if (!sandwich) {
    Operands<kBackwardOperands> operands;
    operands.data = {given(c.input), given(c.around.before ? nullptr : c.grad), c.grad_input, given(c.grad_sum)};
    operands.push(c.rows, {row, row, row, row, 0, 0});
    return run_backward(*gain.target, b, operands, rstd, nullptr, {to(c.weight_type, c.grad_weight), GradWeight()},
                        &c.around);
  }
  const Gain second = gain_of(c.next_weight_type, c.next_weight);
  SandwichBackward s = {{b, b}, {rstd, next ? next.get() : c.next_rstd}};
  s.norm[0].add = false, s.norm[1].add = c.grad_sum, s.norm[1].need_input = true;
  s.norm[1].eps = c.next_eps, s.norm[1].gain = second.rows, s.norm[1].need_weight = c.grad_next_weight;
  Operands<kSandwichOperands> operands;
  operands.data = {given(c.input), given(c.sum), given(c.grad), given(c.grad_sum), c.grad_input, c.grad_residual};
  operands.push(c.rows, {row, row, row, row, row, row});
  run_sandwich_backward(*gain.target, s, operands,
                        {to(c.weight_type, c.grad_weight), to(c.next_weight_type, c.grad_next_weight)});
}

void run(const Heads& c) {
  Forward f = {};
  f.columns = c.columns, f.input = f.output = static_cast<Type>(c.input_type), f.turn = Turn::norm;
  f.interleaved = c.interleaved, f.angle = static_cast<Type>(c.angle_type), f.turned = c.turned;
  f.eps = c.eps, f.round_first = c.round_first;
  const Type weight = static_cast<Type>(c.weight_type);
  const Gain gain = weight == Type::none ? Gain(1.0, f.input, padded(c.columns))
                                         : Gain(weight, c.weight, c.offset, f.input, c.columns, Gain::kForward);
  f.gain_type = gain.type, f.gain = gain.rows;
  const int64_t size = size_of(f.input), angle = size_of(f.angle), row = c.columns * size;
  Operands<kForwardOperands> operands;
  operands.data[kInput] = const_cast<char*>(c.input), operands.data[kOutput] = c.output;
  operands.data[kGate] = const_cast<char*>(c.cos), operands.data[kResidual] = const_cast<char*>(c.sin);
  const auto push = [&](int64_t count, int64_t input, int64_t output, int64_t cos, int64_t sin) {
    std::array<int64_t, kForwardOperands> strides = {};
    strides[kInput] = input * size, strides[kOutput] = output, strides[kGate] = cos * angle;
    strides[kResidual] = sin * angle, operands.push(count, strides);
  };
  push(c.batch, c.input_batch, c.tokens * c.heads * row, c.cos_batch, c.sin_batch);
  push(c.tokens, c.input_token, c.heads * row, c.cos_token, c.sin_token);
  push(c.heads, c.input_head, row, 0, 0);
  run_forward(f, operands, *gain.target, {c.rstd, nullptr, nullptr});
}

}  // namespace

void run_call(const Call& call) { run(call); }

}  // namespace rmsnorm

// For who writes that code: where all of an output is no more, there are no rows to ask for ahead.
extern "C" __attribute__((visibility("default"))) int64_t rmsnorm_local_bytes() { return rmsnorm::kLocal; }

// The numbers change with the structs, as compiled code is kept on disk.
extern "C" __attribute__((visibility("default"))) void rmsnorm_rows_2(const void* call) {
  rmsnorm::run(*static_cast<const rmsnorm::Call*>(call));
}

extern "C" __attribute__((visibility("default"))) void rmsnorm_heads_1(const void* call) {
  rmsnorm::run(*static_cast<const rmsnorm::Heads*>(call));
}

extern "C" __attribute__((visibility("default"))) void rmsnorm_gradients_3(const void* call) {
  rmsnorm::run(*static_cast<const rmsnorm::Gradients*>(call));
}
