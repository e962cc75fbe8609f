// The only file with the sandwich's kernel of two loops for a pair of rows: one that adds, and one that stores them and
// sums the squares of the next pair. So what both rows are multiplied with is loaded once, sums and stores of two rows
// overlap, and each loop waits for one tensor, which it asks for on its way.
//
//   add: s, and Σ s²        store: y, and Σ x² of the next pair
//
// Of bf16 with its instructions alone, for the library's size: 0.87 of the time of two norms' loops at 512x4096 on a
// Zen 5, 0.9 in L2, 0.95 past the caches.
#pragma once

#if defined(RMSNORM_AVX512BF16)

template <class T, bool Stream>
struct SandwichRows {
  using V = Vector<T>;
  using S = Scalar<T>;
  using Norm = Rms<T>;
  using Form = Sandwich<T, S>;
  // From memory it takes longer than from the last cache (4096x4096: 1.5 KiB 1.08 of the time; 512x4096: 3 KiB 1.03).
  static constexpr int64_t kAhead = Stream ? 3072 : 1536;
  const Forward& f;
  const ForwardRows& rows;
  const S *gain, *next_gain;
  typename Norm::Block first, second;

  RMSNORM_INLINE SandwichRows(const Forward& f, const ForwardRows& rows)
      : f(f), rows(rows), gain((const S*)rows.first_gain[0]), next_gain((const S*)rows.gain[0]) {}

  // The last row of an odd number is a pair with itself; what comes after it is the last again.
  RMSNORM_INLINE int64_t in(int64_t r) const { return r < rows.count ? r : rows.count - 1; }
  RMSNORM_INLINE T* sum_of(int64_t r, int k) const {
    return Stream ? (T*)rows.scratch + k * padded(f.columns) : (T*)rows.sum[in(r + k)];
  }
  RMSNORM_INLINE void find_first(PairSums<T>& sums) {
    for_two([&](auto k) __attribute__((always_inline)) { first.set(k.value, sums[k]); });
    first.find_rows(nullptr, 2, f.columns, f.first_eps);
  }

  RMSNORM_INLINE void begin() {
    const T* const x[2] = {(const T*)rows.input[0], (const T*)rows.input[in(1)]};
    PairSums<T> sums;
    sum_columns<T>(sums, f.columns, [&](auto span, int u) __attribute__((always_inline)) {
      for_two([&](auto k) __attribute__((always_inline)) { sums[k].add_square(u, span.load_from(x[k.value])); });
    });
    find_first(sums);
  }

  RMSNORM_INLINE void add(int64_t r) {
    const T* const x[2] = {(const T*)rows.input[r], (const T*)rows.input[in(r + 1)]};
    const T* const residual[2] = {(const T*)rows.residual[r], (const T*)rows.residual[in(r + 1)]};
    T* const to[2] = {sum_of(r, 0), sum_of(r, 1)};
    const V scale[2] = {splat<T>(first[0].high), splat<T>(first[1].high)};
    PairSums<T> sums;
    sum_columns<T>(sums, f.columns, [&](auto span, int u) __attribute__((always_inline)) {
      const V g = span.load_raw(gain);
      const int64_t at = asked<T>(f.columns, rows.next_residual, kAhead, span);
      V s[2];
      for_two([&](auto k) __attribute__((always_inline)) {
        ask_for(residual[k.value], at);
        const V y = round_if<T>(f.round_first, span.load_from(x[k.value]) * scale[k.value]) * g;
        s[k.value] = round_own<T>(y) + span.load_from(residual[k.value]);
      });
      for_two([&](auto k) __attribute__((always_inline)) {
        sums[k].add_square(u, span.store_back(to[k.value], rounded<T>(span, s[k.value])));
      });
    });
    for_two([&](auto k) __attribute__((always_inline)) { second.set(k.value, sums[k]); });
    for (int k = 0; k < 2; ++k) {
      const int64_t i = in(r + k);
      typename Norm::Row row = first[k];
      if (__builtin_expect(!first.safe(k), 0)) {
        NormAdd<T, S>::rescue_to(to[k], f, rows, i, gain, f.first_eps, row);
        second.set(k, Form::squares_of(to[k], f.columns));
      }
      if (rows.first_rstd) ((S*)rows.first_rstd)[i] = row.kept;
    }
    second.find_rows(nullptr, 2, f.columns, f.eps);
  }

  RMSNORM_INLINE void store(int64_t r) {
    const T* const x[2] = {(const T*)rows.input[in(r + 2)], (const T*)rows.input[in(r + 3)]};
    const T* const from[2] = {sum_of(r, 0), sum_of(r, 1)};
    T* const sum[2] = {(T*)rows.sum[r], (T*)rows.sum[in(r + 1)]};
    T* const output[2] = {(T*)rows.output[r], (T*)rows.output[in(r + 1)]};
    const V scale[2] = {splat<T>(second[0].high), splat<T>(second[1].high)};
    PairSums<T> sums;
    sum_columns<T>(sums, f.columns, [&](auto span, int u) __attribute__((always_inline)) {
      const V g = span.load_raw(next_gain);
      const int64_t at = asked<T>(f.columns, rows.next, kAhead, span);
      V s[2], y[2];
      for_two([&](auto k) __attribute__((always_inline)) {
        ask_for(x[k.value], at);
        s[k.value] = span.load_from(from[k.value]);
        y[k.value] = round_if<T>(f.round_first, s[k.value] * scale[k.value]) * g;
        sums[k].add_square(u, span.load_from(x[k.value]));
      });
      for_two([&](auto k) __attribute__((always_inline)) {
        if constexpr (Stream) stream_to(span, sum[k.value], stored_as<T>(span, s[k.value]));
        store_or_stream<T>(Stream && rows.stream, output[k.value], rounded<T>(span, y[k.value]), span);
      });
    });
    for (int k = 0; k < 2; ++k) {
      const int64_t i = in(r + k);
      typename Norm::Row row = second[k];
      if (__builtin_expect(!second.safe(k), 0)) Form::rescue(f, rows, i, row);
      if (rows.rstd) ((S*)rows.rstd)[i] = row.kept;
    }
    find_first(sums);
  }
};

template <class T, bool Stream>
void sandwich_rows(const Forward& f, const ForwardRows& rows) {
  SandwichRows<T, Stream> pairs(f, rows);
  pairs.begin();
  for (int64_t r = 0; r < rows.count; r += 2) pairs.add(r), pairs.store(r);
}

// Short rows have as many roots as others and less to overlap with them: 16x1024 takes 1.01 of the time, 32x512 1.2.
template <class T>
void sandwich_forward(const Forward& f, const ForwardRows& rows) {
  if (rows.count == 1 || f.columns <= 1024 || f.gain.count > 1 || f.first_gain.count > 1)
    return forward<Sandwich<T, Scalar<T>>>(f, rows);
  bool stream = rows.add_again;
  for (int64_t r = 0; r < rows.count; ++r)
    stream = stream && can_stream(rows.sum[r]) && (!rows.stream || can_stream(rows.output[r]));
  if (stream) sandwich_rows<T, true>(f, rows);
  else sandwich_rows<T, false>(f, rows);
}
#endif
