// The only file that knows about caches and what is larger than they are: pages, stores past the caches, and when
// forward asks for rows to come.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <memory>

#include "kernel.h"

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

// What the system gives out: where its pages are larger, it refuses what is asked for below, and nothing is lost.
constexpr uintptr_t kPage = 4096;

// Memory of our own that begins with a line of a cache: a register of 64 bytes anywhere else takes parts of two. With
// gains and the sums of a weight's gradient in it, gradients of 16x4096 take 0.87 of the time in bf16 on a Zen 5, and
// 0.84 in fp32.
class Lines {
 public:
  Lines() = default;
  explicit Lines(int64_t bytes) : Lines(new char[bytes + kLine], nullptr) {}
  // Half a page from a tensor's offset within its own, so that what is stored here stops no load of it
  // (should_walk_back()).
  Lines(int64_t bytes, const void* tensor) : Lines(new char[bytes + kPage], tensor) {}
  static Lines zeros(int64_t bytes) { return Lines(new char[bytes + kLine](), nullptr); }
  char* get() const { return begin_; }

 private:
  static constexpr uintptr_t kLine = 64;
  Lines(char* memory, const void* tensor) : memory_(memory), begin_(memory) {
    const auto from = reinterpret_cast<uintptr_t>(memory), to = reinterpret_cast<uintptr_t>(tensor) / kLine * kLine;
    begin_ += tensor ? (to + kPage / 2 - from) % kPage : (0 - from) % kLine;
  }
  std::unique_ptr<char[]> memory_;
  char* begin_ = nullptr;
};

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

// The second. Tests set it, so that what one machine does is tested on all.
inline std::atomic<int64_t>& second_cache() {
  static std::atomic<int64_t> bytes{cache_bytes(2, int64_t{256} << 10, int64_t{4} << 20)};
  return bytes;
}
inline int64_t second_cache_bytes() { return second_cache().load(std::memory_order_relaxed); }

// Whether loops that store rows while they sum others pay in a cache: where L2 has 2 MiB, which says that the last
// cache is far. There a core has so many lines on their way at most, so many bytes a second, be they read or written
// (an Emerald Rapids: 28 GB/s), and loops that only read, then only write, leave places empty. Gradients of two rows
// are so stored while the next two are summed (backward_pairs.h), be they stored from their end otherwise or not. A Zen
// 4, whose stores stop loads (should_walk_back()), and a Zen 5 have half of that L2, and backward wasn't measured
// there.
inline bool has_large_second_cache() { return second_cache_bytes() >= int64_t{2} << 20; }

// Whether L1 has no room for the rows to come beside those at hand and what is written or multiplied with them. With 48
// KiB of L1, rows of up to 16 KiB go on as they were measured on a Zen 5.
inline bool fills_first_cache(const Forward& f) {
  return 3 * block_rows(f.input, f.columns) * f.columns * size_of(f.input) > first_cache_bytes();
}

// fp32 that is only normalised: what waits for the caches most.
inline bool is_plain(const Forward& f) {
  return f.input == Type::f32 && !f.add && !f.add_after && !f.twice && !f.layer && f.gate == Gate::none &&
         f.modulate == Modulate::none;
}

// Rows whose gain leaves room in L1 for an output that stays there.
inline bool has_short_rows(const Forward& f) { return f.columns * size_of(f.input) <= first_cache_bytes() / 8; }

// Whether several threads have `share` bytes each of what the last cache can just hold.
inline bool share_a_cache(int64_t bytes, int64_t share) { return share < bytes && !is_large(bytes - 1); }

