// The only file that knows vector registers: packs of them, whatever their width, and what all targets can do with
// them.
//
// A pack is 16 lanes (one zmm, two ymm, or four xmm or AArch64's q registers; rows of bf16 have their own, split.h),
// and every operation is the same IEEE operation in each lane. So all targets give the same bits as long as no
// multiply-add is contracted (-ffp-contract=off): fma() is one rounding, and emulated exactly where the CPU has none.
// Included inside an unnamed namespace by target.cpp: nothing here may be shared between targets.
#pragma once

#define RMSNORM_INLINE inline __attribute__((always_inline))
// Operations that take dozens of instructions where the CPU lacks one: inlining them makes the baseline five times as
// large and no faster.
#define RMSNORM_EMULATED inline __attribute__((noinline))

#if defined(__AVX512F__)
#define RMSNORM_AVX512
#endif
#if defined(__AVX512BF16__)
#define RMSNORM_AVX512BF16
#endif
#if defined(__aarch64__)
#define RMSNORM_NEON  // what every AArch64 has: its baseline is no emulation
#endif

#if defined(RMSNORM_AVX512)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = 16;

// One register of each element type, and half a register for the narrow side of a conversion.
typedef float FloatReg __attribute__((vector_size(kBytes)));
typedef double DoubleReg __attribute__((vector_size(kBytes)));
typedef uint32_t BitsReg __attribute__((vector_size(kBytes)));
typedef int32_t MaskReg __attribute__((vector_size(kBytes)));
typedef int64_t WideBitsReg __attribute__((vector_size(kBytes)));
typedef float HalfFloatReg __attribute__((vector_size(kBytes / 2)));
typedef uint16_t ShortReg __attribute__((vector_size(kBytes / 2)));

template <int N, class R>
struct Pack {
  using Register = R;
  R v[N];

  // The pack whose register i is make(i). Not a loop: gcc 12 would have thousands of them to unroll, which made a build
  // take 75 s and not 47, and the baseline's kernels half as fast.
  template <class Make>
  static RMSNORM_INLINE Pack of(const Make& make) {
    return [&]<int... I>(std::integer_sequence<int, I...>)
               __attribute__((always_inline)) { return Pack{{make(I)...}}; }(std::make_integer_sequence<int, N>{});
  }
  // act(i) for each register.
  template <class Act>
  static RMSNORM_INLINE void each(const Act& act) {
    [&]<int... I>(std::integer_sequence<int, I...>)
        __attribute__((always_inline)) { (act(I), ...); }(std::make_integer_sequence<int, N>{});
  }

  friend RMSNORM_INLINE Pack operator+(const Pack& a, const Pack& b) {
    return of([&](int i) __attribute__((always_inline)) { return a.v[i] + b.v[i]; });
  }
  friend RMSNORM_INLINE Pack operator-(const Pack& a, const Pack& b) {
    return of([&](int i) __attribute__((always_inline)) { return a.v[i] - b.v[i]; });
  }
  friend RMSNORM_INLINE Pack operator*(const Pack& a, const Pack& b) {
    return of([&](int i) __attribute__((always_inline)) { return a.v[i] * b.v[i]; });
  }
};

constexpr int kFloatRegs = kLanes * 4 / kBytes;
constexpr int kDoubleRegs = kLanes * 8 / kBytes;
using F = Pack<kFloatRegs, FloatReg>;
using D = Pack<kDoubleRegs, DoubleReg>;

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The vector in which rows of a type are computed, its scalar, and the columns that it holds.
template <class T>
struct Compute {
  using Vector = F;
  using Scalar = float;
  static constexpr int64_t kStep = kLanes;
};
template <>
struct Compute<double> {
  using Vector = D;
  using Scalar = double;
  static constexpr int64_t kStep = kLanes;
};
#if defined(__AVX2__)
template <>
struct Compute<bf16> {  // the even columns, and the odd ones
  using Vector = Pack<2, FloatReg>;
  using Scalar = float;
  static constexpr int64_t kStep = kBytes / 2;
};
#endif
template <class T>
using Vector = typename Compute<T>::Vector;
template <class T>
using Scalar = typename Compute<T>::Scalar;
template <class T>
constexpr int64_t kStep = Compute<T>::kStep;

