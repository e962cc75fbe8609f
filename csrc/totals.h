// The only file that knows where a weight's gradient is added up: in chunks of rows, each with a total of its own, so
// that the result depends on the number of rows and not on the threads. finish() adds the totals in their order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "kernel.h"

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

// Where a chunk is added up, or null; whether to what is there.
struct Total {
  double* data = nullptr;
  bool adds = false;
};

// The totals of all chunks. The thread that has the first ones adds theirs up in one place, which stays in its caches,
// where a chunk is flushed once: that is finish()'s own order. One for each chunk, all of them are written to memory
// and read from there.
class Totals {
 public:
  Totals() = default;
  Totals(const Backward& b, int64_t chunks, int64_t columns, int64_t chunk_rows)
      : data_(new double[chunks * columns]), chunks_(chunks), columns_(columns), once_(chunk_rows <= flush_rows(b)) {}

  // Of a chunk of a thread that has those in [begin, end).
  Total of(int64_t chunk, int64_t begin, int64_t end) {
    if (!data_) return {};
    const bool together = once_ && begin == 0;
    if (together) first_ = end - 1;
    return {data_.get() + (together ? first_ : chunk) * columns_, together && chunk > begin};
  }

  const double* data() const { return data_.get() + first_ * columns_; }
  int64_t count() const { return chunks_ - first_; }

 private:
  std::unique_ptr<double[]> data_;
  int64_t chunks_ = 0, columns_ = 0, first_ = 0;
  bool once_ = false;
};

}  // namespace rmsnorm
