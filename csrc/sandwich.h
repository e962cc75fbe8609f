// The only file with the sandwich's steps: a norm whose output is added to the residual, alone or with the norm of that
// sum behind it.
//
//   s = round(residual + round(x·r·gain))        y = round(s·r'·gain')
//
// Nothing between the two norms leaves L1 but the sum. Both gains are of one type, so that two weights, each in one of
// two types or none, are not nine kernels: formed before, or, for few rows, weights of the input's type as they are.
#pragma once

template <class T, class Gain>
class Gains {
 public:
  RMSNORM_INLINE Gains(const Forward& f, const void* gain)
      : gain_((const Gain*)gain), offset_((Scalar<T>)(f.offset == 0 ? -0.0 : f.offset)) {}  // -0 + w is w, be it -0
  template <class Span>
  RMSNORM_INLINE Vector<T> operator()(Span span) const {
    if constexpr (kRaw) return span.load_raw(gain_);
    else return span.load_from(gain_) + splat<T>(offset_);
  }
  double at(int64_t i) const {
    if constexpr (kRaw) return (double)gain_[raw_index<T>(i)];
    else return (double)((Scalar<T>)element(gain_, i) + offset_);
  }

 private:
  static constexpr bool kRaw = std::is_same_v<Gain, Scalar<T>>;
  const Gain* gain_;
  Scalar<T> offset_;
};

template <class T>
RMSNORM_INLINE Vector<T> round_if(bool round, const Vector<T>& x) {
  if constexpr (sizeof(T) == 2)
    if (round) return round_own<T>(x);
  return x;
}

// What is stored, rounded as round_own() does it where that can be told: a sum of two numbers of bf16 is 0 once in 1300
// of normal ones, so in every 40th vector, for which the store's own rounding would look twice (16x4096 in L2, Zen 5:
// 0.96 of the time, 512x4096 0.92).
template <class T, class Span>
RMSNORM_INLINE auto rounded([[maybe_unused]] Span span, const Vector<T>& x) {
#if defined(__AVX2__)
  if constexpr (kSplit<T> && std::is_same_v<Span, Full<T>>) return Rounded{round_split(x)};
  else
#endif
    return x;
}

// x̂ of an element of a row that is not safe.
template <class T>
double rescued(const ScaledRow& row, bool round_first, double x) {
  const double y = row.normalise(x);
  return sizeof(T) == 2 && round_first ? round_element<T>(y) : y;
}

// norm + add: a store step, and the load step of the norm behind it. Or norm · factor, as compiled graphs ask for it.
template <class T, class Gain>
class NormAdd {
 public:
  using Norm = Rms<T>;
  using Out = T;
  static constexpr bool kAsks = kStreams, kAsksInSum = false, kAdds = true, kAddsAgain = false, kTwice = false,
                        kStores = false;
  template <bool Ask, bool Keep>
  using Loader = typename Plain<Norm, void, T, false, false>::template Loader<Ask, Keep>;
  RMSNORM_INLINE static const void* const* rows_of(const ForwardRows& rows) { return rows.input; }

  RMSNORM_INLINE NormAdd(const Forward& f, const ForwardRows& rows, int64_t r, const void* gain,
                         const Rstd<Scalar<T>>& row)
      : x_((const T*)rows.input[r]),
        residual_((const T*)rows.residual[r]),
        gain_(f, gain),
        round_first_(f.round_first),
        times_(f.times),
        normalised_(row) {}
  RMSNORM_INLINE NormAdd(const Forward& f, const ForwardRows& rows, int64_t r, int64_t, const Rstd<Scalar<T>>& row)
      : NormAdd(f, rows, r, rows.gain[r], row) {}
  template <class Span>
  RMSNORM_INLINE Vector<T> operator()(Span span) const {
    const Vector<T> y = round_if<T>(round_first_, normalised_(span.load_from(x_))) * gain_(span);
    const Vector<T> other = span.load_from(residual_);
    return times_ ? round_own<T>(y) * other : round_own<T>(y) + other;
  }

  __attribute__((noinline, cold)) static void rescue_to(T* to, const Forward& f, const ForwardRows& rows, int64_t r,
                                                        const void* gain, double eps, Rstd<Scalar<T>>& row) {
    const T *x = (const T*)rows.input[r], *residual = (const T*)rows.residual[r];
    const Gains<T, Gain> gains(f, gain);
    const ScaledRow scaled = scale_row([&](int64_t i) { return element(x, i); }, f.columns, eps, false);
    for (int64_t i = 0; i < f.columns; ++i) {
      const double y = rescued<T>(scaled, f.round_first, element(x, i)) * gains.at(i);
      const double other = element(residual, i);
      set_element(to, i, f.times ? round_element<T>(y) * other : round_element<T>(y) + other);
    }
    set_row(row, scaled);
  }
  RMSNORM_INLINE static void rescue(const Forward& f, const ForwardRows& rows, int64_t r, Rstd<Scalar<T>>& row) {
    rescue_to((T*)rows.output[r], f, rows, r, rows.gain[r], f.eps, row);
  }

 private:
  const T *x_, *residual_;
  Gains<T, Gain> gain_;
  bool round_first_, times_;
  typename Norm::Normaliser normalised_;
};

// The norm of that sum. A sum that goes past the caches is kept in scratch until it is normalised.
template <class T, class Gain>
class Sandwich {
  using First = NormAdd<T, Gain>;

 public:
  using Norm = Rms<T>;
  using Out = T;
  static constexpr bool kAsks = kStreams, kAsksInSum = false, kAdds = true, kAddsAgain = kStreams, kTwice = true,
                        kStores = false;
  template <bool, bool>
  struct Loader;  // sum_twice() has its own
  RMSNORM_INLINE static const void* const* rows_of(const ForwardRows& rows) { return rows.sum; }

