// The only file that sums a row: how products are accumulated, and how a mean square becomes 1/rms.
//
//   input       products            summed in                               1/rms kept as
//   bf16, f16   exact in fp32       fp32, 64 lanes, 8 into fp64 each 4096   fp32
//   f32         exact in fp64       fp64, 32 lanes                          fp32 pair high + low
//   f64         fp64 and its error  fp64 with compensation, 16 lanes        fp64 pair high + low
//
// The order is fixed by the column alone. Errors of the sum, relative: bf16 and f16 at most 67·2⁻²⁴ in fp32 chains of
// 64 additions and three halvings, which is 0.004 ulp of f16 after the root; f32 below n·2⁻⁵³; f64 about 2⁻¹⁰⁴·n.
// The pair keeps x·r within 0.51 ulp, so that one more rounding, by the gain, stays below 1.6 ulp.
#pragma once

// A sum of products of two vectors: `add` for any product, `add_square` for x·x.
template <class T>
struct Sum {  // half types
  static constexpr int kUnroll = 64 / kStep<T>;
  static constexpr int64_t kBlock = 4096;
  Vector<T> part[kUnroll] = {};
  Eight total = {};

  RMSNORM_INLINE void add(int u, const Vector<T>& a, const Vector<T>& b) {
    for_accumulator<kUnroll>(u, [&](int i) __attribute__((always_inline)) { part[i] = fma(a, b, part[i]); });
  }
  RMSNORM_INLINE void add_square(int u, const Vector<T>& x) {
    for_accumulator<kUnroll>(u,
                             [&](int i) __attribute__((always_inline)) { part[i] = add_exact_product(x, x, part[i]); });
  }
  RMSNORM_INLINE void end_block() {
    Vector<T> sums[kUnroll / 2];
    for (int u = 0; u < kUnroll / 2; ++u) sums[u] = part[u] + part[u + kUnroll / 2];
    total = total + widen_halves(halve<T>(sums));
    for (auto& p : part) p = Vector<T>{};
  }
};

template <>
struct Sum<float> {
  static constexpr int kUnroll = 2;
  static constexpr int64_t kBlock = INT64_MAX;
  D part[2] = {};
  D total;

  RMSNORM_INLINE void add(int u, const D& a, const D& b) {
    for_accumulator<kUnroll>(u,
                             [&](int i) __attribute__((always_inline)) { part[i] = add_exact_product(a, b, part[i]); });
  }
  RMSNORM_INLINE void add(int u, const F& a, const F& b) { add(u, widen(a), widen(b)); }
  RMSNORM_INLINE void add_square(int u, const D& x) { add(u, x, x); }
  RMSNORM_INLINE void add_square(int u, const F& x) { add_square(u, widen(x)); }
  RMSNORM_INLINE void end_block() { total = part[0] + part[1]; }
};

template <>
struct Sum<double> {
  static constexpr int kUnroll = 1;
  static constexpr int64_t kBlock = INT64_MAX;
  D total = {};
  D lost = {};

  RMSNORM_INLINE void add(int, const D& a, const D& b) {
    const D product = a * b, error = fma(a, b, splat<double>(0.0) - product);
    const D sum = total + product, back = sum - total;
    lost = lost + (((total - (sum - back)) + (product - back)) + error);
    total = sum;
  }
  RMSNORM_INLINE void add_square(int u, const D& x) { add(u, x, x); }
  RMSNORM_INLINE void end_block() {}
};

// A value of about twice a double's precision: high + low, unevaluated.
struct Double2 {
  double high, low;
};

RMSNORM_INLINE Double2 two_sum(double a, double b) {
  const double sum = a + b, back = sum - a;
  return {sum, (a - (sum - back)) + (b - back)};
}

