// Calls the kernels through rows.h and dispatch.cpp as ops.cpp does, on one thread and on several, and compares the
// bits; exits with 1 at the first difference. ThreadSanitizer looks on (sanitize.sh): it knows nothing of the OpenMP
// that torch brings, so the threads are made here, and split the work as torch's parallel_for does.
//
// Link with dispatch.o, target_baseline.o and, on x86-64, target_avx2.o.
#include <cstdio>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/rows.h"

namespace rmsnorm {
#if defined(__x86_64__)
// dispatch.cpp asks for these. Which instructions write a row makes no difference to who writes it.
extern const Target target_avx2, target_avx512, target_avx512bf16;
const Target target_avx512 = target_avx2, target_avx512bf16 = target_avx2;
#endif
}  // namespace rmsnorm
using namespace rmsnorm;

extern "C" const char* rmsnorm_cpu_target();
extern "C" const char* rmsnorm_cpu_targets();
extern "C" bool rmsnorm_set_cpu_target(const char* name);

namespace {

using Bytes = std::vector<char>;
using Threads = std::vector<std::jthread>;  // joined where they go out of scope

struct Problem {
  Type type;
  int64_t outer, inner, columns;  // outer × inner rows
};

// Rows that make chunks of 32 (the last one of a single row) and of 33, fewer rows than threads, and none.
constexpr Type kTypes[] = {Type::f32, Type::f64, Type::bf16, Type::f16};
constexpr int64_t kShapes[][3] = {{3, 43, 576}, {3, 43, 33}, {5, 829, 3}, {1, 2, 1027}, {4, 40, 0}, {0, 8, 16}};

// Any bits, but for the exponent's highest: every number is finite and below 2.
Bytes random_bytes(Type type, int64_t count, unsigned seed) {
  Bytes bytes(count * size_of(type));
  std::mt19937 random(seed);
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = (char)(random() & ((i + 1) % size_of(type) ? 0xff : 0xbf));
  return bytes;
}

// torch's: as few parts as there are threads, all of one size but the last. A grain of 1 splits small problems too.
template <class Function>
void parallel(int64_t threads, int64_t count, const Function& function) {
  if (count == 0) return;
  const int64_t each = (count + threads - 1) / threads;
  Threads running;
  for (int64_t begin = 0; begin < count; begin += each)
    running.emplace_back([&, begin] { function(begin, std::min(count, begin + each)); });
}

// Forward with a residual, from transposed rows; then backward, from an expanded gradient: with and without the
// weight's gradient. Returns what was written.
std::vector<Bytes> run(const Problem& p, int64_t threads) {
  const int64_t rows = p.outer * p.inner, pitch = p.columns * size_of(p.type), wide_size = size_of(wide(p.type));
  Bytes input = random_bytes(p.type, rows * p.columns, 1), residual = random_bytes(p.type, rows * p.columns, 2);
  Bytes grad = random_bytes(p.type, p.outer * p.columns, 3), weight = random_bytes(p.type, p.columns, 4);
  Bytes gain(padded(p.columns) * wide_size), raw(gain.size()), output(rows * pitch), sum(rows * pitch),
      rstd(rows * wide_size);
  const Target& target = current_target();
  target.make_gain(Type::none, p.type, weight.data(), 1.0, wide(p.type), gain.data(), p.columns);
  target.make_gain(p.type, p.type, weight.data(), 1.0, wide(p.type), raw.data(), p.columns);

  Forward f = {};
  f.columns = p.columns, f.eps = 1e-6, f.input = p.type, f.output = p.type, f.gain_type = wide(p.type), f.add = true;
  f.gain.data = gain.data();
  Operands<kForwardOperands> forward;
  forward.data = {input.data(), output.data(), residual.data(), sum.data(), nullptr};
  forward.push(p.outer, {pitch, p.inner * pitch, p.inner * pitch, p.inner * pitch, 0});
  forward.push(p.inner, {p.outer * pitch, pitch, pitch, pitch, 0});
  parallel(threads, rows, [&](int64_t begin, int64_t end) {
    forward_rows(target, f, forward, {rstd.data(), nullptr, nullptr}, nullptr, begin, end);
  });

  std::vector<Bytes> written = {output, sum, rstd};
  for (bool need_weight : {false, true}) {
    Bytes grad_input(rows * pitch), grad_weight(pitch);
    Backward b = {};
    b.columns = p.columns, b.eps = 1e-6, b.input = p.type, b.need_input = true, b.need_weight = need_weight,
    b.add = true;
    b.gain.data = raw.data();
    Operands<kBackwardOperands> backward;
    backward.data = {sum.data(), grad.data(), grad_input.data(), residual.data(), nullptr, nullptr};
    backward.push(p.outer, {p.inner * pitch, pitch, p.inner * pitch, p.inner * pitch, 0, 0});
    backward.push(p.inner, {pitch, 0, pitch, pitch, 0, 0});
    if (need_weight) {
      const int64_t each = chunk_rows(b, rows), chunks = (rows + each - 1) / each;
      Totals totals(b, chunks, 1, each);
      parallel(threads, chunks, [&](int64_t begin, int64_t end) {
        const auto partial = std::make_unique<char[]>(grad_rows(b) * grad_stride(b));
        for (int64_t chunk = begin; chunk < end; ++chunk)
          backward_rows(target, b, backward, rstd.data(), nullptr, nullptr, partial.get(), totals.of(chunk, begin, end),
                        chunk * each, std::min(rows, (chunk + 1) * each));
      });
      parallel(threads, p.columns, [&](int64_t begin, int64_t end) {
        target.finish(totals.summands(0), begin, end, p.type, grad_weight.data());
      });
    } else {
      parallel(threads, rows, [&](int64_t begin, int64_t end) {
        backward_rows(target, b, backward, rstd.data(), nullptr, nullptr, nullptr, {}, begin, end);
      });
    }
    written.insert(written.end(), {grad_input, grad_weight});
  }
  return written;
}

}  // namespace

