// The only file for rows that a plain kernel can't do: squares that over- or underflow, and 1/rms outside the normal
// numbers. One lane, in fp64, scaled by a power of two (so is eps): slow, exact enough, and only for the row in need.
//
// NaN and Inf come here too and follow the formula: a NaN spreads over its row; beside an Inf everything finite is 0.
#pragma once

// Rows are reached one element at a time through the same conversions as whole vectors.
template <class T>
RMSNORM_INLINE double element(const T* row, int64_t i) {
  const auto lanes = Tail<T>{i, 1}.load_from(row);
  return (double)lanes.v[0][0];
}
template <class T>
RMSNORM_INLINE void set_element(T* row, int64_t i, double x) {
  Tail<T>{i, 1}.store_to(row, splat<T>((Scalar<T>)x));
}

// The row is normalised as (x·scale - mean)·(high + low); 1/rms = scale·high, which forward keeps. RMSNorm's mean is 0.
struct ScaledRow {
  double scale, high, low;
  Double2 mean;
  RMSNORM_INLINE double centred(double x) const { return (x * scale - mean.high) - mean.low; }
  RMSNORM_INLINE double normalise(double x) const { return __builtin_fma(centred(x), high, centred(x) * low); }
};

template <class T>
ScaledRow scale_row(const T* x, int64_t columns, double eps, bool layer) {
  double largest = __builtin_sqrt(eps > 0 ? eps : 0.0);
  for (int64_t i = 0; i < columns; ++i) {
    const double magnitude = __builtin_fabs(element(x, i));
    if (magnitude > largest) largest = magnitude;  // false for NaN
  }
  int exponent = 0;
  if (largest > 0 && largest < __builtin_inf()) __builtin_frexp(largest, &exponent);
  // 2^1023 is the largest power; for the smallest subnormals the squares are then 2^-102, still exact enough.
  if (exponent < -1022) exponent = -1022;
  ScaledRow row = {__builtin_ldexp(1.0, -exponent), 0.0, 0.0, {0.0, 0.0}};
  const auto sum = [&](auto&& term) {
    Double2 sum = {0.0, 0.0};
    for (int64_t i = 0; i < columns; ++i) {
      const Double2 next = two_sum(sum.high, term(element(x, i)));
      sum = {next.high, sum.low + next.low};
    }
    return sum;
  };
  if (layer) {
    const double n = (double)columns;
    const Double2 total = sum([&](double value) { return value * row.scale; });
    row.mean.high = total.high / n;
    row.mean.low = (__builtin_fma(-row.mean.high, n, total.high) + total.low) / n;
  }
  double lost = 0.0;
  Double2 squares = sum([&](double value) {
    const double centred = row.centred(value), square = centred * centred;
    lost += __builtin_fma(centred, centred, -square);
    return square;
  });
  squares.low += lost;
  const Rstd<double> rstd = rstd_from<double>(squares, columns, eps * row.scale * row.scale);
  row.high = rstd.high, row.low = rstd.low;
  return row;
}

template <class S>
RMSNORM_INLINE void keep_mean(Rstd<S>&, const ScaledRow&) {}
template <class S>
RMSNORM_INLINE void keep_mean(LayerRow<S>& row, const ScaledRow& scaled) {
  row.mean = scaled.mean.high / scaled.scale;
}

template <bool RoundFirst, class Row, class T, class Gain, class Out>
__attribute__((noinline, cold)) void rescue_forward(Row& row, const T* x, const Gain* gain, const Gain* bias, Out* out,
                                                    int64_t columns, double eps) {
  constexpr bool layer = std::is_same_v<Row, LayerRow<Scalar<T>>>;
  const ScaledRow scaled = scale_row(x, columns, eps, layer);
  for (int64_t i = 0; i < columns; ++i) {
    double y = scaled.normalise(element(x, i));
    if constexpr (RoundFirst) y = (double)round_to<T>(splat<T>((Scalar<T>)y)).v[0][0];
    if constexpr (!std::is_void_v<Gain>) y = y * element(gain, i);
    if constexpr (!std::is_void_v<Gain> && layer) y = y + element(bias, i);
    set_element(out, i, y);
  }
  row.high = (Scalar<T>)(scaled.high * scaled.scale);
  keep_mean(row, scaled);
}

template <class T>
__attribute__((noinline, cold)) void rescue_backward(const Backward& b, const BackwardRows& rows, int64_t r) {
  using S = Scalar<T>;
  const T* x = (const T*)rows.input[r];
  const T* grad = (const T*)rows.grad[r];
  const auto gain_at = [&](int64_t i) { return b.gain ? (double)((const S*)b.gain)[raw_index<T>(i)] : 1.0; };
  // A normal 1/rms serves as it is (so does a NaN): fp64 has the room. Another was rounded off or lost, and is found
  // anew.
  const double rstd = (double)((const S*)rows.rstd)[r], mean = b.layer ? rows.mean[r] : 0.0;
  constexpr double smallest = sizeof(T) == 8 ? 0x1p-1022 : 0x1p-126;
  const bool usable = !(rstd < smallest) && !(rstd > 1 / smallest);
  const ScaledRow row = usable ? ScaledRow{1.0, rstd, 0.0, {mean, 0.0}} : scale_row(x, b.columns, b.eps, b.layer);
  double mean_h = 0.0, mean_product = 0.0;
  for (int64_t i = 0; i < b.columns; ++i) {
    const double h = element(grad, i) * gain_at(i) / (double)b.columns;
    mean_product += h * row.normalise(element(x, i));
    if (b.layer) mean_h += h;
  }
  for (int64_t i = 0; i < b.columns; ++i) {
    const double dy = element(grad, i), normalised = row.normalise(element(x, i));
    if (b.need_input) {
      double dx = ((dy * gain_at(i) - mean_h) - normalised * mean_product) * row.high * row.scale;
      if (b.add) dx += element((const T*)rows.grad_sum[r], i);
      set_element((T*)rows.grad_input[r], i, dx);
    }
    S* grad_weight = (S*)rows.grad_weight + raw_index<T>(i);
    if (b.need_weight) *grad_weight += (S)(dy * normalised);
    if (b.need_weight && b.layer) grad_weight[padded(b.columns)] += (S)dy;
  }
}
