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

// ---- load, store, root ------------------------------------------------------------------------------------------

RMSNORM_INLINE F load(const float* p) {
  return F::of([&](int i) __attribute__((always_inline)) { return load_register<FloatReg>(p + i * (kBytes / 4)); });
}

RMSNORM_INLINE D load(const double* p) {
  return D::of([&](int i) __attribute__((always_inline)) { return load_register<DoubleReg>(p + i * (kBytes / 8)); });
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
