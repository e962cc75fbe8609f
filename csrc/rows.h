// The only file that turns tensors' sizes and strides into row pointers, and rows into batches and chunks.
// It knows bytes and rows, not torch: ops.cpp fills the operands, and chooses the threads.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <memory>

#include "kernel.h"
#include "memory.h"
#include "totals.h"

namespace rmsnorm {

constexpr int kMaxDims = 64;  // torch's own limit

// The tensors of one call, walked together: `data[k] + sum(index · stride[k])` is the row of operand k.
template <int N>
struct Operands {
  std::array<char*, N> data = {};
  int dims = 0;
  int64_t rows = 1;
  std::array<int64_t, kMaxDims> size;
  std::array<std::array<int64_t, kMaxDims>, N> stride;  // bytes

  // Adds the next outer dimension, outermost first; merges it with the previous one where every operand allows it.
  void push(int64_t count, const std::array<int64_t, N>& strides) {
    rows *= count;
    if (count == 1) return;
    bool merge = dims > 0;
    for (int k = 0; merge && k < N; ++k) merge = stride[k][dims - 1] == strides[k] * count;
    if (merge) size[dims - 1] *= count;
    else size[dims++] = count;
    for (int k = 0; k < N; ++k) stride[k][dims - 1] = strides[k];
  }
};

// Walks rows in order, from any row on.
template <int N>
class Cursor {
 public:
  Cursor(const Operands<N>& operands, int64_t row) : operands_(operands), pointer_(operands.data) {
    for (int d = operands.dims - 1; d >= 0; --d) {
      index_[d] = row % operands.size[d];
      row /= operands.size[d];
      for (int k = 0; k < N; ++k) pointer_[k] += index_[d] * operands.stride[k][d];
    }
  }

  // Fills `lists[k]` with pointers to the next `count` rows of operand k; of one that isn't there it leaves the list be
  // (32768x128 bf16: 10 % of the time went into pointers that nobody read).
  void take(int64_t count, const std::array<void**, N>& lists) {
    for (int64_t done = 0; done < count;) {
      const int last = operands_.dims - 1;
      const int64_t run = last < 0 ? 1 : std::min(count - done, operands_.size[last] - index_[last]);
      for (int k = 0; k < N; ++k) {
        if (!operands_.data[k]) continue;
        const int64_t stride = last < 0 ? 0 : operands_.stride[k][last];
        for (int64_t r = 0; r < run; ++r) lists[k][done + r] = pointer_[k] + r * stride;
        pointer_[k] += run * stride;
      }
      if (last >= 0 && (index_[last] += run) == operands_.size[last]) wrap();
      done += run;
    }
  }

 private:
  // The innermost dimension is through: back to its start, and on to the next of those around it.
  void wrap() {
    for (int d = operands_.dims - 1; d >= 0 && index_[d] == operands_.size[d]; --d) {
      index_[d] = 0;
      if (d > 0) ++index_[d - 1];
      for (int k = 0; k < N; ++k)
        pointer_[k] += (d > 0 ? operands_.stride[k][d - 1] : 0) - operands_.stride[k][d] * operands_.size[d];
    }
  }

