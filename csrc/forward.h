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

// The store step: one vector of the output.
template <class Norm, class Gain, class Out, bool RoundFirst, bool Stream, class T, class Span>
RMSNORM_INLINE void store_part(const T* x, const Gain* gain, const Gain* bias, Out* out,
                               const typename Norm::Normaliser& normalised, Span span) {
  Vector<T> y = normalised(span.load_from(x));
  if constexpr (RoundFirst) y = round_to<T>(y);
  if constexpr (!std::is_void_v<Gain>) y = y * span.load_from(gain);
  if constexpr (!std::is_void_v<Gain> && Norm::kBias) y = y + span.load_from(bias);
  if constexpr (Stream) stream_to(span, out, y);
  else span.store_to(out, y);
}

// How many rows are between a row's sum and its store: several short ones, as the square roots and divisions of rows
// that don't wait for each other overlap, but no more than 8 KiB, a quarter of L1.
template <class T>
int64_t rows_ahead(int64_t columns) {
  const int64_t most = 8192 / ((columns + 1) * (int64_t)sizeof(T));
  return most < 1 ? 1 : most > 8 ? 8 : most;
}

// While one row is stored, a later one is summed: reading and writing overlap, and both passes take little more time
// than a copy (8192x512 fp32, 1 thread of a Zen 3: 1.04 times memcpy; the two passes one after the other, 1.5 times).
template <class Norm, class Gain, class Out, bool RoundFirst, bool Add>
void forward(const Forward& f, const ForwardRows& rows) {
  using T = typename Norm::Element;
  const Gain *gain = (const Gain*)f.gain, *bias = (const Gain*)f.bias;
  typename Norm::Values sums[kBatch];
  typename Norm::Row row[kBatch];
  const auto sum_row = [&](int64_t r, auto&& store) __attribute__((always_inline)) {
    const auto adder = Norm::adder((const T*)rows.input[r], f.columns);
    sums[r] =
        sum_columns<T, typename Norm::Sums>(f.columns, [&](auto& sum, auto span, int u) __attribute__((always_inline)) {
          adder.add(sum, u, load_row<T, Add>(rows, r, span), span);
          store(span);
        });
  };
  const auto only_sum_row = [&](int64_t r) __attribute__((noinline)) { sum_row(r, [](auto) {}); };
  const int64_t ahead = rows_ahead<T>(f.columns);
  for (int64_t r = 0; r < ahead && r < rows.count; ++r) only_sum_row(r);
  for (int64_t begin = 0; begin < rows.count; begin += ahead) {
    const int64_t end = begin + ahead < rows.count ? begin + ahead : rows.count;
    for (int64_t r = begin; r < end; ++r) row[r] = Norm::row(sums[r], (const T*)rows.input[r], f.columns, f.eps);
    for (int64_t r = begin; r < end; ++r) {
      const T* x = (const T*)(Add ? rows.sum[r] : rows.input[r]);
      Out* out = (Out*)rows.output[r];
      const typename Norm::Normaliser normalised(row[r]);
      const auto store = [&](auto span, auto...) __attribute__((always_inline)) {
        store_part<Norm, Gain, Out, RoundFirst, false>(x, gain, bias, out, normalised, span);
      };
      const auto stream = [&](auto span) __attribute__((always_inline)) {
        store_part<Norm, Gain, Out, RoundFirst, true>(x, gain, bias, out, normalised, span);
      };
      const bool last = r + ahead >= rows.count;
      if (__builtin_expect(row[r].safe && !last, 1)) {
        if (kStreams && !Add && rows.stream && can_stream(out)) sum_row(r + ahead, stream);
        else sum_row(r + ahead, store);
      } else if (row[r].safe) {
        for_columns<T, 2>(0, f.columns, store);
      } else {
        rescue_forward<RoundFirst>(row[r], x, gain, bias, out, f.columns, f.eps);
        if (!last) only_sum_row(r + ahead);
      }
      if (rows.rstd) ((Scalar<T>*)rows.rstd)[r] = row[r].high;
      if constexpr (Norm::kBias)
        if (rows.mean) rows.mean[r] = row[r].mean;
    }
  }
  if (kStreams && !Add && rows.stream) finish_streaming();
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