template <class T>
RMSNORM_INLINE Vector<T> splat(Scalar<T> x) {
  using Register = typename Vector<T>::Register;
  return Vector<T>::of([&](int) __attribute__((always_inline)) { return x - Register{}; });  // keeps -0, unlike 0 + x
}

// One register at any address. A copy of a whole pack would go through the stack: gcc 12 keeps no array in registers
// once its address is taken.
template <class Register, class T>
RMSNORM_INLINE Register load_register(const T* p) {
  typedef Register Unaligned __attribute__((aligned(1), may_alias));
  return *(const Unaligned*)p;
}
template <class Register, class T>
RMSNORM_INLINE void store_register(T* p, Register x) {
  typedef Register Unaligned __attribute__((aligned(1), may_alias));
  *(Unaligned*)p = x;
}

// ---- fp32 <-> fp64 ---------------------------------------------------------------------------------------------

RMSNORM_INLINE DoubleReg widen(HalfFloatReg x) {
#if defined(RMSNORM_AVX512)
  return (DoubleReg)_mm512_cvtps_pd((__m256)x);
#elif defined(__AVX2__)
  return (DoubleReg)_mm256_cvtps_pd((__m128)x);  // gcc 12 splits __builtin_convertvector into two halves
#elif defined(RMSNORM_NEON)
  return (DoubleReg)vcvt_f64_f32((float32x2_t)x);  // gcc 12 converts lane by lane
#else
  return __builtin_convertvector(x, DoubleReg);
#endif
}

RMSNORM_INLINE HalfFloatReg narrow(DoubleReg x) {
#if defined(RMSNORM_AVX512)
  return (HalfFloatReg)_mm512_cvtpd_ps((__m512d)x);
#elif defined(__AVX2__)
  return (HalfFloatReg)_mm256_cvtpd_ps((__m256d)x);
#elif defined(RMSNORM_NEON)
  return (HalfFloatReg)vcvt_f32_f64((float64x2_t)x);
#else
  return __builtin_convertvector(x, HalfFloatReg);
#endif
}

RMSNORM_INLINE HalfFloatReg lower(FloatReg x) {
#if defined(RMSNORM_AVX512)
  return (HalfFloatReg)_mm512_castps512_ps256((__m512)x);
#elif defined(__AVX2__)
  return (HalfFloatReg)_mm256_castps256_ps128((__m256)x);
#elif defined(RMSNORM_NEON)
  return (HalfFloatReg)vget_low_f32((float32x4_t)x);
#else
  return HalfFloatReg{x[0], x[1]};
#endif
}

RMSNORM_INLINE HalfFloatReg upper(FloatReg x) {
#if defined(RMSNORM_AVX512)
  return (HalfFloatReg)_mm512_extractf32x8_ps((__m512)x, 1);
#elif defined(__AVX2__)
  return (HalfFloatReg)_mm256_extractf128_ps((__m256)x, 1);
#elif defined(RMSNORM_NEON)
  return (HalfFloatReg)vget_high_f32((float32x4_t)x);
#else
  return HalfFloatReg{x[2], x[3]};
#endif
}

RMSNORM_INLINE FloatReg join(HalfFloatReg low, HalfFloatReg high) {
#if defined(RMSNORM_AVX512)
  return (FloatReg)_mm512_insertf32x8(_mm512_castps256_ps512((__m256)low), (__m256)high, 1);
#elif defined(__AVX2__)
  return (FloatReg)_mm256_set_m128((__m128)high, (__m128)low);
#elif defined(RMSNORM_NEON)
  return (FloatReg)vcombine_f32((float32x2_t)low, (float32x2_t)high);
#else
  return FloatReg{low[0], low[1], high[0], high[1]};
#endif
}

