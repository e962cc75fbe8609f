// The only file that says what a launch of a kernel made by Triton is: its arguments, and what it was compiled for.
//
// Triton compiles a kernel anew for the types of its arguments, for addresses and integers that 16 divides, for
// integers that are 1 or beyond 32 bits, and for each constant. All of that is the key of a launch, a byte for each
// argument. gpu/launcher.py reads the key of a kernel that isn't known yet; launch.cpp keeps those that are, and
// launches them.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

namespace rmsnorm {

// Those of gpu/launcher.py, in its order.
enum class Kernel : uint8_t { forward, add, backward, wide_means, fold, sandwich, quantised, turn };

struct LaunchKey {
  static constexpr int kConstants = 10, kKinds = 72;
  uint8_t kernel, warps;
  uint16_t device;
  int32_t kinds;                              // how many there are
  double offset;                              // the constant of that name
  std::array<int32_t, kConstants> constants;  // the others, in the kernel's order
  std::array<uint8_t, kKinds> kind;
  bool operator==(const LaunchKey& other) const { return std::memcmp(this, &other, sizeof(LaunchKey)) == 0; }
};
static_assert(sizeof(LaunchKey) == 128 && sizeof(LaunchKey) % 8 == 0);

class Launch {
 public:
  // As gpu/launcher.py reads them. An integer's kind is of three bits more, a pointer's of the type's number and one.
  enum Kind : uint8_t { kNone = 1, kOpen, kClose, kMore, kNumber, kInteger = 8, kCount = 16, kPointer = 128 };

  Launch(Kernel kernel, int device, int64_t warps) : key_{} {
    key_.kernel = static_cast<uint8_t>(kernel);
    key_.device = static_cast<uint16_t>(device), key_.warps = static_cast<uint8_t>(warps);
  }

  // Arguments, in the kernel's order: what isn't there, a tuple's ends, and numbers.
  void none() { push(kNone, 0); }
  void open(Kind kind = kOpen) { mark(kind); }
  void close() { mark(kClose); }
  void number(double value) {
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    push(kNumber, bits);
  }
  void integer(int64_t value) {
    push(kInteger + (value == 1) + 2 * (value % 16 == 0) + 4 * (value > INT32_MAX), static_cast<uint64_t>(value));
  }
  // One that nothing is compiled anew for, but its width.
  void count(int64_t value) { push(kCount + (value > INT32_MAX), static_cast<uint64_t>(value)); }
  // Null is none; `code` is torch's number of the type.
  void pointer(const void* data, int32_t code) {
    const auto address = reinterpret_cast<uintptr_t>(data);
    if (data) push(static_cast<uint8_t>(kPointer + 2 * code + (address % 16 == 0)), address);
    else none();
  }
  void constant(int64_t value) { key_.constants[constants_++] = static_cast<int32_t>(value); }
  void offset(double value) { key_.offset = value + 0.0; }  // -0.0 is the same

  // Launches so many programs on the current stream of the device; nothing where there are none. Returns false if the
  // kernel is one that Triton has to launch itself; throws what the driver says.
  bool run(int64_t x, int64_t y = 1, int64_t z = 1);

 private:
  void mark(uint8_t kind) { key_.kind[key_.kinds++] = kind; }
  void push(uint8_t kind, uint64_t value) {
    mark(kind);
    values_[count_++] = value;
  }

  LaunchKey key_;
  std::array<uint64_t, LaunchKey::kKinds> values_;
  int count_ = 0, constants_ = 0;
};

// Who serves a device: Python, until it has found out whether the kernels run there; torch what its fused kernel means,
// and ours the rest; ours all; or torch what it can, and Python the rest.
enum class Serving : int8_t { python, torch_first, ours, torch_alone };
Serving serving(int device);

// Which tiles a launch has, from gpu/launch.py and gpu/backward.py: the only tables there are.
struct Tiles {
  enum Way { forward, forward_more, backward, backward_more, backward_f64, kWays };
  int64_t widest[kWays], loop_block[kWays], tile[kWays][2], per_warp[kWays];
  int64_t narrow, fewest_warps, most_warps;
  int64_t partials[2], fewest_steps, steps, group_partials[2], fold[3];
};
const Tiles& tiles();

}  // namespace rmsnorm
