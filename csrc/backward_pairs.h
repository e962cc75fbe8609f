// The only file that stores the gradients of two rows in the loop that sums the next two: memory and arithmetic then
// take turns within a loop, and four rows share the gain and its gradient. With the bits of backward_rows(), as each
// sum keeps its order.
//
// RMSNorm with a gain and its gradient alone, of AVX-512: fp32, where gradients may arrive as bf16, and bf16 where the
// CPU rounds to it and nothing is added, for the library's size (all of AVX-512 would be 41 KB). Whether rows go past
// the caches is asked in the loop, for the same reason. Xeon (Emerald Rapids, 2 MiB of L2), 1 thread, ÷
// backward_rows(): fp32 16x4096 0.80, 2048x576 0.74, 32768x128 0.80, 512x4096 0.83, 4096x4096 0.90; bf16 0.97, 0.88,
// 0.86, 0.85 and 0.91.
#pragma once

#if defined(RMSNORM_AVX512)

// Rows of which the next two are summed, at least: the last two are summed twice.
constexpr int64_t kLeastPiped = 8;

// Rows [begin, end), an even number, all of them safe; their gradients arrive as G.
template <class T, class G, bool Add>
__attribute__((noinline)) void backward_pairs(const Backward& b, const BackwardRows& rows, int64_t begin, int64_t end,
                                              bool stream) {
  using V = Vector<T>;
  using S = Scalar<T>;
  using Norm = RmsBackward<T>;
  // Bytes ahead, into L1. In the last cache 0 to 2.5 KiB are as good; from memory 4096x4096 fp32 takes 0.90 of the time
  // of backward_rows(), 0.93 1 KiB ahead, 0.92 to 0.95 with more, and 1.04 where nothing is asked for.
  constexpr int64_t ahead = 512;
  const int64_t columns = b.columns;
  const S* gains = (const S*)rows.gain[begin];
  S* dw = (S*)rows.grad_weight[begin];
  Norm norm[2], soon[2];
  for (int k = 0; k < 2; ++k) {
    norm[k].set_row(rows, begin + k);
    find_means<false, Norm, G, true>(b, rows, begin + k, norm[k]);
  }
  for (int64_t r = begin; r < end; r += 2) {
    const int64_t next = r + 2 < end ? r + 2 : r;
    const T *x[2], *more[2], *next_x[2];
    const G *dy[2], *next_dy[2];
    T* dx[2];
    for_two([&](auto k) __attribute__((always_inline)) {
      const int64_t i = r + k.value, n = next + k.value;
      x[k.value] = (const T*)rows.input[i], dy[k.value] = (const G*)rows.grad[i], dx[k.value] = (T*)rows.grad_input[i];
      if constexpr (Add) more[k.value] = (const T*)rows.grad_sum[i];
      next_x[k.value] = (const T*)rows.input[n], next_dy[k.value] = (const G*)rows.grad[n];
      soon[k.value].set_row(rows, n);
    });
    PairSums<T> sums;
    sum_columns<T>(sums, columns, [&](auto span, int u) __attribute__((always_inline)) {
      const V gain = span.load_raw(gains);
      V weight = span.load_raw(dw), gradient[2];
      for_two([&](auto k) __attribute__((always_inline)) {
        if (stream) {
          const auto ask = [&](const auto* row) __attribute__((always_inline)) {
            __builtin_prefetch((const char*)(row + span.j) + ahead);
          };
          ask(next_x[k.value]), ask(next_dy[k.value]);
          if constexpr (Add) ask(more[k.value]);
        }
        const V g = span.load_from(dy[k.value]), normalised = norm[k.value].normalised(span.load_from(x[k.value]));
        gradient[k.value] = norm[k.value].dx(g * gain, normalised);
        if constexpr (Add) gradient[k.value] = gradient[k.value] + span.load_from(more[k.value]);
        weight = fma(g, normalised, weight);
        const V soons = soon[k.value].normalised(span.load_from(next_x[k.value]));
        sums[k].add(u, span.load_from(next_dy[k.value]) * gain, soons);
      });
      for_two([&](auto k)
                  __attribute__((always_inline)) { store_or_stream<T>(stream, dx[k.value], gradient[k.value], span); });
      span.store_raw(dw, weight);
    });
    for_two([&](auto k) __attribute__((always_inline)) {
      soon[k.value].set_means(value_of(sums[k]), (double)columns), norm[k.value] = soon[k.value];
    });
  }
}

// Rows from r on that are done so: those that are safe, in pairs.
template <class T>
RMSNORM_INLINE int64_t rows_in_pairs(const BackwardRows& rows, int64_t r) {
  int64_t end = r;
  while (end < rows.count && is_safe<T>(rows, end)) ++end;
  return end - r < kLeastPiped ? 0 : (end - r) / 2 * 2;
}
#endif
