// The only file with the modulated norm's steps (AdaLN): a norm whose output is scaled and shifted by numbers that a
// sample or a token brings along, and the residual add before it, whose other part is scaled by a gate.
//
//   s = residual + gate·x        y = x̂·(1 + scale) + shift        x̂ that of s
//
// Rounded once, or, as models in a half type do it, after every step; never fused, so fp32 is the same either way. All
// rows that a kernel is given share scale and shift, which are formed once, in the wide type and the kernel's own order
// (512x4096 bf16, rounded after every step: 0.86 of the time of forming them for each row).
#pragma once

// A vector of scales, shifts or gates.
template <class T, class Span>
RMSNORM_INLINE Vector<T> modulation_of(Type type, const void* row, Span span) {
  if constexpr (sizeof(T) == 2)
    if (type == Type::f32) return span.load_from((const float*)row);
  return span.load_from((const T*)row);
}
template <class T>
double modulation_at(Type type, const void* row, int64_t i) {
  if constexpr (sizeof(T) == 2)
    if (type == Type::f32) return ((const float*)row)[i];
  return element((const T*)row, i);
}

template <class Norm_>
class Modulated {
  using T = typename Norm_::Element;

 public:
  using Norm = Norm_;
  using Out = T;
  static constexpr bool kAsks = false, kAsksInSum = false, kAdds = false, kAddsAgain = false, kTwice = false,
                        kStores = false;
  template <bool Ask, bool Keep>
  using Loader = typename Plain<Norm, void, T, false, false>::template Loader<Ask, Keep>;
  RMSNORM_INLINE static const void* const* rows_of(const ForwardRows& rows) { return rows.input; }

  // The store step.
  RMSNORM_INLINE Modulated(const Forward& f, const ForwardRows& rows, int64_t r, int64_t, const typename Norm::Row& row)
      : x_((const T*)rows.input[r]),
        gain_((const Scalar<T>*)rows.gain[r]),
        shift_((const Scalar<T>*)rows.first_gain[r]),
        round_(f.round_first),
        normalised_(row) {}
  template <class Span>
  RMSNORM_INLINE Vector<T> operator()(Span span) const {
    const Vector<T> y = round_if<T>(round_, normalised_(span.load_from(x_))) * span.load_raw(gain_);
    return round_if<T>(round_, y) + span.load_raw(shift_);
  }

  __attribute__((noinline, cold)) static void rescue(const Forward& f, const ForwardRows& rows, int64_t r,
                                                     typename Norm::Row& row) {
    const T* x = (const T*)rows.input[r];
    const ScaledRow scaled = scale_row([&](int64_t i) { return element(x, i); }, f.columns, f.eps, Norm::kBias);
    using S = Scalar<T>;
    const auto step = [&](S y) { return sizeof(T) == 2 && f.round_first ? (S)round_element<T>(y) : y; };
    const S *gain = (const S*)rows.gain[r], *shift = (const S*)rows.first_gain[r];
    for (int64_t i = 0; i < f.columns; ++i) {  // in the separate steps' arithmetic
      const S y = step((S)scaled.normalise(element(x, i)));
      set_element((T*)rows.output[r], i, step(y * gain[raw_index<T>(i)]) + shift[raw_index<T>(i)]);
    }
    set_row(row, scaled);
  }

 private:
  const T* x_;
  const Scalar<T>*gain_, *shift_;
  bool round_;
  typename Norm::Normaliser normalised_;
};

template <>
constexpr bool kSumsAhead<Modulated<Layer<float>>> = kStreams;  // not the baseline: 2 KB

// 1 + scale, and the shift, or -0, which leaves even the sign of a zero.
template <class T>
__attribute__((noinline)) void form(const Forward& f, const void* scale, const void* shift, Scalar<T>* gain,
                                    Scalar<T>* added) {
  for_columns<T>(f.columns, [&](auto span) __attribute__((always_inline)) {
    span.store_raw(gain, round_if<T>(f.round_first, modulation_of<T>(f.modulation, scale, span) + splat<T>(1)));
    span.store_raw(added, shift ? modulation_of<T>(f.modulation, shift, span) : splat<T>((Scalar<T>)-0.0));
  });
}

// Scratch remembers whose modulations are in it.
template <class Norm>
void modulated(const Forward& f, const ForwardRows& rows) {
  using T = typename Norm::Element;
  const void** formed = (const void**)rows.scratch;
  if (formed[0] != rows.gate[0] || formed[1] != rows.residual[0]) {
    form<T>(f, rows.gate[0], rows.residual[0], (Scalar<T>*)rows.gain[0], (Scalar<T>*)rows.first_gain[0]);
    formed[0] = rows.gate[0], formed[1] = rows.residual[0];
  }
  forward<Modulated<Norm>>(f, rows);
}

// The add: of rows.input and rows.residual, to rows.sum; without a gate the input is added as it is. A sum that goes
// past the caches may be stored once more, to rows.output, and rows to come are asked for, so many further on as there
// are.
template <class T>
void add_gated(const Forward& f, const ForwardRows& rows) {
  const bool round = f.round_first, ask = rows.ask;
  const Type modulation = f.modulation;
  for (int64_t r = 0; r < rows.count; ++r) {
    const T *x = (const T*)rows.input[r], *residual = (const T*)rows.residual[r];
    const void* gate = rows.gate[r];
    void *sum = rows.sum[r], *again = rows.output[r];
    const bool stream = rows.stream && can_stream(sum);
    const char *next = (const char*)x + rows.next * rows.count,
               *next_residual = (const char*)residual + rows.next_residual * rows.count;
    for_columns<T>(f.columns, rows.back, [&](auto span) __attribute__((always_inline)) {
      if (is_whole<decltype(span)> && ask) prefetch_part<T, 2>(next, span), prefetch_part<T, 2>(next_residual, span);
      Vector<T> y = span.load_from(x);
      if (gate) y = round_if<T>(round, y * modulation_of<T>(modulation, gate, span));
      y = y + span.load_from(residual);
      if (is_whole<Full<T>> && again) span.store_to((T*)again, y);
      store_or_stream<T>(stream, sum, y, span);
    });
    if (!is_whole<Full<T>> && again) __builtin_memcpy(again, sum, f.columns * sizeof(T));
  }
}

template <class T>
ForwardKernel modulated_of(const Forward& f) {
  if (f.modulate == Modulate::add) return &add_gated<T>;
  return f.layer ? &modulated<Layer<T>> : &modulated<Rms<T>>;
}
