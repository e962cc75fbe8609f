// The only file that is called by code which Inductor has compiled: rows in plain pointers, past torch's dispatcher,
// and, while they are in a cache, what that code does with them.
#include "tensors.h"

namespace rmsnorm {
namespace {

// As src/rmsnorm/_called.py writes it: a field is 8 bytes.
struct Call {
  enum Kind : int64_t { kNorm, kAddNorm, kNormAdd, kSandwich } kind;
  int64_t type, output_type, weight_type, next_weight_type;  // numbers of Type
  int64_t round_first, rows, columns;
  double eps, next_eps, offset;  // next_eps: of the second norm of a sandwich
  const char *x, *residual, *weight, *next_weight;
  char *output, *sum, *rstd, *next_rstd;  // null where nobody wants it
  // What is done with rows [begin, end) as soon as they are normed. They are in `output`, or, if that is null, in
  // memory of this thread's, until it returns.
  void (*rest)(void* context, int64_t begin, int64_t end, void* rows);
  void* context;
};

// Bytes of rows that are normed before the rest is done with them: they, and what they are made of, stay in L2.
constexpr int64_t kLocal = 65536;

Forward form_of(const Call& c) {
  Forward f = {};
  f.columns = c.columns, f.input = static_cast<Type>(c.type), f.output = static_cast<Type>(c.output_type);
  f.round_first = c.round_first, f.eps = c.eps, f.offset = c.offset;
  f.add = c.kind == Call::kAddNorm, f.add_after = c.kind == Call::kNormAdd, f.twice = c.kind == Call::kSandwich;
  if (f.twice) f.first_eps = c.eps, f.eps = c.next_eps;
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
  const Gain gain = gain_of(weight, c.weight), second = f.twice ? gain_of(next, c.next_weight) : Gain();
  f.gain_type = (f.twice ? second : gain).type, f.gain = (f.twice ? second : gain).rows, f.first_gain = gain.rows;

  const int64_t row = c.columns * size_of(f.input), out_row = c.columns * size_of(f.output);
  const int64_t value = size_of(wide(f.input)), bytes = scratch_bytes(f);
  const auto at = [](auto* data, int64_t offset) { return data ? data + offset : nullptr; };
  const auto operands_of_rows = [&](int64_t begin, int64_t end, char* output) {
    Operands<kForwardOperands> operands;
    operands.data = {const_cast<char*>(c.x) + begin * row, output, const_cast<char*>(at(c.residual, begin * row)),
                     at(c.sum, begin * row), nullptr};
    operands.push(end - begin, {row, out_row, row, row, 0});
    return operands;
  };
  const auto kept_of_rows = [&](int64_t begin) {
    char *rstd = at(c.rstd, begin * value), *next_rstd = at(c.next_rstd, begin * value);
    return f.twice ? Statistics{next_rstd, rstd, nullptr} : Statistics{rstd, nullptr, nullptr};
  };
  if (c.output && is_large(c.rows * out_row)) ask_for_huge_pages(c.output, c.rows * out_row);
  if (c.sum && is_large(c.rows * row)) ask_for_huge_pages(c.sum, c.rows * row);
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

}  // namespace
}  // namespace rmsnorm

// The number changes with `Call`, as compiled code is kept on disk.
extern "C" __attribute__((visibility("default"))) void rmsnorm_rows_1(const void* call) {
  rmsnorm::run(*static_cast<const rmsnorm::Call*>(call));
}
