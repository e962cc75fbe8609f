// The only file that knows rows that lie evenly: short ones, found without a list of pointers, and with less to ask for
// each of them than forward.h has, which is a third of the time that 128 columns of fp32 take.
#pragma once

template <class Form>
class EvenRows {
  using Norm = typename Form::Norm;
  using T = typename Norm::Element;
  using Block = typename Norm::Block;

 public:
  EvenRows(const Forward& f, const ForwardRows& rows)
      : f_(f),
        rows_(rows),
        count_(rows.count),
        columns_(f.columns),
        step_(rows.next),
        step_out_(rows.next_output),
        gain_((const T*)rows.gain[0]) {}

  // Each row is stored while one of the block after next is summed. So memory, or a last cache that is far, is read and
  // written at once, and a block's roots and divisions are found behind the back of the one before it. A far cache
  // wants blocks of a page (should_weave() in memory.h; 8 KiB 1.04 to 1.06 of that), memory those of two (of one 1.03
  // to 1.1).
  template <bool Past>
  RMSNORM_INLINE void weave() {
    const int64_t block = block_of(Past ? 8192 : 4096), two = 2 * block;
    for (int64_t r = 0; r < two && r < count_; ++r) sum_apart(found_[r >= block], r % block, input(r));
    find(found_[0], 0, block);
    const char* x = input(0);
    char* y = (char*)rows_.output[0];
    for (int64_t begin = 0, k = 0; begin < count_; begin += block, k = 1 - k) {
      find(found_[1 - k], begin + block, block);
      Block& found = found_[k];
      const int64_t left = count_ - begin;
      for (int64_t i = 0; i < block && i < left; ++i, x += step_, y += step_out_) {
        const char* later = i + two < left ? x + two * step_ : x;
        if (__builtin_expect(!found.safe(i), 0)) {
          rescue(found[i], begin + i, x, y);
          sum_apart(found, i, later);
          continue;
        }
        const Form part((const T*)x, gain_, found[i]);
        typename Norm::Sums sum;
        for_whole_columns<T, Norm::Sums::kUnroll>(0, columns_, [&](auto span, auto u) __attribute__((always_inline)) {
          sum.add_square(u.value, span.load_wide_from((const T*)later));
          if constexpr (Past) store_line((T*)y + span.j, part(span));
          else span.store_to((T*)y, part(span));
        });
        sum.end_block();
        found.set(i, sum);
      }
    }
  }

  // Into a cache that is near, a block of rows is summed, then stored, as everywhere.
  RMSNORM_INLINE void keep() {
    const int64_t block = block_of(16384);
    Block& found = found_[0];
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
        const Form part((const T*)x, gain_, found[i]);
        for_columns<T, true>(columns_, false,
                             [&](auto span) __attribute__((always_inline)) { span.store_to((T*)y, part(span)); });
      }
    }
  }

 private:
  // Past the caches, a line at once: in halves 32768x128 takes 1.07 of the time.
  static RMSNORM_INLINE void store_line(float* to, const F& x) {
#if defined(RMSNORM_AVX512) && !defined(RMSNORM_EMULATE_AVX512)
    _mm512_stream_ps(to, (__m512)x.v[0]);
#else
    store(to, x);
#endif
  }

  const char* input(int64_t r) const { return (const char*)rows_.input[0] + r * step_; }

  // Rows of so many bytes; 32 at most.
  int64_t block_of(int64_t bytes) const {
    const int64_t rows = bytes / (columns_ * (int64_t)sizeof(T));
    return rows < 1 ? 1 : rows > kBlockRows ? kBlockRows : rows;
  }

  RMSNORM_INLINE void sum_alone(Block& found, int64_t i, const char* row) const {
    typename Norm::Sums sum;
    sum_columns<T>(sum, columns_, [&](auto span, int u) __attribute__((always_inline)) {
      if constexpr (std::is_same_v<T, float>) sum.add_square(u, span.load_wide_from((const float*)row));
      else sum.add_square(u, span.load_from((const T*)row));
    });
    found.set(i, sum);
  }
  // A function of its own, where it is rare.
  __attribute__((noinline)) void sum_apart(Block& found, int64_t i, const char* row) const { sum_alone(found, i, row); }

  // 1/rms of the block that begins there, if it does.
  RMSNORM_INLINE void find(Block& found, int64_t begin, int64_t block) const {
    const int64_t count = count_ - begin < block ? count_ - begin : block;
    if (count <= 0) return;
    found.find_rows(nullptr, count, f_.divisor ? f_.divisor : columns_, f_.eps);
    if (rows_.rstd)
      for (int64_t i = 0; i < count; ++i) ((float*)rows_.rstd)[begin + i] = found[i].kept;
  }

  __attribute__((noinline, cold)) void rescue(typename Norm::Row row, int64_t r, const char* x, char* y) const {
    rescue_forward<false>(row, (const T*)x, gain_, (const T*)nullptr, (T*)y, columns_, f_.eps,
                          f_.divisor ? f_.divisor : columns_);
    if (rows_.rstd) ((float*)rows_.rstd)[r] = row.kept;
  }

  const Forward& f_;
  const ForwardRows& rows_;
  const int64_t count_, columns_, step_, step_out_;
  const T* const gain_;
  Block found_[2];
};

template <class Form>
void forward_even(const Forward& f, const ForwardRows& rows) {
  EvenRows<Form> even(f, rows);
  if constexpr (std::is_same_v<typename Form::Norm::Element, float>) {
    if (rows.stream) return even.template weave<true>();
    if (rows.woven) return even.template weave<false>();
  }
  even.keep();
}
