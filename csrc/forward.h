// The only file with the forward kernel: a load step, a sum, and a store step for a batch of rows.
#pragma once

// One vector of the row that is normalised. With `Add` the sum is formed, rounded and kept on the way.
template <class T, bool Add, class Span>
RMSNORM_INLINE Vector<T> load_row(const ForwardRows& rows, int64_t r, Span span) {
  Vector<T> x = span.load_from((const T*)rows.input[r]);
  if constexpr (Add) x = span.store_back((T*)rows.sum[r], x + span.load_from((const T*)rows.residual[r]));
  return x;
}

template <class Norm, bool Add>
RMSNORM_INLINE auto sum_row(const Forward& f, const ForwardRows& rows, int64_t r) {
  using T = typename Norm::Element;
  const auto adder = Norm::adder((const T*)rows.input[r], f.columns);
  return sum_columns<T, typename Norm::Sums>(
      f.columns, [&](auto& sum, auto span, int u)
                     __attribute__((always_inline)) { adder.add(sum, u, load_row<T, Add>(rows, r, span), span); });
}

// The store step: one vector of the output.
template <class Norm, class Gain, bool RoundFirst, class T, class Span>
RMSNORM_INLINE auto normalise_part(const T* x, const Gain* gain, const Gain* bias,
                                   const typename Norm::Normaliser& normalised, Span span) {
  Vector<T> y = normalised(span.load_from(x));
  if constexpr (RoundFirst) y = round_to<T>(y);
  if constexpr (!std::is_void_v<Gain>) y = y * span.load_from(gain);
  if constexpr (!std::is_void_v<Gain> && Norm::kBias) y = y + span.load_from(bias);
  return y;
}

// Rows whose sums are found before the first of them is stored: 8 KiB of them, so that what is read again is still in
// L1 beside the gain and the output (512x4096 fp32 on a Zen 5: 1.5 times memcpy; one row's sum and another's store in
// one loop, 1.8).
template <class T>
int64_t block_rows(int64_t columns) {
  const int64_t most = 8192 / ((columns + 1) * (int64_t)sizeof(T));
  return most < 1 ? 1 : most > kBlockRows ? kBlockRows : most;
}

template <class Norm, class Gain, class Out, bool RoundFirst, bool Add>
void forward(const Forward& f, const ForwardRows& rows) {
  using T = typename Norm::Element;
  const Gain *gain = (const Gain*)f.gain, *bias = (const Gain*)f.bias;
  const int64_t block = block_rows<T>(f.columns);
  for (int64_t begin = 0; begin < rows.count; begin += block) {
    const int64_t end = begin + block < rows.count ? begin + block : rows.count;
    typename Norm::Block found;
    for (int64_t r = begin; r < end; ++r) found.set(r - begin, sum_row<Norm, Add>(f, rows, r));
    const void* const* x_of = Add ? rows.sum : rows.input;
    found.find_rows(x_of + begin, end - begin, f.columns, f.eps);
    for (int64_t r = begin; r < end; ++r) {
      const T* x = (const T*)x_of[r];
      Out* out = (Out*)rows.output[r];
      typename Norm::Row row = found[r - begin];
      const typename Norm::Normaliser normalised(row);
      const auto part = [&](auto span) __attribute__((always_inline)) {
        return normalise_part<Norm, Gain, RoundFirst>(x, gain, bias, normalised, span);
      };
      if (__builtin_expect(!row.safe, 0)) {
        rescue_forward<RoundFirst>(row, x, gain, bias, out, f.columns, f.eps);
      } else if (kStreams && rows.stream && can_stream(out)) {
        const char* next = (const char*)rows.input[r] + rows.next * block;
        for_columns<T>(f.columns, [&](auto span) __attribute__((always_inline)) {
          prefetch_part<T, 3>(next, span);
          stream_to(span, out, part(span));
        });
      } else {
        for_columns<T>(f.columns, [&](auto span) __attribute__((always_inline)) { span.store_to(out, part(span)); });
      }
      if (rows.rstd) ((Scalar<T>*)rows.rstd)[r] = row.high;
      if constexpr (Norm::kBias)
        if (rows.mean) rows.mean[r] = row.mean;
    }
  }
  if (kStreams && rows.stream) finish_streaming();
}

template <class T, class Gain, class Out, bool RoundFirst>
ForwardKernel forward_of(const Forward& f) {
  return f.add ? &forward<Rms<T>, Gain, Out, RoundFirst, true> : &forward<Rms<T>, Gain, Out, RoundFirst, false>;
}

template <class T>
ForwardKernel layer_of(const Forward& f) {
  return f.gain_type == Type::none ? &forward<Layer<T>, void, T, false, false>
                                   : &forward<Layer<T>, Scalar<T>, T, false, false>;
}

template <class T>
ForwardKernel forward_of_half(const Forward& f) {
  if (f.layer) return layer_of<T>(f);
  if (f.gain_type == Type::none) return forward_of<T, void, T, false>(f);
  if (f.gain_type == f.input) return f.round_first ? forward_of<T, T, T, true>(f) : forward_of<T, T, T, false>(f);
  if (f.output == Type::f32) return forward_of<T, float, float, true>(f);
  return f.round_first ? forward_of<T, float, T, true>(f) : forward_of<T, float, T, false>(f);
}

// For fp32 and fp64 rounding before the gain is no rounding: both modes are one kernel.
template <class T>
ForwardKernel forward_of_full(const Forward& f) {
  if (f.layer) return layer_of<T>(f);
  return f.gain_type == Type::none ? forward_of<T, void, T, false>(f) : forward_of<T, T, T, false>(f);
}

ForwardKernel select_forward(const Forward& f) {
#if defined(RMSNORM_LENDER)
  return f.input == Type::bf16 ? forward_of_half<bf16>(f) : RMSNORM_LENDER.forward(f);
#else
  switch (f.input) {
    case Type::bf16: return forward_of_half<bf16>(f);
    case Type::f16: return forward_of_half<f16>(f);
    case Type::f64: return forward_of_full<double>(f);
    default: return forward_of_full<float>(f);
  }
#endif
}