// Whether even.h has loops for a call, and L1 room for three blocks: a Zen 5 (48 KiB), whose numbers these are, by 1
// thread. In L2 and the last cache, fp32: 2048x128 0.84 of the time, 8192x256 0.82, 2048x576 0.89, 512x1024 0.9; bf16:
// 32768x128 and 2048x576 0.86.
inline bool is_even(const Target& target, const Forward& f) {
  const bool has = f.input == Type::f32    ? target.even
                   : f.input == Type::bf16 ? target.even_bf16 && !f.round_first && f.output == f.input
                                           : false;
  return has && f.gain_type == f.input && f.gain.count == 1 && !f.add && !f.add_after && !f.twice && !f.layer &&
         !f.general && f.gate == Gate::none && f.turn == Turn::none && f.modulate == Modulate::none && f.columns > 0 &&
         has_short_rows(f) && !fills_first_cache(f);
}

// Whether it has them past the caches, for rows that begin with lines: 32768x128 0.68 of the time, 16384x256 0.76,
// 7281x576 0.77; out of memory 32768x576 0.91, but 16384x1024 1.08.
inline bool is_even_past_caches(const Forward& f, const char* output, int64_t next_output) {
  return f.input == Type::f32 && f.columns % 32 == 0 && f.columns * size_of(f.input) <= first_cache_bytes() / 16 &&
         (reinterpret_cast<uintptr_t>(output) | static_cast<uintptr_t>(next_output)) % 64 == 0;
}

// Whether even.h stores rows that stay in a cache in the loop that sums others, beyond L2. 32768x128 by 2 threads 0.91
// of the time, 2048x576 0.96, 1536x1024 0.95; where L2 holds two thirds, 512x576, 1.02. A Zen 5, whose L2 has 1 MiB,
// takes 1.09 to 1.14 so in its last cache, in blocks of 8 KiB.
inline bool should_weave(const Forward& f, int64_t share) {
  return f.input == Type::f32 && f.columns % 32 == 0 && has_large_second_cache() &&
         2 * share > 3 * second_cache_bytes();
}

// Whether rows to come are asked for into L2: where there is something to wait for. Always memory; for fp32 all that
// lies beyond L2 (a thread's share of 2 MiB then takes 0.97 of the time, 4 MiB 0.85 to 0.96, 8 MiB 0.75 to 0.95; within
// L2 1.03); for what computes or reads more, a last cache that the share half fills (640x4096 LayerNorm 0.95; less full
// 1.05). Half types wait for arithmetic there (32768x128 bf16 1.08). All on a Zen 4 (L1 32 KiB), where 8192x4096 fp32,
// 1 thread, takes 0.86 of a copy by it, and not 1.32. Two norms wait for two tensors at once, in half types too
// (512x4096 bf16 0.8 of the time). On a Zen 5, whose L1 isn't filled, they ask for what comes from memory alone: 256
// rows would take 1.08 of the time. So does a norm of half types that is added to what is read, too (4096x4096 bf16 by
// 1 thread 0.75 to 0.8; fp32 by 2 threads 1.04).
inline bool should_ask(const Forward& f, int64_t bytes, int64_t share) {
  const bool far = is_plain(f) || f.twice ? share > second_cache_bytes() : size_of(f.input) >= 4 && is_large(2 * share);
  const bool reads_two = f.twice || (f.add_after && size_of(f.input) == 2);
  return overflows_caches(bytes) ? reads_two || fills_first_cache(f) : far && fills_first_cache(f);
}

// Whether add's sum goes past the caches, and is added twice for it. 4096x4096 fp32 takes 0.92 of the time, by 1 thread
// or 2; 512x4096 0.7 by 1 thread, and 0.93 by two cores of a complex (1.4 with the output past their cache, too).
inline bool should_add_again(const Forward& f, int64_t bytes) {
  return (f.twice || (f.add && f.input == Type::f32)) && overflows_caches(bytes);
}

