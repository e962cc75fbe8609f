// The only file that calls operators' kernels with tensors as objects of Python's: every form, past torch's dispatcher.
//
// The everyday norms have calls with pointers of their own (handed_ops.cpp). What may be asked for beyond them has too
// many shapes for that; but its kernels take at::Tensor, of which an object of Python's is no more than a case.
#include <cstring>
#include <limits>
#include <optional>

#include "asked.h"
#include "tensors.h"

namespace rmsnorm {
namespace {

namespace stack = torch::stable::detail;  // values of an operator's stack

constexpr int kMostArguments = 16, kMostTensors = 8;

// An operator's kernel; and what it takes, a letter each:
//   T t   a tensor, and one that may be None      W   one of exactly the normalised dimensions
//   s S   the same of one that rows of the first share, of as many dimensions or fewer      w   one that is written to
//   d o   the number of normalised dimensions: Python gives their sizes; the weight has them, or it is the last
//   e     eps, or None for the default of the first one's type      f, i, b, y   a float, int, bool, dtype or None
struct Row {
  const char* name;
  Boxed kernel;
  const char* takes;
  int64_t results;
};
bool may_be_none(char letter) { return letter == 't' || letter == 'S'; }
bool is_shared(char letter) { return letter == 's' || letter == 'S'; }

constinit std::array<Row, 16> known = {};
constinit size_t count_known = 0;

// A call: what Python gives, and what that comes to.
struct Straight {
  const Row& row;
  Object const* given;  // the sizes of the normalised dimensions, or None; and the arguments but for their number
  intptr_t count;
  Straight(const Row& row, Object const* given, intptr_t count) : row(row), given(given), count(count) {}

  struct Argument {
    Object object;
    char letter;
    int at;  // the stack's
    View of;
  };
  int tensors = 0, values = 0, dims = 0;
  std::array<Argument, kMostTensors> tensor;
  std::array<StableIValue, kMostArguments> stack;
  int64_t sizes[kMaxDims];

  const View& x() const { return tensor[0].of; }
  int normalised() const { return std::max(dims, 1); }  // without sizes the last dimension is a row
  int64_t elements() const {
    int64_t product = 1;
    for (int d = 0; d < x().ndim; ++d) product *= x().shape[d];
    return product;
  }

  // Whether it is of torch's own classes, and has memory on the CPU; the kernel checks the rest.
  bool is_understood() {
    // The class first: sizes of a tensor that is traced may be symbols, and whoever reads those makes them constants.
    if (count < 2 || !is_a(given[1], python.tensor)) return false;
    if (is_there(given[0]) && !(dims = sizes_of(given[0], sizes))) return false;
    intptr_t next = 1;
    for (const char* letter = row.takes; *letter; ++letter, ++values) {
      StableIValue& value = stack[values];
      if (*letter == 'd' && dims) value = stack::from(int64_t{dims});
      else if (*letter == 'o') value = stack::from(int64_t{own_dims()});
      else if (*letter == 'd' || next == count || !take(*letter, given[next++], value)) return false;
    }
    return next == count && x().ndim >= dims && std::equal(sizes, sizes + dims, x().shape + x().ndim - dims);
  }

  // Of a call without sizes: those of the weight, or the last one.
  int own_dims() const {
    const Argument& last = tensor[tensors - 1];
    return last.letter == 't' ? last.of.ndim : 1;
  }

  bool take(char letter, Object object, StableIValue& value) {
    double number_ = 0;
    int64_t integer_ = 0;
    switch (letter) {
      case 'e':
        if (!is_there(object)) {
          const bool wide = x().code == kFloat && x().bits == 64;
          number_ = wide ? std::numeric_limits<double>::epsilon() : std::numeric_limits<float>::epsilon();
        } else if (!number(object, number_) || !(number_ >= 0)) {
          return false;
        }
        return value = stack::from(number_), true;
      case 'f': return number(object, number_) && (value = stack::from(number_), true);
      case 'i': return integer(object, integer_) && (value = stack::from(integer_), true);
      case 'b': return value = stack::from(object == python.yes), value || object == python.no;
      case 'y': return take_type(object, value);
      default: return take_tensor(letter, object, value);
    }
  }

  bool take_type(Object object, StableIValue& value) {
    value = stack::from(nullptr);
    const auto type = std::find(std::begin(python.types), std::end(python.types), object);
    if (type == std::end(python.types)) return !is_there(object);
    const auto number_of_type = static_cast<Type>(type - python.types + 1);
    return value = stack::from(std::optional<ScalarType>(scalar_of(number_of_type))), true;
  }

