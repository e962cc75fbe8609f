// The only file that knows a·b + c in one rounding: an instruction, or what gives its bits where there is none.
#pragma once

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
