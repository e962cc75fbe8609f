// The only file with the plain form's steps: add and round first, or not; round, multiply by the gain, both or none,
// and add a bias.
#pragma once

template <class Norm_, class Gain, class Out_, bool RoundFirst, bool Add>
class Plain {
  using T = typename Norm_::Element;

 public:
  using Norm = Norm_;
  using Out = Out_;
  // Asking for rows to come is a kernel of its own. LayerNorm of half types has more to compute, and lost 7 % by it.
  static constexpr bool kAsks = kStreams && !(Norm::kBias && sizeof(T) == 2), kAdds = Add, kTwice = false,
                        kStores = false;
  // Out of the last cache, rows to come are asked for while one is summed, and none of them while one is stored, as the
  // output's are: 4096x576 takes 0.91 of the time, 32768x128 with 2 threads 0.93. What adds is no faster by it.
  static constexpr bool kAsksInSum = std::is_same_v<T, float> && !Add;
  // A sum that goes past the caches isn't kept while it is summed up, but added again while it is normalised, as plain
  // stores would read its lines first. Half types, which have more to compute, lose a tenth by it, and fp64 gains
  // nothing.
  static constexpr bool kAddsAgain = kStreams && Add && std::is_same_v<T, float>;

  // The load step: one vector of the row that is normalised. A sum is rounded and kept on the way.
  template <bool Ask, bool Keep>
  class Loader {
   public:
    Loader() = default;
    RMSNORM_INLINE Loader(const Forward& f, const ForwardRows& rows, int64_t r, int64_t)
        : x_((const T*)rows.input[r]),
          residual_((const T*)rows.residual[r]),
          sum_((T*)rows.sum[r]),
          scaled_(f.scale),
          factor_(splat<T>((Scalar<T>)f.factor)),
          soon_(rows.keep_gain ? rows.gain[r] : rows.input[r]) {}
    template <class Span>
    RMSNORM_INLINE auto operator()(Span span) const {
      // The row, its output and the gain may fill L1 to the last line; then this order keeps the gain there, and the
      // last row's output leaves (512x4096 fp32 on a Zen 5: 1.6 times memcpy without, 1.5 with).
      if constexpr (kKeepsGain) __builtin_prefetch((const T*)soon_ + span.j, 0, 3);
      if constexpr (Add) {
        const Vector<T> given = span.load_from(x_);
        const Vector<T> x = scaled_ ? given * factor_ : given + span.load_from(residual_);
        if constexpr (Keep) return span.store_back(sum_, x);
        else return round_to<T>(x);
      } else if constexpr (std::is_same_v<T, float>) {
        return span.load_wide_from(x_);
      } else {
        return span.load_from(x_);
      }
    }

   private:
    static constexpr bool kKeepsGain =
        std::is_same_v<T, float> && std::is_same_v<Gain, T> && !Add && !Norm::kBias && !Ask;
    const T *x_, *residual_;
    T* sum_;
    bool scaled_;
    Vector<T> factor_;
    const void* soon_;
  };
  RMSNORM_INLINE static const void* const* rows_of(const ForwardRows& rows) { return Add ? rows.sum : rows.input; }

  // The store step: one vector of the output.
  RMSNORM_INLINE Plain(const Forward& f, const ForwardRows& rows, int64_t r, int64_t, const typename Norm::Row& row)
      : x_((const T*)rows_of(rows)[r]),
        sum_((T*)rows.sum[r]),
        add_(f, rows, r, 0),
        gain_((const Gain*)rows.gain[r]),
        bias_((const Gain*)f.bias),
        normalised_(row) {}
  // The same of a row that lies anywhere, with a gain.
  RMSNORM_INLINE Plain(const T* x, const Gain* gain, const typename Norm::Row& row)
      : x_(x), gain_(gain), normalised_(row) {}
  template <class Span>
  RMSNORM_INLINE Vector<T> operator()(Span span) const {
    return from(span, span.load_from(x_));
  }
  template <class Span>
  RMSNORM_INLINE Vector<T> add_again(Span span) const {
    const Vector<T> x = add_(span);
    stream_to(span, sum_, x);
    return from(span, x);
  }
  template <class Span>
  RMSNORM_INLINE Vector<T> from(Span span, const Vector<T>& x) const {
    Vector<T> y = normalised_(x);
    if constexpr (RoundFirst) y = round_own<T>(y);
    if constexpr (!std::is_void_v<Gain>) y = y * span.load_from(gain_);
    if constexpr (!std::is_void_v<Gain> && Norm::kBias) y = y + span.load_from(bias_);
    if constexpr (kRoundsOutput<T, Gain, Out>) y = round_own<T>(y);
    return y;
  }

  RMSNORM_INLINE static void rescue(const Forward& f, const ForwardRows& rows, int64_t r, typename Norm::Row& row) {
    rescue_forward<RoundFirst>(row, (const T*)rows_of(rows)[r], (const Gain*)rows.gain[r], (const Gain*)f.bias,
                               (Out*)rows.output[r], f.columns, f.eps, f.divisor ? f.divisor : f.columns);
  }

  // What rescue() reads, where it was not kept.
  __attribute__((noinline, cold)) static void keep_sum(const Forward& f, const ForwardRows& rows, int64_t r, int64_t) {
    const Loader<false, true> load(f, rows, r, 0);
    for_columns<T>(f.columns, [&](auto span) { load(span); });
  }

 private:
  const T* x_;
  T* sum_;
  Loader<false, false> add_;
  const Gain *gain_, *bias_;
  typename Norm::Normaliser normalised_;
};