template <class T>
RMSNORM_INLINE Double2 value_of(const Sum<T>& sum) {
  return {reduce(fold(sum.total)), 0.0};
}
template <>
RMSNORM_INLINE Double2 value_of(const Sum<double>& sum) {
  double lanes[kLanes];
  store(lanes, sum.total);
  Double2 value = {lanes[0], reduce(fold(sum.lost))};
  for (int i = 1; i < kLanes; ++i) {
    const Double2 next = two_sum(value.high, lanes[i]);
    value = {next.high, value.low + next.low};
  }
  return two_sum(value.high, value.low);
}

// Runs add(span, u) over all columns, which adds to `sum`; then value_of() it, or set() it in a block of rows. It is
// not returned, as a copy would go through the stack: 33 ns for each row of bf16, more than the rest at 128 columns.
template <class T, class Sums, class Add>
RMSNORM_INLINE void sum_columns(Sums& sum, int64_t columns, Add&& add) {
  const auto body = [&](auto span, auto u) __attribute__((always_inline)) { add(span, u.value); };
  int64_t j = 0;
  do {
    const int64_t end = columns - j > Sums::kBlock ? j + Sums::kBlock : columns;
    for_columns<T, Sums::kUnroll>(j, end, body);
    sum.end_block();
    j = end;
  } while (j < columns);
}

// The two rules for eps: 1/rms = 1/sqrt(mean square + eps), or, for a negative one, 1/sqrt(max(mean square, -eps)), as
// in F.normalize. Where that floor holds, 1/rms is a constant, which backward has to know.
struct Eps {
  double added, floor;
  RMSNORM_INLINE explicit Eps(double eps) : added(eps < 0 ? 0.0 : eps), floor(eps < 0 ? -eps : -__builtin_inf()) {}
};

// 1/rms of a row as high + low, whether a plain kernel may use it, and what forward keeps for backward: `high`,
// negative where it is the floor's. So backward decides nothing anew: a row whose mean square is 2^-25 above the floor
// has the same 1/rms in fp32, and another derivative.
template <class S>
struct Rstd {
  S high, low;
  bool safe;
  S kept;
};

// The mean square (with eps) for which products, 1/rms and their errors stay inside the normal numbers of fp32
// (fp64 for fp64), with room for weights and gradients of any sane size. Rows outside go to rescue.h.
template <class T>
constexpr double kSmallest = sizeof(T) == 8 ? 0x1p-800 : 0x1p-100;
template <class T>
constexpr double kLargest = sizeof(T) == 8 ? 0x1p800 : 0x1p100;

template <class T>
RMSNORM_INLINE Rstd<Scalar<T>> rstd_from(Double2 sum, int64_t columns, double eps) {
  const double n = (double)columns;
  const Eps rule(eps);
  if constexpr (sizeof(T) == 8) {
    const double mean = sum.high / n;
    const double mean_low = (__builtin_fma(-mean, n, sum.high) + sum.low) / n;
    const bool floored = mean < rule.floor;  // not for NaN
    const Double2 v = floored ? Double2{rule.floor, 0.0} : two_sum(mean, rule.added);
    const double low = floored ? 0.0 : v.low + mean_low, r = 1.0 / __builtin_sqrt(v.high);
    // One Newton step in twice the precision: r·(1 - v·r²)/2 is what r lacks.
    const double q = r * v.high, q_low = __builtin_fma(r, v.high, -q);
    const double residual = (__builtin_fma(-q, r, 1.0) - q_low * r) - (low * r) * r;
    const bool safe = v.high >= kSmallest<T> && v.high <= kLargest<T>;
    return {r, safe ? 0.5 * (r * residual) : 0.0, safe, floored ? -r : r};
  } else {
    const double mean = sum.high / n + rule.added;
    const bool floored = mean < rule.floor;
    const double v = floored ? rule.floor : mean, r = 1.0 / __builtin_sqrt(v);
    const float high = (float)r;
    // A row of fp32 subnormals is rescued even under a large eps: x·r alone would round below the normal numbers.
    const bool subnormal = sizeof(T) == 4 && sum.high > 0 && sum.high < kSmallest<T>;
    return {high, (float)(r - (double)high), v >= kSmallest<T> && v <= kLargest<T> && !subnormal,
            floored ? -high : high};
  }
}

