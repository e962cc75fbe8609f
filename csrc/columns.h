// The only file that walks along a row: a vector of columns at a time, and the last few of them.
#pragma once

// The lanes of a pack hold the columns of a row in the order that suits rows of type `Row` (split.h), whatever the type
// of the pointer; raw scratch is ours, in that order already, and has room for whole vectors.
template <class Row>
struct Full {
  int64_t j;  // the first column
  template <class T>
  RMSNORM_INLINE auto load_from(const T* row) const {
    return load_for<Row>(row + j);
  }
  RMSNORM_INLINE D load_wide_from(const float* row) const { return load_wide(row + j); }
  template <class T, class V>
  RMSNORM_INLINE void store_to(T* row, const V& x) const {
    store_for<Row>(row + j, x);
  }
  // Stores, and returns what loading would give.
  template <class T, class V>
  RMSNORM_INLINE auto store_back(T* row, const V& x) const {
    return store_back_for<Row>(row + j, x);
  }
  RMSNORM_INLINE Vector<Row> load_raw(const Scalar<Row>* row) const {
    using Register = typename Vector<Row>::Register;
    constexpr int64_t lanes = kBytes / (int64_t)sizeof(Scalar<Row>);
    return Vector<Row>::of([&](int i)
                               __attribute__((always_inline)) { return load_register<Register>(row + j + i * lanes); });
  }
  RMSNORM_INLINE void store_raw(Scalar<Row>* row, const Vector<Row>& x) const {
    constexpr int64_t lanes = kBytes / (int64_t)sizeof(Scalar<Row>);
    Vector<Row>::each([&](int i) __attribute__((always_inline)) { store_register(row + j + i * lanes, x.v[i]); });
  }
  template <class V>
  RMSNORM_INLINE const V& present(const V& x) const {
    return x;
  }
};

// Kernels with one copy of a loop's body for all columns of a row, instead of up to nine: those of the portable
// baseline, whose vectors are four registers or eight, and which emulates what it lacks, and those of fp64, whose sums
// are long.
#if defined(__AVX2__) || defined(RMSNORM_NEON)
constexpr bool kEmulates = false;
#else
constexpr bool kEmulates = true;
#endif
template <class Row>
constexpr bool kCompact = kEmulates || sizeof(Row) == 8;

// Fewer elements than a vector has, between a row and a buffer, without touching a byte beyond. A function of its own,
// as inlined wherever a row ends it is a fifth of the library.
template <class T>
__attribute__((noinline)) void copy_few(T* to, const T* from, int64_t count) {
#if defined(RMSNORM_AVX512) && !defined(RMSNORM_EMULATE_AVX512)
  for (int64_t left = count * (int64_t)sizeof(T); left > 0; left -= 64, to += 64 / sizeof(T), from += 64 / sizeof(T)) {
    const __mmask64 some = left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
    _mm512_mask_storeu_epi8(to, some, _mm512_maskz_loadu_epi8(some, from));
  }
#else
  char* p = (char*)to;
  const char* q = (const char*)from;
  int64_t left = count * (int64_t)sizeof(T);
  for (; left >= 16; left -= 16, p += 16, q += 16) __builtin_memcpy(p, q, 16);
  if (left & 8) __builtin_memcpy(p, q, 8), p += 8, q += 8;
  if (left & 4) __builtin_memcpy(p, q, 4), p += 4, q += 4;
  if (left & 2) __builtin_memcpy(p, q, 2), p += 2, q += 2;
  if constexpr (sizeof(T) == 1)
    if (left & 1) *p = *q;
#endif
}

// The last columns, or, where a body is written once, any: absent lanes load as zero and are not stored.
template <class Row>
struct Tail {
  int64_t j;
  int64_t count;
  template <class T>
  RMSNORM_INLINE auto load_from(const T* row) const {
    if constexpr (kMasked<Row, T>) {
      return load_few(row + j, count);
    } else {
      T lanes[kStep<Row>];
      const T* from = row + j;
      if (count < kStep<Row>) {
        for (T& lane : lanes) lane = T{};
        copy_few(lanes, from, count);
        from = lanes;
      }
      return load_for<Row>(from);
    }
  }
  RMSNORM_INLINE D load_wide_from(const float* row) const { return widen(load_from(row)); }
  template <class T, class V>
  RMSNORM_INLINE void store_to(T* row, const V& x) const {
    if constexpr (kMasked<Row, T>) {
      store_few(row + j, x, count);
    } else {
      T lanes[kStep<Row>];
      const bool few = count < kStep<Row>;
      store_for<Row>(few ? lanes : row + j, x);
      if (few) copy_few(row + j, lanes, count);
    }
  }
  template <class T, class V>
  RMSNORM_INLINE V store_back(T* row, const V& x) const {
    T lanes[kStep<Row>];
    const bool few = count < kStep<Row>;
    const V back = store_back_for<Row>(few ? lanes : row + j, x);
    if (few) copy_few(row + j, lanes, count);
    return back;
  }
  RMSNORM_INLINE Vector<Row> load_raw(const Scalar<Row>* row) const {
    if constexpr (kSplit<Row>) return Full<Row>{j}.load_raw(row);
    else return load_from(row);  // it may be the user's weight, which ends here
  }
  RMSNORM_INLINE void store_raw(Scalar<Row>* row, const Vector<Row>& x) const { Full<Row>{j}.store_raw(row, x); }
  // The vector with zeros in the absent lanes.
  template <class V>
  RMSNORM_INLINE V present(const V& x) const {
    if (count == kStep<Row>) return x;
    std::remove_cvref_t<decltype(x.v[0][0])> lanes[kStep<Row>];
    store_for<Row>(lanes, x);
    for (int64_t i = count; i < kStep<Row>; ++i) lanes[i] = 0;
    return load_for<Row>(lanes);
  }
};

