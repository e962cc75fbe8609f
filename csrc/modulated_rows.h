// The only file that walks the rows of a modulated norm and of the gated add before it: over so few rows at a time that
// what flows between the two stays in L1. They are kernels of their own, so the norm has the bits of the norm of a sum
// that came from elsewhere.
#pragma once

#include "rows.h"

namespace rmsnorm {

enum ModulatedOperand { kModX, kModResidual, kModGate, kModScale, kModShift, kModSum, kModOutput, kModulatedOperands };

// Which of the two there are.
struct ModulatedForward {
  Forward norm, add;
  bool normed, added;
  int64_t shared;  // rows that share the norm's modulations: those that lie one behind the other
};

inline int64_t modulated_block(Type type, int64_t columns) {
  return std::max<int64_t>(2, block_rows(type, columns) / 2 * 2);
}

// Of a thread: two addresses, which are no row's at first, and what was formed of them; and rows of sums that go past
// the caches, until they are normed.
constexpr int64_t kFormed = 64;
inline int64_t formed_bytes(const Forward& f) { return kFormed + 2 * padded(f.columns) * size_of(wide(f.input)); }
inline int64_t modulated_scratch(const Forward& f) {
  return formed_bytes(f) + modulated_block(f.input, f.columns) * padded(f.columns) * size_of(f.input);
}

inline void modulated_forward_rows(const Target& target, const ModulatedForward& m,
                                   const Operands<kModulatedOperands>& operands, const Statistics& kept, char* scratch,
                                   int64_t begin, int64_t end) {
  const Forward& any = m.normed ? m.norm : m.add;
  const ForwardKernel norm = m.normed ? target.forward(m.norm) : nullptr;
  const ForwardKernel add = m.added ? target.forward(m.add) : nullptr;
  Cursor<kModulatedOperands> cursor(operands, begin);
  ForwardRows adds = {}, norms = {};
  const auto& data = operands.data;
  const int64_t row_bytes = any.columns * size_of(any.input) * ((m.added ? 3 : 1) + m.normed);
  const int64_t bytes = operands.rows * row_bytes, share = (end - begin) * row_bytes;
  norms.stream = m.normed && should_stream(any, bytes, share);
  // fp32 takes 1.05 to 1.18 of the time by it on a Zen 5, 64 or 128 bytes apart.
  const bool back = any.input != Type::f32;
  norms.back = back && should_walk_back({data[m.added ? kModSum : kModX]}, {data[kModOutput]});
  adds.stream = m.added && should_stream(any, bytes, share) &&
                (reinterpret_cast<uintptr_t>(data[kModSum]) | any.columns * size_of(any.input)) % 32 == 0;
  adds.back = back && should_walk_back({data[kModX], data[kModResidual]}, {data[kModSum]});
  norms.next = !m.added && operands.dims > 0 ? operands.stride[kModX][operands.dims - 1] : 0;
  norms.next_output = operands.dims > 0 ? operands.stride[kModOutput][operands.dims - 1] : 0;
  adds.next = operands.dims > 0 ? operands.stride[kModX][operands.dims - 1] : 0;
  adds.next_residual = operands.dims > 0 ? operands.stride[kModResidual][operands.dims - 1] : 0;
  adds.ask = m.added && share > second_cache_bytes();
  const bool apart = m.normed && adds.stream;
  const int64_t block = m.added && m.normed ? modulated_block(any.input, any.columns) : kBatch;
  void** const input = m.added ? adds.input : norms.input;
  if (m.normed) {
    norms.scratch = std::fill_n(scratch, kFormed, '\0') - kFormed;
    std::fill_n(norms.gain, kBatch, scratch + kFormed);
    std::fill_n(norms.first_gain, kBatch, scratch + kFormed + padded(any.columns) * size_of(wide(any.input)));
  }
  for (int64_t r = 0; apart && r < block; ++r)
    adds.output[r] = norms.input[r] = scratch + formed_bytes(any) + r * padded(any.columns) * size_of(any.input);
  for (int64_t row = begin; row < end; row += norms.count) {
    const int64_t alike = m.normed ? m.shared - row % m.shared : block;
    adds.count = norms.count = std::min({block, end - row, alike});
    cursor.take(norms.count, {input, adds.residual, adds.gate, norms.gate, norms.residual, adds.sum, norms.output});
    if (m.added) add(m.add, adds);
    if (!m.normed) continue;
    if (m.added && !apart) std::copy_n(adds.sum, adds.count, norms.input);
    norms.rstd = kept.rstd ? kept.rstd + row * size_of(wide(any.input)) : nullptr;
    norms.mean = kept.mean ? kept.mean + row : nullptr;
    norm(m.norm, norms);
  }
  if (norms.stream || adds.stream) finish_streaming();
}

// The sum is what was normalised; kModGradX is x's gradient, kModGradSum that of the sum, and the residual's.
enum ModulatedGrad {
  kBackX,
  kBackGate,
  kBackScale,
  kBackSum,
  kBackGrad,
  kBackGradSum,
  kBackGradX,
  kBackGradResidual,
  kBackGradScale,
  kBackGradShift,
  kBackGradGate,
  kModulatedGrads
};

struct ModulatedBackward {
  Backward norm, add;
  bool normed, added;
  const char* rstd;
  const double* mean;
};

// What modulations that rows share have their gradients added up in: scale, shift, gate.
constexpr int kModulations = 3;
inline int64_t modulation_bytes(const Backward& b) { return padded(b.columns) * size_of(wide(b.input)); }

// Rows at a time: 32 KiB of them, as the calls for two rows cost a twentieth (16x1152 fp32), and past the caches a
// tenth.
inline int64_t modulated_backward_block(const Backward& b) { return modulated_block(b.input, b.columns / 2); }

// Room for the gradient of a sum that is normed, where nobody asked for it, or it goes past the caches.
inline int64_t modulated_scratch(const ModulatedBackward& m) {
  const Backward& b = m.norm;
  return m.normed && m.added ? modulated_backward_block(b) * b.columns * size_of(b.input) : 0;
}

// Rows of one chunk, all of which share their modulations if `partial` is there: zeros, kModulations ·
// modulation_bytes(); `total` as in backward_rows().
inline void modulated_backward_rows(const Target& target, const ModulatedBackward& m,
                                    const Operands<kModulatedGrads>& operands, char* partial, Total total,
                                    char* scratch, int64_t begin, int64_t end) {
  const Backward& any = m.normed ? m.norm : m.add;
  const int64_t each = modulation_bytes(any), bytes = any.columns * size_of(any.input);
  const bool both = m.normed && m.added, overflows = overflows_caches(operands.rows * bytes * (both ? 6 : 3));
  const auto& data = operands.data;
  const auto can = [&](int k) { return (reinterpret_cast<uintptr_t>(data[k]) | bytes) % 32 == 0; };
  BackwardRows norms = {}, adds = {};
  norms.ask = overflows;
  const bool stream = overflows && can(kBackGradX) && can(kBackGradResidual);
  norms.stream = stream && !both, adds.stream = stream && m.added;
  // The gradient of what was normed; without an add it is x's. Past the caches the add stores it.
  const int normed_grad = m.added ? kBackGradResidual : kBackGradX;
  const bool apart = both && (stream || !data[normed_grad]);
  const BackwardKernel norm = m.normed ? target.backward(m.norm) : nullptr;
  const BackwardKernel add = m.added ? target.backward(m.add) : nullptr;
  Cursor<kModulatedGrads> cursor(operands, begin);
  partial = total.sums(partial);
  std::fill_n(norms.grad_weight, kBatch, partial);
  std::fill_n(adds.grad_weight, kBatch, partial ? partial + 2 * each : nullptr);
  norms.back = should_walk_back({data[kBackSum], data[kBackGrad], data[kBackGradSum]}, {data[normed_grad]});
  const int64_t block = both ? modulated_backward_block(any) : kBatch;
  for (int64_t r = 0; apart && r < block; ++r) norms.grad_input[r] = adds.grad[r] = scratch + r * bytes;
  for (int64_t row = begin; row < end; row += norms.count) {
    norms.count = adds.count = std::min({block, end - row, kFlush - (row - begin) % kFlush});
    void* unread[kBatch];
    void** const found = !m.normed ? unread : apart ? adds.gain : norms.grad_input;
    cursor.take(norms.count, {adds.input, adds.gate, norms.gate, norms.input, m.normed ? norms.grad : adds.grad,
                              norms.grad_sum, m.added ? adds.grad_input : found, m.added ? found : unread,
                              norms.grad_gate, norms.gain, adds.grad_gate});
    if (m.normed) {
      norms.rstd = m.rstd + row * size_of(wide(any.input));
      norms.mean = m.mean ? m.mean + row : nullptr;
      norm(m.norm, norms);
    }
    if (both && !apart) std::copy_n(norms.grad_input, norms.count, adds.grad);
    if (add) add(m.add, adds);
    const int64_t done = row + norms.count - begin;
    if (total && (done % kFlush == 0 || begin + done == end))
      for (int k = 0; k < kModulations; ++k)
        if (k < 2 ? m.norm.need_weight : m.add.need_weight)
          total.take(target, any.input, partial + k * each, k, any.columns, done <= kFlush);
  }
  if (stream) finish_streaming();
}

}  // namespace rmsnorm
