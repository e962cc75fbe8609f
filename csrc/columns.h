// The only file that walks along a row: sixteen columns at a time, and the last few of them.
#pragma once

// Sixteen columns of a row starting at j, or the last few of them: absent lanes load as zero and are not stored.
// Whatever the type of a pointer, its lanes are in the order that suits rows of type `Row` (half.h).
template <class Row>
struct Full {
  int64_t j;
  template <class T>
  RMSNORM_INLINE auto load_from(const T* row) const {
    return load_for<Row>(row + j);
  }
  template <class T, class V>
  RMSNORM_INLINE void store_to(T* row, const V& x) const {
    store_for<Row>(row + j, x);
  }
  template <class V>
  RMSNORM_INLINE const V& present(const V& x) const {
    return x;
  }
};

template <class Row>
struct Tail {
  int64_t j;
  int64_t count;
  template <class T>
  RMSNORM_INLINE auto load_from(const T* row) const {
    T lanes[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = row[j + i];
    return load_for<Row>(lanes);
  }
  template <class T, class V>
  RMSNORM_INLINE void store_to(T* row, const V& x) const {
    T lanes[kLanes];
    store_for<Row>(lanes, x);
    for (int64_t i = 0; i < count; ++i) row[j + i] = lanes[i];
  }
  // The vector with zeros in the absent lanes.
  template <class V>
  RMSNORM_INLINE V present(const V& x) const {
    std::remove_cvref_t<decltype(x.v[0][0])> lanes[kLanes];
    store_for<Row>(lanes, x);
    for (int64_t i = count; i < kLanes; ++i) lanes[i] = 0;
    return load_for<Row>(lanes);
  }
};

template <int U>
struct Index {
  static constexpr int value = U;
};

// Calls body(span, Index<u>) over columns [begin, end), u cycling through 0..Unroll-1: independent accumulators.
template <class Row, int Unroll, class Body>
RMSNORM_INLINE void for_columns(int64_t begin, int64_t end, Body&& body) {
  int64_t j = begin;
  for (; j + Unroll * kLanes <= end; j += Unroll * kLanes) {
    body(Full<Row>{j}, Index<0>{});
    if constexpr (Unroll > 1) body(Full<Row>{j + kLanes}, Index<1>{});
    if constexpr (Unroll > 2) {
      body(Full<Row>{j + 2 * kLanes}, Index<2>{});
      body(Full<Row>{j + 3 * kLanes}, Index<3>{});
    }
  }
  if constexpr (Unroll > 1) {
    if (j + kLanes <= end) body(Full<Row>{j}, Index<0>{}), j += kLanes;
  }
  if constexpr (Unroll > 2) {
    if (j + kLanes <= end) body(Full<Row>{j}, Index<1>{}), j += kLanes;
    if (j + kLanes <= end) body(Full<Row>{j}, Index<2>{}), j += kLanes;
  }
  if (j < end) body(Tail<Row>{j, end - j}, Index<Unroll - 1>{});
}
