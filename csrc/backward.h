// The only file with the backward kernel: with x̂ = (x - mean)·r and h = grad·gain,
//
//   dx = r · (h - mean(h) - x̂ · mean(h · x̂))  [+ grad_sum]          dw += grad · x̂          db += grad
//
// where RMSNorm has no mean and no bias. Two passes over a row, the second from cache. Weight gradients are added row
// by row, in the order of the rows.
#pragma once

// What backward needs to know of a statistic: x̂ from what forward kept, and the means of h and h·x̂.
template <class T>
struct RmsBackward {
  static constexpr bool kBias = false;
  using Element = T;
  using Sums = Sum<T>;
  Vector<T> scale, mean_product = {};

  RMSNORM_INLINE RmsBackward(const BackwardRows& rows, int64_t r) : scale(splat(((const Scalar<T>*)rows.rstd)[r])) {}
  RMSNORM_INLINE Vector<T> normalised(const Vector<T>& x) const { return x * scale; }
  RMSNORM_INLINE void set_means(Double2 sum, double n) { mean_product = splat((Scalar<T>)(sum.high / n)); }
  RMSNORM_INLINE Vector<T> dx(const Vector<T>& h, const Vector<T>& normalised) const {
    return (h - normalised * mean_product) * scale;
  }
};

template <class T>
struct LayerBackward {
  static constexpr bool kBias = true;
  using Element = T;
  using Sums = Moments<T>;
  Vector<T> scale, mean_high, mean_low, mean_h = {}, mean_product = {};

  RMSNORM_INLINE LayerBackward(const BackwardRows& rows, int64_t r) : scale(splat(((const Scalar<T>*)rows.rstd)[r])) {
    const auto high = (Scalar<T>)rows.mean[r];
    mean_high = splat(high);
    mean_low = splat((Scalar<T>)(rows.mean[r] - (double)high));
  }
  RMSNORM_INLINE Vector<T> normalised(const Vector<T>& x) const { return ((x - mean_high) - mean_low) * scale; }
  RMSNORM_INLINE void set_means(const TwoSums& sums, double n) {
    mean_h = splat((Scalar<T>)(sums.first.high / n));
    mean_product = splat((Scalar<T>)(sums.second.high / n));
  }
  RMSNORM_INLINE Vector<T> dx(const Vector<T>& h, const Vector<T>& normalised) const {
    return ((h - mean_h) - normalised * mean_product) * scale;
  }
};

template <class Norm, bool HasGain, bool NeedInput, bool NeedWeight, bool Add>
RMSNORM_INLINE void backward_row(const Backward& b, const BackwardRows& rows, int64_t r) {
  using T = typename Norm::Element;
  using V = Vector<T>;
  using S = Scalar<T>;
  const T* x = (const T*)rows.input[r];
  const T* grad = (const T*)rows.grad[r];
  const S* gain = (const S*)b.gain;
  T* grad_input = (T*)rows.grad_input[r];
  Norm norm(rows, r);
  if constexpr (NeedInput) {
    norm.set_means(sum_columns<T, typename Norm::Sums>(b.columns,
                                                       [&](auto& sum, auto span, int u) __attribute__((always_inline)) {
                                                         V h = span.load_from(grad);
                                                         if constexpr (HasGain) h = h * span.load_from(gain);
                                                         sum.add(u, h, norm.normalised(span.load_from(x)));
                                                       }),
                   (double)b.columns);
  }
  for_columns<T, 1>(0, b.columns, [&](auto span, auto) __attribute__((always_inline)) {
    const V dy = span.load_from(grad), normalised = norm.normalised(span.load_from(x));
    if constexpr (NeedInput) {
      V h = dy;
      if constexpr (HasGain) h = h * span.load_from(gain);
      V dx = norm.dx(h, normalised);
      if constexpr (Add) dx = dx + span.load_from((const T*)rows.grad_sum[r]);
      span.store_to(grad_input, dx);
    }
    if constexpr (NeedWeight) {
      S* dw = (S*)rows.grad_weight;
      span.store_to(dw, span.load_from(dw) + dy * normalised);
      if constexpr (Norm::kBias) {
        S* db = dw + b.columns;
        span.store_to(db, span.load_from(db) + dy);
      }
    }
  });
}

template <class Norm, bool HasGain, bool NeedInput, bool NeedWeight, bool Add>
void backward(const Backward& b, const BackwardRows& rows) {
  using T = typename Norm::Element;
  // What kSmallest and kLargest mean for 1/rms.
  constexpr Scalar<T> smallest = sizeof(T) == 8 ? (Scalar<T>)0x1p-400 : (Scalar<T>)0x1p-50;
  for (int64_t r = 0; r < rows.count; ++r) {
    const Scalar<T> rstd = ((const Scalar<T>*)rows.rstd)[r];
    if (__builtin_expect(rstd >= smallest && rstd <= 1 / smallest, 1))
      backward_row<Norm, HasGain, NeedInput, NeedWeight, Add>(b, rows, r);
    else rescue_backward<T>(b, rows, r);
  }
}

template <class Norm, bool NeedInput, bool NeedWeight, bool Add>
BackwardKernel backward_with_gain(const Backward& b) {
  return b.gain ? &backward<Norm, true, NeedInput, NeedWeight, Add>
                : &backward<Norm, false, NeedInput, NeedWeight, Add>;
}

template <class T>
BackwardKernel backward_of(const Backward& b) {
  if (b.layer) {
    using Norm = LayerBackward<T>;
    if (!b.need_input) return &backward<Norm, false, false, true, false>;
    return b.need_weight ? backward_with_gain<Norm, true, true, false>(b)
                         : backward_with_gain<Norm, true, false, false>(b);
  }
  using Norm = RmsBackward<T>;
  if (!b.need_input) return &backward<Norm, false, false, true, false>;
  if (b.need_weight)
    return b.add ? backward_with_gain<Norm, true, true, true>(b) : backward_with_gain<Norm, true, true, false>(b);
  return b.add ? backward_with_gain<Norm, true, false, true>(b) : backward_with_gain<Norm, true, false, false>(b);
}

BackwardKernel select_backward(const Backward& b) {
#if defined(RMSNORM_LENDER)
  return b.input == Type::bf16 ? backward_of<bf16>(b) : RMSNORM_LENDER.backward(b);
#else
  switch (b.input) {
    case Type::bf16: return backward_of<bf16>(b);
    case Type::f16: return backward_of<f16>(b);
    case Type::f64: return backward_of<double>(b);
    default: return backward_of<float>(b);
  }
#endif
}