// widen(upper(x)), and join(narrow(low), narrow(high)): AArch64 has them as one instruction, and as no move and one.
RMSNORM_INLINE DoubleReg widen_upper(FloatReg x) {
#if defined(RMSNORM_NEON)
  return (DoubleReg)vcvt_high_f64_f32((float32x4_t)x);
#else
  return widen(upper(x));
#endif
}
RMSNORM_INLINE FloatReg narrow(DoubleReg low, DoubleReg high) {
#if defined(RMSNORM_NEON)
  return (FloatReg)vcvt_high_f32_f64((float32x2_t)narrow(low), (float64x2_t)high);
#else
  return join(narrow(low), narrow(high));
#endif
}

RMSNORM_INLINE D widen(const F& x) {
  return D::of(
      [&](int i) __attribute__((always_inline)) { return i % 2 ? widen_upper(x.v[i / 2]) : widen(lower(x.v[i / 2])); });
}

// The first eight lanes plus the last eight, in fp64: half the conversions, which take longer than additions (256x128
// bf16 on a Zen 4: 6 %).
using Eight = Pack<kDoubleRegs / 2, DoubleReg>;
RMSNORM_INLINE Eight widen_halves(const F& x) {
  if constexpr (kFloatRegs == 1) return {{widen(lower(x.v[0]) + upper(x.v[0]))}};
  else
    return Eight::of([&](int i) __attribute__((always_inline)) {
      const FloatReg sum = x.v[i / 2] + x.v[i / 2 + kFloatRegs / 2];
      return i % 2 ? widen_upper(sum) : widen(lower(sum));
    });
}

RMSNORM_INLINE F narrow(const D& x) {
  return F::of([&](int i) __attribute__((always_inline)) { return narrow(x.v[2 * i], x.v[2 * i + 1]); });
}

// ---- fused multiply-add ----------------------------------------------------------------------------------------

#if defined(__FMA__) || defined(RMSNORM_NEON)
RMSNORM_INLINE DoubleReg fma(DoubleReg a, DoubleReg b, DoubleReg c) {
#if defined(RMSNORM_AVX512)
  return (DoubleReg)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (DoubleReg)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return (DoubleReg)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#endif
}
RMSNORM_INLINE FloatReg fma(FloatReg a, FloatReg b, FloatReg c) {
#if defined(RMSNORM_AVX512)
  return (FloatReg)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (FloatReg)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return (FloatReg)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#endif
}
template <int N, class Register>
RMSNORM_INLINE Pack<N, Register> fma(const Pack<N, Register>& a, const Pack<N, Register>& b,
                                     const Pack<N, Register>& c) {
  return Pack<N, Register>::of([&](int i) __attribute__((always_inline)) { return fma(a.v[i], b.v[i], c.v[i]); });
}
#else
RMSNORM_EMULATED D fma(const D& a, const D& b, D c) {
  for (int i = 0; i < kDoubleRegs; ++i)
    for (int j = 0; j < kBytes / 8; ++j) c.v[i][j] = __builtin_fma(a.v[i][j], b.v[i][j], c.v[i][j]);
  return c;
}
RMSNORM_EMULATED F fma(const F& a, const F& b, const F& c) {
  // The product is exact in fp64; rounding the fp64 sum to odd makes the second rounding, to fp32, the right one
  // (Boldo & Melquiond 2008). `error` is what the fp64 addition lost.
  const D product = widen(a) * widen(b), addend = widen(c), sum = product + addend;
  const D back = sum - product, error = (product - (sum - back)) + (addend - back);
  D odd;
  for (int i = 0; i < kDoubleRegs; ++i) {
    const WideBitsReg bits = (WideBitsReg)sum.v[i];
    const auto inexact = (error.v[i] < 0) | (error.v[i] > 0);  // also false for a NaN or infinite sum
    const auto even = (bits & 1) == 0;
    const auto outwards = (error.v[i] > 0) == (sum.v[i] > 0);
    odd.v[i] = (DoubleReg)(bits + ((inexact & even) & (outwards ? WideBitsReg{} + 1 : WideBitsReg{} - 1)));
  }
  return narrow(odd);
}
#endif

