// The only file that knows vector registers: sixteen lanes, whatever their width, and the conversions between types.
//
// A pack is always 16 lanes (one zmm, two ymm, or four xmm registers), and every operation is the same IEEE operation
// in each lane. So all targets give the same bits as long as no multiply-add is contracted (-ffp-contract=off):
// fma() is asked for where its single rounding matters, and emulated exactly where the CPU has none.
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

template <int N, class Register>
struct Pack {
  Register v[N];

  friend RMSNORM_INLINE Pack operator+(Pack a, const Pack& b) {
    for (int i = 0; i < N; ++i) a.v[i] = a.v[i] + b.v[i];
    return a;
  }
  friend RMSNORM_INLINE Pack operator-(Pack a, const Pack& b) {
    for (int i = 0; i < N; ++i) a.v[i] = a.v[i] - b.v[i];
    return a;
  }
  friend RMSNORM_INLINE Pack operator*(Pack a, const Pack& b) {
    for (int i = 0; i < N; ++i) a.v[i] = a.v[i] * b.v[i];
    return a;
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

// The vector in which a type is computed, and its scalar.
template <class T>
struct Compute {
  using Vector = F;
  using Scalar = float;
};
template <>
struct Compute<double> {
  using Vector = D;
  using Scalar = double;
};
template <class T>
using Vector = typename Compute<T>::Vector;
template <class T>
using Scalar = typename Compute<T>::Scalar;

RMSNORM_INLINE F splat(float x) {
  F r;
  for (auto& v : r.v) v = x - FloatReg{}; // keeps the sign of -0, unlike 0 + x
  return r;
}
RMSNORM_INLINE D splat(double x) {
  D r;
  for (auto& v : r.v) v = x - DoubleReg{};
  return r;
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
  return (DoubleReg)_mm256_cvtps_pd((__m128)x); // gcc 12 splits __builtin_convertvector into two halves
#else
  return __builtin_convertvector(x, DoubleReg);
#endif
}

RMSNORM_INLINE HalfFloatReg narrow(DoubleReg x) {
#if defined(RMSNORM_AVX512)
  return (HalfFloatReg)_mm512_cvtpd_ps((__m512d)x);
#elif defined(__AVX2__)
  return (HalfFloatReg)_mm256_cvtpd_ps((__m256d)x);
#else
  return __builtin_convertvector(x, HalfFloatReg);
#endif
}

RMSNORM_INLINE HalfFloatReg lower(FloatReg x) {
#if defined(RMSNORM_AVX512)
  return (HalfFloatReg)_mm512_castps512_ps256((__m512)x);
#elif defined(__AVX2__)
  return (HalfFloatReg)_mm256_castps256_ps128((__m256)x);
#else
  return HalfFloatReg{x[0], x[1]};
#endif
}

RMSNORM_INLINE HalfFloatReg upper(FloatReg x) {
#if defined(RMSNORM_AVX512)
  return (HalfFloatReg)_mm512_extractf32x8_ps((__m512)x, 1);
#elif defined(__AVX2__)
  return (HalfFloatReg)_mm256_extractf128_ps((__m256)x, 1);
#else
  return HalfFloatReg{x[2], x[3]};
#endif
}

RMSNORM_INLINE FloatReg join(HalfFloatReg low, HalfFloatReg high) {
#if defined(RMSNORM_AVX512)
  return (FloatReg)_mm512_insertf32x8(_mm512_castps256_ps512((__m256)low), (__m256)high, 1);
#elif defined(__AVX2__)
  return (FloatReg)_mm256_set_m128((__m128)high, (__m128)low);
#else
  return FloatReg{low[0], low[1], high[0], high[1]};
#endif
}

RMSNORM_INLINE D widen(const F& x) {
  D r;
  for (int i = 0; i < kFloatRegs; ++i) {
    r.v[2 * i] = widen(lower(x.v[i]));
    r.v[2 * i + 1] = widen(upper(x.v[i]));
  }
  return r;
}

RMSNORM_INLINE F narrow(const D& x) {
  F r;
  for (int i = 0; i < kFloatRegs; ++i) r.v[i] = join(narrow(x.v[2 * i]), narrow(x.v[2 * i + 1]));
  return r;
}

// ---- fused multiply-add ----------------------------------------------------------------------------------------

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define RMSNORM_FMA RMSNORM_INLINE
#else
#define RMSNORM_FMA RMSNORM_EMULATED
#endif

RMSNORM_FMA D fma(const D& a, const D& b, D c) {
#if defined(RMSNORM_AVX512)
  for (int i = 0; i < kDoubleRegs; ++i) c.v[i] = (DoubleReg)_mm512_fmadd_pd((__m512d)a.v[i], (__m512d)b.v[i], (__m512d)c.v[i]);
#elif defined(__FMA__)
  for (int i = 0; i < kDoubleRegs; ++i) c.v[i] = (DoubleReg)_mm256_fmadd_pd((__m256d)a.v[i], (__m256d)b.v[i], (__m256d)c.v[i]);
#else
  for (int i = 0; i < kDoubleRegs; ++i)
    for (int j = 0; j < kBytes / 8; ++j) c.v[i][j] = __builtin_fma(a.v[i][j], b.v[i][j], c.v[i][j]);
#endif
  return c;
}

RMSNORM_FMA F fma(const F& a, const F& b, F c) {
#if defined(RMSNORM_AVX512)
  for (int i = 0; i < kFloatRegs; ++i) c.v[i] = (FloatReg)_mm512_fmadd_ps((__m512)a.v[i], (__m512)b.v[i], (__m512)c.v[i]);
#elif defined(__FMA__)
  for (int i = 0; i < kFloatRegs; ++i) c.v[i] = (FloatReg)_mm256_fmadd_ps((__m256)a.v[i], (__m256)b.v[i], (__m256)c.v[i]);
#elif defined(__ARM_FEATURE_FMA)
  for (int i = 0; i < kFloatRegs; ++i)
    for (int j = 0; j < kBytes / 4; ++j) c.v[i][j] = __builtin_fmaf(a.v[i][j], b.v[i][j], c.v[i][j]);
#else
  // The product is exact in fp64; rounding the fp64 sum to odd makes the second rounding, to fp32, the right one
  // (Boldo & Melquiond 2008). `error` is what the fp64 addition lost.
  const D product = widen(a) * widen(b), addend = widen(c), sum = product + addend;
  const D back = sum - product, error = (product - (sum - back)) + (addend - back);
  D odd;
  for (int i = 0; i < kDoubleRegs; ++i) {
    const WideBitsReg bits = (WideBitsReg)sum.v[i];
    const auto inexact = (error.v[i] < 0) | (error.v[i] > 0); // also false for a NaN or infinite sum
    const auto even = (bits & 1) == 0;
    const auto outwards = (error.v[i] > 0) == (sum.v[i] > 0);
    odd.v[i] = (DoubleReg)(bits + ((inexact & even) & (outwards ? WideBitsReg{} + 1 : WideBitsReg{} - 1)));
  }
  c = narrow(odd);
#endif
  return c;
}

// a·b + c where the product is exact (fp32 factors in fp64, half factors in fp32): with or without a fused
// instruction the result is the same.
template <class V>
RMSNORM_INLINE V add_exact_product(const V& a, const V& b, const V& c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return fma(a, b, c);
#else
  return a * b + c;
#endif
}

// ---- half types ------------------------------------------------------------------------------------------------

// Round to nearest even. A NaN keeps its upper payload and becomes quiet, as the AVX-512 instruction does it.
RMSNORM_INLINE BitsReg bf16_bits(FloatReg x) {
  const BitsReg bits = (BitsReg)x;
  const BitsReg rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return ((x != x) ? (bits | 0x400000) : rounded) >> 16;
}

// fp16 by integer arithmetic, for CPUs without F16C (after F. Giesen's float_to_half_fast3_rtne).
RMSNORM_EMULATED BitsReg f16_bits(FloatReg x) {
  const BitsReg bits = (BitsReg)x, sign = bits & 0x80000000u, magnitude = bits ^ sign;
  const FloatReg shift = (FloatReg)(BitsReg{} + (126u << 23)); // 0.5: adding it aligns subnormal mantissas
  const BitsReg subnormal = (BitsReg)((FloatReg)magnitude + shift) - (126u << 23);
  const BitsReg normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const BitsReg nan = 0x7e00 | ((magnitude >> 13) & 0x3ff);
  const BitsReg finite = (magnitude < (113u << 23)) ? subnormal : normal;
  const BitsReg large = (magnitude > (255u << 23)) ? nan : (BitsReg{} + 0x7c00);
  return ((magnitude < (143u << 23)) ? finite : large) | (sign >> 16);
}

RMSNORM_EMULATED FloatReg from_f16_bits(BitsReg half) {
  const BitsReg magnitude = (half & 0x7fff) << 13, exponent = magnitude & (0x7c00u << 13);
  const BitsReg normal = magnitude + (112u << 23);
  const FloatReg subnormal = (FloatReg)(normal + (1u << 23)) - (FloatReg)(BitsReg{} + (113u << 23));
  const BitsReg finite = (exponent == 0) ? (BitsReg)subnormal : normal;
  return (FloatReg)(((exponent == (0x7c00u << 13)) ? normal + (112u << 23) : finite) | ((half & 0x8000) << 16));
}

RMSNORM_INLINE BitsReg zero_extend(ShortReg x) {
#if defined(RMSNORM_AVX512)
  return (BitsReg)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
  return (BitsReg)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, BitsReg);
#endif
}

// The sixteen lanes, each below 2^16, as sixteen shorts.
RMSNORM_INLINE void store_shorts(uint16_t* to, const BitsReg (&bits)[kFloatRegs]) {
#if defined(RMSNORM_AVX512)
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)bits[0]));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)bits[0], (__m256i)bits[1]);
  _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(packed, 0xd8));
