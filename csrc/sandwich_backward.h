// The only file with the sandwich's gradients: one kernel for both norms where there is one (sandwich_pairs.h); else
// the backward kernel of every norm, of the second norm and then of the first, over so few rows at a time that what
// flows between them stays in L1.
//
//   ds = norm'(dy; s, gain') + grad_sum,  rounded        dx = norm'(ds; x, gain)        dw', dw +=
//
// So they have the bits of the two operators called one after the other, in chunks of the same rows.
#pragma once

#include "run.h"

namespace rmsnorm {

enum SandwichOperand { kTheX, kTheSum, kTheGrad, kTheGradSum, kTheGradX, kTheGradResidual, kSandwichOperands };

// Of both norms: first that of x, then that of the sum.
struct SandwichBackward {
  Backward norm[2];
  const char* rstd[2];
};

// An even number of rows: the kernel takes two together. Four things of each are read or written.
inline int64_t sandwich_block(const Backward& b) {
  return std::max<int64_t>(2, block_rows(b.input, 2 * b.columns) / 2 * 2);
}
inline int64_t sandwich_scratch(const Backward& b) { return sandwich_block(b) * padded(b.columns) * size_of(b.input); }

// Rows of one chunk, as backward_rows(); `partial` and `total` are a norm's each; `scratch` is for ds where
// nobody asked for it; `ahead` knows what the chunk before found of this one, and the thread's rows end with `last`.
inline void sandwich_backward_rows(const Target& target, const SandwichBackward& s,
                                   const Operands<kSandwichOperands>& operands, std::array<char*, 2> partial,
                                   const std::array<Total, 2>& total, char* scratch, SandwichAhead& ahead,
                                   int64_t begin, int64_t end, int64_t last) {
  const BackwardKernel kernel[2] = {target.backward(s.norm[0]), target.backward(s.norm[1])};
  const int64_t columns = s.norm[0].columns, bytes = size_of(s.norm[0].input), block = sandwich_block(s.norm[0]);
  const auto& data = operands.data;
  Cursor<kSandwichOperands> cursor(operands, begin);
  BackwardRows rows[2] = {};
  for (int k = 0; k < 2; ++k) {
    rows[k].shared_weight = true;
    partial[k] = total[k].sums(partial[k]);
    std::fill_n(rows[k].gain, kBatch, s.norm[k].gain.data);
    std::fill_n(rows[k].grad_weight, kBatch, partial[k]);
  }
  const bool overflows = overflows_caches(operands.rows * columns * bytes * 6);
  // One kernel computes all that there can be.
  const Type type = s.norm[0].input;
  const bool pairs = target.sandwich && !s.norm[1].round_add && (type == Type::f32 || type == Type::bf16) &&
                     data[kTheGradX] && data[kTheGradResidual] && s.norm[1].add && s.norm[0].need_weight &&
                     s.norm[1].need_weight;
  rows[0].stream = overflows, rows[0].scratch = scratch;
  rows[0].back =
      (overflows || type != Type::f16) && should_walk_back({data[kTheX], data[kTheGradResidual]}, {data[kTheGradX]});
  rows[1].back = (overflows || type != Type::f16) &&
                 should_walk_back({data[kTheSum], data[kTheGrad], data[kTheGradSum]}, {data[kTheGradResidual]});
  const auto next = [&](int k) { return operands.dims > 0 ? operands.stride[k][operands.dims - 1] : 0; };
  rows[0].next[0] = next(kTheX), rows[1].next[0] = next(kTheSum), rows[1].next[1] = next(kTheGrad);
  for (int64_t r = 0; r < block; ++r) rows[0].grad[r] = scratch + r * padded(columns) * bytes;
  for (int64_t row = begin; row < end; row += rows[0].count) {
    // Blocks end with a flush.
    const int64_t flush = kFlush - (row - begin) % kFlush, left = std::min(end - row, flush);
    const bool both = pairs && left > 1;  // half a batch, or behind it were no room for pointers to two rows more
    rows[0].count = rows[1].count = both ? std::min(kBatch / 2, left / 2 * 2) : std::min(block, left);
    cursor.take(rows[0].count,
                {rows[0].input, rows[1].input, rows[1].grad, rows[1].grad_sum, rows[0].grad_input, rows[0].grad});
    std::copy_n(rows[0].grad, rows[0].count, rows[1].grad_input);
    for (int k = 0; k < 2; ++k) rows[k].rstd = s.rstd[k] + row * size_of(wide(type));
    ahead.more = both && row + rows[0].count + 2 <= last;
    if (ahead.more) {
      void **const sum = rows[1].input + rows[1].count, **const grad = rows[1].grad + rows[1].count;
      void* others[2];
      Cursor(cursor).take(2, {others, sum, grad, others, others, others});
    }
    const bool found = both && target.sandwich(type, s.norm, rows, ahead);
    ahead.found &= found;
    const int64_t done = row + rows[0].count - begin;
    for (int k = 1; k >= 0; --k) {
      if (!found) kernel[k](s.norm[k], rows[k]);
      if (total[k] && (done % kFlush == 0 || begin + done == end))
        total[k].take(target, type, partial[k], 0, columns, done <= kFlush);
    }
  }
  if (rows[0].stream) finish_streaming();
}

// All rows. Of a norm whose weight's gradient nobody wants, need_weight is false.
inline void run_sandwich_backward(const Target& target, const SandwichBackward& s,
                                  const Operands<kSandwichOperands>& operands,
                                  const std::array<GradWeight, 2>& grad_weights) {
  const int64_t columns = s.norm[0].columns, padded_bytes = grad_stride(s.norm[0]);
  const bool weights = grad_weights[0].data || grad_weights[1].data;
  const int64_t rows = operands.rows, each = weights ? chunk_rows(s.norm[0], rows) : 1;
  const int64_t chunks = (rows + each - 1) / each;
  const bool few = rows <= kFlush;
  Totals totals[2];
  for (int k = 0; k < 2; ++k)
    if (grad_weights[k].data && !few) totals[k] = Totals(s.norm[k], chunks, 1, each);
  parallel(chunks, std::max<int64_t>(1, grain_rows(columns) / each), [&](int64_t begin, int64_t end) {
    const Lines scratch(sandwich_scratch(s.norm[0]), operands.data[kTheX]);
    Lines partial[2];
    for (int k = 0; k < 2; ++k)
      if (grad_weights[k].data) partial[k] = Lines::zeros(padded_bytes);
    SandwichAhead ahead = {};
    // Where L2 is large 0.5 to 0.75 KiB take 0.98 of the time of 1.5, which is what a Zen 5 wants (0.75 KiB 1.02
    // to 1.07).
    ahead.asks = has_large_second_cache() ? 768 : 1536;
    const auto run = [&](int64_t chunk, int64_t first, int64_t last) {
      sandwich_backward_rows(target, s, operands, {partial[0].get(), partial[1].get()},
                             {totals[0].of(chunk, begin, end), totals[1].of(chunk, begin, end)}, scratch.get(), ahead,
                             first, last, weights ? std::min(rows, end * each) : end);
    };
    if (!weights) return run(0, begin, end);
    for (int64_t chunk = begin; chunk < end; ++chunk) run(chunk, chunk * each, std::min(rows, (chunk + 1) * each));
    for (int k = 0; k < 2; ++k)
      if (few && partial[k].get())
        target.finish_one(s.norm[k].input, partial[k].get(), columns, grad_weights[k].type, grad_weights[k].data);
  });
  if (!few || rows == 0) finish_weights(target, {totals[0].summands(0), totals[1].summands(0)}, grad_weights);
}

}  // namespace rmsnorm
