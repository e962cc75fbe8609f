// The only file that is called by Python with tensors as objects: everyday norms, past torch's dispatcher.
//
// From Python to an operator and back takes 1.3 µs, four times the norm of a row of 4096. (2048x128 fp32 takes
// 0.95 and 0.89 of the operator's time by 1 and 2 threads of a Zen 5, 512x4096 0.97 and 0.93; what is larger than the
// last cache is the operator's, which asks for huge pages.) What an operator would be told of a tensor is in DLPack's
// view of it, which torch fills in in 20 ns by a table of functions (DLPack 1.3's exchange API). CPython's functions
// are of its stable ABI (PEP 384) and are handed over, too: the library needs no Python.
#include "tensors.h"

#include <numeric>

namespace rmsnorm {
namespace {

using Object = void*;

// A tensor, and a framework's table of functions, as DLPack 1 lays them out (torch keeps its own header for code that
// isn't of the stable ABI).
struct View {
  void* data;
  int32_t device_type, device_id, ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct Table {
  uint32_t major, minor;
  const Table* previous;
  void *allocate, *own, *to_object;
  int (*view)(Object, View*);
};
// Its own numbers.
enum { kMajor = 1, kCpu = 1, kFloat = 2, kBfloat = 4 };

// As src/rmsnorm/_handed.py fills it in.
struct Python {
  int (*view)(Object, View*);
  double (*as_double)(Object);
  long long (*as_integer)(Object);
  intptr_t (*size)(Object);          // of a sequence
  Object (*item)(Object, intptr_t);  // of it, a new reference, as all that follow return
  Object (*type)(Object);
  Object (*call)(Object, ...);  // with arguments, up to a null
  Object (*pack)(intptr_t, ...);
  Object (*occurred)();
  void (*clear)();
  void (*retain)(Object);
  void (*release)(Object);
  void* (*let_go)();    // of the interpreter's lock
  void (*take)(void*);  // it again
  Object none, yes, integer, empty_like, empty_contiguous;
} python;

// Elements from which on other threads of Python don't wait: 4 µs by one thread, where letting go takes 0.05.
constexpr int64_t kSmall = 32768;

// A contiguous tensor on the CPU, of a type that the kernels know; else there is none.
struct Plain {
  Type type = Type::none;
  bool canonical = true;  // a dimension of size 1 may have any stride
  int64_t count = 1;
  View of = {};

  Plain() = default;
  explicit Plain(Object tensor) {
    if (python.view(tensor, &of) != 0) {
      python.clear();
      return;
    }
    if (of.device_type != kCpu || !of.data || of.lanes != 1) return;
    for (int d = of.ndim; d-- > 0;) {
      if (of.strides && of.strides[d] != count) {
        if (of.shape[d] != 1) return;
        canonical = false;
      }
      count *= of.shape[d];
    }
    const auto is = [&](int code, int bits) { return of.code == code && of.bits == bits; };
    type = is(kFloat, 32)    ? Type::f32
           : is(kBfloat, 16) ? Type::bf16
           : is(kFloat, 16)  ? Type::f16
           : is(kFloat, 64)  ? Type::f64
                             : Type::none;
  }

  char* begin() const { return static_cast<char*>(of.data) + of.byte_offset; }
  char* end() const { return begin() + count * size_of(type); }
  bool is_beside(const Plain& other) const { return end() <= other.begin() || other.end() <= begin(); }