#else
  for (int i = 0; i < kFloatRegs; ++i)
    store_register(to + i * (kBytes / 4), __builtin_convertvector(bits[i], ShortReg));
#endif
}

// ---- load, store, round ----------------------------------------------------------------------------------------

RMSNORM_INLINE F load(const float* p) {
  F r;
  for (int i = 0; i < kFloatRegs; ++i) r.v[i] = load_register<FloatReg>(p + i * (kBytes / 4));
  return r;
}

RMSNORM_INLINE D load(const double* p) {
  D r;
  for (int i = 0; i < kDoubleRegs; ++i) r.v[i] = load_register<DoubleReg>(p + i * (kBytes / 8));
  return r;
}

RMSNORM_INLINE ShortReg load_shorts(const void* p, int i) {
  return load_register<ShortReg>((const uint16_t*)p + i * (kBytes / 4));
}

RMSNORM_INLINE F load(const bf16* p) {
  F r;
  for (int i = 0; i < kFloatRegs; ++i) r.v[i] = (FloatReg)(zero_extend(load_shorts(p, i)) << 16);
  return r;
}

RMSNORM_INLINE F load(const f16* p) {
  F r;
  for (int i = 0; i < kFloatRegs; ++i) {
    const ShortReg shorts = load_shorts(p, i);
#if defined(RMSNORM_AVX512)
    r.v[i] = (FloatReg)_mm512_cvtph_ps((__m256i)shorts);
#elif defined(__F16C__)
    r.v[i] = (FloatReg)_mm256_cvtph_ps((__m128i)shorts);
#else
    r.v[i] = from_f16_bits(zero_extend(shorts));
#endif
  }
  return r;
}

