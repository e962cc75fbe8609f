// The only file that writes past the caches, and reads ahead for it.
//
// A plain store first reads the line that it overwrites: 8192x4096 fp32 then moves 384 MiB instead of 256. While a row
// is stored, rows to come are asked for, or memory waits for the end of every row (8192x4096 fp32, 1 thread of a Zen 5:
// 1.3 times memcpy without, 0.9 with). The baseline has none of it: one more loop to compile.
#pragma once

#if defined(__AVX__)
constexpr bool kStreams = true;
template <int Bytes>
RMSNORM_INLINE void stream_bytes(char* p, const char* from) {
  if constexpr (Bytes == 32) _mm256_stream_si256((__m256i*)p, _mm256_loadu_si256((const __m256i*)from));
  else _mm_stream_si128((__m128i*)p, _mm_loadu_si128((const __m128i*)from));
}
#else
constexpr bool kStreams = false;
template <int>
RMSNORM_INLINE void stream_bytes(char*, const char*) {}
#endif

// Whether a row can be streamed: its vectors must be aligned. Rows that aren't take plain stores.
RMSNORM_INLINE bool can_stream(const void* row) { return (uintptr_t)row % 32 == 0; }

// What a span does as store_to, past the caches. The way through memory is free: the stores wait for the bus.
template <class Row, class T, class V>
RMSNORM_INLINE void stream_to(const Full<Row>& span, T* row, const V& x) {
  T lanes[kStep<Row>];
  store_for<Row>(lanes, x);
  // In no larger pieces than were stored, or each load waits until two have reached the cache: three times as long
  // (8192x4096 fp16). AVX2 stores 16 bytes where it makes half types, or fp32 out of split lanes.
  constexpr int piece = kBytes == 64 || kSplit<Row> == (sizeof(T) == 2) ? 32 : 16;
  for (int k = 0; k < (int)sizeof lanes; k += piece)
    stream_bytes<piece>((char*)(row + span.j) + k, (const char*)lanes + k);
}
template <class Row, class T, class V>
RMSNORM_INLINE void stream_to(const Tail<Row>& span, T* row, const V& x) {
  if (kCompact<Row> && span.count == kStep<Row>) stream_to(Full<Row>{span.j}, row, x);
  else span.store_to(row, x);
}

// Whether a span's columns are asked for and streamed in loops that find out at run time. Half types wait for
// arithmetic where AVX2 makes them, and fp16 everywhere: 10 KB.
template <class Span>
constexpr bool is_whole = false;
template <class Row>
constexpr bool is_whole<Full<Row>> = kStreams && (sizeof(Row) == 4 || (kBytes == 64 && std::is_same_v<Row, bf16>));

#if defined(RMSNORM_AVX512)  // where alone there are loops of pairs
// A vector that is as it was stored: to store it again isn't to round again.
template <class T, class Span>
RMSNORM_INLINE auto stored_as([[maybe_unused]] Span span, const Vector<T>& x) {
  if constexpr (kSplit<T> && std::is_same_v<Span, Full<T>>) return Rounded{x};
  else return x;
}
#endif

// Past the caches, if asked for: where a second loop would be too much code.
template <class T, class V, class Span>
RMSNORM_INLINE void store_or_stream(bool stream, void* row, const V& x, Span span) {
  if (is_whole<Span> && stream) stream_to(span, (T*)row, x);
  else span.store_to((T*)row, x);
}

// Asks for the same columns of another row. Level 3 means L1, level 2 the cache behind it.
template <class T, int Level, class Span>
RMSNORM_INLINE void prefetch_part(const char* row, Span span) {
  const int64_t byte = span.j * (int64_t)sizeof(T);
  constexpr int step = kStep<T> * sizeof(T);
  if (step < 64 && byte % 64) return;  // half a line: asked for already
  for (int k = 0; k < step; k += 64) __builtin_prefetch(row + byte + k, 0, Level);
}

// Asks for a row to come while another is walked along, for the cache behind L1; `ask` bytes with each column. By
// default that is half a row: one half while a row is summed, the other while it is stored, so that memory never rests.
// Each line is asked for twice; once is a tenth slower (8192x4096 fp32 on a Zen 4: 9.9 ms, not 8.8), perhaps as a CPU
// with too many under way drops some. A vector of fp32 may ask for a whole line.
template <class T, class Span>
RMSNORM_INLINE void prefetch_ahead(const char* row, Span span, int64_t ask = sizeof(T) / 2) {
  const int64_t byte = span.j * ask;
  constexpr int step = kStep<T> * sizeof(T) / 2;
  if (step < 32 && byte % 32) return;
  __builtin_prefetch(row + byte, 0, 2);
}
