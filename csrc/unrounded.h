// The only file with add + norm of half types whose sum is normalised before it is rounded, as flashinfer's, sglang's
// and vLLM's kernels do:
//
//   t = x + residual        r = 1 / sqrt(Σ t²/n + eps)        y = t·r·weight
//
// and t, rounded, is the sum that is kept. The bits are those of general.h, whose row of fp32 this is: squares in fp64,
// r in two parts. Here it stays in the vectors in which half rows lie, so that what is read and written is converted as
// cheaply as the rounded sum's (512x4096 bf16 on a Zen 5: 1.3 of its time, general.h's 2.3).
#pragma once

#if defined(__AVX2__)
// Sum<float>, of vectors of even and odd columns: the same lanes, put in their order at the end.
struct SplitSum : Sum<float> {
  static constexpr int kUnroll = 32 / kStep<bf16>;
  using Half = Pack<2, DoubleReg>;  // the even columns of a vector, or the odd ones
  Half evens[kUnroll] = {}, odds[kUnroll] = {};

  RMSNORM_INLINE void add_square(int u, const Split& x) {
    const auto add = [&](Half& sums, FloatReg y) __attribute__((always_inline)) {
      const Half wide = {{widen(lower(y)), widen_upper(y)}};
      sums = add_exact_product(wide, wide, sums);
    };
    add(evens[u], x.v[0]), add(odds[u], x.v[1]);
  }
  RMSNORM_INLINE void end_block() {
#if defined(RMSNORM_AVX512)
    const auto low = [](DoubleReg a, DoubleReg b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); };
    const auto high = [](DoubleReg a, DoubleReg b) {
      return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
    };
    const Half &a = evens[0], &b = odds[0];
    for (int u = 0; u < 2; ++u) part[u] = {{ low(a.v[u], b.v[u]), high(a.v[u], b.v[u]) }};
#else
    const auto low = [](DoubleReg a, DoubleReg b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); };
    const auto high = [](DoubleReg a, DoubleReg b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); };
    for (int u = 0; u < 2; ++u) {
      const Half &a = evens[u], &b = odds[u];
      part[u] = {{low(a.v[0], b.v[0]), high(a.v[0], b.v[0]), low(a.v[1], b.v[1]), high(a.v[1], b.v[1])}};
    }
#endif
    Sum<float>::end_block();
  }
};
#endif

// The statistic of fp32, in the vectors of a half type.
template <class T>
struct Wide : Rms<float> {
  using Element = T;
#if defined(__AVX2__)
  using Sums = std::conditional_t<kSplit<T>, SplitSum, Sum<float>>;
#endif
  struct Square {
    template <class V, class Span>
    RMSNORM_INLINE void add(Sums& sums, int u, const V& x, Span) const {
      sums.add_square(u, x);
    }
  };
  RMSNORM_INLINE static Square adder(const T*, int64_t) { return {}; }
};

template <class T>
class Unrounded {
 public:
  using Norm = Wide<T>;
  using Out = T;
  static constexpr bool kAsks = kStreams, kAsksInSum = false, kAdds = true, kAddsAgain = false, kTwice = false,
                        kStores = true;

  // Sums are added twice, as in general.h.
  template <bool, bool>
  class Loader {
   public:
    RMSNORM_INLINE Loader(const Forward&, const ForwardRows& rows, int64_t r, int64_t)
        : x_((const T*)rows.input[r]), residual_((const T*)rows.residual[r]) {}
    template <class Span>
    RMSNORM_INLINE Vector<T> operator()(Span span) const {
      return span.load_from(x_) + span.load_from(residual_);
    }

   private:
    const T *x_, *residual_;
  };
  RMSNORM_INLINE static const void* const* rows_of(const ForwardRows& rows) { return rows.input; }

  // The store step, of the sum too.
  RMSNORM_INLINE Unrounded(const Forward& f, const ForwardRows& rows, int64_t r, int64_t, const Rstd<float>& row)
      : load_(f, rows, r, 0),
        sum_((T*)rows.sum[r]),
        output_((T*)rows.output[r]),
        gain_((const T*)rows.gain[r]),
        round_first_(f.round_first),
        high_(splat<T>(row.high)),
        low_(splat<T>(row.low)) {}
  template <bool Stream, class Span>
  RMSNORM_INLINE void store(Span span) const {
    const auto to = [&](T* row, const Vector<T>& x) __attribute__((always_inline)) {
      if constexpr (Stream) stream_to(span, row, x);
      else span.store_to(row, x);
    };
    const Vector<T> x = load_(span);
    to(sum_, x);
    to(output_, round_if<T>(round_first_, fma(x, high_, x * low_)) * span.load_from(gain_));
  }

  RMSNORM_INLINE static void rescue(const Forward& f, const ForwardRows& rows, int64_t r, Rstd<float>& row) {
    General<float>::rescue(f, rows, r, row);
  }

 private:
  Loader<false, false> load_;
  T *sum_, *output_;
  const T* gain_;
  bool round_first_;
  Vector<T> high_, low_;
};

template <class T>
ForwardKernel unrounded_of() {
  if constexpr (kStreams) return &forward<Unrounded<T>>;
  else return &forward<General<float>>;  // the baseline's: 20 KB less
}
