// The only file that knows the order of lanes: in columns' order, but for rows of bf16 where registers are wide enough.
//
// There the first of two registers holds the even columns and the second the odd ones (16 columns on AVX2, 32 on
// AVX-512). So a shift and a mask unpack them, a shift and a blend pack them, and nothing crosses the lanes: a third
// fewer instructions. Other types in such a row are shuffled into its order; scratch of our own is kept in it ("raw").
#pragma once

#if defined(__AVX2__)
template <class Row>
constexpr bool kSplit = std::is_same_v<Row, bf16>;
using Split = Vector<bf16>;

RMSNORM_INLINE Split unpack(BitsReg both) { return {{(FloatReg)(both << 16), (FloatReg)(both & 0xffff0000u)}}; }

// Two registers of bits whose upper halves are bf16, as one.
RMSNORM_INLINE BitsReg merge(BitsReg evens, BitsReg odds) {
#if defined(RMSNORM_AVX512)
  return (evens >> 16) | (odds & 0xffff0000u);
#else
  return (BitsReg)_mm256_blend_epi16((__m256i)(evens >> 16), (__m256i)odds, 0xaa);
#endif
}

// pack() of anything, NaNs too. A function of its own, as pack() stands some hundred times in a target.
__attribute__((noinline, cold)) BitsReg pack_unusual(FloatReg evens, FloatReg odds) {
  return merge(bf16_bits(evens) << 16, bf16_bits(odds) << 16);
}

