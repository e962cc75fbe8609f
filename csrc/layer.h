// The only file that knows LayerNorm's statistic: the mean beside the mean square, in the kernels of RMSNorm.
//
//   y = (x - mean) / sqrt(mean((x - mean)²) + eps) · gain + bias
//
// One pass sums d and d² of d = x - shift. The shift is the row's first element: then mean - shift is at most sqrt(n)
// standard deviations, whatever the mean is, and half a million ulps of offset cost nothing. Where it is more than
// three (one row in a few hundred), d² cancels, and the row is summed again around the mean that was found.
//
// Errors of the variance, relative: bf16 and f16 at most 10 · 67·2⁻²⁴ (fp32 chains of 64, into fp64); f32 below n·2⁻⁵⁰;
// f64 about 2⁻¹⁰⁰·n. Bits are those of every target: no product here is fused unless it is exact.
#pragma once

// Σ a and Σ a·b, in the types of statistic.h: forward adds (d, d), backward (h, x̂).
template <class T>
struct Moments {  // half types
  static constexpr int kUnroll = 32 / kStep<T>;
  static constexpr int64_t kBlock = 2048;
  Vector<T> first[kUnroll] = {}, second[kUnroll] = {};
  Eight total_first = {}, total_second = {};

  RMSNORM_INLINE void add(int u, const Vector<T>& a, const Vector<T>& b) {
    for_accumulator<kUnroll>(u, [&](int i) __attribute__((always_inline)) {
      first[i] = first[i] + a;
      second[i] = fma(a, b, second[i]);
    });
  }
  template <class Span>
  RMSNORM_INLINE void add_deviation(int u, const Vector<T>& x, const Vector<T>& shift, Span span) {
    const Vector<T> d = span.present(x - shift);
    add(u, d, d);
  }
  RMSNORM_INLINE void end_block() {
    total_first = total_first + widen_halves(halve<T>(first));
    total_second = total_second + widen_halves(halve<T>(second));
    for (int u = 0; u < kUnroll; ++u) first[u] = second[u] = Vector<T>{};
  }
};

template <>
struct Moments<float> {
  static constexpr int kUnroll = 1;
  static constexpr int64_t kBlock = INT64_MAX;
  D total_first = {}, total_second = {};

  RMSNORM_INLINE void add(const D& a, const D& b) {
    total_first = total_first + a;
    total_second = total_second + a * b;
  }
  RMSNORM_INLINE void add(int, const F& a, const F& b) {
    const D first = widen(a);
    total_first = total_first + first;
    total_second = add_exact_product(first, widen(b), total_second);
  }
  template <class Span>
  RMSNORM_INLINE void add_deviation(int u, const F& x, const F& shift, Span span) {
    add_deviation(u, widen(x), shift, span);
  }
  template <class Span>
  RMSNORM_INLINE void add_deviation(int, const D& x, const F& shift, Span span) {
    // A difference as a multiply-add: of a Zen 5's units those that add are the busier ones (16x4096 0.93 of the time).
    const D d = span.present(add_exact_product(x, splat<double>(1.0), splat<double>(-0.0) - widen(shift)));
    add(d, d);
  }
  RMSNORM_INLINE void end_block() {}
};

template <>
struct Moments<double> {
  static constexpr int kUnroll = 1;
  static constexpr int64_t kBlock = INT64_MAX;
  D total_first = {}, lost_first = {};
  Sum<double> second;

  RMSNORM_INLINE void add(int u, const D& a, const D& b) {
    const D sum = total_first + a, back = sum - total_first;
    lost_first = lost_first + ((total_first - (sum - back)) + (a - back));
    total_first = sum;
    second.add(u, a, b);
  }
  template <class Span>
  RMSNORM_INLINE void add_deviation(int u, const D& x, const D& shift, Span span) {
    const D rounded = x - shift, back = rounded - x;
    const D d = span.present(rounded), error = span.present((x - (rounded - back)) - (shift + back));
    add(u, d, d);
    lost_first = lost_first + error;
    second.lost = second.lost + d * (error + error);
  }
  RMSNORM_INLINE void end_block() {}
};

struct TwoSums {
  Double2 first, second;
};

template <class T>
RMSNORM_INLINE TwoSums value_of(const Moments<T>& sums) {
  return {{reduce(fold(sums.total_first)), 0.0}, {reduce(fold(sums.total_second)), 0.0}};
}
template <>
RMSNORM_INLINE TwoSums value_of(const Moments<double>& sums) {
  Sum<double> first;
  first.total = sums.total_first, first.lost = sums.lost_first;
  return {value_of(first), value_of(sums.second)};
}