  // Both sums of the rows of a block. Here, and while it is stored, each pass asks for one thing, so that memory never
  // rests (4096x4096 of a Zen 5: 0.6 of the time of asking for the input alone in bf16, 0.75 in fp32; half of each in
  // two passes, 0.75 and 0.8): this block's residual again, for L1, the next one's, and, while stored, its input.
  template <bool Ask>
  RMSNORM_INLINE static void sum_twice(const Forward& f, const ForwardRows& rows, typename Norm::Block& found,
                                       int64_t begin, int64_t end, bool again, int64_t block) {
    typename Norm::Block first;
    for (int64_t r = begin; r < end; ++r) {
      const typename First::template Loader<Ask, true> x(f, rows, r, 0);
      const auto load = [&](auto span) __attribute__((always_inline)) {
        if constexpr (Ask) prefetch_part<T, 3>((const char*)rows.residual[r], span);
        return x(span);
      };
      sum_row<First, false>(load, rows, r, first, r - begin, block, f.columns, 0);
    }
    first.find_rows(rows.input + begin, end - begin, f.columns, f.first_eps);
    for (int64_t r = begin; r < end; ++r) {
      T* to = again ? scratch_of(f, rows, r - begin) : (T*)rows.sum[r];
      typename Norm::Row row = first[r - begin];
      if (__builtin_expect(first.safe(r - begin), 1)) {
        const First add(f, rows, r, rows.first_gain[r], row);
        const char* next = (const char*)rows.residual[r] + rows.next_residual * block;
        const auto load = [&](auto span) __attribute__((always_inline)) {
          if constexpr (Ask) prefetch_part<T, 2>(next, span);
          return span.store_back(to, rounded<T>(span, add(span)));
        };
        sum_row<First, false>(load, rows, r, found, r - begin, block, f.columns, 0);
      } else {
        First::rescue_to(to, f, rows, r, rows.first_gain[r], f.first_eps, row);
        found.set(r - begin, squares_of(to, f.columns));
      }
      if (rows.first_rstd) ((Scalar<T>*)rows.first_rstd)[r] = row.kept;
    }
  }

  RMSNORM_INLINE Sandwich(const Forward& f, const ForwardRows& rows, int64_t r, int64_t in_block,
                          const Rstd<Scalar<T>>& row)
      : scratch_(scratch_of(f, rows, in_block)),
        sum_((T*)rows.sum[r]),
        gain_(f, rows.gain[r]),
        round_first_(f.round_first),
        normalised_(row) {}
  template <class Span>
  RMSNORM_INLINE auto operator()(Span span) const {
    return from(span, span.load_from(sum_));
  }
  template <class Span>
  RMSNORM_INLINE auto add_again(Span span) const {
    const Vector<T> x = span.load_from(scratch_);
    stream_to(span, sum_, x);
    return from(span, x);
  }

  __attribute__((noinline, cold)) static void rescue(const Forward& f, const ForwardRows& rows, int64_t r,
                                                     Rstd<Scalar<T>>& row) {
    const T* x = (const T*)rows.sum[r];
    const Gains<T, Gain> gains(f, rows.gain[r]);
    const ScaledRow scaled = scale_row([&](int64_t i) { return element(x, i); }, f.columns, f.eps, false);
    for (int64_t i = 0; i < f.columns; ++i)
      set_element((T*)rows.output[r], i, rescued<T>(scaled, f.round_first, element(x, i)) * gains.at(i));
    set_row(row, scaled);
  }

  __attribute__((noinline, cold)) static typename Norm::Sums squares_of(const T* row, int64_t columns) {
    typename Norm::Sums sum;
    sum_columns<T>(sum, columns,
                   [&](auto span, int u) __attribute__((always_inline)) { sum.add_square(u, span.load_from(row)); });
    return sum;
  }

  __attribute__((noinline, cold)) static void keep_sum(const Forward& f, const ForwardRows& rows, int64_t r,
                                                       int64_t in_block) {
    __builtin_memcpy(rows.sum[r], scratch_of(f, rows, in_block), f.columns * sizeof(T));
  }

 private:
  RMSNORM_INLINE static T* scratch_of(const Forward& f, const ForwardRows& rows, int64_t in_block) {
    return (T*)rows.scratch + in_block * padded(f.columns);
  }
  template <class Span>
  RMSNORM_INLINE auto from(Span span, const Vector<T>& x) const {
    return rounded<T>(span, round_if<T>(round_first_, normalised_(x)) * gain_(span));
  }

  const T* scratch_;
  T* sum_;
  Gains<T, Gain> gain_;
  bool round_first_;
  typename Norm::Normaliser normalised_;
};

// Of few rows, which stay in the caches: nothing is asked for, nothing goes past them.
template <class Form>
void forward_few(const Forward& f, const ForwardRows& rows) {
  forward_batch<Form, false>(f, rows, false, false);
}

template <class T>
void sandwich_forward(const Forward& f, const ForwardRows& rows);
template <class T, class Gain>
ForwardKernel sandwich_with(const Forward& f) {
  if (!f.twice) return &forward<NormAdd<T, Gain>>;
  if constexpr (sizeof(T) == 2 && std::is_same_v<Gain, T>) return &forward_few<Sandwich<T, Gain>>;
#if defined(RMSNORM_AVX512BF16)
  if constexpr (std::is_same_v<T, bf16> && !std::is_same_v<Gain, T>) return &sandwich_forward<T>;
#endif
  return &forward<Sandwich<T, Gain>>;
}
template <class T>
ForwardKernel sandwich_of(const Forward& f) {
  return f.gain_type == f.input ? sandwich_with<T, T>(f) : sandwich_with<T, Scalar<T>>(f);
}
