// The only file that says what a call of forward is in plain pointers: of code that Inductor has compiled, and of
// Python.
#pragma once

#include <cstdint>

namespace rmsnorm {

// As src/rmsnorm/_called.py writes it: a field is 8 bytes.
struct Call {
  // src/rmsnorm/_handed.py has the numbers, by the operators' names.
  enum Kind : int64_t { kNorm, kAddNorm, kNormAdd, kSandwich, kNormTimes, kScaleNorm, kLayerNorm } kind;
  int64_t input_type, output_type, weight_type, next_weight_type;  // numbers of Type
  int64_t round_first, rows, columns;
  double eps, next_eps, offset, factor;                 // next_eps: of the second norm of a sandwich
  const char *input, *residual, *weight, *next_weight;  // the latter: of that norm, or LayerNorm's bias
  char *output, *sum, *rstd, *next_rstd;                // null where nobody wants it
  // What is done with rows [begin, end) as soon as they are normed. They are in `output`, or, if that is null, in
  // memory of this thread's, until it returns.
  void (*rest)(void* context, int64_t begin, int64_t end, void* rows);
  void* context;
};

void run_call(const Call& call);

}  // namespace rmsnorm