  const Operands<N>& operands_;
  std::array<char*, N> pointer_;
  std::array<int64_t, kMaxDims> index_;
};

// The weight's rows for `count` rows from `row` on.
inline void take_weight(const WeightRows& weight, int64_t row, int64_t count, void** list) {
  for (int64_t r = 0, w = weight.count > 1 ? row % weight.count : 0; r < count; ++r) {
    list[r] = weight.data + w * weight.stride;
    if (++w == weight.count) w = 0;
  }
}

enum ForwardOperand { kInput, kOutput, kResidual, kSum, kGate, kForwardOperands };

// Bytes of a block of rows: of what a gate or a norm in front of the norm makes, or of what is turned behind it.
inline int64_t scratch_bytes(const Forward& f) {
  if (f.turn == Turn::norm) return block_rows(f.input, f.columns) * f.columns * size_of(f.input);
  if (!f.gate_first && !f.twice) return 0;
  const int64_t each = f.gate_first ? (size_of(f.input) == 2 ? 4 : 8) : size_of(f.input);
  return std::max<int64_t>(f.twice ? 2 : 1, block_rows(f.input, f.columns)) * padded(f.columns) * each;
}

// What is kept of each row: one value each, or null.
struct Statistics {
  char* rstd;
  char* first_rstd;
  double* mean;
};

// `scratch` has scratch_bytes().
inline void forward_rows(const Target& target, const Forward& f, const Operands<kForwardOperands>& operands,
                         const Statistics& kept, char* scratch, int64_t begin, int64_t end) {
  const ForwardKernel kernel = target.forward(f);
  Cursor<kForwardOperands> cursor(operands, begin);
  ForwardRows rows;  // 2 KiB, not set to 0 for a row that takes 40 bytes: no kernel follows what isn't there
  rows.scratch = scratch;
  const bool sums = f.add || f.twice;  // a sum is written, too
  const int64_t read = (sums ? 3 : f.add_after || f.gate != Gate::none ? 2 : 1) * size_of(f.input);
  const int64_t row_bytes = f.columns * (read + size_of(f.output));
  const int64_t bytes = operands.rows * row_bytes, share = (end - begin) * row_bytes;
  const auto& data = operands.data;
  rows.even = operands.dims == 1 && is_even(target, f);
  rows.stream = !(rows.even && f.input == Type::f32 && share_a_cache(bytes, share)) && should_stream(f, bytes, share);
  if (rows.stream) rows.even &= is_even_past_caches(f, data[kOutput], operands.stride[kOutput][0]);
  rows.woven = rows.even && should_weave(f, share);
  rows.add_again = should_add_again(f, bytes);
  // An output of wider elements meets other columns: add of 512x4096 bf16 to fp32 takes 1.08 to 1.10 backwards.
  const bool plain = f.input == Type::f32 && read == size_of(f.input) && !rows.stream;
  if (!f.general && (plain || size_of(f.output) > size_of(f.input))) rows.back = false;
  else if (rows.add_again || f.general)
    rows.back = should_walk_back({data[kInput], data[kResidual]}, {data[kSum], data[kOutput]});
  else rows.back = should_walk_back({data[sums ? kSum : kInput], data[kGate]}, {data[kOutput]});
  rows.keep_gain = f.columns * (size_of(f.input) + size_of(f.output) + size_of(f.gain_type)) <= first_cache_bytes();
  rows.ask = should_ask(f, bytes, share);
  rows.next = operands.dims > 0 ? operands.stride[kInput][operands.dims - 1] : 0;
  rows.next_output = operands.dims > 0 ? operands.stride[kOutput][operands.dims - 1] : 0;
  rows.next_residual = operands.dims > 0 ? operands.stride[kResidual][operands.dims - 1] : 0;
  for (int64_t row = begin; row < end; row += rows.count) {
    rows.count = rows.even ? end - row : std::min(kBatch, end - row);
    rows.rstd = kept.rstd ? kept.rstd + row * size_of(wide(f.input)) : nullptr;
    rows.first_rstd = kept.first_rstd ? kept.first_rstd + row * size_of(wide(f.input)) : nullptr;
    rows.mean = kept.mean ? kept.mean + row : nullptr;
    const int64_t listed = rows.even ? 1 : rows.count;
    cursor.take(listed, {rows.input, rows.output, rows.residual, rows.sum, rows.gate});
    if (f.gain.count > 1 || row == begin) take_weight(f.gain, row, listed, rows.gain);
    if (f.twice && (f.first_gain.count > 1 || row == begin))
      take_weight(f.first_gain, row, rows.count, rows.first_gain);
    kernel(f, rows);
  }
  if (rows.stream || rows.add_again) finish_streaming();
}

enum BackwardOperand { kX, kGrad, kGradInput, kGradSum, kXGate, kGradGate, kBackwardOperands };

// Bytes that gradients need that are turned back first.
inline int64_t scratch_bytes(const Backward& b) {
  return b.turn.turn == Turn::none ? 0 : turned_rows(b.input, b.columns) * padded(b.columns) * size_of(wide(b.input));
}

// What a graph's own code does around the kernel, while rows [begin, end) are in a cache.
struct Around {
  using Step = void (*)(void* context, int64_t begin, int64_t end, void* rows);
  // Or null: writes the gradient that arrives, into `rows` of this thread's; goes on with what leaves, in its place.
  Step before = nullptr, after = nullptr;
  void *before_context = nullptr, *after_context = nullptr;
};

// Rows of 32 KiB: a divisor of kFlush, as kBatch is, and at least two, which share what they load.
inline int64_t around_rows(int64_t row_bytes) {
  int64_t rows = kBatch;
  while (rows > 2 && rows * row_bytes > 32768) rows /= 2;
  return rows;
}

// Whether rows are written past the caches.
inline bool streams_rows(const Backward& b, int64_t rows) {
  return overflows_caches(rows * b.columns * size_of(b.input) * (b.gate != Gate::none ? 5 : b.add ? 4 : 3));
}

// Bytes of a thread's own. The gradient that around->before makes lies where the input's goes, unless that is past the
// caches: each column of it is read, for the last time, before the other is stored.
inline int64_t scratch_bytes(const Backward& b, int64_t rows, const Around* around) {
  if (!around || !around->before) return scratch_bytes(b);
  const int64_t row = b.columns * size_of(b.input);
  return b.need_input && !streams_rows(b, rows) ? 0 : around_rows(row) * row;
}

// Rows of one chunk; `scratch` has scratch_bytes(), or is null; `partial` is zeros,
// wide(input)[grad_rows][padded(columns)], as is a part of `total`, which takes its place; a total is
// double[grad_rows][columns]. All may be null: then there are no more rows than kFlush.
inline void backward_rows(const Target& target, const Backward& b, const Operands<kBackwardOperands>& operands,
                          const char* rstd, const double* mean, char* scratch, char* partial, Total total,
                          int64_t begin, int64_t end, const Around* around = nullptr) {
  const BackwardKernel kernel = target.backward(b);
  Cursor<kBackwardOperands> cursor(operands, begin);
  BackwardRows rows = {};
  partial = total.sums(partial);
  const WeightRows grad_weight = {partial, b.gain.count, partial ? grad_stride(b) : 0};
  const int64_t flush = flush_rows(b);
  rows.shared_weight = b.gain.count == 1;
  rows.scratch = scratch;
  rows.stream = streams_rows(b, operands.rows);
  const auto& data = operands.data;
  // In a cache, fp16 doesn't wait, and loses a tenth by walking back.
  rows.back =
      (rows.stream || b.input != Type::f16) &&
      should_walk_back({data[kX], data[kGrad], data[kGradSum], data[kXGate]}, {data[kGradInput], data[kGradGate]});
  for (int k : {kX, kGrad}) rows.next[k] = operands.dims > 0 ? operands.stride[k][operands.dims - 1] : 0;
  const int64_t row_bytes = b.columns * size_of(b.input);
  const bool made = around && around->before, changed = around && around->after;
  const int64_t most = made || changed ? around_rows(row_bytes) : kBatch;
  rows.stream &= !changed;
  // From half of the last cache on: 512x4096 bf16 takes 0.93 to 1.0 of the time, 1024x4096 0.81 to 0.89 (a Zen 5).
  rows.ask = b.add && !made && !changed && is_large(8 * operands.rows * row_bytes);
  rows.pairs = has_large_second_cache();
  for (int64_t row = begin; row < end; row += rows.count) {
    rows.count = std::min(most, end - row);
    rows.rstd = rstd + row * size_of(wide(b.input));
    rows.mean = mean ? mean + row : nullptr;
    cursor.take(rows.count, {rows.input, rows.grad, rows.grad_input, rows.grad_sum, rows.gate, rows.grad_gate});
    if (b.gain.count > 1 || row == begin) {  // the first batch is the longest
      take_weight(b.gain, row, rows.count, rows.gain);
      take_weight(grad_weight, row, rows.count, rows.grad_weight);
      if (b.inverse.data) take_weight(b.inverse, row, rows.count, rows.gate);
    }
    if (made) {
      char* const arrives = scratch ? scratch : static_cast<char*>(rows.grad_input[0]);
      for (int64_t r = 0; r < rows.count; ++r) rows.grad[r] = arrives + r * row_bytes;
      around->before(around->before_context, row, row + rows.count, arrives);
    }
    kernel(b, rows);
    if (changed) around->after(around->after_context, row, row + rows.count, rows.grad_input[0]);
    const int64_t done = row + rows.count - begin;
    if (total && (done % flush == 0 || begin + done == end))
      for (int64_t k = 0; k < grad_rows(b); ++k)
        total.take(target, b.input, partial + k * grad_stride(b), k, b.columns, done <= flush);
  }
  if (rows.stream) finish_streaming();
}

}  // namespace rmsnorm
