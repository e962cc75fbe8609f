// Runs the kernels of several targets on the same rows and compares every bit that they write; exits with 1 at the
// first difference. Also what the sanitizers run: every row lies at the very end of its own allocation, half of them
// at the very beginning too, so that one element read or written too far is seen.
//
// Link with any of the objects that target.cpp makes; the first one there, in the order below, is the reference.
// With a file's name it writes a hash of each tensor of the reference there, and with --digest before the name it does
// nothing else: two CPUs that can't run in one process are compared by their digests (sanitize.sh).
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <tuple>
#include <vector>

#include "../../csrc/rows.h"

namespace rmsnorm {
extern const Target target_baseline __attribute__((weak)), target_avx2 __attribute__((weak));
extern const Target target_avx512 __attribute__((weak)), target_avx512bf16 __attribute__((weak));
}  // namespace rmsnorm
using namespace rmsnorm;

namespace {

constexpr Type kTypes[] = {Type::f32, Type::f64, Type::bf16, Type::f16};
constexpr int64_t kColumns[] = {0, 1, 3, 15, 16, 17, 31, 33, 64, 127, 129, 576, 1027, 4096, 5137, 9001};

// A float as bits of the type, good enough for test data.
void put(char* to, Type type, double value) {
  const float narrow = (float)value;
  uint32_t bits;
  std::memcpy(&bits, &narrow, 4);
  const uint32_t magnitude = bits & 0x7fffffff;
  uint16_t half = (uint16_t)(bits >> 16);
  if (type == Type::f16)  // truncated; any subnormal below and the largest finite number above its normal numbers
    half = (uint16_t)((bits >> 16 & 0x8000) | (magnitude < (113u << 23)    ? bits & 0x3ff
                                               : magnitude < (143u << 23)  ? (magnitude >> 13) - (112 << 10)
                                               : magnitude < (255u << 23)  ? 0x7bff
                                               : magnitude == (255u << 23) ? 0x7c00
                                                                           : 0x7e00));
  if (type == Type::f64) std::memcpy(to, &value, 8);
  else if (type == Type::f32) std::memcpy(to, &narrow, 4);
  else std::memcpy(to, &half, 2);
}

using Bytes = std::vector<char>;

// Plain, tiny, huge, zero, and rows with a NaN or an Inf; then plain ones, as the kernels take several of them together
// (backward_pairs.h eight). Made once: random numbers take longer than the kernels. The
// same on every platform: mt19937_64 is in the standard to the bit, normal_distribution calls the platform's log.
const Bytes& make_rows(Type type, int64_t rows, int64_t columns, unsigned seed) {
  static std::map<std::tuple<Type, int64_t, int64_t, unsigned>, Bytes> made;
  const auto [entry, is_new] = made.try_emplace({type, rows, columns, seed});
  Bytes& bytes = entry->second;
  if (!is_new || type == Type::none) return bytes;
  bytes.resize(rows * columns * size_of(type));
  std::mt19937_64 random(seed);
  const double scales[] = {1.0, 1e-39, 1e30, 0.0, 1e3, 1.0, 1e-20};
  for (int64_t i = 0; i < rows * columns; ++i) {
    const int64_t row = i / columns;
    const uint64_t bits = random();
    // The difference of two uniform numbers; √6 gives it unit variance, and all 53 bits to an fp64 mantissa.
    double value =
        ((double)(bits >> 32) - (double)(uint32_t)bits) * 0x1p-32 * 2.449489742783178 * (row < 7 ? scales[row] : 1.0);
    if (row == 5 && i % columns == columns / 2) value = columns % 2 ? INFINITY : NAN;
    put(bytes.data() + i * size_of(type), type, value);
  }
  return bytes;
}

// The bits of elements; any NaN is the same one, as its sign and payload are not promised.
template <class Word>
std::vector<Word> words_of(const Bytes& bytes, Word infinity) {
  std::vector<Word> words(bytes.size() / sizeof(Word));
  if (!words.empty()) std::memcpy(words.data(), bytes.data(), bytes.size());
  const Word sign = (Word)((Word)1 << (8 * sizeof(Word) - 1));
  for (Word& word : words)
    if ((Word)(word & ~sign) > infinity) word = (Word)(infinity + 1);
  return words;
}

template <class Function>
auto with_words(Type type, const Function& function) {
  if (type == Type::f64) return function((uint64_t)0x7ff << 52);
  if (type == Type::f32) return function((uint32_t)0x7f800000);
  return function((uint16_t)(type == Type::bf16 ? 0x7f80 : 0x7c00));
}

bool same(const Bytes& a, const Bytes& b, Type type) {
  if (a == b) return true;
  return with_words(type, [&](auto infinity) {
    const auto left = words_of(a, infinity), right = words_of(b, infinity);
    for (size_t i = 0; i < left.size(); ++i)
      if (left[i] != right[i]) {
        std::printf("element %zu: %llx and %llx\n", i, (unsigned long long)left[i], (unsigned long long)right[i]);
        return false;
      }
    return true;
  });
}

// A multiplication an element, as FNV-1a has one a byte: under qemu those took longer than the kernels. The shift
// brings high bits down, where a multiplication doesn't: two signs that differ would else make up for each other.
uint64_t digest_of(const Bytes& bytes, Type type) {
  return with_words(type, [&](auto infinity) {
    uint64_t hash = 0xcbf29ce484222325;
    for (const uint64_t bits : words_of(bytes, infinity)) hash = (hash ^ bits) * 0x9e3779b97f4a7c15, hash ^= hash >> 32;
    return hash;
  });
}

// Rows, each at the end of its own allocation: the first half as aligned as malloc makes them, with nothing of their
// own in front; the others, and a row alone, one element off.
struct Rows {
  std::vector<Bytes> row;
  int64_t bytes;
  Rows(const Bytes& all, int64_t rows, int64_t bytes, int64_t element) : row(rows), bytes(bytes) {
    for (int64_t r = 0; r < rows; ++r) {
      row[r].resize(bytes + (2 * r >= rows - 1 ? element : 0));
      row[r].shrink_to_fit();
      if (!all.empty()) std::memcpy(at(r), all.data() + r * bytes, bytes);
    }
  }
  char* at(int64_t r) { return row[r].data() + row[r].size() - bytes; }
  Bytes gather() const {
    Bytes all;
    for (const Bytes& r : row) all.insert(all.end(), r.end() - bytes, r.end());
    return all;
  }
};

struct Case {
  Type input, gain, output;
  bool round_first, add;
  int64_t columns;
  bool layer = false;
  Gate gate = Gate::none;
  bool gate_first = false;
  double eps = 1e-6;
  Turn turn = Turn::none;
  bool interleaved = false;
  Type angle = Type::none;  // or of modulations
  Modulate modulate = Modulate::none;
};

std::vector<Bytes> run(const Target& target, const Case& c, bool need_input, bool need_weight, bool back) {
  constexpr int64_t kRows = 15;
  const int64_t in = size_of(c.input), row_bytes = c.columns * in;
  const Bytes &x = make_rows(c.input, kRows, c.columns, 1), &residual = make_rows(c.input, kRows, c.columns, 2);
  const Bytes &dy = make_rows(c.input, kRows, c.columns, 3), &weight = make_rows(c.gain, 1, c.columns, 4);
  Rows input(x, kRows, row_bytes, in), other(residual, kRows, row_bytes, in), grad(dy, kRows, row_bytes, in);
  Rows sum({}, kRows, row_bytes, in), dx({}, kRows, row_bytes, in), dgate({}, kRows, row_bytes, in);
  Rows output({}, kRows, c.columns * size_of(c.output), size_of(c.output)),
      gain(weight, 1, c.columns * size_of(c.gain), size_of(c.gain));
  Bytes rstd(kRows * size_of(wide(c.input)));

  const int64_t stride = padded(c.columns) * size_of(wide(c.input));
  Bytes formed(stride);
  if (c.gain != Type::none) target.make_gain(c.input, c.gain, gain.at(0), 1.0, wide(c.input), formed.data(), c.columns);

  Forward f = {};
  f.columns = c.columns, f.eps = c.eps, f.input = c.input, f.output = c.output, f.gain_type = c.gain;
  f.round_first = f.round_product = c.round_first, f.add = c.add, f.layer = c.layer, f.bias = gain.at(0);
  f.gate = c.gate, f.gate_first = c.gate_first;
  // All columns are turned in one order, some in the other.
  f.turn = c.turn, f.interleaved = c.interleaved, f.angle = c.angle;
  f.turned = (c.interleaved ? c.columns : c.columns / 2 + 1) / 2 * 2;
  f.modulate = c.modulate, f.modulation = c.angle;
  const Type angle = c.angle == Type::none ? c.input : c.angle;
  const int64_t angle_bytes = c.columns * size_of(angle);
  Rows cosines(make_rows(angle, kRows, c.columns, 5), kRows, angle_bytes, size_of(angle));
  Rows sines(make_rows(angle, kRows, c.columns, 6), kRows, angle_bytes, size_of(angle));
  std::vector<double> mean(kRows);
  ForwardRows rows = {};
  rows.mean = mean.data();
  rows.count = kRows;
  rows.stream = need_input, rows.add_again = need_weight;  // the rows that happen to be aligned
  rows.back = back, rows.ask = need_weight;
  rows.rstd = rstd.data();
  const bool modulated = c.modulate == Modulate::norm;
  Bytes scratch(modulated ? 64 + 2 * stride : scratch_bytes(f));  // begins with two addresses that are no row's
  rows.scratch = scratch.data();
  for (int64_t r = 0; r < kRows; ++r)
    rows.input[r] = input.at(r), rows.residual[r] = other.at(r), rows.sum[r] = sum.at(r), rows.output[r] = output.at(r),
    rows.gate[r] = other.at(r), rows.gain[r] = c.gate == Gate::none ? gain.at(0) : formed.data();
  for (int64_t r = 0; c.turn != Turn::none && r < kRows; ++r)
    rows.gate[r] = cosines.at(r), rows.residual[r] = sines.at(r);
  for (int64_t r = 0; modulated && r < kRows; ++r)  // one scale and shift for all rows
    rows.gate[r] = cosines.at(0), rows.residual[r] = sines.at(0), rows.gain[r] = scratch.data() + 64,
    rows.first_gain[r] = scratch.data() + 64 + stride;
  for (int64_t r = 0; c.modulate == Modulate::add && r < kRows; ++r) rows.gate[r] = cosines.at(r);
  target.forward(f)(f, rows);

  // The output's codes as numbers, and behind them the scales.
  Rows codes({}, kRows, c.columns, 1);
  std::vector<float> quantised(kRows * (c.columns + 1));
  for (int64_t r = 0; r < kRows && c.output != Type::f64; ++r) {
    target.quantise(c.output, output.at(r), c.columns, need_weight, codes.at(r), &quantised[kRows * c.columns + r]);
    const char* const code = codes.at(r);
    float* const number = &quantised[r * c.columns];
    for (int64_t j = 0; j < c.columns; ++j) number[j] = static_cast<float>(static_cast<unsigned char>(code[j]));
  }
  Bytes numbers(quantised.size() * sizeof(float));
  std::memcpy(numbers.data(), quantised.data(), numbers.size());

  Bytes partial(2 * stride);
  const bool two = c.layer || modulated;
  const int64_t width = two ? 2 * c.columns : c.columns;
  std::vector<double> total(2 * width);
  Backward b = {};
  b.columns = c.columns, b.eps = c.eps, b.input = c.input, b.need_input = need_input;
  b.need_weight = need_weight && (c.layer || c.gain != Type::none || c.modulate != Modulate::none);
  b.modulate = c.modulate, b.modulation = c.angle;
  b.add = c.add && need_input, b.layer = c.layer, b.gate = c.gate, b.gate_first = c.gate_first;
  b.need_gate = c.gate != Gate::none && need_weight;
  if (c.gain != Type::none) b.gain.data = formed.data();
  if (c.turn == Turn::norm) b.turn = f, b.need_input = true;
  Bytes back_scratch(scratch_bytes(b));
  BackwardRows grads = {};
  grads.scratch = back_scratch.data();
  grads.mean = mean.data();
  grads.count = kRows;
  grads.rstd = rstd.data();
  grads.shared_weight = true;
  grads.stream = need_weight, grads.back = back, grads.pairs = !back;
  for (int64_t r = 0; r < kRows; ++r)
    grads.input[r] = input.at(r), grads.grad[r] = grad.at(r), grads.grad_sum[r] = other.at(r),
    grads.gate[r] = other.at(r), grads.grad_gate[r] = dgate.at(r), grads.grad_input[r] = dx.at(r),
    grads.gain[r] = b.gain.data, grads.grad_weight[r] = partial.data();
  for (int64_t r = 0; c.turn == Turn::norm && r < kRows; ++r)
    grads.gate[r] = cosines.at(r), grads.grad_sum[r] = sines.at(r);
  Rows dscale({}, kRows, angle_bytes, size_of(angle)), dshift({}, kRows, angle_bytes, size_of(angle));
  for (int64_t r = 0; c.modulate != Modulate::none && r < kRows; ++r) {
    grads.gate[r] = cosines.at(modulated ? 0 : r), grads.grad_gate[r] = dscale.at(r);
    grads.gain[r] = modulated ? dshift.at(r) : nullptr;
  }
  target.backward(b)(b, grads);
  Bytes part = partial;  // as another chunk's, which stays what its rows sum
  for (int64_t k = 0; k < (two ? 2 : 1); ++k) target.put_in_order(c.input, part.data() + k * stride, c.columns);
  target.flush(c.input, partial.data(), total.data(), c.columns, true);
  if (two) target.flush(c.input, partial.data() + stride, total.data() + c.columns, c.columns, true);
  Rows dw({}, 1, two ? 2 * row_bytes : row_bytes, in);
  Summands summands = {};
  summands.totals = total.data(), summands.totals_count = 2, summands.totals_apart = width;
  summands.parts_count = 1, summands.row = c.input;
  for (int64_t k = 0; k < (two ? 2 : 1); ++k, summands.totals += c.columns) {
    summands.parts = part.data() + k * stride;
    target.finish(summands, 0, c.columns, c.input, dw.at(0) + k * c.columns * size_of(c.input));
  }
  Bytes means(kRows * sizeof(double));
  std::memcpy(means.data(), mean.data(), means.size());
  Bytes own = dscale.gather();  // of modulations that rows don't share
  const Bytes shifts = dshift.gather();
  own.insert(own.end(), shifts.begin(), shifts.end());
  return {output.gather(), sum.gather(), rstd, dx.gather(), dw.gather(), means, dgate.gather(), numbers, own};
}

}  // namespace

