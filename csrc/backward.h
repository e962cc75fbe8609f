// The only file with the backward kernel: with x̂ = x·r and h = grad·gain,
//
//   dx = r · (h - x̂ · mean(h · x̂))  [+ grad_sum]          dw += grad · x̂
//
// Two passes over a row, the second from cache. Weight gradients are added row by row, in the order of the rows.
#pragma once

template <class T, bool HasGain, bool NeedInput, bool NeedWeight, bool Add>
RMSNORM_INLINE void backward_row(const Backward& b, const BackwardRows& rows, int64_t r, Scalar<T> rstd) {
  using V = Vector<T>;
  using S = Scalar<T>;
  const T* x = (const T*)rows.input[r];
  const T* grad = (const T*)rows.grad[r];
  const S* gain = (const S*)b.gain;
  const V scale = splat(rstd);
  V mean = {};
  if constexpr (NeedInput) {
    const Double2 sum = sum_columns<T>(b.columns, [&](auto& sum, auto span, int u) __attribute__((always_inline)) {
      V h = span.load_from(grad);
      if constexpr (HasGain) h = h * span.load_from(gain);
      sum.add(u, h, span.load_from(x) * scale);
    });
    mean = splat((S)(sum.high / (double)b.columns));
  }
  for_columns<T, 1>(0, b.columns, [&](auto span, auto) __attribute__((always_inline)) {
    const V dy = span.load_from(grad), normalised = span.load_from(x) * scale;
    if constexpr (NeedInput) {
      V h = dy;
      if constexpr (HasGain) h = h * span.load_from(gain);
      V dx = (h - normalised * mean) * scale;
      if constexpr (Add) dx = dx + span.load_from((const T*)rows.grad_sum[r]);
      span.store_to((T*)rows.grad_input[r], dx);
    }
    if constexpr (NeedWeight) {
      S* dw = (S*)rows.grad_weight;
      span.store_to(dw, span.load_from(dw) + dy * normalised);
    }
  });
}

template <class T, bool HasGain, bool NeedInput, bool NeedWeight, bool Add>
void backward(const Backward& b, const BackwardRows& rows) {
  // What kSmallest and kLargest mean for 1/rms.
  constexpr Scalar<T> smallest = sizeof(T) == 8 ? (Scalar<T>)0x1p-400 : (Scalar<T>)0x1p-50;
  for (int64_t r = 0; r < rows.count; ++r) {
    const Scalar<T> rstd = ((const Scalar<T>*)rows.rstd)[r];
    if (__builtin_expect(rstd >= smallest && rstd <= 1 / smallest, 1))
      backward_row<T, HasGain, NeedInput, NeedWeight, Add>(b, rows, r, rstd);
    else rescue_backward<T>(b, rows, r);
  }
}

template <class T, bool NeedInput, bool NeedWeight, bool Add>
BackwardKernel backward_with_gain(const Backward& b) {
  return b.gain ? &backward<T, true, NeedInput, NeedWeight, Add> : &backward<T, false, NeedInput, NeedWeight, Add>;
}

template <class T>
BackwardKernel backward_of(const Backward& b) {
  if (!b.need_input) return &backward<T, false, false, true, false>;
  if (b.need_weight)
    return b.add ? backward_with_gain<T, true, true, true>(b) : backward_with_gain<T, true, true, false>(b);
  return b.add ? backward_with_gain<T, true, false, true>(b) : backward_with_gain<T, true, false, false>(b);
}

BackwardKernel select_backward(const Backward& b) {
  switch (b.input) {
    case Type::bf16: return backward_of<bf16>(b);
    case Type::f16: return backward_of<f16>(b);
    case Type::f64: return backward_of<double>(b);
    default: return backward_of<float>(b);
  }
}