  // Whether it has those sizes, or ends with them.
  bool ends(const int64_t* sizes, int dims) const {
    return of.ndim >= dims && std::equal(sizes, sizes + dims, of.shape + of.ndim - dims);
  }
  bool is_like(const Plain& other) const {
    return type == other.type && of.ndim == other.of.ndim && ends(other.of.shape, other.of.ndim);
  }
};

// What holds a new reference until it is handed on.
struct Owned {
  explicit Owned(Object object) : object(object) {}
  Owned(const Owned&) = delete;
  ~Owned() {
    if (object) python.release(object);
  }
  Object hand_on() { return std::exchange(object, nullptr); }
  Object object;
};

// Lets other threads of Python run meanwhile, if that is worth it.
struct Released {
  explicit Released(bool worth) : state(worth ? python.let_go() : nullptr) {}
  Released(const Released&) = delete;
  ~Released() {
    if (state) python.take(state);
  }
  void* state;
};

Object new_reference(Object object) {
  python.retain(object);
  return object;
}

// Whether an error was raised, which nobody hears of: the operator will meet the same.
bool failed() {
  const bool raised = python.occurred();
  if (raised) python.clear();
  return raised;
}

// A number, or what Python makes one of.
bool number(Object object, double& value) {
  value = python.as_double(object);
  return value != -1.0 || !failed();
}

bool integer(Object object, int64_t& value) {
  value = python.as_integer(object);
  return value != -1 || !failed();
}

// The sizes of the normalised dimensions, an integer or a sequence of some; how many, or 0.
int sizes_of(Object shape, int64_t* sizes) {
  const Owned type(python.type(shape));
  if (type.object == python.integer) return integer(shape, sizes[0]);
  const intptr_t count = python.size(shape);
  if (count < 0 || count > kMaxDims) return failed(), 0;
  for (intptr_t d = 0; d < count; ++d) {
    const Owned size(python.item(shape, d));
    if (!size.object || !integer(size.object, sizes[d])) return failed(), 0;
  }
  return static_cast<int>(count);
}

Object nothing() { return new_reference(python.none); }

// (input, residual or None, normalized_shape, weight or None, eps or None, offset, round_first, output or None): the
// output, with a residual (output, sum), and None where the operator is to be asked: it serves everything else, or
// refuses it. The caller has made sure that tensors are tensors, and that they show what their memory holds.
Object norm(Object, Object const* given, intptr_t count) {
  enum { kX, kResidual, kShape, kWeight, kEps, kOffset, kRoundFirst, kOutput, kCount };
  const auto has = [&](int which) { return given[which] != python.none; };
  if (count != kCount) return nothing();
  const Plain x(given[kX]);
  int64_t sizes[kMaxDims];
  const bool known = x.type != Type::none && x.count != 0 && !is_large(x.count * size_of(x.type));
  const int dims = known ? sizes_of(given[kShape], sizes) : 0;
  if (dims == 0 || !x.ends(sizes, dims)) return nothing();
  const Plain weight = has(kWeight) ? Plain(given[kWeight]) : Plain();
  if (has(kWeight) && !(weight.type == x.type && weight.of.ndim == dims && weight.ends(sizes, dims))) return nothing();
  const Plain residual = has(kResidual) ? Plain(given[kResidual]) : x;
  if (!residual.is_like(x)) return nothing();

  Forward f = {};
  double offset = 0.0;
  f.eps = x.type == Type::f64 ? std::numeric_limits<double>::epsilon() : std::numeric_limits<float>::epsilon();
  if ((has(kEps) && !number(given[kEps], f.eps)) || !number(given[kOffset], offset) || !(f.eps >= 0)) return nothing();
  f.columns = std::accumulate(sizes, sizes + dims, int64_t{1}, std::multiplies<>());
  f.input = f.output = x.type, f.add = has(kResidual), f.round_first = given[kRoundFirst] == python.yes;

  const auto make = [&] {
    return python.call(x.canonical ? python.empty_like : python.empty_contiguous, given[kX], nullptr);
  };
  Owned output(has(kOutput) ? new_reference(given[kOutput]) : make());
  Owned sum(!f.add || !output.object ? nullptr : has(kOutput) ? new_reference(given[kResidual]) : make());
  if (!output.object || (f.add && !sum.object)) return nullptr;
  const Plain y(output.object), s = f.add ? Plain(sum.object) : y;
  // As rms_norm_out() has it: nothing shared, or the very same elements.
  const auto apart = [](const Plain& to, const Plain& from) {
    return to.is_beside(from) || to.begin() == from.begin();
  };
  const bool safe = apart(y, x) && apart(y, residual) && apart(s, x) && apart(s, residual) &&
                    (!f.add || y.is_beside(s)) && (!has(kWeight) || (y.is_beside(weight) && s.is_beside(weight)));
  if (!y.is_like(x) || !s.is_like(x) || !safe) return nothing();

  const int64_t row = f.columns * size_of(x.type);
  Operands<kForwardOperands> operands;
  operands.data = {x.begin(), y.begin(), f.add ? residual.begin() : nullptr, f.add ? s.begin() : nullptr, nullptr};
  operands.push(x.count / f.columns, {row, row, row, row, 0});
  try {
    const Released lock(x.count > kSmall);
    const Gain gain(weight.type, weight.begin(), offset, x.type, f.columns, Gain::kForward);
    f.gain_type = gain.type, f.gain = gain.rows;
    run_forward(f, operands, *gain.target, Statistics{});
  } catch (...) {  // nothing may be thrown into Python; the operator will meet the same, and say so
    return nothing();
  }
  return f.add ? python.pack(2, output.object, sum.object) : output.hand_on();
}

// CPython's PyMethodDef, whose layout is of the stable ABI.
struct Method {
  const char* name;
  Object (*function)(Object, Object const*, intptr_t);
  int flags;
  const char* doc;
};
constexpr int kFastCall = 0x80;  // METH_FASTCALL
Method method = {"norm", norm, kFastCall, nullptr};

}  // namespace
}  // namespace rmsnorm

// What PyCFunction_NewEx makes a function of, given DLPack's table and the rest of `Python`; null for a table of
// another kind.
extern "C" __attribute__((visibility("default"))) void* rmsnorm_handed(const void* table, void* const* rest,
                                                                       int64_t count) {
  using rmsnorm::python;
  constexpr int64_t known = sizeof(python) / sizeof(void*) - 1;
  const auto api = static_cast<const rmsnorm::Table*>(table);
  if (api->major != rmsnorm::kMajor || !api->view || count != known) return nullptr;
  std::memcpy(&python.as_double, rest, known * sizeof(void*));
  python.view = api->view;
  return &rmsnorm::method;
}
