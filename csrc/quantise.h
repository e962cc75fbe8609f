// The only file that quantises a row: bytes and one scale, as torchao computes them from a row of type T.
//
//   int8      s = max(T(largest / 127.5), 2^-23)   code = min(nearest(x · (1/s)), 127)        symmetric, ties to even
//   e4m3      s = T(largest / 448)                 code = e4m3(clamp(x / s, ±448))            float8, ties to even
//
// with largest = max |x|, a NaN if one is, and T() one rounding; the rest is fp32. So a byte is the same IEEE
// operations in each lane, on every CPU. A NaN is 0 in int8 and 0x7f in e4m3: there it is all of a row of zeros, whose
// scale is 0.
#pragma once

using Magnitudes = MaskReg[kStep<float> * 4 / kBytes > 2 ? kStep<float> * 4 / kBytes : 2];

template <class T>
float largest_of(const T* row, int64_t columns) {
  Magnitudes most = {};
  for_columns<T>(columns, [&](auto span) __attribute__((always_inline)) {
    const Vector<T> x = span.load_from(row);
    Vector<T>::each([&](int i) __attribute__((always_inline)) {
      // As integers: they are in the numbers' order, with NaN above all.
      const MaskReg magnitude = (MaskReg)x.v[i] & 0x7fffffff;
      most[i] = magnitude > most[i] ? magnitude : most[i];
    });
  });
  int32_t bits = 0;
  for (const MaskReg& lanes : most)
    for (int i = 0; i < kBytes / 4; ++i) bits = lanes[i] > bits ? lanes[i] : bits;
  return __builtin_bit_cast(float, bits);
}

// The last byte of each lane, in columns' order.
template <class T>
RMSNORM_INLINE void store_bytes(uint8_t* to, const Vector<T>& lanes, int64_t count) {
  int32_t ordered[kStep<T>];
  store_for<T>((float*)ordered, lanes);
  uint8_t few[kStep<T>];
  // Straight to where they go: a load from a place that was stored in pieces waits for all of them.
  uint8_t* const bytes = __builtin_expect(count == kStep<T>, 1) ? to : few;
#if defined(RMSNORM_AVX512) && !defined(RMSNORM_EMULATE_AVX512)
  for (int i = 0; i < kStep<T>; i += 16)
    _mm_storeu_si128((__m128i*)(bytes + i), _mm512_cvtepi32_epi8(_mm512_loadu_si512(ordered + i)));
#elif defined(__AVX2__)
  const __m256i low = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1, -1,
                                       -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  for (int i = 0; i < kStep<T>; i += 8) {
    const __m256i picked = _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i*)(ordered + i)), low);
    const __m128i joined = _mm_unpacklo_epi32(_mm256_castsi256_si128(picked), _mm256_extracti128_si256(picked, 1));
    _mm_storel_epi64((__m128i*)(bytes + i), joined);
  }
#else
  for (int i = 0; i < kStep<T>; ++i) bytes[i] = (uint8_t)ordered[i];
#endif
  if (bytes != to) copy_few(to, few, count);
}

RMSNORM_INLINE MaskReg to_int8(FloatReg x) {
  // Added to 1.5 · 2^23, a number's last bit is 1: the sum is rounded as nearest() is.
  const MaskReg nearest = (MaskReg)(x + 12582912.0f) - 0x4b400000;
  const MaskReg most = nearest > 127 ? MaskReg{} + 127 : nearest;
  return (x == x) & (most < -128 ? MaskReg{} - 128 : most);
}

RMSNORM_INLINE MaskReg to_e4m3(FloatReg x) {
  const BitsReg bits = (BitsReg)x, sign = bits & 0x80000000u;
  const BitsReg most = BitsReg{} + 0x43e00000u;  // 448
  BitsReg magnitude = bits ^ sign;
  magnitude = magnitude > most ? most : magnitude;
  // Below 2^-6 all have the step 2^-9, the last bit of what is about 2^14.
  const BitsReg small = (BitsReg)((FloatReg)magnitude + 16384.0f) - 0x46800000u;
  const BitsReg normal = (magnitude - (120u << 23) + 0x7ffff + ((magnitude >> 20) & 1)) >> 20;
  const BitsReg code = (magnitude < (121u << 23) ? small : normal) | (sign >> 24);
  return (x == x) ? (MaskReg)code : MaskReg{} + 0x7f;
}

template <class T>
void quantise_row(const T* row, int64_t columns, bool e4m3, uint8_t* codes, float* scale) {
  const float largest = largest_of(row, columns);
  const float s = (float)round_element<T>((double)(largest / (e4m3 ? 448.0f : 127.5f)));
  *scale = !e4m3 && s < 0x1p-23f ? 0x1p-23f : s;
  const FloatReg by = FloatReg{} + (e4m3 ? *scale : 1.0f / *scale);
  const auto count_of = [](auto span) __attribute__((always_inline)) {
    if constexpr (requires { span.count; }) return span.count;
    else return kStep<T>;
  };
  for_columns<T>(columns, [&](auto span) __attribute__((always_inline)) {
    const Vector<T> x = span.load_from(row);
    const auto code = [&](int i) __attribute__((always_inline)) {
      return (FloatReg)(e4m3 ? to_e4m3(x.v[i] / by) : to_int8(x.v[i] * by));
    };
    store_bytes<T>(codes + span.j, Vector<T>::of(code), count_of(span));
  });
}

void quantise(Type type, const void* row, int64_t columns, bool e4m3, void* codes, float* scale) {
  switch (type) {
    case Type::bf16: return quantise_row((const bf16*)row, columns, e4m3, (uint8_t*)codes, scale);
    case Type::f16: return quantise_row((const f16*)row, columns, e4m3, (uint8_t*)codes, scale);
    default: return quantise_row((const float*)row, columns, e4m3, (uint8_t*)codes, scale);
  }
}
