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
  bool floored;
  RMSNORM_INLINE double centred(double x) const { return (x * scale - mean.high) - mean.low; }
  RMSNORM_INLINE double normalise(double x) const { return __builtin_fma(centred(x), high, centred(x) * low); }
};

// As storing and loading again would round it.
template <class T>
RMSNORM_INLINE double round_element(double x) {
  return (double)round_to<T>(splat<T>((Scalar<T>)x)).v[0][0];
}

// Of the row whose elements are x(i); the sum of their squares is divided by their number, or by another.
template <class Read>
ScaledRow scale_row(const Read& x, int64_t columns, double eps, bool layer, int64_t divisor) {
  // Of the elements and the root of eps, or of the floor: both squares are then at most 1, and what is lost of the
  // other below 2^-1074 is nothing to it.
  double largest = __builtin_sqrt(__builtin_fabs(eps));
  for (int64_t i = 0; i < columns; ++i) {
    const double magnitude = __builtin_fabs(x(i));
    if (magnitude > largest) largest = magnitude;  // false for NaN
  }
  int exponent = 0;
  if (largest > 0 && largest < __builtin_inf()) __builtin_frexp(largest, &exponent);
  // 2^1023 is the largest power; for the smallest subnormals the squares are then 2^-102, still exact enough.
  if (exponent < -1022) exponent = -1022;
  ScaledRow row = {__builtin_ldexp(1.0, -exponent), 0.0, 0.0, {0.0, 0.0}, false};
  const auto sum = [&](auto&& term) {
    Double2 sum = {0.0, 0.0};
    for (int64_t i = 0; i < columns; ++i) {
      const Double2 next = two_sum(sum.high, term(x(i)));
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
  const Rstd<double> rstd = rstd_from<double>(squares, divisor, eps * row.scale * row.scale);
  row.high = rstd.high, row.low = rstd.low, row.floored = rstd.kept < 0;
  return row;
}

template <class Read>
ScaledRow scale_row(const Read& x, int64_t columns, double eps, bool layer) {
  return scale_row(x, columns, eps, layer, columns);
}

// What forward keeps of the row.
template <class S>
RMSNORM_INLINE void set_row(Rstd<S>& row, const ScaledRow& scaled) {
  row.high = (S)(scaled.high * scaled.scale);
  row.kept = scaled.floored ? -row.high : row.high;
}
template <class S>
RMSNORM_INLINE void set_row(LayerRow<S>& row, const ScaledRow& scaled) {
  row.high = (S)(scaled.high * scaled.scale);
  row.mean = scaled.mean.high / scaled.scale;
}

// Whether an output in fp32 is rounded to the row's type first: for a cast behind the norm.
template <class T, class Gain, class Out>
constexpr bool kRoundsOutput = sizeof(T) == 2 && std::is_same_v<Gain, T> && std::is_same_v<Out, float>;

template <bool RoundFirst, class Row, class T, class Gain, class Out>
__attribute__((noinline, cold)) void rescue_forward(Row& row, const T* x, const Gain* gain, const Gain* bias, Out* out,
                                                    int64_t columns, double eps, int64_t divisor) {
  constexpr bool layer = std::is_same_v<Row, LayerRow<Scalar<T>>>;
  const ScaledRow scaled = scale_row([&](int64_t i) { return element(x, i); }, columns, eps, layer, divisor);
  for (int64_t i = 0; i < columns; ++i) {
    double y = scaled.normalise(element(x, i));
    if constexpr (RoundFirst) y = round_element<T>(y);
    if constexpr (!std::is_void_v<Gain>) y = y * element(gain, i);
    if constexpr (!std::is_void_v<Gain> && layer) y = y + element(bias, i);
    if constexpr (kRoundsOutput<T, Gain, Out>) y = round_element<T>(y);
    set_element(out, i, y);
  }
  set_row(row, scaled);
}

// 1/rms as forward kept it, whose sign says whether it is the floor's.
template <class T>
RMSNORM_INLINE Scalar<T> kept_rstd(const BackwardRows& rows, int64_t r) {
  return ((const Scalar<T>*)rows.rstd)[r];
}

// The row as forward kept it: a normal 1/rms serves as it is (so does a NaN), fp64 has the room. Another was rounded
// off or lost, and is found anew.
template <class T, class Find>
ScaledRow kept_or_scaled(const BackwardRows& rows, int64_t r, const Find& find, double mean = 0.0) {
  const double rstd = __builtin_fabs((double)kept_rstd<T>(rows, r));
  constexpr double smallest = sizeof(T) == 8 ? 0x1p-1022 : 0x1p-126;
  const bool usable = !(rstd < smallest) && !(rstd > 1 / smallest);
  return usable ? ScaledRow{1.0, rstd, 0.0, {mean, 0.0}, kept_rstd<T>(rows, r) < 0} : find();
}

// The gradients of a row: `gain_at` is a column's gain, `found` hears of dy and x̂.
template <class T, class G, class Gain, class Found>
RMSNORM_INLINE void rescue_gradients(const Backward& b, const BackwardRows& rows, int64_t r, const Gain& gain_at,
                                     const Found& found) {
  using S = Scalar<T>;
  const T* x = (const T*)rows.input[r];
  const G* grad = (const G*)rows.grad[r];
  const auto gate_at = [&](int64_t i) {
    return b.gate == Gate::none ? Activated{1.0, 0.0} : activate_element(element((const T*)rows.gate[r], i), b.gate);
  };
  const auto x_at = [&](int64_t i) { return element(x, i) * (b.gate_first ? gate_at(i).value : 1.0); };
  const auto dy_at = [&](int64_t i) { return element(grad, i) * (b.gate_first ? 1.0 : gate_at(i).value); };
  // Of an output in the input's place nothing can be found anew: what was rounded off stays so.
  const S* inverse = b.inverse.data ? (const S*)rows.gate[r] : nullptr;
  const double rstd = __builtin_fabs((double)kept_rstd<T>(rows, r)), mean = b.layer ? rows.mean[r] : 0.0;
  const ScaledRow row = kept_or_scaled<T>(
      rows, r,
      [&] { return inverse ? ScaledRow{1.0, rstd, 0.0, {}, false} : scale_row(x_at, b.columns, b.eps, b.layer); },
      mean);
  const auto normalised_at = [&](int64_t i) {
    return inverse ? x_at(i) * (double)inverse[raw_index<T>(i)] : row.normalise(x_at(i));
  };
  double mean_h = 0.0, mean_product = inverse && rows.mean ? rows.mean[r] * rstd / (double)b.columns : 0.0;
  for (int64_t i = 0; i < b.columns; ++i) {
    const double h = dy_at(i) * gain_at(i) / (double)b.columns;
    mean_product += inverse ? dy_at(i) * x_at(i) / (double)b.columns : h * row.normalise(x_at(i));
    if (b.layer) mean_h += h;
  }
  if (row.floored) mean_product = 0.0;
  for (int64_t i = 0; i < b.columns; ++i) {
    const double dy = dy_at(i), normalised = normalised_at(i);
    const double dz = ((dy * gain_at(i) - mean_h) - normalised * mean_product) * row.high * row.scale;
    const Activated a = gate_at(i);
    if (b.need_gate) {
      const double behind = element(grad, i) * normalised * gain_at(i), first = dz * element(x, i);
      set_element((T*)rows.grad_gate[r], i, (b.gate_first ? first : behind) * a.slope);
    }
    if (b.need_input) {
      double dx = b.gate_first ? dz * a.value : dz;
      if (b.add) dx = (b.round_add ? round_element<T>(dx) : dx) + element((const T*)rows.grad_sum[r], i);
      set_element((T*)rows.grad_input[r], i, dx);
    }
    S* grad_weight = (S*)rows.grad_weight[r] + raw_index<T>(i);
    if (b.need_weight) *grad_weight += (S)(dy * normalised);
    if (b.need_weight && (b.layer || b.modulate != Modulate::none)) grad_weight[padded(b.columns)] += (S)dy;
    found(i, dy, normalised);
  }
}

template <class T, class G = T>  // the gradient's type
__attribute__((noinline, cold)) void rescue_backward(const Backward& b, const BackwardRows& rows, int64_t r) {
  const auto* gain = (const Scalar<T>*)rows.gain[r];
  rescue_gradients<T, G>(
      b, rows, r, [&](int64_t i) { return gain ? (double)gain[raw_index<T>(i)] : 1.0; },
      [](int64_t, double, double) {});
}

// Whether the 1/rms that forward kept is inside what kSmallest and kLargest mean for it: one that moves with its row,
// or a floor's.
template <class T>
RMSNORM_INLINE bool is_usable(Scalar<T> rstd) {
  constexpr Scalar<T> smallest = sizeof(T) == 8 ? (Scalar<T>)0x1p-400 : (Scalar<T>)0x1p-50;
  return rstd >= smallest && rstd <= 1 / smallest;
}
template <class T>
RMSNORM_INLINE bool is_safe(const BackwardRows& rows, int64_t r) {
  return is_usable<T>(kept_rstd<T>(rows, r));
}
template <class T>
RMSNORM_INLINE bool is_floored(const BackwardRows& rows, int64_t r) {
  return is_usable<T>(-kept_rstd<T>(rows, r));
}
