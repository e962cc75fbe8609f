// The only file that adds the lanes of a register: always as ((i, i + n/2), i + n/4, ...), for one row or for several.
#pragma once

// Halves of the pack, down to one register.
template <int N>
RMSNORM_INLINE DoubleReg fold(const Pack<N, DoubleReg>& x) {
  if constexpr (N == 1) return x.v[0];
  else
    return fold(
        Pack<N / 2, DoubleReg>::of([&](int i) __attribute__((always_inline)) { return x.v[i] + x.v[i + N / 2]; }));
}
RMSNORM_INLINE double reduce(DoubleReg x) {
#if defined(RMSNORM_AVX512)
  const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256((__m512d)x), _mm512_extractf64x4_pd((__m512d)x, 1));
#elif defined(__AVX2__)
  const __m256d four = (__m256d)x;
#endif
#if defined(__AVX2__)
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
#else
  const auto two = x;
#endif
  return two[0] + two[1];
}

template <int Distance, int... Lower>
RMSNORM_INLINE DoubleReg halves(DoubleReg a, DoubleReg b) {
  return __builtin_shufflevector(a, b, Lower...) + __builtin_shufflevector(a, b, (Lower + Distance)...);
}

// reduce() of as many registers as one has lanes, each a row's: they are transposed on the way, so that one addition is
// a step for several rows.
RMSNORM_INLINE DoubleReg reduce_each(const DoubleReg* x) {
#if defined(RMSNORM_AVX512)
  const auto two = [&](int i) { return halves<4, 0, 1, 2, 3, 8, 9, 10, 11>(x[i], x[i + 2]); };
  const auto four = [&](int i) { return halves<2, 0, 1, 4, 5, 8, 9, 12, 13>(two(i), two(i + 4)); };
  return halves<1, 0, 8, 2, 10, 4, 12, 6, 14>(four(0), four(1));
#elif defined(__AVX2__)
  const auto two = [&](int i) { return halves<2, 0, 1, 4, 5>(x[i], x[i + 2]); };
  return halves<1, 0, 4, 2, 6>(two(0), two(1));
#else
  return halves<1, 0, 2>(x[0], x[1]);
#endif
}