  bool take_tensor(char letter, Object object, StableIValue& value) {
    if (!is_there(object)) return value = stack::from(nullptr), may_be_none(letter);
    const bool may_learn = tensors > 0 && letter != 'w';
    if (!is_a(object, python.tensor) && !(may_learn && is_a(object, python.parameter))) return false;
    Argument& one = tensor[tensors++] = {object, letter, values, {}};
    if (python.view(object, &one.of) != 0) return python.clear(), false;
    if (one.of.device_type != kCpu || !one.of.data || one.of.ndim > kMaxDims) return false;
    if (letter == 'W') return one.of.ndim == dims;
    return !is_shared(letter) || (one.of.ndim >= normalised() && one.of.ndim <= x().ndim);
  }

  // Whether nothing of torch's would have been asked by the dispatcher, and no gradient is recorded.
  bool is_alone() const {
    const auto all = [&](auto holds) { return std::all_of(tensor.begin(), tensor.begin() + tensors, holds); };
    const bool records = !answers(python.is_recording, python.no);
    return all([&](const Argument& one) { return !records || !learns(one.object); }) &&
           is_unwatched(tensor[0].object) &&
           all([](const Argument& one) { return shows(one.object) && (one.letter != 'w' || may_change(one.object)); });
  }

  // The tensor that an object holds, for the kernel to take over; null if there is no memory for it.
  AtenTensorHandle handle_of(const Argument& one) const {
    const auto own = static_cast<AtenTensorHandle>(inside(one.object));
    AtenTensorHandle handle = nullptr;
    const int missing = x().ndim - one.of.ndim;
    if (!is_shared(one.letter) || missing == 0) return aoti_torch_new_tensor_handle(own, &handle), handle;
    // Sizes of 1 for the dimensions that it lacks, in front of the normalised ones.
    int64_t shape[kMaxDims], strides[kMaxDims];
    for (int d = 0, from = 0; d < x().ndim; ++d) {
      const bool lacks = d >= one.of.ndim - normalised() && d < x().ndim - normalised();
      shape[d] = lacks ? 1 : one.of.shape[from], strides[d] = lacks ? 0 : one.of.strides[from];
      from += !lacks;
    }
    return aoti_torch__reinterpret_tensor(own, x().ndim, shape, strides, 0, &handle), handle;
  }

  // Puts the tensors on the stack; false if there is no memory for them.
  bool is_stacked() {
    std::array<AtenTensorHandle, kMostTensors> handles;
    for (int i = 0; i < tensors; ++i) {
      if ((handles[i] = handle_of(tensor[i]))) continue;
      while (i-- > 0) aoti_torch_delete_tensor_object(handles[i]);
      return false;
    }
    for (int i = 0; i < tensors; ++i) {
      const Argument& one = tensor[i];
      stack[one.at] = may_be_none(one.letter) ? stack::from(std::optional(handles[i])) : stack::from(handles[i]);
    }
    return true;
  }

  // What the kernel returns: a tensor, several (None for none), or True if it writes to what it is given.
  Object results() {
    if (!is_stacked()) return nothing();
    for_objects = true;
    try {
      const Released lock(elements() > kSmall);
      row.kernel(stack.data(), values, row.results);
    } catch (...) {  // nothing may be thrown into Python; the operator will meet the same, and say so
      return for_objects = false, nothing();
    }
    for_objects = false;
    if (row.results == 0) return tell(tensor[0].object, tensor[1].object) ? new_reference(python.yes) : nullptr;
    Owned all(row.results == 1 ? nullptr : python.tuple(row.results));
    Object one = nullptr;
    bool good = true;
    for (int64_t k = 0; k < row.results; ++k) {
      const auto handle = stack::to<AtenTensorHandle>(stack[k]);
      one = python.show(handle), good = good && one;
      if (all.object) python.put(all.object, k, one);
      aoti_torch_delete_tensor_object(handle);
    }
    return !good ? nullptr : all.object ? all.hand_on() : one;
  }
};

Object straight(Object self, Object const* given, intptr_t count) {
  Straight asked(*reinterpret_cast<const Row*>(python.as_integer(self)), given, count);
  return asked.is_understood() && asked.is_alone() ? asked.results() : nothing();
}

Method method = {"straight", straight, kFastCall, nullptr};

}  // namespace

void serve(torch::stable::detail::StableLibrary& library, const char* name, Boxed kernel) {
  library.impl(name, kernel);
  known.at(count_known++) = {name, kernel, nullptr, 0};
}

}  // namespace rmsnorm

// What PyCFunction_NewEx makes a function of, and, in `row`, the number that is its first argument; null where no
// kernel has that name, or Python lacks what it takes.
extern "C" __attribute__((visibility("default"))) const void* rmsnorm_straight(const char* name, const char* takes,
                                                                               int64_t results, const void** row) {
  using namespace rmsnorm;
  const auto found = std::find_if(known.begin(), known.begin() + count_known,
                                  [&](const Row& one) { return std::strcmp(one.name, name) == 0; });
  if (found == known.begin() + count_known || !python.place) return nullptr;
  *row = new Row{found->name, found->kernel, strdup(takes), results};  // as long as the function: that of the process
  return &method;
}
