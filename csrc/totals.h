// The only file that knows where a weight's gradient is added up: in chunks of rows, each with a total of its own, so
// that the result depends on the number of rows and not on the threads. finish() adds the totals in their order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#include "memory.h"

namespace rmsnorm {

// Rows of a chunk. At least 32, or the totals cost more than the rows; at most 128 chunks, or the totals outgrow the
// cache (128 · 4096 columns · 8 bytes = 4 MiB). A weight of several rows counts as many of the tensor's as one, and so
// does its flush.
inline int64_t chunk_rows(const Backward& b, int64_t rows) {
  return std::max(kLeastChunk, (rows / b.gain.count + kMostChunks - 1) / kMostChunks) * b.gain.count;
}
inline int64_t flush_rows(const Backward& b) { return kFlush * b.gain.count; }

// Rows of the weight's gradient, with the bias's behind them.
inline int64_t grad_rows(const Backward& b) { return b.layer || b.need_bias ? 2 : b.gain.count; }
inline int64_t grad_stride(const Backward& b) { return padded(b.columns) * size_of(wide(b.input)); }

// Where a chunk is added up: in a total, or in a part, which is zeros as the rows' own sums are, and stays what they
// sum.
struct Total {
  double* data = nullptr;
  bool adds = false;  // to what is there
  char* part = nullptr;

  explicit operator bool() const { return data || part; }
  // Where the rows are summed: in the part itself, or else in what the thread has for all its chunks.
  char* sums(char* threads) const { return part ? part : threads; }
  // Takes the sums of a gradient's row k, which a part keeps, in the columns' order; `first` of the chunk.
  void take(const Target& target, Type row, char* sums, int64_t k, int64_t columns, bool first) const {
    if (part) target.put_in_order(row, sums, columns);
    else target.flush(row, sums, data + k * columns, columns, first && !adds);
  }
};

// What finish() adds, for a gradient of `width` rows, or for several with as many chunks each (modulations, each of
// some rows), whose chunks lie one behind the other. Where a chunk is flushed once (and a weight is one row, as those
// of a part aren't side by side), the thread that has a gradient's first ones adds theirs up in one total, which stays
// in its caches: that is finish()'s own order. The other chunks are parts, which are written to memory and read from
// there; of totals that is twice as much, and a pass over each more.
class Totals {
 public:
  Totals() = default;
  Totals(const Backward& b, int64_t chunks, int64_t width, int64_t chunk_rows, int64_t gradients = 1)
      : once_(b.gain.count == 1 && chunk_rows <= flush_rows(b)),
        row_(b.input),
        chunks_(chunks),
        columns_(b.columns),
        stride_(grad_stride(b)),
        width_(width),
        totals_(new double[gradients * (once_ ? 1 : chunks) * width * b.columns]),
        parts_(once_ ? Lines(gradients * chunks * width * stride_) : Lines()),
        first_(new int64_t[gradients]()) {}

  // Of a chunk of a thread that has those in [begin, end).
  Total of(int64_t chunk, int64_t begin, int64_t end) {
    if (!totals_) return {};
    if (!once_) return {total(chunk)};
    const int64_t gradient = chunk / chunks_, start = gradient * chunks_;
    if (begin <= start) {
      first_[gradient] = std::min(end - start, chunks_);
      return {total(gradient), chunk > start};
    }
    char* const part = parts_.get() + chunk * width_ * stride_;
    return {nullptr, false, static_cast<char*>(std::memset(part, 0, width_ * stride_))};
  }

  Summands summands(int64_t row, int64_t gradient = 0) const {
    if (!totals_) return {};
    Summands s = {};
    s.totals = total(once_ ? gradient : gradient * chunks_) + row * columns_, s.totals_apart = width_ * columns_;
    s.totals_count = once_ ? first_[gradient] > 0 : chunks_;
    if (!once_) return s;
    s.parts = parts_.get() + (gradient * chunks_ + first_[gradient]) * width_ * stride_ + row * stride_;
    s.parts_apart = width_ * stride_, s.parts_count = chunks_ - first_[gradient], s.row = row_;
    return s;
  }

 private:
  double* total(int64_t place) const { return totals_.get() + place * width_ * columns_; }

  bool once_ = false;
  Type row_ = Type::none;
  int64_t chunks_ = 0, columns_ = 0, stride_ = 0, width_ = 0;
  std::unique_ptr<double[]> totals_;
  Lines parts_;
  std::unique_ptr<int64_t[]> first_;  // how many of its chunks have the total
};

}  // namespace rmsnorm