// What a row is normalised with: x̂ = (x - mean_high - mean_low) · (high + low).
template <class S>
struct LayerRow {
  S high, low;
  bool safe;
  double mean;
  S mean_high, mean_low;
};

template <class S>
RMSNORM_INLINE void set_mean(LayerRow<S>& row, double high, double low) {
  row.mean = high;
  row.mean_high = (S)high;
  row.mean_low = (S)((high - (double)row.mean_high) + low);
}

// The statistic as the kernels know it; Rms in statistic.h is the other one.
template <class T>
struct Layer {
  static constexpr bool kBias = true;  // a mean to keep, and a bias to add
  using Element = T;
  using Sums = Moments<T>;
  using Row = LayerRow<Scalar<T>>;

  struct Shift {
    Vector<T> shift;
    template <class V, class Span>
    RMSNORM_INLINE void add(Sums& sums, int u, const V& x, Span span) const {
      sums.add_deviation(u, x, shift, span);
    }
  };
  RMSNORM_INLINE static Scalar<T> first(const T* x, int64_t columns) {
    return columns > 0 ? Tail<T>{0, 1}.load_from(x).v[0][0] : (Scalar<T>)0;
  }
  RMSNORM_INLINE static Shift adder(const T* x, int64_t columns) { return {splat<T>(first(x, columns))}; }

  __attribute__((noinline)) static TwoSums sum_around(Scalar<T> mean, const T* x, int64_t columns) {
    const Shift around = {splat<T>(mean)};
    Sums sums;
    sum_columns<T>(sums, columns, [&](auto span, int u) __attribute__((always_inline)) {
      around.add(sums, u, span.load_from(x), span);
    });
    return value_of(sums);
  }

  RMSNORM_INLINE static Row row(TwoSums sums, const T* x, int64_t columns, double eps) {
    Scalar<T> shift = first(x, columns);
    const double n = (double)columns;
    double mean = sums.first.high / n, moved = sums.first.high * mean;
    if (__builtin_expect(moved > 0.9 * sums.second.high && columns > 1, 0)) {
      shift = (Scalar<T>)((double)shift + mean);
      sums = sum_around(shift, x, columns);
      mean = sums.first.high / n, moved = sums.first.high * mean;
    }
    // mean and Σd² - (Σd)²/n, in twice the precision of a double.
    const double mean_low = (__builtin_fma(-mean, n, sums.first.high) + sums.first.low) / n;
    const double moved_low =
        __builtin_fma(sums.first.high, mean, -moved) + (sums.first.high * mean_low + sums.first.low * mean);
    Double2 squares = two_sum(sums.second.high, -moved);
    squares = two_sum(squares.high, squares.low + (sums.second.low - moved_low));
    const Rstd<Scalar<T>> rstd = rstd_from<T>(squares, columns, eps);
    const Double2 total = two_sum((double)shift, mean);
    Row row = {rstd.high, rstd.low, rstd.safe, 0.0, 0, 0};
    set_mean(row, total.high, total.low + mean_low);
    return row;
  }
  class Block {
   public:
    RMSNORM_INLINE void set(int64_t i, const Sums& sums) { sums_[i] = value_of(sums); }
    __attribute__((noinline)) void find_rows(const void* const* x, int64_t count, int64_t columns, double eps) {
      for (int64_t i = 0; i < count; ++i) row_[i] = row(sums_[i], (const T*)x[i], columns, eps);
    }
    RMSNORM_INLINE bool safe(int64_t i) const { return row_[i].safe; }
    RMSNORM_INLINE const Row& operator[](int64_t i) const { return row_[i]; }

   private:
    TwoSums sums_[kBlockRows];
    Row row_[kBlockRows];
  };

  // x̂ of a vector, from splats of the row: the low part of the mean is taken off after the product, where it costs no
  // rounding of its own.
  struct Normaliser {
    Vector<T> mean, high, low, left;
    RMSNORM_INLINE Normaliser(const Row& row)
        : mean(splat<T>(row.mean_high)),
          high(splat<T>(row.high)),
          low(splat<T>(row.low)),
          left(splat<T>((Scalar<T>)(-row.mean_low * row.high))) {}
    RMSNORM_INLINE Vector<T> operator()(const Vector<T>& x) const {
      const Vector<T> d = x - mean;
      if constexpr (sizeof(T) == 2) return d * high + left;
      return fma(d, high, d * low + left);
    }
  };
};
