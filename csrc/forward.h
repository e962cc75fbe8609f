// The only file with the forward kernel: a load step, a sum, and a store step for a batch of rows.
#pragma once

// One vector of the row that is normalised. With `Add` the sum is formed, rounded and kept on the way.
template <class T, bool Add, class Span>
RMSNORM_INLINE Vector<T> load_row(const ForwardRows& rows, int64_t r, Span span) {
  Vector<T> x = span.load_from((const T*)rows.input[r]);
  if constexpr (Add) {
    x = round_to<T>(x + span.load_from((const T*)rows.residual[r]));
    span.store_to((T*)rows.sum[r], x);
  }
  return x;
}

template <class T, class Gain, class Out, bool RoundFirst>
RMSNORM_INLINE void store_row(const T* x, const Gain* gain, Out* out, Rstd<Scalar<T>> rstd, int64_t columns) {
  const Vector<T> high = splat(rstd.high), low = splat(rstd.low);
  for_columns<2>(0, columns, [&](auto span, auto) __attribute__((always_inline)) {
    Vector<T> y = normalise<T>(span.load_from(x), high, low);
    if constexpr (RoundFirst) y = round_to<T>(y);
    if constexpr (!std::is_void_v<Gain>) y = y * span.load_from(gain);
    span.store_to(out, y);
  });
}

template <class T, class Gain, class Out, bool RoundFirst, bool Add>
void forward(const Forward& f, const ForwardRows& rows) {
  Rstd<Scalar<T>> rstd[kBatch];
  for (int64_t r = 0; r < rows.count; ++r) {
    const Double2 sum = sum_columns<T>(f.columns, [&](auto& sum, auto span, int u) __attribute__((always_inline)) {
      sum.add_square(u, load_row<T, Add>(rows, r, span));
    });
    rstd[r] = rstd_from<T>(sum, f.columns, f.eps);
    if (rows.rstd) ((Scalar<T>*)rows.rstd)[r] = rstd[r].high;
  }
  const Gain* gain = (const Gain*)f.gain;
  for (int64_t r = 0; r < rows.count; ++r) {
    const T* x = (const T*)(Add ? rows.sum[r] : rows.input[r]);
    Out* out = (Out*)rows.output[r];
    if (__builtin_expect(rstd[r].safe, 1)) store_row<T, Gain, Out, RoundFirst>(x, gain, out, rstd[r], f.columns);
    else rescue_forward<T, Gain, Out, RoundFirst>(x, gain, out, f.columns, f.eps);
  }
}

template <class T, class Gain, class Out, bool RoundFirst>
ForwardKernel forward_of(const Forward& f) {
  return f.add ? &forward<T, Gain, Out, RoundFirst, true> : &forward<T, Gain, Out, RoundFirst, false>;
}

template <class T>
ForwardKernel forward_of_half(const Forward& f) {
  if (f.gain_type == Type::none) return forward_of<T, void, T, false>(f);
  if (f.gain_type == f.input) return f.round_first ? forward_of<T, T, T, true>(f) : forward_of<T, T, T, false>(f);
  if (f.output == Type::f32) return forward_of<T, float, float, true>(f);
  return f.round_first ? forward_of<T, float, T, true>(f) : forward_of<T, float, T, false>(f);
}

// For fp32 and fp64 rounding before the gain is no rounding: both modes are one kernel.
template <class T>
ForwardKernel forward_of_full(const Forward& f) {
  return f.gain_type == Type::none ? forward_of<T, void, T, false>(f) : forward_of<T, T, T, false>(f);
}

ForwardKernel select_forward(const Forward& f) {
  switch (f.input) {
    case Type::bf16: return forward_of_half<bf16>(f);
    case Type::f16: return forward_of_half<f16>(f);
    case Type::f64: return forward_of_full<double>(f);
    default: return forward_of_full<float>(f);
  }
}
