// The only file that knows about memory larger than the caches: pages, and stores past the caches.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace rmsnorm {

// What the system says of a core's cache of that level, in bytes, within bounds: it may say 0, or -1 for not knowing.
inline int64_t cache_bytes(int level, int64_t least, int64_t most) {
#if defined(_SC_LEVEL1_DCACHE_SIZE)  // glibc knows all three names, other systems none
  constexpr int names[] = {_SC_LEVEL1_DCACHE_SIZE, _SC_LEVEL2_CACHE_SIZE, _SC_LEVEL3_CACHE_SIZE};
  return std::clamp<int64_t>(sysconf(names[level - 1]), least, most);
#else
  (void)level, (void)most;
  return least;  // what 0 comes to
#endif
}

// Outputs from this size on, in bytes: a last-level cache, as by then nothing of the input is left in it when the
// output is written, and nothing of the output when it is read. Tests set it to 1.
inline std::atomic<int64_t>& large_bytes() {
  static std::atomic<int64_t> bytes{cache_bytes(3, int64_t{8} << 20, int64_t{32} << 20)};
  return bytes;
}

inline bool is_large(int64_t bytes) { return bytes >= large_bytes().load(std::memory_order_relaxed); }

// Whether a call that reads and writes so many bytes should write past the caches: from three quarters of the last
// level on, what a row pushes out has to be fetched again (Zen 5, 32 MiB: 16 MiB in and out, 1.9 times memcpy,
// streamed 1.0).
inline bool overflows_caches(int64_t bytes) { return is_large(bytes / 3 * 4); }

// Must come between the last row written past the caches and whatever tells another thread that it is there. Once for
// all rows of a thread: after each batch it costs up to a quarter of 32768x128 fp32.
inline void finish_streaming() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

// The first data cache of a core.
inline int64_t first_cache_bytes() {
  static const int64_t bytes = cache_bytes(1, int64_t{32} << 10, int64_t{128} << 10);
  return bytes;
}

// The second.
inline int64_t second_cache_bytes() {
  static const int64_t bytes = cache_bytes(2, int64_t{256} << 10, int64_t{4} << 20);
  return bytes;
}

// Asks for 2 MiB pages before a fresh output is touched: with 4 KiB pages, 80 % of the time to write 128 MiB goes to
// page faults. An output of this size has pages of its own (glibc maps from 32 MiB on, others earlier); where it has
// not, or the system keeps its huge pages for itself, the request does nothing.
inline void ask_for_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace rmsnorm