// a·b + c where the product is exact (fp32 factors in fp64, half factors in fp32): with or without a fused
// instruction the result is the same.
template <class V>
RMSNORM_INLINE V add_exact_product(const V& a, const V& b, const V& c) {
#if defined(__FMA__) || defined(RMSNORM_NEON)
  return fma(a, b, c);
#else
  return a * b + c;
#endif
}

// ---- load, store, root ------------------------------------------------------------------------------------------

RMSNORM_INLINE F load(const float* p) {
  return F::of([&](int i) __attribute__((always_inline)) { return load_register<FloatReg>(p + i * (kBytes / 4)); });
}

RMSNORM_INLINE D load(const double* p) {
  return D::of([&](int i) __attribute__((always_inline)) { return load_register<DoubleReg>(p + i * (kBytes / 8)); });
}

// widen(load(p)), without taking a register of floats apart: on a Zen 4 a sum takes 3.6 cycles for 64 bytes, not 4.5.
RMSNORM_INLINE D load_wide(const float* p) {
#if defined(RMSNORM_NEON)
  return widen(load(p));  // its conversions reach both halves
#else
  return D::of([&](int i)
                   __attribute__((always_inline)) { return widen(load_register<HalfFloatReg>(p + i * (kBytes / 8))); });
#endif
}

RMSNORM_INLINE void store(float* p, const F& x) {
  F::each([&](int i) __attribute__((always_inline)) { store_register(p + i * (kBytes / 4), x.v[i]); });
}
RMSNORM_INLINE void store(double* p, const D& x) {
  D::each([&](int i) __attribute__((always_inline)) { store_register(p + i * (kBytes / 8), x.v[i]); });
}

#if defined(RMSNORM_AVX512)
RMSNORM_INLINE F load_few(const float* p, int64_t count) {
  return {{(FloatReg)_mm512_maskz_loadu_ps((1u << count) - 1, p)}};
}
RMSNORM_INLINE void store_few(float* p, const F& x, int64_t count) {
  _mm512_mask_storeu_ps(p, (1u << count) - 1, (__m512)x.v[0]);
}
RMSNORM_INLINE D load_few(const double* p, int64_t count) {
  return D::of([&](int i) __attribute__((always_inline)) {
    return (DoubleReg)_mm512_maskz_loadu_pd((((1u << count) - 1) >> 8 * i) & 255, p + 8 * i);
  });
}
RMSNORM_INLINE void store_few(double* p, const D& x, int64_t count) {
  D::each([&](int i) __attribute__((always_inline)) {
    _mm512_mask_storeu_pd(p + 8 * i, (((1u << count) - 1) >> 8 * i) & 255, (__m512d)x.v[i]);
  });
}
#elif defined(__AVX2__)
RMSNORM_INLINE __m256i first_lanes(int64_t count, int i) {
  static constexpr int32_t ones_then_zeros[32] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256((const __m256i*)(ones_then_zeros + 16 - count + 8 * i));
}
RMSNORM_INLINE F load_few(const float* p, int64_t count) {
  return F::of([&](int i) __attribute__((always_inline)) {
    return (FloatReg)_mm256_maskload_ps(p + 8 * i, first_lanes(count, i));
  });
}
RMSNORM_INLINE void store_few(float* p, const F& x, int64_t count) {
  F::each([&](int i) __attribute__((always_inline)) {
    _mm256_maskstore_ps(p + 8 * i, first_lanes(count, i), (__m256)x.v[i]);
  });
}
#endif

RMSNORM_INLINE DoubleReg root(DoubleReg x) {
#if defined(RMSNORM_AVX512)
  return (DoubleReg)_mm512_sqrt_pd((__m512d)x);
#elif defined(__AVX2__)
  return (DoubleReg)_mm256_sqrt_pd((__m256d)x);
#elif defined(RMSNORM_NEON)
  return (DoubleReg)vsqrtq_f64((float64x2_t)x);
#else
  for (int i = 0; i < kBytes / 8; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
#endif
}
