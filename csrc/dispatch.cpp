// The only file that asks what this CPU can do, and holds the choice of target. Its extern "C" functions are what
// _native.py calls through ctypes.
#include <atomic>
#include <cstring>
#include <string>

#include "kernel.h"

namespace rmsnorm {

extern const Target target_baseline;
#if defined(__x86_64__)
extern const Target target_avx2, target_avx512, target_avx512bf16;

// A Zen 4 takes 512 bits in two halves, and converts them one after the other. So it has these targets' kernels, each
// where it is the faster: AVX2 takes 0.88 of the time for fp32 in L2, and 0.73 for fp16 (16x4096), in bits the same. Of
// rows that end within a vector it takes 1.2 and 2.4 (256x100).
static ForwardKernel forward_on_zen4(const Forward& f) {
  const bool plain = !f.layer && f.gate == Gate::none && f.columns % 16 == 0;
  const bool narrow = plain && (f.input == Type::f32 || f.input == Type::f16);
  return (narrow ? target_avx2 : target_avx512bf16).forward(f);
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
    static Target zen4 = target_avx512bf16;
    zen4.name = "zen4", zen4.forward = &forward_on_zen4;
    if (avx512 && __builtin_cpu_is("amdfam19h")) list[count++] = &zen4;
    if (avx512 && __builtin_cpu_supports("avx512bf16")) list[count++] = &target_avx512bf16;
    else if (avx512) list[count++] = &target_avx512;
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