// Whether the output goes past the caches. A core complex of a Zen 4 writes 28.6 GB/s there, by one core or by several.
// So several threads stay in the last cache if it holds all that they read and write, rows are asked for, and the gain
// leaves room in L1 for the output: 32768x128 fp32 takes 396 to 468 us by two cores of a complex, and 600 to 630 past
// the cache (by cores of two complexes 397 to 506, and 362 to 426), but 1024x4096 607 to 904, and 607 to 667. Who has
// more to compute or to read for what is written loses up to a tenth: fp64, LayerNorm, add of half types. Where a sum
// goes past it, the output stays for such threads, as it is what is read next.
inline bool should_stream(const Forward& f, int64_t bytes, int64_t share) {
  const bool stay = should_add_again(f, bytes) || (is_plain(f) && has_short_rows(f) && fills_first_cache(f));
  return overflows_caches(bytes) && !(stay && share_a_cache(bytes, share));
}

// Whether rows should be stored from their end on. A load that follows a store to the same offset within 4 KiB waits
// for it: at first a CPU compares twelve bits of their addresses. Tensors that are multiples of 4 KiB lie a line or a
// few apart (64 to 256 bytes by glibc), so a store would meet the loads of columns soon to come; walking back there are
// none. On a Zen 4, 64 bytes apart: 512x4096 bf16 takes 192 us, not 250 to 260, 1024x1024 bf16 98, not 159, dx and dw
// of 512x4096 fp32 0.77 ms, not 1.0, of 3072x4096 bf16 3.3, not 5.6. From 512 bytes on it makes no difference, nor
// there to fp32 forward in a cache. What reads but one tensor takes longer by it on a Zen 5 (16x4096 1.05 to 1.19 of
// the time, 512x4096 1.09; LayerNorm 1.02 to 1.05), so forward_rows() doesn't ask for that.
inline bool should_walk_back(std::initializer_list<const char*> loads, std::initializer_list<const char*> stores) {
  int64_t ahead = 4096, behind = 4096;  // from a load to the nearest store, either way
  for (const char* load : loads)
    for (const char* store : stores)
      if (load && store) {  // the same address is as far as can be: a column is loaded before it is stored
        const auto from = reinterpret_cast<uintptr_t>(load), to = reinterpret_cast<uintptr_t>(store);
        ahead = std::min<int64_t>(ahead, (to - from - 1) % 4096);
        behind = std::min<int64_t>(behind, (from - to - 1) % 4096);
      }
  return ahead < std::min<int64_t>(behind, 512);
}

// Asks for 2 MiB pages before a fresh output is touched: with 4 KiB pages, 80 % of the time to write 128 MiB goes to
// page faults. An output of this size has pages of its own (glibc maps from 32 MiB on, others earlier); where it has
// not, or the system keeps its huge pages for itself, the request does nothing. Whether the last whole page isn't there
// yet, and so most likely none.
inline bool ask_for_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (begin >= end) return false;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  unsigned char there = 1;
  return mincore(reinterpret_cast<void*>(end - kPage), kPage, &there) == 0 && !(there & 1);
#else
  return false;
#endif
}

// Bytes of a fresh output whose pages a thread makes at a time, at least: as much as one huge page, where it has those.
constexpr int64_t kMadeAtOnce = int64_t{2} << 20;

// Makes the pages that begin between two addresses, by one call of the system that changes no content. Where a page is
// made by the first store to it, the lines that the system has just zeroed are still in L2, and stores past the caches
// drive them out one by one: made beforehand, 4096x4096 fp32 takes 0.84 of the time and bf16 0.80, by 1 thread and by 2
// (Emerald Rapids; add 0.90, gradients 0.91 to 0.97). Pages of 4 KiB take 0.6, as a fault costs twice as much for each.
// Linux before 5.14 has no such call: stores make the pages there.
inline void make_pages([[maybe_unused]] uintptr_t from, [[maybe_unused]] uintptr_t to) {
#if defined(MADV_HUGEPAGE)
  constexpr int populate_write = 23;  // MADV_POPULATE_WRITE, which older headers lack
  const uintptr_t begin = (from + kPage - 1) / kPage * kPage, end = (to + kPage - 1) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, populate_write);
#endif
}

}  // namespace rmsnorm
