// The only file with what backward needs to know of a statistic: x̂ from what forward kept, and the means of h and h·x̂.
#pragma once

template <class T>
struct RmsBackward {
  static constexpr bool kBias = false, kMeans = true;
  using Element = T;
  using Sums = Sum<T>;
  Vector<T> scale, minus_mean_product = {};

  RMSNORM_INLINE void set_row(const BackwardRows& rows, int64_t r) { scale = splat<T>(kept_rstd<T>(rows, r)); }
  RMSNORM_INLINE Vector<T> normalised(const Vector<T>& x) const { return x * scale; }
  RMSNORM_INLINE void set_means(Double2 sum, double n) { minus_mean_product = splat<T>((Scalar<T>)(-sum.high / n)); }
  RMSNORM_INLINE Vector<T> dx(const Vector<T>& h, const Vector<T>& normalised) const {
    return fma(normalised, minus_mean_product, h) * scale;
  }
};

// A row whose 1/rms is the floor's. Not an RmsBackward that asks: of 128 columns it would take 5 % more, floor or none.
template <class T>
struct FlooredBackward {
  static constexpr bool kBias = false, kMeans = false;
  using Element = T;
  Vector<T> scale;

  RMSNORM_INLINE void set_row(const BackwardRows& rows, int64_t r) { scale = splat<T>(-kept_rstd<T>(rows, r)); }
  RMSNORM_INLINE Vector<T> normalised(const Vector<T>& x) const { return x * scale; }
  RMSNORM_INLINE Vector<T> dx(const Vector<T>& h, const Vector<T>&) const { return h * scale; }
};

template <class T>
struct LayerBackward {
  static constexpr bool kBias = true, kMeans = true;
  using Element = T;
  using Sums = Moments<T>;
  Vector<T> scale, mean_high, mean_low, mean_h = {}, minus_mean_product = {};

  RMSNORM_INLINE void set_row(const BackwardRows& rows, int64_t r) {
    const auto high = (Scalar<T>)rows.mean[r];
    scale = splat<T>(((const Scalar<T>*)rows.rstd)[r]);
    mean_high = splat<T>(high);
    mean_low = splat<T>((Scalar<T>)(rows.mean[r] - (double)high));
  }
  RMSNORM_INLINE Vector<T> normalised(const Vector<T>& x) const { return ((x - mean_high) - mean_low) * scale; }
  RMSNORM_INLINE void set_means(const TwoSums& sums, double n) {
    mean_h = splat<T>((Scalar<T>)(sums.first.high / n));
    minus_mean_product = splat<T>((Scalar<T>)(-sums.second.high / n));
  }
  RMSNORM_INLINE Vector<T> dx(const Vector<T>& h, const Vector<T>& normalised) const {
    return fma(normalised, minus_mean_product, h - mean_h) * scale;
  }
};

// Of the output in the input's place: h·x̂ is grad·y then, without a gain. 1/rms may have a gradient of its own, in
// second derivatives: it is -r²·x̂/n times that, which the mean of h·x̂ takes in.
template <class T>
struct LeanBackward : RmsBackward<T> {
  double more;

  RMSNORM_INLINE void set_row(const BackwardRows& rows, int64_t r) {
    RmsBackward<T>::set_row(rows, r);
    more = rows.mean ? rows.mean[r] * (double)kept_rstd<T>(rows, r) : 0.0;
  }
  RMSNORM_INLINE void set_means(Double2 sum, double n) { RmsBackward<T>::set_means({sum.high + more, sum.low}, n); }
};
template <class Norm>
constexpr bool kLean = false;
template <class T>
constexpr bool kLean<LeanBackward<T>> = true;