// rstd_from() for the rows of a block: for fp32 and half types a register of rows at a time, as two divisions and a
// root take 40 cycles one after the other, and a row of 128 columns no more.
template <class T>
class Rstds {
 public:
  RMSNORM_INLINE void set(int64_t i, const Sum<T>& sum) { sum_[i] = fold(sum.total); }
  RMSNORM_INLINE void find(int64_t count, int64_t columns, double eps) {
    for (int64_t i = count; i % (kBytes / 8) != 0; ++i) sum_[i] = DoubleReg{};  // the last register is full
    const Eps rule(eps);
    for (int64_t i = 0; i < count; i += kBytes / 8) {
      const DoubleReg sum = reduce_each(sum_ + i), mean = sum / (double)columns + rule.added;
      const auto floored = mean < rule.floor;
      const DoubleReg v = floored ? DoubleReg{} + rule.floor : mean, r = 1.0 / root(v);
      const HalfFloatReg high = narrow(r);
      store_register(high_ + i, high);
      store_register(low_ + i, narrow(r - widen(high)));
      auto safe = (v >= kSmallest<T>)&(v <= kLargest<T>);
      if constexpr (sizeof(T) == 4) safe &= ~((sum > 0) & (sum < kSmallest<T>));
      store_register(safe_ + i, safe);
      store_register(kept_ + i, narrow(floored ? -r : r));
    }
  }
  RMSNORM_INLINE bool safe(int64_t i) const { return safe_[i] != 0; }
  RMSNORM_INLINE Rstd<float> operator[](int64_t i) const { return {high_[i], low_[i], safe(i), kept_[i]}; }

 private:
  DoubleReg sum_[kBlockRows];  // each still in several lanes
  float high_[kBlockRows], low_[kBlockRows], kept_[kBlockRows];
  int64_t safe_[kBlockRows];
};
template <>
class Rstds<double> {
 public:
  RMSNORM_INLINE void set(int64_t i, const Sum<double>& sum) { sum_[i] = value_of(sum); }
  RMSNORM_INLINE void find(int64_t count, int64_t columns, double eps) {
    for (int64_t i = 0; i < count; ++i) row_[i] = rstd_from<double>(sum_[i], columns, eps);
  }
  RMSNORM_INLINE bool safe(int64_t i) const { return row_[i].safe; }
  RMSNORM_INLINE const Rstd<double>& operator[](int64_t i) const { return row_[i]; }

 private:
  Double2 sum_[kBlockRows];
  Rstd<double> row_[kBlockRows];
};

// x·r of a safe row.
template <class T>
RMSNORM_INLINE Vector<T> normalise(const Vector<T>& x, Vector<T> high, Vector<T> low) {
  if constexpr (sizeof(T) == 2) return x * high;
  return fma(x, high, x * low);
}

// The statistic as the kernels know it; Layer in layer.h is the other one.
template <class T>
struct Rms {
  static constexpr bool kBias = false;  // a mean to keep, and a bias to add
  using Element = T;
  using Sums = Sum<T>;
  using Row = Rstd<Scalar<T>>;
  struct Square {
    template <class V, class Span>
    RMSNORM_INLINE void add(Sums& sums, int u, const V& x, Span) const {
      sums.add_square(u, x);
    }
  };
  RMSNORM_INLINE static Square adder(const T*, int64_t) { return {}; }

  struct Block : Rstds<T> {
    __attribute__((noinline)) void find_rows(const void* const*, int64_t count, int64_t columns, double eps) {
      this->find(count, columns, eps);
    }
  };

  // x̂ of a vector, from splats of the row.
  struct Normaliser {
    Vector<T> high, low;
    RMSNORM_INLINE Normaliser(const Row& row) : high(splat<T>(row.high)), low(splat<T>(row.low)) {}
    RMSNORM_INLINE Vector<T> operator()(const Vector<T>& x) const { return normalise<T>(x, high, low); }
  };
};
