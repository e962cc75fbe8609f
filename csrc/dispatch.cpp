// The only file that asks what this CPU can do, and holds the choice of target. Its extern "C" functions are what
// _native.py calls through ctypes.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "kernel.h"

namespace rmsnorm {

extern const Target target_baseline;
#if defined(__x86_64__)
extern const Target target_avx2, target_avx512, target_avx512bf16;

// Whether AVX2 is the faster: a plain forward of ones that fit in L2, the fastest of some calls each, taking turns. A
// twentieth at least, so that chance doesn't decide.
static bool is_narrow_faster(Type type, const Target& wide) {
  constexpr int64_t rows = 8, columns = 4096, bytes = rows * columns * 4;
  const std::unique_ptr<char[]> memory(new char[3 * bytes + 64]);  // input, output, and what is more than a gain
  char* const input = memory.get() + (-reinterpret_cast<uintptr_t>(memory.get()) & 63);
  for (int64_t i = 0; i < 3 * bytes / size_of(type); ++i)
    if (type == Type::f32) reinterpret_cast<float*>(input)[i] = 1;
    else reinterpret_cast<uint16_t*>(input)[i] = 0x3c00;
  Forward f = {};
  f.columns = columns, f.eps = 1e-6, f.input = f.output = f.gain_type = type;
  ForwardRows batch = {};
  batch.count = rows;
  for (int64_t r = 0; r < rows; ++r) {
    batch.input[r] = input + r * columns * size_of(type);
    batch.output[r] = input + bytes + r * columns * size_of(type);
    batch.gain[r] = input + 2 * bytes;
  }
  const auto seconds = [&](ForwardKernel kernel) {
    const auto start = std::chrono::steady_clock::now();
    kernel(f, batch);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  double narrow_seconds = 1, wide_seconds = 1;
  for (int round = 0; round < 16; ++round) {
    narrow_seconds = std::min(narrow_seconds, seconds(target_avx2.forward(f)));
    wide_seconds = std::min(wide_seconds, seconds(wide.forward(f)));
  }
  return narrow_seconds < 0.95 * wide_seconds;
}

// What a CPU with AVX-512 has where AVX2 is the faster, in bits the same: for some types. A Zen 4 takes 512 bits in two
// halves, and converts them one after the other: AVX2 takes 0.88 of the time for fp32 in L2, and 0.73 for fp16
// (16x4096). Of rows that end within a vector it takes 1.2 and 2.4 (256x100).
struct Mixed {
  explicit Mixed(const Target& wide)
      : wide(wide), fp32(is_narrow_faster(Type::f32, wide)), fp16(is_narrow_faster(Type::f16, wide)), target(wide) {
    name = std::string(wide.name) + "+avx2" + (fp32 && fp16 ? "(fp32,fp16)" : fp32 ? "(fp32)" : "(fp16)");
    target.name = name.c_str();
    target.even &= !fp32;
  }

  const Target& wide;
  const bool fp32, fp16;
  Target target;
  std::string name;
};

static const Mixed* mixed = nullptr;

static ForwardKernel mixed_forward(const Forward& f) {
  const bool plain = !f.layer && f.gate == Gate::none && f.columns % 16 == 0;
  const bool narrow = plain && ((f.input == Type::f32 && mixed->fp32) || (f.input == Type::f16 && mixed->fp16));
  return (narrow ? target_avx2 : mixed->wide).forward(f);
}
#endif

const Target* const* available_targets() {
  static const Target* list[6] = {};
  static const bool filled = [] {
    int count = 0;
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool bf16 = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    const Target* wide = !avx512 ? nullptr : bf16 ? &target_avx512bf16 : &target_avx512;
    const char* named = std::getenv("RMSNORM_CPU_TARGET");  // then nobody asks which is faster
    if (wide && !(named && *named)) {
      static Mixed found(*wide);
      mixed = &found, found.target.forward = &mixed_forward;
      if (found.fp32 || found.fp16) list[count++] = &found.target;
    }
    if (wide) list[count++] = wide;
    if (avx2) list[count++] = &target_avx2;
#endif
    list[count] = &target_baseline;
    return true;
  }();
  (void)filled;
  return list;
}

static std::atomic<const Target*> chosen{nullptr};

const Target& current_target() {
  const Target* target = chosen.load(std::memory_order_relaxed);
  return target ? *target : *available_targets()[0];  // not stored: that could undo a choice made meanwhile
}

}  // namespace rmsnorm

using rmsnorm::Target;

// "avx512bf16" is the avx512 target with the bf16 conversion instruction: users choose it as avx512.
static bool answers_to(const Target& target, const char* name) {
  return !strcmp(target.name, name) || (!strcmp(name, "avx512") && !strcmp(target.name, "avx512bf16"));
}

extern "C" __attribute__((visibility("default"))) const char* rmsnorm_cpu_target() {
  return rmsnorm::current_target().name;
}

// Of the kernels in use; the text is the caller's.
extern "C" __attribute__((visibility("default"))) void rmsnorm_contract(char* text, int64_t room) {
  rmsnorm::current_target().describe(text, room);
}

extern "C" __attribute__((visibility("default"))) const char* rmsnorm_cpu_targets() {
  static const std::string names = [] {
    std::string list;
    for (auto target = rmsnorm::available_targets(); *target; ++target) list += std::string((*target)->name) + " ";
    return list;
  }();
  return names.c_str();
}

extern "C" __attribute__((visibility("default"))) bool rmsnorm_set_cpu_target(const char* name) {
  for (auto target = rmsnorm::available_targets(); *target; ++target)
    if (answers_to(**target, name)) {
      rmsnorm::chosen = *target;
      return true;
    }
  return false;
}
