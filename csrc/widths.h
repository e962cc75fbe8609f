// The only file that knows how packs of fp32 become fp64, and come back.
#pragma once

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

// widen(load(p)), without taking a register of floats apart: on a Zen 4 a sum takes 3.6 cycles for 64 bytes, not 4.5.
RMSNORM_INLINE D load_wide(const float* p) {
#if defined(RMSNORM_NEON)
  return widen(load(p));  // its conversions reach both halves
#else
  return D::of([&](int i)
                   __attribute__((always_inline)) { return widen(load_register<HalfFloatReg>(p + i * (kBytes / 8))); });
#endif
}
