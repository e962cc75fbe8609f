// The only file that knows a GPU's driver, whose functions _native.py finds at run time: keeps the kernels that Triton
// loaded, and launches them.
//
// A kernel belongs to the context that it was loaded into, which is made current for a launch if it isn't; so a thread
// may be on any device. Nothing here waits for a device, so a launch can be captured in a graph. A process that was
// forked off has no driver: CUDA can't be used there, as torch says.
#include "launch.h"

#include <pthread.h>

#include <array>
#include <atomic>

#include "refuse.h"

namespace rmsnorm {
namespace {

constexpr int kDevices = 256;
constexpr const char* kNames[] = {"forward", "add", "backward", "wide_means", "fold", "sandwich", "quantised", "turn"};

// What is asked of the driver, and of torch's library for CUDA: before torch 2.13 its stable ABI tells a stream's
// number, not the stream.
struct Driver {
  int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
  int (*current)(void**);
  int (*push)(void*);
  int (*pop)(void**);
  int (*words)(int, const char**);
  int (*stream)(int32_t, void**);
};
Driver driver = {};

// A kernel that was made known. There are dozens in a process, of which none is ever forgotten: so a list behind each
// of some hash values, to which a thread adds while others read.
struct Known {
  LaunchKey key;
  void* function;  // null: Triton launches it
  void* context;
  unsigned threads, shared;
  std::array<uint8_t, LaunchKey::kKinds> bytes;  // of each argument; none of what is compiled into the kernel
  const Known* next;
};
std::array<std::atomic<const Known*>, 512> lists = {};

std::array<std::atomic<Serving>, kDevices> served = {};
std::atomic<bool> forked = false;
bool (*load)(const LaunchKey*, int64_t) = nullptr;
Tiles table = {};

std::atomic<const Known*>& list_of(const LaunchKey& key) {
  std::array<uint64_t, sizeof(LaunchKey) / 8> words;
  std::memcpy(words.data(), &key, sizeof(key));
  uint64_t hash = 0;
  for (const uint64_t word : words) hash = (hash ^ word) * 0x9e3779b97f4a7c15, hash ^= hash >> 29;
  return lists[hash % lists.size()];
}

const Known* find(const LaunchKey& key) {
  const Known* known = list_of(key).load(std::memory_order_acquire);
  while (known && !(known->key == key)) known = known->next;
  return known;
}

// The context of a kernel, while this lives.
struct Current {
  explicit Current(void* context) {
    void* now = nullptr;
    other = driver.current(&now) != 0 || now != context;
    if (other) driver.push(context);
  }
  ~Current() {
    void* was;
    if (other) driver.pop(&was);
  }
  bool other;
};

[[gnu::cold, noreturn]] void failed(const LaunchKey& key, const Known& kernel, int64_t x, int64_t y, int64_t z,
                                    int code) {
  const char* words = nullptr;
  if (driver.words(code, &words) != 0 || !words) words = "an error that the driver has no words for";
  refuse("rmsnorm: the driver did not launch the kernel ", kNames[key.kernel], " on device ", key.device, ": ", words,
         " (", code, "); grid ", x, " x ", y, " x ", z, ", block ", kernel.threads, ", shared memory ", kernel.shared,
         " bytes");
}

}  // namespace

bool Launch::run(int64_t x, int64_t y, int64_t z) {
  if (x == 0 || y == 0 || z == 0) return true;
  require(!forked.load(std::memory_order_relaxed),
          "rmsnorm: CUDA can't be used in a process that was forked off one that used it; start it with 'spawn'");
  const Known* kernel = find(key_);
  if (!kernel) [[unlikely]] {
    if (!load || !load(&key_, sizeof(key_)) || !(kernel = find(key_))) return false;
  }
  if (!kernel->function) return false;
  std::array<void*, LaunchKey::kKinds + 2> parameters;
  int count = 0;
  for (int i = 0; i < count_; ++i)
    if (kernel->bytes[i]) parameters[count++] = &values_[i];  // the low bytes come first
  uint64_t scratch = 0;  // two addresses of room, which our kernels don't use; a driver reads as many as a kernel has
  parameters[count++] = &scratch, parameters[count++] = &scratch;
  void* stream = nullptr;
  require(driver.stream(key_.device, &stream) == 0, "rmsnorm: torch has no current stream for device ", key_.device);
  const Current context(kernel->context);
  const int code =
      driver.launch(kernel->function, static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z),
                    kernel->threads, 1, 1, kernel->shared, stream, parameters.data(), nullptr);
  if (code != 0) failed(key_, *kernel, x, y, z, code);
  return true;
}

Serving serving(int device) {
  return device < 0 || device >= kDevices ? Serving::python : served[device].load(std::memory_order_relaxed);
}

const Tiles& tiles() { return table; }

}  // namespace rmsnorm

// For _native.py, through ctypes: the functions of Driver, in its order.
extern "C" __attribute__((visibility("default"))) void rmsnorm_gpu_open(const void* functions) {
  std::memcpy(&rmsnorm::driver, functions, sizeof(rmsnorm::driver));
}

// Who makes kernels known: a function that gets a key, and says whether it did.
extern "C" __attribute__((visibility("default"))) void rmsnorm_gpu_loader(bool (*loader)(const rmsnorm::LaunchKey*,
                                                                                         int64_t)) {
  rmsnorm::load = loader;
}

extern "C" __attribute__((visibility("default"))) void rmsnorm_gpu_tiles(const int64_t* numbers, int64_t count) {
  if (count * sizeof(int64_t) == sizeof(rmsnorm::Tiles)) std::memcpy(&rmsnorm::table, numbers, sizeof(rmsnorm::Tiles));
}

extern "C" __attribute__((visibility("default"))) void rmsnorm_gpu_serve(int device, int how) {
  if (device >= 0 && device < rmsnorm::kDevices) rmsnorm::served[device] = static_cast<rmsnorm::Serving>(how);
}

// Keeps a kernel, which was loaded into the context that is current now.
extern "C" __attribute__((visibility("default"))) void rmsnorm_gpu_kernel(const rmsnorm::LaunchKey* key,
                                                                          uint64_t function, int threads, int shared,
                                                                          const uint8_t* bytes, int64_t count) {
  using namespace rmsnorm;
  [[maybe_unused]] static const int once = pthread_atfork(nullptr, nullptr, [] { forked = true; });
  Known* known =
      new Known{*key, reinterpret_cast<void*>(function), nullptr, unsigned(threads), unsigned(shared), {}, {}};
  for (int64_t i = 0; i < count && i < LaunchKey::kKinds; ++i) known->bytes[i] = bytes[i];
  driver.current(&known->context);
  auto& list = list_of(*key);
  known->next = list.load();
  while (!list.compare_exchange_weak(known->next, known)) {
  }
}

// Forgets all kernels: for the tests.
extern "C" __attribute__((visibility("default"))) void rmsnorm_gpu_forget() {
  for (auto& list : rmsnorm::lists) list = nullptr;
}
