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

// Of a thread: two addresses, which are no row's at first, and what was formed of them.
constexpr int64_t kFormed = 64;
inline int64_t modulated_scratch(const Forward& f) { return kFormed + 2 * padded(f.columns) * size_of(wide(f.input)); }

inline int64_t modulated_block(Type type, int64_t columns) {
  return std::max<int64_t>(2, block_rows(type, columns) / 2 * 2);
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
  norms.back = should_walk_back({data[m.added ? kModSum : kModX]}, {data[kModOutput]});
  adds.stream = !m.normed && should_stream(any, bytes, share);
  adds.back = should_walk_back({data[kModX], data[kModResidual]}, {data[kModSum]});
  norms.next = !m.added && operands.dims > 0 ? operands.stride[kModX][operands.dims - 1] : 0;
  norms.next_output = operands.dims > 0 ? operands.stride[kModOutput][operands.dims - 1] : 0;
  const int64_t block = m.added && m.normed ? modulated_block(any.input, any.columns) : kBatch;
  void** const input = m.added ? adds.input : norms.input;
  if (m.normed) {
    norms.scratch = std::fill_n(scratch, kFormed, '\0') - kFormed;
    std::fill_n(norms.gain, kBatch, scratch + kFormed);
    std::fill_n(norms.first_gain, kBatch, scratch + kFormed + padded(any.columns) * size_of(wide(any.input)));
  }
  for (int64_t row = begin; row < end; row += norms.count) {
    const int64_t alike = m.normed ? m.shared - row % m.shared : block;
    adds.count = norms.count = std::min({block, end - row, alike});
    cursor.take(norms.count, {input, adds.residual, adds.gate, norms.gate, norms.residual, adds.sum, norms.output});
    if (m.added) add(m.add, adds);
    if (!m.normed) continue;
    if (m.added) std::copy_n(adds.sum, adds.count, norms.input);
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

// Room for the sum's gradient where nobody asked for it.
inline int64_t modulated_scratch(const Backward& b) {
  return modulated_block(b.input, 2 * b.columns) * b.columns * size_of(b.input);
}

// Rows of one chunk, all of which share their modulations if `partial` is there: zeros, kModulations ·
// modulation_bytes(); `total` is double[kModulations][columns].
inline void modulated_backward_rows(const Target& target, const ModulatedBackward& m,
                                    const Operands<kModulatedGrads>& operands, char* partial, double* total,
                                    char* scratch, int64_t begin, int64_t end) {
  const Backward& any = m.normed ? m.norm : m.add;
  const BackwardKernel norm = m.normed ? target.backward(m.norm) : nullptr;
  const BackwardKernel add = m.added ? target.backward(m.add) : nullptr;
  Cursor<kModulatedGrads> cursor(operands, begin);
  BackwardRows norms = {}, adds = {};
  const int64_t each = modulation_bytes(any), bytes = any.columns * size_of(any.input);
  std::fill_n(norms.grad_weight, kBatch, partial);
  std::fill_n(adds.grad_weight, kBatch, partial ? partial + 2 * each : nullptr);
  const auto& data = operands.data;
  norms.back = should_walk_back({data[kBackSum], data[kBackGrad], data[kBackGradSum]},
                                {data[m.added ? kBackGradResidual : kBackGradX]});
  const int64_t block = m.added && m.normed ? modulated_block(any.input, 2 * any.columns) : kBatch;
  // The sum's gradient: of the norm alone it is x's, of the add alone what arrived.
  void** const sum_grad = m.normed ? norms.grad_input : adds.grad;
  for (int64_t r = 0; m.normed && !data[m.added ? kBackGradResidual : kBackGradX] && r < block; ++r)
    sum_grad[r] = scratch ? scratch + r * bytes : nullptr;
  for (int64_t row = begin; row < end; row += norms.count) {
    norms.count = adds.count = std::min({block, end - row, kFlush - (row - begin) % kFlush});
    void* unread[kBatch];
    cursor.take(norms.count,
                {adds.input, adds.gate, norms.gate, norms.input, m.normed ? norms.grad : adds.grad, norms.grad_sum,
                 m.added ? adds.grad_input : norms.grad_input, m.added && m.normed ? norms.grad_input : unread,
                 norms.grad_gate, norms.gain, adds.grad_gate});
    if (m.normed) {
      norms.rstd = m.rstd + row * size_of(wide(any.input));
      norms.mean = m.mean ? m.mean + row : nullptr;
      norm(m.norm, norms);
    }
    if (m.added) {
      if (m.normed) std::copy_n(norms.grad_input, norms.count, adds.grad);
      add(m.add, adds);
    }
    const int64_t done = row + norms.count - begin;
    if (partial && (done % kFlush == 0 || begin + done == end))
      for (int k = 0; k < kModulations; ++k)
        if (k < 2 ? m.norm.need_weight : m.add.need_weight)
          target.flush(any.input, partial + k * each, total + k * any.columns, any.columns, done <= kFlush);
  }
}

}  // namespace rmsnorm
