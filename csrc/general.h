// The only file with the steps of the norm in general: whatever a call asks for beyond the plain one, in one kernel.
//
//   s = x + residual        r = 1 / sqrt(Σ s²/divisor + eps), of the first columns        y = s·r·gain + bias
//
// What is read and written has types of its own, asked for each vector: a branch that is always taken alike, and not
// some thirty kernels. A row is computed in the type T of what is normalised: fp32 where the sum isn't rounded, or is
// wider than x. The steps are the plain norm's, and so are the bits, but for the type of the output.
#pragma once

// to = from, a register at a time: what one of several branches returns whole goes through the stack in halves, and is
// waited for when it is read (64x4096 fp32, AVX2: 350 us, not 50).
template <class V>
RMSNORM_INLINE void put(V& to, const V& from) {
  V::each([&](int i) __attribute__((always_inline)) { to.v[i] = from.v[i]; });
}

// One vector of a row of any type that one of type T meets.
template <class T, class Span>
RMSNORM_INLINE Vector<T> load_as(Span span, Type type, const void* row) {
  Vector<T> x;
  if constexpr (std::is_same_v<T, double>) {
    if (type == Type::f32) put(x, widen(span.load_from((const float*)row)));
    else put(x, span.load_from((const double*)row));
  } else if constexpr (std::is_same_v<T, float>) {
    if (type == Type::bf16) put(x, span.load_from((const bf16*)row));
    else if (type == Type::f16) put(x, span.load_from((const f16*)row));
    else put(x, span.load_from((const float*)row));
  } else {
    if (type == Type::f32) put(x, span.load_from((const float*)row));
    else put(x, span.load_from((const T*)row));
  }
  return x;
}

template <class T, bool Stream, class Span>
RMSNORM_INLINE void store_as(Span span, Type type, void* row, const Vector<T>& x) {
  const auto to = [&](auto* typed, const auto& y) __attribute__((always_inline)) {
    if constexpr (Stream) stream_to(span, typed, y);
    else span.store_to(typed, y);
  };
  if constexpr (std::is_same_v<T, double>) {
    if (type == Type::f32) return to((float*)row, narrow(x));
  } else if constexpr (std::is_same_v<T, float>) {
    if (type == Type::bf16) return to((bf16*)row, x);
    if (type == Type::f16) return to((f16*)row, x);
  } else {
    if (type == Type::f32) return to((float*)row, x);
  }
  to((T*)row, x);
}

// One element, for rows that aren't safe.
inline double element_as(Type type, const void* row, int64_t i) {
  switch (type) {
    case Type::bf16: return element((const bf16*)row, i);
    case Type::f16: return element((const f16*)row, i);
    case Type::f64: return element((const double*)row, i);
    default: return element((const float*)row, i);
  }
}
inline void set_element_as(Type type, void* row, int64_t i, double x) {
  switch (type) {
    case Type::bf16: return set_element((bf16*)row, i, x);
    case Type::f16: return set_element((f16*)row, i, x);
    case Type::f64: return set_element((double*)row, i, x);
    default: return set_element((float*)row, i, x);
  }
}

// Rounds a vector as storing it in another type, or in its own, and loading it would.
template <class T>
RMSNORM_INLINE void round_as([[maybe_unused]] Type type, Vector<T>& x) {
  if constexpr (sizeof(T) == 2) put(x, round_own<T>(x));
  if constexpr (std::is_same_v<T, float>) {
    uint16_t shorts[kStep<float>];
    if (type == Type::bf16) store((bf16*)shorts, x), put(x, load((const bf16*)shorts));
    if (type == Type::f16) store((f16*)shorts, x), put(x, load((const f16*)shorts));
  }
}

template <class T>
class General {
 public:
  using Norm = Rms<T>;
  using Out = T;
  static constexpr bool kAsks = false, kAsksInSum = false, kAdds = true, kAddsAgain = false, kTwice = false,
                        kStores = true;

