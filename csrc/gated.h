// The only file with the gated norm's steps, between which the kernels are those of every norm:
//
//   gate behind the norm      y = x·r·gain · a                       a = silu(gate) or sigmoid(gate)
//   gate first                z = x·a,  y = z·r·gain                 with 1/r = rms of what is normalised
//
// The steps work in fp32 for half types and in fp64 for fp32, so that an activation and two more products cost fp32
// nothing of its 0.51 ulp. Options that cost a branch a vector (activation, roundings) are no further kernels.
#pragma once

template <class T>
using Work = std::conditional_t<sizeof(T) == 4, D, Vector<T>>;

template <class T>
RMSNORM_INLINE Work<T> to_work(const Vector<T>& x) {
  if constexpr (sizeof(T) == 4) return widen(x);
  else return x;
}
template <class T>
RMSNORM_INLINE Vector<T> from_work(const Work<T>& x) {
  if constexpr (sizeof(T) == 4) return narrow(x);
  else return x;
}

// A row of z in scratch: in the kernel's own order for half types.
template <class T>
using WorkScalar = std::conditional_t<sizeof(T) == 2, float, double>;
template <class T, class Span>
RMSNORM_INLINE void keep(WorkScalar<T>* row, const Work<T>& z, Span span) {
  if constexpr (sizeof(T) == 4) span.store_to(row, z);
  else span.store_raw(row, z);
}
template <class T, class Span>
RMSNORM_INLINE Work<T> kept(const WorkScalar<T>* row, Span span) {
  if constexpr (sizeof(T) == 4) return span.load_from(row);
  else return span.load_raw(row);
}

// The statistic of z, whose squares are exact in no type: rounded, then added as the types of statistic.h are.
template <class T>
struct GatedRms : Rms<T> {
  struct Square {
    template <class Span>
    RMSNORM_INLINE void add(Sum<T>& sums, int u, const Work<T>& z, Span) const {
      if constexpr (sizeof(T) == 8) sums.add_square(u, z);
      else
        for_accumulator<Sum<T>::kUnroll>(
            u, [&](int i) __attribute__((always_inline)) { sums.part[i] = sums.part[i] + z * z; });
    }
  };
  RMSNORM_INLINE static Square adder(const T*, int64_t) { return {}; }
};

template <class T, class Out_, bool First>
class Gated {
 public:
  using Norm = std::conditional_t<First, GatedRms<T>, Rms<T>>;
  using Out = Out_;
  static constexpr bool kAsks = false, kAsksInSum = false, kAdds = false, kAddsAgain = false, kTwice = false,
                        kStores = false;

  // The load step.
  template <bool, bool>
  class Loader {
   public:
    RMSNORM_INLINE Loader(const Forward& f, const ForwardRows& rows, int64_t r, int64_t in_block)
        : x_((const T*)rows.input[r]),
          gate_((const T*)rows.gate[r]),
          scratch_(row_of(f, rows, in_block)),
          activate_(f.gate == Gate::silu) {}
    template <class Span>
    RMSNORM_INLINE auto operator()(Span span) const {
      if constexpr (First) {
        const Work<T> z = to_work<T>(span.load_from(x_)) * activate_(to_work<T>(span.load_from(gate_)));
        keep<T>(scratch_, z, span);
        return z;
      } else {
        return span.load_from(x_);
      }
    }

   private:
    const T *x_, *gate_;
    WorkScalar<T>* scratch_;
    Activation<kDegree<T>, Work<T>> activate_;
  };

  RMSNORM_INLINE static const void* const* rows_of(const ForwardRows& rows) { return rows.input; }

  // The store step.
  RMSNORM_INLINE Gated(const Forward& f, const ForwardRows& rows, int64_t r, int64_t in_block,
                       const Rstd<Scalar<T>>& row)
      : f_(f),
        x_((const T*)rows.input[r]),
        gate_((const T*)rows.gate[r]),
        gain_((const Scalar<T>*)rows.gain[r]),
        scratch_(row_of(f, rows, in_block)),
        activate_(f.gate == Gate::silu) {
    if constexpr (sizeof(T) == 4) high_ = splat<double>((double)row.high + (double)row.low);
    else high_ = splat<T>(row.high), low_ = splat<T>(row.low);
  }
  template <class Span>
  RMSNORM_INLINE Vector<T> operator()(Span span) const {
    Work<T> y;
    if constexpr (First) y = kept<T>(scratch_, span);
    else y = to_work<T>(span.load_from(x_));
    if constexpr (sizeof(T) == 8) y = normalise<T>(y, high_, low_);
    else y = y * high_;
    y = rounded(f_.round_first, y) * to_work<T>(span.load_raw(gain_));
    if constexpr (!First) y = rounded(f_.round_product, y) * activate_(to_work<T>(span.load_from(gate_)));
    return from_work<T>(y);
  }

  __attribute__((noinline, cold)) static void rescue(const Forward& f, const ForwardRows& rows, int64_t r,
                                                     Rstd<Scalar<T>>& row) {
    const T *x = (const T*)rows.input[r], *gate = (const T*)rows.gate[r];
    const auto* gain = (const Scalar<T>*)rows.gain[r];
    const auto a = [&](int64_t i) { return activate_element(element(gate, i), f.gate).value; };
    const auto z = [&](int64_t i) { return First ? element(x, i) * a(i) : element(x, i); };
    const ScaledRow scaled = scale_row(z, f.columns, f.eps, false);
    for (int64_t i = 0; i < f.columns; ++i) {
      double y = rounded(f.round_first, scaled.normalise(z(i))) * (double)gain[raw_index<T>(i)];
      if (!First) y = rounded(f.round_product, y) * a(i);
      set_element((Out*)rows.output[r], i, y);
    }
    set_row(row, scaled);
  }

 private:
  RMSNORM_INLINE static WorkScalar<T>* row_of(const Forward& f, const ForwardRows& rows, int64_t in_block) {
    return First ? (WorkScalar<T>*)rows.scratch + in_block * padded(f.columns) : nullptr;
  }
  RMSNORM_INLINE static Work<T> rounded(bool round, const Work<T>& y) {
    if constexpr (sizeof(T) == 2)
      if (round) return round_to<T>(y);
    return y;
  }
  static double rounded(bool round, double y) { return round ? round_element<T>(y) : y; }

  const Forward& f_;
  const T *x_, *gate_;
  const Scalar<T>* gain_;
  const WorkScalar<T>* scratch_;
  Activation<kDegree<T>, Work<T>> activate_;
  Work<T> high_, low_;
};
