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

// ---- the order of lanes ------------------------------------------------------------------------------------------

// A pack holds sixteen columns in order, but for rows of bf16 on AVX2: there the first register holds the even columns
// and the second the odd ones. So a shift and a mask unpack them, a shift and a blend pack them, and nothing crosses
// the lanes: 10 instructions less for each 16 columns. Other types in such a row are shuffled into its order.
#if defined(__AVX2__) && !defined(RMSNORM_AVX512)
template <class Row>
constexpr bool kSplit = std::is_same_v<Row, bf16>;

RMSNORM_INLINE F load_split(const bf16* p) {
  const BitsReg both = load_register<BitsReg>(p);
  return {{(FloatReg)(both << 16), (FloatReg)(both & 0xffff0000u)}};
}
RMSNORM_INLINE F load_split(const float* p) {
  const __m256 x = _mm256_loadu2_m128(p + 8, p), y = _mm256_loadu2_m128(p + 12, p + 4);
  return {{(FloatReg)_mm256_shuffle_ps(x, y, 0x88), (FloatReg)_mm256_shuffle_ps(x, y, 0xdd)}};
}
RMSNORM_INLINE void store_split(bf16* p, const F& x) {
  BitsReg rounded[2];
  for (int i = 0; i < 2; ++i) {
    const BitsReg bits = (BitsReg)x.v[i];
    rounded[i] = bits + 0x7fff + ((bits >> 16) & 1);
  }
  const __m256 nan = _mm256_cmp_ps((__m256)x.v[0], (__m256)x.v[1], _CMP_UNORD_Q);
  if (__builtin_expect(!_mm256_testz_ps(nan, nan), 0))
    for (int i = 0; i < 2; ++i) rounded[i] = bf16_bits(x.v[i]) << 16;
  store_register(p, _mm256_blend_epi16((__m256i)(rounded[0] >> 16), (__m256i)rounded[1], 0xaa));
}
RMSNORM_INLINE void store_split(float* p, const F& x) {
  const __m256 low = _mm256_unpacklo_ps((__m256)x.v[0], (__m256)x.v[1]);
  const __m256 high = _mm256_unpackhi_ps((__m256)x.v[0], (__m256)x.v[1]);
  _mm256_storeu2_m128(p + 8, p, low);
  _mm256_storeu2_m128(p + 12, p + 4, high);
}
template <class Row>
RMSNORM_INLINE D in_order(const D& x) {
  if constexpr (!kSplit<Row>) return x;
  D r;
  for (int i = 0; i < kDoubleRegs; i += 2) {
    const DoubleReg even = x.v[i / 2], odd = x.v[i / 2 + kDoubleRegs / 2];
    r.v[i] = __builtin_shuffle(even, odd, (WideBitsReg){0, 4, 1, 5});
    r.v[i + 1] = __builtin_shuffle(even, odd, (WideBitsReg){2, 6, 3, 7});
  }
  return r;
}
#else
template <class Row>
constexpr bool kSplit = false;
template <class Row>
RMSNORM_INLINE const D& in_order(const D& x) {
  return x;
}
#endif

template <class Row, class T>
RMSNORM_INLINE auto load_for(const T* p) {
  if constexpr (kSplit<Row>) return load_split(p);
  else return load(p);
}
template <class Row, class T, class V>
RMSNORM_INLINE void store_for(T* p, const V& x) {
  if constexpr (kSplit<Row>) store_split(p, x);
  else store(p, x);
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
