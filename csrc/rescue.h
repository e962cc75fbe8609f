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
  Tail<T>{i, 1}.store_to(row, splat((Scalar<T>)x));
}

// The row is normalised as (x·scale)·(high + low); 1/rms = scale·high, which forward keeps.
struct ScaledRow {
  double scale, high, low;
  RMSNORM_INLINE double normalise(double x) const { return __builtin_fma(x * scale, high, x * scale * low); }
};

template <class T>
ScaledRow scale_row(const T* x, int64_t columns, double eps) {
  double largest = __builtin_sqrt(eps > 0 ? eps : 0.0);
  for (int64_t i = 0; i < columns; ++i) {
    const double magnitude = __builtin_fabs(element(x, i));
    if (magnitude > largest) largest = magnitude;  // false for NaN
  }
  int exponent = 0;
  if (largest > 0 && largest < __builtin_inf()) __builtin_frexp(largest, &exponent);
  // 2^1023 is the largest power; for the smallest subnormals the squares are then 2^-102, still exact enough.
  if (exponent < -1022) exponent = -1022;
  const double scale = __builtin_ldexp(1.0, -exponent);
  Double2 sum = {0.0, 0.0};
  for (int64_t i = 0; i < columns; ++i) {
    const double scaled = element(x, i) * scale, square = scaled * scaled;
    const Double2 next = two_sum(sum.high, square);
    sum = {next.high, sum.low + (next.low + __builtin_fma(scaled, scaled, -square))};
  }
  const Rstd<double> rstd = rstd_from<double>(sum, columns, eps * scale * scale);
  return {scale, rstd.high, rstd.low};
}

template <class T, class Gain, class Out, bool RoundFirst>
__attribute__((noinline, cold)) Scalar<T> rescue_forward(const T* x, const Gain* gain, Out* out, int64_t columns,
                                                         double eps) {
  const ScaledRow row = scale_row(x, columns, eps);
  for (int64_t i = 0; i < columns; ++i) {
    double y = row.normalise(element(x, i));
    if constexpr (RoundFirst) y = (double)round_to<T>(splat((Scalar<T>)y)).v[0][0];
    if constexpr (!std::is_void_v<Gain>) y = y * element(gain, i);
    set_element(out, i, y);
  }
  return (Scalar<T>)(row.high * row.scale);
}

template <class T>
__attribute__((noinline, cold)) void rescue_backward(const Backward& b, const BackwardRows& rows, int64_t r) {
  using S = Scalar<T>;
  const T* x = (const T*)rows.input[r];
  const T* grad = (const T*)rows.grad[r];
  const S* gain = (const S*)b.gain;
  // A normal 1/rms serves as it is (so does a NaN): fp64 has the room. Another was rounded off or lost, and is found
  // anew.
  const double rstd = (double)((const S*)rows.rstd)[r];
  constexpr double smallest = sizeof(T) == 8 ? 0x1p-1022 : 0x1p-126;
  const bool usable = !(rstd < smallest) && !(rstd > 1 / smallest);
  const ScaledRow row = usable ? ScaledRow{1.0, rstd, 0.0} : scale_row(x, b.columns, b.eps);
  double mean = 0.0;
  for (int64_t i = 0; i < b.columns; ++i)
    mean += element(grad, i) * (gain ? (double)gain[i] : 1.0) * row.normalise(element(x, i)) / (double)b.columns;
  for (int64_t i = 0; i < b.columns; ++i) {
    const double dy = element(grad, i), normalised = row.normalise(element(x, i));
    if (b.need_input) {
      double dx = (dy * (gain ? (double)gain[i] : 1.0) - normalised * mean) * row.high * row.scale;
      if (b.add) dx += element((const T*)rows.grad_sum[r], i);
      set_element((T*)rows.grad_input[r], i, dx);
    }
    if (b.need_weight) ((S*)rows.grad_weight)[i] += (S)(dy * normalised);
  }
}