// Calls body(span) over the first `columns` columns, or `back` from the last whole vector on; the columns that fill
// none come last in any case. `Twice`: the compiler's last step is to write the loop's body twice. Written twice here,
// it takes all steps with it, a fifth of the time to build. On a Zen 4 it makes stores up to 6 % faster (256x128 fp32),
// but those past the caches 7 % slower (8192x4096 fp32).
template <class Row, bool Twice = false, class Body>
RMSNORM_INLINE void for_columns(int64_t columns, bool back, Body&& body) {
  constexpr int64_t step = kStep<Row>;
  const int64_t whole = columns - columns % step, by = back ? -step : step;
  if constexpr (kCompact<Row>) {
    for (int64_t j = 0; j < columns; j += step) {
      const int64_t left = columns - j;
      body(Tail<Row>{back && left >= step ? whole - step - j : j, left < step ? left : step});
    }
  } else {
    int64_t j = back ? whole - step : 0;
    if constexpr (Twice) {
#pragma GCC unroll 2
      for (int64_t left = whole; left > 0; left -= step, j += by) body(Full<Row>{j});
    } else {
      for (int64_t left = whole; left > 0; left -= step, j += by) body(Full<Row>{j});
    }
    if (__builtin_expect(whole < columns, 0)) body(Tail<Row>{whole, columns - whole});
  }
}
template <class Row, class Body>
RMSNORM_INLINE void for_columns(int64_t columns, Body&& body) {
  for_columns<Row>(columns, false, body);
}

template <int U>
struct Index {
  static constexpr int value = U;
};
struct Any {
  int value;
};

// Calls body(span, Index<u>) over columns from `begin` on, u cycling through 0..Unroll-1: independent accumulators.
// Returns the first column that is left, where fewer than Unroll vectors are.
template <class Row, int Unroll, class Body>
RMSNORM_INLINE int64_t for_whole_columns(int64_t begin, int64_t end, Body&& body) {
  constexpr int64_t step = kStep<Row>;
  int64_t j = begin;
  for (; j + Unroll * step <= end; j += Unroll * step) {
    body(Full<Row>{j}, Index<0>{});
    if constexpr (Unroll > 1) body(Full<Row>{j + step}, Index<1>{});
    if constexpr (Unroll > 2) body(Full<Row>{j + 2 * step}, Index<2>{}), body(Full<Row>{j + 3 * step}, Index<3>{});
  }
  return j;
}

// The same to the end. A column's lane and accumulator follow from its index, whatever the width of a vector: of 64
// lanes (Unroll · step), the last columns, fewer than 32, take the second half; of 32 or 16, those that come next. They
// share a body, which gets its accumulator at run time: the body may be long, and was written up to nine times.
template <class Row, int Unroll, class Body>
RMSNORM_INLINE void for_columns(int64_t begin, int64_t end, Body&& body) {
  constexpr int64_t step = kStep<Row>;
  constexpr int lanes = Unroll * (int)step;
  static_assert(lanes == 16 || lanes == 32 || lanes == 64);
  int64_t j = begin;
  if constexpr (!kCompact<Row>) {
    j = for_whole_columns<Row, Unroll>(begin, end, body);
    if (__builtin_expect(j == end, 1)) return;
  }
  for (Any u = {0}; j < end; j += step, u.value = (u.value + 1) % Unroll) {
    const int64_t left = end - j;
    if (lanes == 64 && u.value == 0 && left < 32) u.value = Unroll / 2;
    body(Tail<Row>{j, left < step ? left : step}, u);
  }
}

// Calls act(i) for i = u of `Count` accumulators. Each i is a constant: by one that is not, all would be in memory.
template <int Count, class Act>
RMSNORM_INLINE void for_accumulator(int u, const Act& act) {
  [&]<int... I>(std::integer_sequence<int, I...>)
      __attribute__((always_inline)) { ((u == I ? act(I) : (void)0), ...); }(std::make_integer_sequence<int, Count>{});
}