// Rounded to nearest even; NaNs as bf16_bits() treats them. `Usual`: there are none, nor subnormal numbers but 0.
template <bool Usual = false>
RMSNORM_INLINE BitsReg pack(const Split& x) {
#if defined(RMSNORM_AVX512BF16)
  // The instruction takes subnormals for zero. So what it makes is right where no lane is zero, or none was subnormal
  // before; else the long way. One test of what was packed, as two of what goes in cost a tenth of 512x4096.
  typedef uint16_t Shorts __attribute__((vector_size(64)));
  const Shorts evens_then_odds = (Shorts)_mm512_cvtne2ps_pbh((__m512)x.v[1], (__m512)x.v[0]);
  const BitsReg packed =
      (BitsReg)__builtin_shufflevector(evens_then_odds, evens_then_odds, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6,
                                       22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  if constexpr (Usual) return packed;
  const Shorts magnitude = Shorts{} + 0x7fff;
  if (__builtin_expect(!_mm512_testn_epi16_mask((__m512i)packed, (__m512i)magnitude), 1)) return packed;
  if (_mm512_kortestz(_mm512_fpclass_ps_mask((__m512)x.v[0], 0x20), _mm512_fpclass_ps_mask((__m512)x.v[1], 0x20)))
    return packed;
  return pack_unusual(x.v[0], x.v[1]);
#else
#if defined(RMSNORM_AVX512)
  const bool nan = _mm512_cmp_ps_mask((__m512)x.v[0], (__m512)x.v[1], _CMP_UNORD_Q);
#else
  const __m256 unordered = _mm256_cmp_ps((__m256)x.v[0], (__m256)x.v[1], _CMP_UNORD_Q);
  const bool nan = !_mm256_testz_ps(unordered, unordered);
#endif
  if (__builtin_expect(nan, 0)) return pack_unusual(x.v[0], x.v[1]);
  BitsReg rounded[2];
  for (int i = 0; i < 2; ++i) {
    const BitsReg bits = (BitsReg)x.v[i];
    rounded[i] = bits + 0x7fff + ((bits >> 16) & 1);
  }
  return merge(rounded[0], rounded[1]);
#endif
}

// unpack(pack(x)) of what has no NaN with a payload in the lower half, which would be carried out of it.
RMSNORM_INLINE Split round_split(const Split& x) {
  return Split::of([&](int i) __attribute__((always_inline)) {
    const BitsReg bits = (BitsReg)x.v[i];
#if defined(__AVX512VNNI__)  // + 0x7fff · 1 + (upper & 1) · 1, the halves of a product: 2 instructions, and no shift
    const __m512i addends =
        _mm512_ternarylogic_epi32((__m512i)bits, _mm512_set1_epi32(0x10000), _mm512_set1_epi32(0x7fff), 0xea);
    return (FloatReg)((BitsReg)_mm512_dpwssd_epi32((__m512i)bits, addends, _mm512_set1_epi32(0x10001)) & 0xffff0000u);
#else
    const BitsReg upper = bits >> 16;
#if defined(RMSNORM_AVX512) && !defined(RMSNORM_EMULATE_AVX512)  // (~upper & 1) - 0x8000, in one instruction
    const BitsReg less =
        (BitsReg)_mm512_ternarylogic_epi32((__m512i)upper, _mm512_set1_epi32(1), _mm512_set1_epi32(-0x8000), 0xae);
    return (FloatReg)((bits - less) & 0xffff0000u);
#else
    return (FloatReg)((bits + 0x7fff + (upper & 1)) & 0xffff0000u);
#endif
#endif
  });
}

// What round_split() made. To store it is not to round again, nor to look for subnormals, which stops at every zero.
struct Rounded {
  Split x;
};

RMSNORM_INLINE Split load_split(const bf16* p) { return unpack(load_register<BitsReg>(p)); }
RMSNORM_INLINE void store_split(bf16* p, const Split& x) { store_register(p, pack(x)); }
RMSNORM_INLINE void store_split(bf16* p, const Rounded& y) {
  store_register(p, merge((BitsReg)y.x.v[0], (BitsReg)y.x.v[1]));
}

#if defined(RMSNORM_AVX512)
RMSNORM_INLINE Split load_few(const bf16* p, int64_t count) {
  return unpack((BitsReg)_mm512_maskz_loadu_epi16(~0u >> (32 - count), p));
}
RMSNORM_INLINE void store_few(bf16* p, const Split& x, int64_t count) {
  _mm512_mask_storeu_epi16(p, ~0u >> (32 - count), (__m512i)pack(x));
}
#endif

#if defined(RMSNORM_AVX512)
RMSNORM_INLINE Split load_split(const float* p) {
  const FloatReg a = load_register<FloatReg>(p), b = load_register<FloatReg>(p + 16);
  return {{__builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
           __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)}};
}
RMSNORM_INLINE void store_split(float* p, const Split& x) {
  const FloatReg a = x.v[0], b = x.v[1];
  store_register(p, __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
  store_register(p + 16, __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
}
#else
RMSNORM_INLINE Split load_split(const float* p) {
  const __m256 x = _mm256_loadu2_m128(p + 8, p), y = _mm256_loadu2_m128(p + 12, p + 4);
  return {{(FloatReg)_mm256_shuffle_ps(x, y, 0x88), (FloatReg)_mm256_shuffle_ps(x, y, 0xdd)}};
}
RMSNORM_INLINE void store_split(float* p, const Split& x) {
  const __m256 low = _mm256_unpacklo_ps((__m256)x.v[0], (__m256)x.v[1]);
  const __m256 high = _mm256_unpackhi_ps((__m256)x.v[0], (__m256)x.v[1]);
  _mm256_storeu2_m128(p + 8, p, low);
  _mm256_storeu2_m128(p + 12, p + 4, high);
}
#endif
#else
template <class Row>
constexpr bool kSplit = false;
#endif

// 32 lanes, in one vector or two, to 16. Of bf16 each even column is added to the odd one beside it.
template <class T>
RMSNORM_INLINE F halve(const Vector<T> (&x)[32 / kStep<T>]) {
  if constexpr (kSplit<T>) {
    return F::of([&](int i) __attribute__((always_inline)) { return x[i].v[0] + x[i].v[1]; });
#if !defined(__AVX2__)
  } else if constexpr (std::is_same_v<T, bf16>) {
    return F::of([&](int i) __attribute__((always_inline)) {
      const FloatReg a = x[i / 2].v[i % 2 * 2], b = x[i / 2].v[i % 2 * 2 + 1];
      return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
    });
#endif
  } else {
    return x[0] + x[1];
  }
}

// Where a column is in raw scratch.
template <class Row>
RMSNORM_INLINE int64_t raw_index(int64_t column) {
  if constexpr (!kSplit<Row>) return column;
  const int64_t in_step = column % kStep<Row>;
  return column - in_step + in_step / 2 + in_step % 2 * (kStep<Row> / 2);
}

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

// Stores, and returns what loading would give.
template <class Row, class T, class V>
RMSNORM_INLINE V store_back_for(T* p, const V& x) {
#if defined(__AVX2__)
  if constexpr (kSplit<Row> && sizeof(T) == 2) {
    const BitsReg packed = pack(x);
    store_register(p, packed);
    return unpack(packed);
  }
#endif
  store_for<Row>(p, x);
  if constexpr (sizeof(T) == 2) return load_for<Row>(p);
  else return x;
}

#if defined(__AVX2__)
template <class Row, class T>
RMSNORM_INLINE Split store_back_for(T* p, const Rounded& y) {
  store_split(p, y);
  return y.x;
}
#endif

// The value that storing as T and loading again would give.
template <class T>
RMSNORM_INLINE Vector<T> round_to(const Vector<T>& x) {
  if constexpr (sizeof(T) > 2) return x;
  T stored[kStep<T>];
  return store_back_for<T>(stored, x);
}

// The same of what was computed from numbers of that type and from gains, as make_gain() forms them.
template <class T>
RMSNORM_INLINE Vector<T> round_own(const Vector<T>& x) {
#if defined(__AVX2__)
  if constexpr (kSplit<T>) return round_split(x);
#endif
  return round_to<T>(x);
}

// Whether load_few() and store_few() take the last columns of a row, by masks. By way of the stack a load waits until
// what was just written has left for the cache, three times a row (512x80 bf16 on a Zen 4, 1 thread: 28 us, not 8).
template <class Row, class T>
constexpr bool kMasked =
#if defined(RMSNORM_EMULATE_AVX512)
    false;
#elif defined(RMSNORM_AVX512)
    std::is_same_v<T, bf16> ? kSplit<Row> : !kSplit<Row>;
#elif defined(__AVX2__)
    std::is_same_v<T, float> && !kSplit<Row>;
#else
    false;
#endif
