// Proves, under AddressSanitizer, that the modulated forms stay in the scratch that they ask for: kernels stand in that
// write all of what a kernel may, to the last column and the padding behind it, and find what forward formed of
// modulations where nobody else writes. Rows are real memory, of their own sizes; no kernels are compiled.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/modulated_rows.h"

using namespace rmsnorm;

namespace {

using Bytes = std::vector<char>;
constexpr int64_t kRows = 70;
int64_t calls = 0;

void require(bool good, const char* what) {
  if (!good) std::printf("%s\n", what), std::exit(1);
}

void write(void* to, int64_t bytes) {
  if (to) std::memset(to, 7, static_cast<size_t>(bytes));
}

// What was formed is the call before's: whole, and not yet there in the first one.
void norm(const Forward& f, const ForwardRows& rows) {
  const int64_t formed = padded(f.columns) * size_of(wide(f.input)), row = f.columns * size_of(f.input);
  const void* whose[2];
  std::memcpy(whose, rows.scratch, sizeof(whose));
  char* const both[] = {static_cast<char*>(const_cast<void*>(rows.gain[0])),
                        static_cast<char*>(const_cast<void*>(rows.first_gain[0]))};
  for (int k = 0; k < 2; ++k) {
    const Bytes wanted(static_cast<size_t>(formed), static_cast<char>(k + 1));
    require(!whose[k] || !std::memcmp(both[k], wanted.data(), wanted.size()), "something wrote to what was formed");
    std::memcpy(both[k], wanted.data(), wanted.size());
  }
  require(!whose[0] == !whose[1], "scratch begins with no row's addresses, or with two");
  whose[0] = rows.gate[0], whose[1] = rows.residual[0];
  std::memcpy(rows.scratch, whose, sizeof(whose));
  for (int64_t r = 0; r < rows.count; ++r)
    std::memcpy(rows.output[r], rows.input[r], static_cast<size_t>(row)), ++calls;
}

void add(const Forward& f, const ForwardRows& rows) {
  for (int64_t r = 0; r < rows.count; ++r)
    write(rows.sum[r], f.columns * size_of(f.input)), write(rows.output[r], f.columns * size_of(f.input));
}

void back(const Backward& b, const BackwardRows& rows) {
  for (int64_t r = 0; r < rows.count; ++r) {
    require(b.modulate == Modulate::add || rows.grad_input[r], "the gradient of a sum has no room");
    write(rows.grad_input[r], b.columns * size_of(b.input)), ++calls;
  }
}

template <int N>
struct Tensors {
  Operands<N> operands;
  Bytes memory[N];
  Tensors(int64_t row_bytes, std::initializer_list<int> there, std::initializer_list<int> shared = {}) {
    std::array<int64_t, N> strides = {};
    const auto make = [&](int k, int64_t rows) {
      memory[k].resize(static_cast<size_t>(rows * row_bytes + 64));  // aligned to 32: rows may go past the caches
      operands.data[k] = memory[k].data() + (-reinterpret_cast<uintptr_t>(memory[k].data()) & 63);
      strides[k] = rows > 1 ? row_bytes : 0;
    };
    for (int k : there) make(k, kRows);
    for (int k : shared) make(k, 1);
    operands.push(kRows, strides);
  }
};

void forward(const Target& target, Type type, int64_t columns, bool added) {
  ModulatedForward m = {};
  m.normed = true, m.added = added, m.shared = kRows;
  for (Forward* f : {&m.norm, &m.add}) f->columns = columns, f->input = f->output = f->modulation = type;
  m.norm.modulate = Modulate::norm, m.add.modulate = Modulate::add;
  Tensors<kModulatedOperands> t(columns * size_of(type), {kModX, kModOutput}, {kModScale, kModShift});
  if (added)
    t = Tensors<kModulatedOperands>(columns * size_of(type), {kModX, kModResidual, kModSum, kModOutput},
                                    {kModGate, kModScale, kModShift});
  Bytes scratch(static_cast<size_t>(modulated_scratch(m.norm)), 9);  // not of zeros: it is given as it comes
  for (int round = 0; round < 2; ++round)                            // a thread's next part gets what the last one left
    modulated_forward_rows(target, m, t.operands, {}, scratch.data(), round * 35, 35 + round * 35);
}

void backward(const Target& target, Type type, int64_t columns, bool asked) {
  ModulatedBackward m = {};
  m.normed = m.added = true;
  for (Backward* b : {&m.norm, &m.add}) b->columns = columns, b->input = b->modulation = type, b->need_input = true;
  m.norm.modulate = Modulate::norm, m.add.modulate = Modulate::add;
  const Bytes rstd(kRows * 8);
  m.rstd = rstd.data();
  Tensors<kModulatedGrads> t(columns * size_of(type), {kBackX, kBackSum, kBackGrad, kBackGradX},
                             {kBackGate, kBackScale});
  if (asked)
    t = Tensors<kModulatedGrads>(columns * size_of(type), {kBackX, kBackSum, kBackGrad, kBackGradX, kBackGradResidual},
                                 {kBackGate, kBackScale});
  Bytes scratch(static_cast<size_t>(modulated_scratch(m)));
  modulated_backward_rows(target, m, t.operands, nullptr, {}, scratch.data(), 0, kRows);
}

}  // namespace

int main() {
  Target target = {};
  target.forward = [](const Forward& f) -> ForwardKernel { return f.modulate == Modulate::norm ? norm : add; };
  target.backward = [](const Backward&) -> BackwardKernel { return back; };
  for (int64_t large : {int64_t{1} << 60, int64_t{1}}) {  // in the caches, and past them
    large_bytes() = large;
    for (Type type : {Type::f32, Type::f64, Type::bf16, Type::f16})
      for (int64_t columns : {1, 16, 33, 576, 4096, 9001})
        for (bool both : {false, true}) forward(target, type, columns, both), backward(target, type, columns, both);
  }
  std::printf("%ld rows stayed in their scratch\n", static_cast<long>(calls));
}