int main(int argc, char** argv) {
  const bool compares = argc < 2 || std::strcmp(argv[1], "--digest");
  std::FILE* const digests = argc < 2 ? nullptr : std::fopen(argv[argc - 1], "w");
  if (argc > 1 && !digests) return std::perror(argv[argc - 1]), 1;
  std::vector<const Target*> targets;
  for (const Target* target : {&target_baseline, &target_avx2, &target_avx512, &target_avx512bf16})
    if (target) targets.push_back(target);
  long compared = 0;
  for (Type input : kTypes)
    for (int64_t columns : kColumns)
      for (int form = 0; form < 27; ++form)
        for (int add = 0; add < (form < 6 ? 2 : 1); ++add)
          for (int needs = 1; needs < 4; ++needs) {
            const Type wider = wide(input);
            const Case cases[] = {
                {input, Type::none, input, false, false, columns}, {input, input, input, false, false, columns},
                {input, input, input, true, false, columns},       {input, wider, input, false, false, columns},
                {input, wider, input, true, false, columns},       {input, wider, wider, true, false, columns},
                {input, Type::none, input, false, false, columns}, {input, wider, input, false, false, columns},
                {input, input, input, true, false, columns},       {input, input, input, false, false, columns},
                {input, input, wider, true, false, columns},       {input, wider, input, false, false, columns},
                {input, Type::none, input, false, false, columns}, {input, input, input, false, false, columns},
                {input, wider, input, false, false, columns},      {input, input, input, false, false, columns},
                {input, wider, input, true, false, columns},       {input, input, input, true, false, columns},
                {input, wider, input, false, false, columns},      {input, Type::none, input, false, false, columns},
                {input, Type::none, input, false, false, columns}, {input, Type::none, input, false, false, columns},
                {input, Type::none, input, true, false, columns},  {input, Type::none, input, false, false, columns},
                {input, Type::none, input, true, false, columns},  {input, Type::none, input, false, false, columns},
                {input, Type::none, input, true, false, columns}};
            Case c = cases[form];
            c.layer = form == 6 || form == 7;
            c.add = add;
            if (form >= 12 && form < 15) c.eps = -1e-6;  // a floor: of tiny rows, and of ordinary ones none
            if ((form >= 8 && form < 12) || form == 14)
              c.gate = form % 2 ? Gate::sigmoid : Gate::silu, c.gate_first = form >= 10;
            if (form >= 21) {  // modulated: RMS, LayerNorm, and the gated add
              c.layer = form == 23 || form == 24, c.modulate = form < 25 ? Modulate::norm : Modulate::add;
              c.angle = form % 2 ? wider : input;
            } else if (form >= 15) {
              c.turn = form < 19 ? Turn::norm : form == 19 ? Turn::input : Turn::back;
              c.interleaved = form % 2, c.angle = form == 15 || form == 16 || form == 19 ? input : wider;
            }
            const auto expected = run(*targets[0], c, needs & 1, needs & 2, false);
            const Type types[] = {c.output, input,     wider,
                                  input,    input,     Type::f64,
                                  input,    Type::f32, c.angle == Type::none ? input : c.angle};
            const char* names[] = {"output", "sum",       "rstd",  "grad_input", "grad_weight",
                                   "mean",   "grad_gate", "codes", "own"};
            char name[99];
            std::snprintf(name, sizeof name, "type %d, form %d, add %d, needs %d, %lld columns", (int)input, form, add,
                          needs, (long long)columns);
            for (int i = 0; digests && i < 9; ++i)
              std::fprintf(digests, "%016llx %s, %s\n", (unsigned long long)digest_of(expected[i], types[i]), names[i],
                           name);
            if (!compares) continue;
            for (const Target* target : targets)
              for (bool back : {false, true}) {
                if (target == targets[0] && !back) continue;
                const auto actual = run(*target, c, needs & 1, needs & 2, back);
                for (int i = 0; i < 9; ++i, ++compared)
                  if (!same(expected[i], actual[i], types[i])) {
                    std::printf("%s differs: %s%s from %s, %s\n", names[i], target->name, back ? ", backwards" : "",
                                targets[0]->name, name);
                    return 1;
                  }
              }
          }
  if (digests && std::fclose(digests)) return std::perror(argv[argc - 1]), 1;
  if (!compares) return 0;
  std::printf("%ld tensors compared, all equal, targets:", compared);
  for (const Target* target : targets) std::printf(" %s", target->name);
  std::printf("\n");
}
