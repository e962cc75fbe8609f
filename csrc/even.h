// The only file that knows rows that lie evenly: short ones of fp32, found without a list of pointers, and with less to
// ask for each of them than forward.h has, which is a third of the time that 128 columns take. With AVX-512 alone: other
// CPUs whose L1 has room (memory.h) weren't at hand.
#pragma once

#if defined(RMSNORM_AVX512)
constexpr bool kHasEven = true;

class EvenRows {
  using Norm = Rms<float>;

 public:
  EvenRows(const Forward& f, const ForwardRows& rows)
      : f_(f),
        rows_(rows),
        count_(rows.count),
        columns_(f.columns),
        step_(rows.next),
        step_out_(rows.next_output),
        gain_((const float*)rows.gain[0]) {}

  // Each row goes past the caches while one of the block after next is summed. So memory is read and written at once,
  // and a block's roots and divisions are found behind the back of the one before it.
  void stream() {
    const int64_t block = block_of(8192), two = 2 * block;
    for (int64_t r = 0; r < two && r < count_; ++r) sum_alone(found_[r >= block], r % block, input(r));
    find(found_[0], 0, block);
    const char* x = input(0);
    char* y = (char*)rows_.output[0];
    for (int64_t begin = 0, k = 0; begin < count_; begin += block, k = 1 - k) {
      find(found_[1 - k], begin + block, block);
      Norm::Block& found = found_[k];
      const int64_t left = count_ - begin;
      for (int64_t i = 0; i < block && i < left; ++i, x += step_, y += step_out_) {
        const char* later = i + two < left ? x + two * step_ : x;
        if (__builtin_expect(!found.safe(i), 0)) {
          rescue(found[i], begin + i, x, y);
          sum_alone(found, i, later);
          continue;
        }
        const Norm::Normaliser normalised(found[i]);
        Norm::Sums sum;
        for_whole_columns<float, 2>(0, columns_, [&](auto span, auto u) __attribute__((always_inline)) {
          sum.add_square(u.value, span.load_wide_from((const float*)later));
          store_line((float*)y + span.j, normalised(span.load_from((const float*)x)) * span.load_from(gain_));
        });
        sum.end_block();
        found.set(i, sum);
      }
    }
  }

  // Into a cache, a block of rows is summed, then stored, as everywhere.
  void keep() {
    const int64_t block = block_of(16384);
    Norm::Block& found = found_[0];
    const char* x = input(0);
    char* y = (char*)rows_.output[0];
    for (int64_t begin = 0; begin < count_; begin += block) {
      const int64_t here = count_ - begin < block ? count_ - begin : block;
      for (int64_t i = 0; i < here; ++i) sum_alone(found, i, x + i * step_);
      find(found, begin, here);
      for (int64_t i = 0; i < here; ++i, x += step_, y += step_out_) {
        if (__builtin_expect(!found.safe(i), 0)) {
          rescue(found[i], begin + i, x, y);
          continue;
        }
        const Norm::Normaliser normalised(found[i]);
        for_columns<float, true>(columns_, false, [&](auto span) __attribute__((always_inline)) {
          span.store_to((float*)y, normalised(span.load_from((const float*)x)) * span.load_from(gain_));
        });
      }
    }
  }

 private:
  // Past the caches, a line at once: in halves 32768x128 takes 1.07 of the time.
  static RMSNORM_INLINE void store_line(float* to, const F& x) {
#if defined(RMSNORM_EMULATE_AVX512)
    store(to, x);
#else
    _mm512_stream_ps(to, (__m512)x.v[0]);
#endif
  }

  const char* input(int64_t r) const { return (const char*)rows_.input[0] + r * step_; }

  // Rows of so many bytes; 32 at most.
  int64_t block_of(int64_t bytes) const {
    const int64_t rows = bytes / (columns_ * (int64_t)sizeof(float));
    return rows < 1 ? 1 : rows > kBlockRows ? kBlockRows : rows;
  }

  __attribute__((noinline)) void sum_alone(Norm::Block& found, int64_t i, const char* row) const {
    Norm::Sums sum;
    sum_columns<float>(sum, columns_, [&](auto span, int u) __attribute__((always_inline)) {
      sum.add_square(u, span.load_wide_from((const float*)row));
    });
    found.set(i, sum);
  }

  // 1/rms of the block that begins there, if it does.
  RMSNORM_INLINE void find(Norm::Block& found, int64_t begin, int64_t block) const {
    const int64_t count = count_ - begin < block ? count_ - begin : block;
    if (count <= 0) return;
    found.find_rows(nullptr, count, f_.divisor ? f_.divisor : columns_, f_.eps);
    if (rows_.rstd)
      for (int64_t i = 0; i < count; ++i) ((float*)rows_.rstd)[begin + i] = found[i].kept;
  }

  __attribute__((noinline, cold)) void rescue(Norm::Row row, int64_t r, const char* x, char* y) const {
    rescue_forward<false>(row, (const float*)x, gain_, (const float*)nullptr, (float*)y, columns_, f_.eps,
                          f_.divisor ? f_.divisor : columns_);
    if (rows_.rstd) ((float*)rows_.rstd)[r] = row.kept;
  }

  const Forward& f_;
  const ForwardRows& rows_;
  const int64_t count_, columns_, step_, step_out_;
  const float* const gain_;
  Norm::Block found_[2];
};

inline void forward_even(const Forward& f, const ForwardRows& rows) {
  EvenRows even(f, rows);
  if (rows.stream) even.stream();
  else even.keep();
}
#else
constexpr bool kHasEven = false;
inline void forward_even(const Forward&, const ForwardRows&);
#endif