  // The load step. Sums are added twice, so that one which isn't rounded needs no room, and one that takes the place of
  // the residual may.
  template <bool, bool>
  class Loader {
   public:
    RMSNORM_INLINE Loader(const Forward& f, const ForwardRows& rows, int64_t r, int64_t)
        : f_(f), x_(rows.input[r]), residual_(rows.residual[r]) {}
    template <class Span>
    RMSNORM_INLINE Vector<T> operator()(Span span) const {
      Vector<T> x = load_as<T>(span, f_.x, x_);
      if (f_.add) put(x, round_to<T>(x + load_as<T>(span, f_.residual, residual_)));
      return x;
    }
    RMSNORM_INLINE double operator()(int64_t i) const {
      const double x = element_as(f_.x, x_, i);
      return f_.add ? round_element<T>(x + element_as(f_.residual, residual_, i)) : x;
    }

   private:
    const Forward& f_;
    const void *x_, *residual_;
  };
  RMSNORM_INLINE static const void* const* rows_of(const ForwardRows& rows) { return rows.input; }

  // The store step, of the sum too.
  RMSNORM_INLINE General(const Forward& f, const ForwardRows& rows, int64_t r, int64_t, const Rstd<Scalar<T>>& row)
      : f_(f), load_(f, rows, r, 0), sum_(rows.sum[r]), output_(rows.output[r]), gain_(rows.gain[r]) {
    high_ = splat<T>(row.high), low_ = splat<T>(row.low);
  }
  template <bool Stream, class Span>
  RMSNORM_INLINE void store(Span span) const {
    const Vector<T> x = load_(span);
    if (f_.add) store_as<T, Stream>(span, f_.sum, sum_, x);
    if (f_.output == Type::none) return;
    Vector<T> y = normalised(x);
    if (f_.round_first) round_as<T>(f_.sum, y);
    if (gain_) put(y, y * load_as<T>(span, f_.gain_type, gain_));
    if (f_.bias) put(y, y + load_as<T>(span, f_.bias_type, f_.bias));
    if constexpr (sizeof(T) == 2)
      if (f_.round_output) put(y, round_own<T>(y));
    store_as<T, Stream>(span, f_.output, output_, y);
  }

  __attribute__((noinline, cold)) static void rescue(const Forward& f, const ForwardRows& rows, int64_t r,
                                                     Rstd<Scalar<T>>& row) {
    const Loader<false, false> load(f, rows, r, 0);
    const ScaledRow scaled = scale_row(load, f.counted, f.eps, false, f.divisor);
    for (int64_t i = 0; i < f.columns; ++i) {
      const double x = load(i);
      if (f.add) set_element_as(f.sum, rows.sum[r], i, x);
      if (f.output == Type::none) continue;
      double y = __builtin_isinf(x) ? x * scaled.scale * scaled.high : scaled.normalise(x);
      if (f.round_first && size_of(f.sum) == 2) {
        if (f.sum == Type::bf16) y = round_element<bf16>(y);
        else y = round_element<f16>(y);
      }
      if (rows.gain[r]) y = y * element_as(f.gain_type, rows.gain[r], i);
      if (f.bias) y = y + element_as(f.bias_type, f.bias, i);
      // As in safe rows, which are float32 before they are stored: so a cast behind the norm may be done here.
      if (f.round_output || (std::is_same_v<T, float> && size_of(f.output) == 2)) y = round_element<T>(y);
      set_element_as(f.output, rows.output[r], i, y);
    }
    set_row(row, scaled);
  }

 private:
  RMSNORM_INLINE Vector<T> normalised(const Vector<T>& x) const {
    Vector<T> y = normalise<T>(x, high_, low_);
    if (sizeof(T) > 2 && f_.counted < f_.columns) {
      // A column that doesn't count may be too large for the low part: Inf - Inf.
      const Vector<T> product = x * high_;
      Vector<T>::each([&](int i) __attribute__((always_inline)) {
        y.v[i] = product.v[i] - product.v[i] == 0 ? y.v[i] : product.v[i];
      });
    }
    return y;
  }

  const Forward& f_;
  Loader<false, false> load_;
  void *sum_, *output_;
  const void* gain_;
  Vector<T> high_, low_;
};

template <class T>
ForwardKernel general_of() {
  return &forward<General<T>>;
}
