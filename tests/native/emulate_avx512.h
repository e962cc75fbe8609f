// The AVX-512 intrinsics that csrc/simd.h uses, in plain C++ from Intel's descriptions: with -DRMSNORM_EMULATE_AVX512
// the AVX-512 sources run on a CPU that has only AVX2. An intrinsic that isn't here fails to compile.
#pragma once

#include <cmath>
#include <cstring>

#define RMSNORM_AVX512
#define RMSNORM_AVX512BF16

namespace emulated {

typedef float f32x16 __attribute__((vector_size(64)));
typedef double f64x8 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint16_t u16x32 __attribute__((vector_size(64)));

inline __m512d cvtps_pd(__m256 x) {
  f64x8 r;
  for (int i = 0; i < 8; ++i) r[i] = ((f32x8)x)[i];
  return (__m512d)r;
}
inline __m256 cvtpd_ps(__m512d x) {
  f32x8 r;
  for (int i = 0; i < 8; ++i) r[i] = (float)((f64x8)x)[i];
  return (__m256)r;
}
inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  f32x16 r;
  for (int i = 0; i < 16; ++i) r[i] = std::fma(((f32x16)a)[i], ((f32x16)b)[i], ((f32x16)c)[i]);
  return (__m512)r;
}
inline __m512d fmadd_pd(__m512d a, __m512d b, __m512d c) {
  f64x8 r;
  for (int i = 0; i < 8; ++i) r[i] = std::fma(((f64x8)a)[i], ((f64x8)b)[i], ((f64x8)c)[i]);
  return (__m512d)r;
}
inline __m256 part(__m512 x, int which) {
  __m256 r;
  std::memcpy(&r, (const char*)&x + 32 * which, 32);
  return r;
}
inline __m512 insert(__m512 x, __m256 y, int which) {
  std::memcpy((char*)&x + 32 * which, &y, 32);
  return x;
}
inline __m512i cvtepu16_epi32(__m256i x) {
  u32x16 r;
  for (int i = 0; i < 16; ++i) r[i] = ((u16x16)x)[i];
  return (__m512i)r;
}
inline __m256i cvtepi32_epi16(__m512i x) {
  u16x16 r;
  for (int i = 0; i < 16; ++i) r[i] = (uint16_t)((u32x16)x)[i];
  return (__m256i)r;
}
inline __m512 cvtph_ps(__m256i x) {
  const __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128(x)), high = _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1));
  return insert(insert(__m512{}, low, 0), high, 1);
}
inline __m256i cvtps_ph(__m512 x) {
  return _mm256_set_m128i(_mm256_cvtps_ph(part(x, 1), 0), _mm256_cvtps_ph(part(x, 0), 0));
}
inline __m512d sqrt_pd(__m512d x) {
  f64x8 r;
  for (int i = 0; i < 8; ++i) r[i] = std::sqrt(((f64x8)x)[i]);
  return (__m512d)r;
}
inline __m256d half(__m512d x, int which) {
  __m256d r;
  std::memcpy(&r, (const char*)&x + 32 * which, 32);
  return r;
}
inline int unordered(__m512 x, __m512 y) {
  int mask = 0;
  for (int i = 0; i < 16; ++i) mask |= (std::isnan(((f32x16)x)[i]) || std::isnan(((f32x16)y)[i])) << i;
  return mask;
}
// Imm8 0x20 asks for subnormals, the only class that simd.h asks for.
inline int is_subnormal(__m512 x) {
  int mask = 0;
  for (int i = 0; i < 16; ++i) mask |= (std::fpclassify(((f32x16)x)[i]) == FP_SUBNORMAL) << i;
  return mask;
}
inline uint32_t testn_epi16(__m512i x, __m512i y) {
  uint32_t mask = 0;
  for (int i = 0; i < 32; ++i) mask |= (uint32_t)((((u16x32)x)[i] & ((u16x32)y)[i]) == 0) << i;
  return mask;
}
// VCVTNEPS2BF16: nearest even, subnormals are zero, NaNs become quiet.
inline __m256i cvtneps_pbh(__m512 x) {
  u16x16 r;
  for (int i = 0; i < 16; ++i) {
    const uint32_t bits = ((u32x16)x)[i];
    const float value = ((f32x16)x)[i];
    if (std::isnan(value)) r[i] = (uint16_t)(bits >> 16 | 0x40);
    else if (std::fabs(value) < 0x1p-126f) r[i] = (uint16_t)(bits >> 16 & 0x8000);
    else r[i] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  return (__m256i)r;
}

// VCVTNE2PS2BF16: the second operand below, the first above.
inline __m512i cvtne2ps_pbh(__m512 above, __m512 below) {
  __m512i r;
  const __m256i halves[2] = {cvtneps_pbh(below), cvtneps_pbh(above)};
  std::memcpy(&r, halves, 64);
  return r;
}

}  // namespace emulated

#define _mm512_cvtps_pd emulated::cvtps_pd
#define _mm512_cvtpd_ps emulated::cvtpd_ps
#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_fmadd_pd emulated::fmadd_pd
#define _mm512_castps512_ps256(x) emulated::part(x, 0)
#define _mm512_extractf32x8_ps emulated::part
#define _mm512_castps256_ps512(x) emulated::insert(__m512{}, x, 0)
#define _mm512_insertf32x8 emulated::insert
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#define _mm512_cvtph_ps emulated::cvtph_ps
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(x, rounding) emulated::cvtps_ph(x)
#undef _mm512_fpclass_ps_mask
#define _mm512_fpclass_ps_mask(x, classes) emulated::is_subnormal(x)
#define _mm512_testn_epi16_mask emulated::testn_epi16
#define _mm512_cvtneps_pbh emulated::cvtneps_pbh
#define _mm512_cvtne2ps_pbh emulated::cvtne2ps_pbh
#define __m256bh __m256i
#define _mm512_kortestz(a, b) (((a) | (b)) == 0)
#define _mm512_sqrt_pd emulated::sqrt_pd
#define _mm512_castpd512_pd256(x) emulated::half(x, 0)
#define _mm512_extractf64x4_pd emulated::half
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask(x, y, unordered_is_asked) emulated::unordered(x, y)
