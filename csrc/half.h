// The only file that knows the bits of half types: bf16 and fp16, loaded as fp32 and rounded to nearest even.
#pragma once

// Round to nearest even. A NaN keeps its upper payload and becomes quiet, as the AVX-512 instruction does it.
RMSNORM_INLINE BitsReg bf16_bits(FloatReg x) {
  const BitsReg bits = (BitsReg)x;
  const BitsReg rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return ((x != x) ? (bits | 0x400000) : rounded) >> 16;
}

// fp16 by integer arithmetic, for CPUs without F16C (after F. Giesen's float_to_half_fast3_rtne).
RMSNORM_EMULATED BitsReg f16_bits(FloatReg x) {
  const BitsReg bits = (BitsReg)x, sign = bits & 0x80000000u, magnitude = bits ^ sign;
  const FloatReg shift = (FloatReg)(BitsReg{} + (126u << 23));  // 0.5: adding it aligns subnormal mantissas
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
#elif defined(RMSNORM_NEON)
  return (BitsReg)vmovl_u16((uint16x4_t)x);
#else
  return __builtin_convertvector(x, BitsReg);
#endif
}

// The sixteen lanes, each below 2^16, as sixteen shorts.
using Bits = Pack<kFloatRegs, BitsReg>;
RMSNORM_INLINE void store_shorts(uint16_t* to, const Bits& bits) {
#if defined(RMSNORM_AVX512)
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)bits.v[0]));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)bits.v[0], (__m256i)bits.v[1]);
  _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(packed, 0xd8));
#else
  Bits::each([&](int i) __attribute__((always_inline)) {
    store_register(to + i * (kBytes / 4), __builtin_convertvector(bits.v[i], ShortReg));
  });
#endif
}

RMSNORM_INLINE ShortReg load_shorts(const void* p, int i) {
  return load_register<ShortReg>((const uint16_t*)p + i * (kBytes / 4));
}

RMSNORM_INLINE F load(const bf16* p) {
#if defined(RMSNORM_NEON)
  return F::of([&](int i)
                   __attribute__((always_inline)) { return (FloatReg)vshll_n_u16((uint16x4_t)load_shorts(p, i), 16); });
#else
  return F::of([&](int i) __attribute__((always_inline)) { return (FloatReg)(zero_extend(load_shorts(p, i)) << 16); });
#endif
}

RMSNORM_INLINE F load(const f16* p) {
  return F::of([&](int i) __attribute__((always_inline)) {
    const ShortReg shorts = load_shorts(p, i);
#if defined(RMSNORM_AVX512)
    return (FloatReg)_mm512_cvtph_ps((__m256i)shorts);
#elif defined(__F16C__)
    return (FloatReg)_mm256_cvtph_ps((__m128i)shorts);
#elif defined(RMSNORM_NEON)
    return (FloatReg)vcvt_f32_f16((float16x4_t)shorts);
#else
    return from_f16_bits(zero_extend(shorts));
#endif
  });
}

RMSNORM_INLINE void store(bf16* p, const F& x) {
#if defined(RMSNORM_NEON)
  F::each([&](int i) __attribute__((always_inline)) {  // bf16_bits() in eight instructions, where gcc 12 makes eleven
    const BitsReg bits = (BitsReg)x.v[i], quiet = bits | 0x400000;
    const uint32x4_t rounded = vsraq_n_u32((uint32x4_t)(bits + 0x7fff), (uint32x4_t)(bits << 15), 31);
    const uint32x4_t is_number = vceqq_f32((float32x4_t)x.v[i], (float32x4_t)x.v[i]);
    store_register(p + i * (kBytes / 4), vshrn_n_u32(vbslq_u32(is_number, rounded, (uint32x4_t)quiet), 16));
  });
#else
  store_shorts(&p->bits, Bits::of([&](int i) __attribute__((always_inline)) { return bf16_bits(x.v[i]); }));
#endif
}

RMSNORM_INLINE void store(f16* p, const F& x) {
#if defined(RMSNORM_AVX512)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x.v[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  F::each([&](int i) __attribute__((always_inline)) {
    _mm_storeu_si128((__m128i*)p + i, _mm256_cvtps_ph((__m256)x.v[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  });
#elif defined(RMSNORM_NEON)
  F::each([&](int i) __attribute__((always_inline)) {
    store_register(p + i * (kBytes / 4), vcvt_f16_f32((float32x4_t)x.v[i]));
  });
#else
  store_shorts(&p->bits, Bits::of([&](int i) __attribute__((always_inline)) { return f16_bits(x.v[i]); }));
#endif
}

#if defined(RMSNORM_AVX512)
RMSNORM_INLINE F load_few(const f16* p, int64_t count) {
  return {{(FloatReg)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16((1u << count) - 1, p))}};
}
RMSNORM_INLINE void store_few(f16* p, const F& x, int64_t count) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm256_mask_storeu_epi16(p, (1u << count) - 1, _mm512_cvtps_ph((__m512)x.v[0], nearest));
}
#endif