RMSNORM_INLINE void store(float* p, const F& x) {
  for (int i = 0; i < kFloatRegs; ++i) store_register(p + i * (kBytes / 4), x.v[i]);
}
RMSNORM_INLINE void store(double* p, const D& x) {
  for (int i = 0; i < kDoubleRegs; ++i) store_register(p + i * (kBytes / 8), x.v[i]);
}

RMSNORM_INLINE void store(bf16* p, const F& x) {
#if defined(RMSNORM_AVX512BF16)
  // vcvtneps2bf16 takes subnormals for zero; a lane that is subnormal (and not zero) needs the long way.
  const __m512 lanes = (__m512)x.v[0];
  if (__builtin_expect(_mm512_fpclass_ps_mask(lanes, 0x20) == 0, 1)) {
    const __m256bh rounded = _mm512_cvtneps_pbh(lanes);
    __builtin_memcpy(p, &rounded, sizeof rounded);
    return;
  }
#endif
  BitsReg bits[kFloatRegs];
  for (int i = 0; i < kFloatRegs; ++i) bits[i] = bf16_bits(x.v[i]);
  store_shorts(&p->bits, bits);
}

RMSNORM_INLINE void store(f16* p, const F& x) {
#if defined(RMSNORM_AVX512)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x.v[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  for (int i = 0; i < kFloatRegs; ++i)
    _mm_storeu_si128((__m128i*)p + i, _mm256_cvtps_ph((__m256)x.v[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  BitsReg bits[kFloatRegs];
  for (int i = 0; i < kFloatRegs; ++i) bits[i] = f16_bits(x.v[i]);
  store_shorts(&p->bits, bits);
#endif
}

// The value that storing as T and loading again would give.
template <class T>
RMSNORM_INLINE Vector<T> round_to(const Vector<T>& x) {
  T stored[kLanes];
  store(stored, x);
  return load(stored);
}
template <>
RMSNORM_INLINE F round_to<float>(const F& x) {
  return x;
}
template <>
RMSNORM_INLINE D round_to<double>(const D& x) {
  return x;
}
template <>
RMSNORM_INLINE F round_to<bf16>(const F& x) {
  F r;
  for (int i = 0; i < kFloatRegs; ++i) r.v[i] = (FloatReg)(bf16_bits(x.v[i]) << 16);
  return r;
}

// The lanes' sum, always as ((i, i+8), i+4, i+2, i+1).
RMSNORM_INLINE double reduce(D x) {
  for (int half = kDoubleRegs / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x.v[i] = x.v[i] + x.v[i + half];
  double lanes[kBytes / 8];
  store_register(lanes, x.v[0]);
  for (int half = kBytes / 16; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] + lanes[i + half];
  return lanes[0];
}

// ---- columns ---------------------------------------------------------------------------------------------------

// Sixteen columns of a row starting at j, or the last few of them: absent lanes load as zero and are not stored.
struct Full {
  int64_t j;
  template <class T>
  RMSNORM_INLINE auto load_from(const T* row) const {
    return load(row + j);
  }
  template <class T, class V>
  RMSNORM_INLINE void store_to(T* row, const V& x) const {
    store(row + j, x);
  }
};

struct Tail {
  int64_t j;
  int64_t count;
  template <class T>
  RMSNORM_INLINE auto load_from(const T* row) const {
    T lanes[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = row[j + i];
    return load(lanes);
  }
  template <class T, class V>
  RMSNORM_INLINE void store_to(T* row, const V& x) const {
    T lanes[kLanes];
    store(lanes, x);
    for (int64_t i = 0; i < count; ++i) row[j + i] = lanes[i];
  }
};

template <int U>
struct Index {
  static constexpr int value = U;
};

// Calls body(span, Index<u>) over columns [begin, end), u cycling through 0..Unroll-1: independent accumulators.
template <int Unroll, class Body>
RMSNORM_INLINE void for_columns(int64_t begin, int64_t end, Body&& body) {
  int64_t j = begin;
  for (; j + Unroll * kLanes <= end; j += Unroll * kLanes) {
    body(Full{j}, Index<0>{});
    if constexpr (Unroll > 1) body(Full{j + kLanes}, Index<1>{});
    if constexpr (Unroll > 2) {
      body(Full{j + 2 * kLanes}, Index<2>{});
      body(Full{j + 3 * kLanes}, Index<3>{});
    }
  }
  if constexpr (Unroll > 1) {
    if (j + kLanes <= end) body(Full{j}, Index<0>{}), j += kLanes;
  }
  if constexpr (Unroll > 2) {
    if (j + kLanes <= end) body(Full{j}, Index<1>{}), j += kLanes;
    if (j + kLanes <= end) body(Full{j}, Index<2>{}), j += kLanes;
  }
  if (j < end) body(Tail{j, end - j}, Index<Unroll - 1>{});
}
