// The only file that knows two rows side by side, as loops of AVX-512 take them (backward_pairs.h, sandwich_pairs.h and
// sandwich_rows.h): what is done for both, their sums, and where they ask for the next two.
#pragma once

// The loop of backward_pairs.h, and how many rows from r on it may have.
template <class T, class G, bool Add>
void backward_pairs(const Backward& b, const BackwardRows& rows, int64_t begin, int64_t end, bool stream);
template <class T>
int64_t rows_in_pairs(const BackwardRows& rows, int64_t r);

#if defined(RMSNORM_AVX512)
// Calls act(k) for both rows of a pair; each k is a constant, or what there are two of would be in memory.
template <class Act>
RMSNORM_INLINE void for_two(const Act& act) {
  act(Index<0>{}), act(Index<1>{});
}

template <class T>
struct PairSums {
  static constexpr int kUnroll = Sum<T>::kUnroll;
  static constexpr int64_t kBlock = Sum<T>::kBlock;
  Sum<T> one, two;
  template <class K>
  RMSNORM_INLINE Sum<T>& operator[](K) {
    if constexpr (K::value == 0) return one;
    else return two;
  }
  RMSNORM_INLINE void end_block() { one.end_block(), two.end_block(); }
};

// Where in a row to ask, in bytes: for what is to come of it, and near its end for the row two further on, `next` bytes
// each; of two tensors, as most lie alike. Into L1: a line that is in L2 first waits twice for one of the few places
// for what L1 misses, and all that the loops read comes from there.
template <class T, class Span>
RMSNORM_INLINE int64_t asked(int64_t columns, int64_t next, int64_t ahead, Span span) {
  const int64_t bytes = columns * (int64_t)sizeof(T), at = span.j * (int64_t)sizeof(T) + ahead;
  return at < bytes ? at : at + 2 * next - bytes;
}
RMSNORM_INLINE void ask_for(const void* row, int64_t at) { __builtin_prefetch((const char*)row + at, 0, 3); }
#endif