int main() {
  {  // the first use of the list of targets, by all at once
    Threads running;
    for (int i = 0; i < 4; ++i) running.emplace_back([] { rmsnorm_cpu_targets(), rmsnorm_cpu_target(); });
  }
  std::vector<Problem> problems;
  for (Type type : kTypes)
    for (const auto& [outer, inner, columns] : kShapes) problems.push_back({type, outer, inner, columns});
  std::vector<std::vector<Bytes>> expected;
  for (const Problem& p : problems) expected.push_back(run(p, 1));

  long compared = 0;
  const auto check = [&](size_t i, const std::vector<Bytes>& actual, const char* how) {
    const char* names[] = {"output", "sum", "rstd", "grad_input alone", "", "grad_input", "grad_weight"};
    for (size_t k = 0; k < actual.size(); ++k, ++compared)
      if (actual[k] != expected[i][k]) {
        const Problem& p = problems[i];
        std::printf("%s differs: %s, type %d, %lld x %lld rows of %lld columns\n", names[k], how, (int)p.type,
                    (long long)p.outer, (long long)p.inner, (long long)p.columns);
        std::exit(1);
      }
  };
  for (size_t i = 0; i < problems.size(); ++i)
    for (int threads : {2, 3, 5})
      check(i, run(problems[i], threads), std::to_string(threads).append(" threads").c_str());

  // All problems at once, while the target changes: a call keeps the one that it began with.
  std::vector<std::vector<Bytes>> actual(problems.size());
  {
    Threads running;
    for (size_t i = 0; i < problems.size(); ++i) running.emplace_back([&, i] { actual[i] = run(problems[i], 2); });
    running.emplace_back([](std::stop_token stop) {
      while (!stop.stop_requested())
        for (auto target = available_targets(); *target; ++target) rmsnorm_set_cpu_target((*target)->name);
    });
    for (size_t i = 0; i < problems.size(); ++i) running[i].join();
  }
  for (size_t i = 0; i < problems.size(); ++i) check(i, actual[i], "beside other calls");
  std::printf("%ld tensors compared, all equal, with 1, 2, 3 and 5 threads and beside other calls\n", compared);
}
