// The only file that knows Python's objects, and what of a tensor DLPack shows: its memory, its type, its sizes.
//
// CPython's functions are of its stable ABI (PEP 384), and handed over, as torch's own are: the library needs no
// Python. What an operator would be told of a tensor is in DLPack's view of it, which torch fills in in 20 ns by a
// table of functions (DLPack 1.3's exchange API).
#pragma once

#include <utility>

#include "tensors.h"

namespace rmsnorm {

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
  Object (*tuple)(intptr_t);
  Object (*integer_of)(long long);
  Object (*float_of)(double);
  int (*put)(Object, intptr_t, Object);  // into a tuple, which owns the reference from then on
  Object (*get)(Object, Object);         // an attribute
  int (*set)(Object, Object, Object);
  Object (*occurred)();
  void (*clear)();
  void (*retain)(Object);
  void (*release)(Object);
  void* (*let_go)();    // of the interpreter's lock
  void (*take)(void*);  // it again
  Object none, yes, no, integer, floating, zero, minus_one, few, lean;
  Object tensor, parameter, types[4];  // torch's own: two classes, and dtypes in the order of Type
  Object empty, written;               // functions
  // Functions that say whether something is: of a tensor, whether it is negated; of torch, whether it records.
  Object is_negated, is_overridden, is_recording, is_transformed, modes, tracer, is_inference, in_inference;
  Object is_included, pre_dispatch;                       // the same of a key of torch's dispatcher; the key
  Object profiler, is_profiling, forward_ad, level;       // modules, and names in them
  Object to_save, materialize_grads, eps, requires_grad;  // names of attributes
  // Of torch's own in C++, or null, all of them: the object of an at::Tensor, and what is asked of one; of its
  // c10::TensorImpl; and whether anybody has asked to hear of operators, and whether a key is included in this thread.
  Object (*show)(const void*);
  bool (*negated)(const void*), (*made_in_inference)(const void*), (*requires_gradient)(const void*);
  bool (*observed)(), (*included)(uint16_t);
  intptr_t place, key;  // of the at::Tensor in an object, in bytes; the number of that key
};
inline Python python;

// CPython's PyMethodDef, whose layout is of the stable ABI.
struct Method {
  const char* name;
  Object (*function)(Object, Object const*, intptr_t);
  int flags;
  const char* doc;
};
constexpr int kFastCall = 0x80;  // METH_FASTCALL

// What is in an object of one of torch's two classes: an at::Tensor, which is the address of a c10::TensorImpl.
inline void* inside(Object tensor) { return static_cast<char*>(tensor) + python.place; }

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

inline Object new_reference(Object object) {
  python.retain(object);
  return object;
}

inline Object nothing() { return new_reference(python.none); }

// Whether an error was raised, which nobody hears of: the operator will meet the same.
inline bool failed() {
  const bool raised = python.occurred();
  if (raised) python.clear();
  return raised;
}

// Whether that very object is what a function answers, or an attribute is; not if there is an error.
inline bool is(const Owned& answer, Object expected) {
  if (!answer.object) python.clear();
  return answer.object == expected;
}
inline bool is_a(Object object, Object type) { return is(Owned(python.type(object)), type); }

// A float or an int. What else Python makes a number of may be a tensor whose gradient would be lost.
inline bool number(Object object, double& value) {
  if (!is_a(object, python.floating) && !is_a(object, python.integer)) return false;
  value = python.as_double(object);
  return value != -1.0 || !failed();
}

inline bool integer(Object object, int64_t& value) {
  value = python.as_integer(object);
  return value != -1 || !failed();
}

inline bool answers(Object function, Object expected) { return is(Owned(python.call(function, nullptr)), expected); }
inline bool answers(Object function, Object argument, Object expected) {
  return is(Owned(python.call(function, argument, nullptr)), expected);
}
inline bool has(Object object, Object name, Object expected) { return is(Owned(python.get(object, name)), expected); }

// The sizes of the normalised dimensions, an integer or a sequence of some; how many, or 0.
inline int sizes_of(Object shape, int64_t* sizes) {
  if (is_a(shape, python.integer)) return integer(shape, sizes[0]);
  const intptr_t count = python.size(shape);
  if (count < 0 || count > kMaxDims) return failed(), 0;
  for (intptr_t d = 0; d < count; ++d) {
    const Owned size(python.item(shape, d));
    if (!size.object || !integer(size.object, sizes[d])) return failed(), 0;
  }
  return static_cast<int>(count);
}

// A contiguous tensor on the CPU, of a type that the kernels know; else there is none.
struct Plain {
  Type type = Type::none;
  int64_t count = 1;
  View of;

  Plain() { of.data = nullptr, of.ndim = 0, of.byte_offset = 0; }  // the rest nobody reads
  explicit Plain(Object tensor) : Plain() {
    if (python.view(tensor, &of) != 0) {
      python.clear();
      return;
    }
    if (of.device_type != kCpu || !is_held(tensor) || of.lanes != 1) return;
    for (int d = of.ndim; d-- > 0;) {
      if (of.strides && of.strides[d] != count && of.shape[d] != 1) return;  // a size of 1 may have any stride
      count *= of.shape[d];
    }
    const auto is = [&](int code, int bits) { return of.code == code && of.bits == bits; };
    type = is(kFloat, 32)    ? Type::f32
           : is(kBfloat, 16) ? Type::bf16
           : is(kFloat, 16)  ? Type::f16
           : is(kFloat, 64)  ? Type::f64
                             : Type::none;
  }

  // Whether it has memory, and that wasn't freed.
  bool is_held(Object tensor) const {
    if (reinterpret_cast<uintptr_t>(of.data) >= kLowest) return true;
    return of.data && python.place && !is_freed(static_cast<AtenTensorHandle>(inside(tensor)), of.data);
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

// Room for a contiguous tensor of that shape and type, as code that Inductor compiles asks for it: 0.34 µs, where
// empty_like() takes 0.65.
inline Object room(const Plain& like) {
  const Owned sizes(python.tuple(like.of.ndim)), strides(python.tuple(like.of.ndim));
  if (!sizes.object || !strides.object) return nullptr;
  int64_t stride = 1;
  for (int d = like.of.ndim; d-- > 0; stride *= like.of.shape[d]) {
    python.put(sizes.object, d, python.integer_of(like.of.shape[d]));
    python.put(strides.object, d, python.integer_of(stride));
  }
  const Object type = python.types[static_cast<int>(like.type) - 1];
  return python.call(python.empty, sizes.object, strides.object, type, nullptr);
}

}  // namespace rmsnorm
