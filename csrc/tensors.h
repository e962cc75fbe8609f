// The only file that knows torch's tensors: checks them, allocates what is returned; and its threads.
// Stable ABI only (TORCH_TARGET_VERSION): one binary for every torch from 2.10 on.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>

#include "ops.h"
#include "refuse.h"
#include "rows.h"

namespace rmsnorm {

using torch::headeronly::ScalarType;

// torch's number for a type. Tensor::scalar_type() fails for those that the stable ABI has no name for.
inline int32_t code_of(const Tensor& tensor) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}

// Tensor::scalar_type() asks for the code of each of torch's types until one fits: 7 calls for float32, not 1.
inline Type type_of(int32_t code) {
  switch (static_cast<ScalarType>(code)) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Half: return Type::f16;
    case ScalarType::Double: return Type::f64;
    default: refuse("rmsnorm: no native kernel for this dtype; call rmsnorm.rms_norm, which has a path for it");
  }
}

inline Type type_of(const Tensor& tensor) { return type_of(code_of(tensor)); }

// Below it lies what is asked further; on Linux no heap of today's processors.
constexpr uintptr_t kLowest = uintptr_t{1} << 40;

// Whether elements have no memory: their storage was freed, by resize_(0), as FSDP does between two uses of a layer.
// Sizes stay, and the address is the offset of a view into nothing.
[[gnu::noinline, gnu::cold]] inline bool is_freed(AtenTensorHandle tensor, const void* data) {
  int64_t elements, offset;
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(tensor, &elements));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(tensor, &offset));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &code));
  return elements != 0 && reinterpret_cast<uintptr_t>(data) == offset * aoti_torch_dtype_element_size(code);
}

// The address that torch has for a tensor. A null would be, to kernels, an operand that isn't there, whose rows are
// those of an earlier call.
template <class T>
T* held(AtenTensorHandle tensor, T* data) {
  if (reinterpret_cast<uintptr_t>(data) < kLowest && is_freed(tensor, data)) [[unlikely]]
    refuse(
        "rmsnorm: a tensor has elements, but no memory: its storage was freed, as FSDP does between two uses of a "
        "layer; call the norm where the tensor is gathered, or resize its storage before");
  return data;
}

inline char* data_of(const Tensor& tensor) { return static_cast<char*>(held(tensor.get(), tensor.data_ptr())); }

// Side by side, of what torch would read wherever it lies.
inline Tensor packed(const Tensor& tensor) {
  held(tensor.get(), tensor.const_data_ptr());
  return torch::stable::contiguous(tensor);
}

inline ScalarType scalar_of(Type type) {
  switch (type) {
    case Type::f32: return ScalarType::Float;
    case Type::f64: return ScalarType::Double;
    case Type::bf16: return ScalarType::BFloat16;
    default: return ScalarType::Half;
  }
}

// Strides and indices lie in arrays of so many.
inline void check_dims(int64_t dims) {
  require(dims <= kMaxDims, "rmsnorm: only tensors with up to ", kMaxDims, " dimensions are supported");
}

// Work below this many elements stays on the calling thread: waking another costs as much as 30,000 elements.
constexpr int64_t kGrain = 32768;

// The least work worth a thread: rows of so many columns each.
inline int64_t grain_rows(int64_t columns) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(columns, 1)); }

template <class Function>
void parallel(int64_t count, int64_t grain, const Function& function) {
  if (count == 0) return;  // a cursor needs a row to stand on
  if (count <= grain) function(0, count);
  else torch::stable::parallel_for(0, count, grain, function);
}

// Makes what a large output will be written to ready, if it is fresh: pages by all threads, each near its own rows.
inline void make_ready(void* data, int64_t bytes) {
  if (!data || !is_large(bytes) || !ask_for_huge_pages(data, bytes)) return;
  parallel((bytes + kMadeAtOnce - 1) / kMadeAtOnce, 1, [&](int64_t first, int64_t last) {
    const auto begin = reinterpret_cast<uintptr_t>(data);
    make_pages(begin + first * kMadeAtOnce, begin + std::min(last * kMadeAtOnce, bytes));
  });
}

// Of any of torch's types, by its number and the bytes of an element; `order` has the dimensions from the outermost to
// the innermost in memory, if that isn't the order of the sizes. The caller owns it.
inline AtenTensorHandle new_empty(const int64_t* sizes, int64_t dims, int32_t code, int64_t size,
                                  const int64_t* order = nullptr) {
  check_dims(dims);
  int64_t strides[kMaxDims], stride = 1;
  for (int64_t i = dims; i-- > 0;) {
    const int64_t d = order ? order[i] : i;
    strides[d] = stride, stride *= std::max<int64_t>(sizes[d], 1);
  }
  const int64_t bytes = stride * size;
  AtenTensorHandle handle;
  require(aoti_torch_empty_strided(dims, sizes, strides, code, aoti_torch_device_type_cpu(), 0, &handle) ==
              AOTI_TORCH_SUCCESS,
          "rmsnorm: not enough memory for ", bytes, " bytes");
  if (is_large(bytes)) {
    void* data;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &data));
    make_ready(data, bytes);
  }
  return handle;
}

inline Tensor empty(const int64_t* sizes, int64_t dims, int32_t code, int64_t size, const int64_t* order = nullptr) {
  return Tensor(new_empty(sizes, dims, code, size, order));
}

inline Tensor empty(const int64_t* sizes, int64_t dims, Type type, const int64_t* order = nullptr) {
  return empty(sizes, dims, static_cast<int32_t>(scalar_of(type)), size_of(type), order);
}

inline Tensor empty_like(const Tensor& tensor, Type type) {
  const auto sizes = tensor.sizes();
  return empty(sizes.data(), static_cast<int64_t>(sizes.size()), type);
}

// One value per row.
inline Tensor empty_statistic(const Tensor& input, int64_t dims, Type type) {
  std::array<int64_t, kMaxDims> sizes;
  for (int64_t d = 0; d < input.dim(); ++d) sizes[d] = d < input.dim() - dims ? input.size(d) : 1;
  return empty(sizes.data(), input.dim(), type);
}

// Whether this thread calls for objects, which may be None: no tensor then, whose making takes 0.3 us.
inline thread_local bool for_objects = false;

// What stands for a result that isn't there, or was not asked for.
inline Tensor none(Type type) {
  if (for_objects) return Tensor();
  const int64_t size = 0;
  return empty(&size, 1, type);
}

// What both directions need to know of the shape.
struct Shape {
  int64_t dims;     // that are normalised over
  int64_t outer;    // the others
  int64_t columns;  // elements of a row
  Shape(const Tensor& input, int64_t dims) : dims(dims), columns(1) {
    const auto sizes = input.sizes();
    outer = static_cast<int64_t>(sizes.size()) - dims;
    check_dims(outer + dims);
    require(dims > 0 && outer >= 0, "rmsnorm: dims must be from 1 to ", sizes.size(), ", but is ", dims);
    for (size_t d = outer; d < sizes.size(); ++d) columns *= sizes[d];
  }
};

// A row can be read in place if its elements lie side by side.
inline bool has_plain_rows(const Tensor& tensor, int64_t outer) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t expected = 1;
  for (int64_t d = static_cast<int64_t>(sizes.size()); d-- > outer;) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

inline Tensor with_plain_rows(const Tensor& tensor, int64_t outer) {
  return has_plain_rows(tensor, outer) ? tensor : packed(tensor);
}

// The same without another reference, whose count takes 5 ns each way: the tensor, or what it was copied to.
inline const Tensor& plain_rows(const Tensor& tensor, int64_t outer, OptionalTensor& copy) {
  return has_plain_rows(tensor, outer) ? tensor : copy.emplace(packed(tensor));
}

// The same of what there may be. Not an undefined Tensor if there is nothing: that is two blocks of the heap.
inline OptionalTensor with_plain_rows(const Tensor* tensor, int64_t outer) {
  if (!tensor) return std::nullopt;
  return with_plain_rows(*tensor, outer);
}

inline const Tensor* address(const OptionalTensor& tensor) { return tensor ? &*tensor : nullptr; }

// The normalised dimensions, or more of the last ones.
inline void check_weight(const Tensor& weight, const Tensor& input, const Shape& shape) {
  const auto sizes = weight.sizes(), whole = input.sizes();  // one call each, where size(d) is one for each d
  const int64_t before = static_cast<int64_t>(whole.size()) - static_cast<int64_t>(sizes.size());
  const bool same = weight.is_cpu() && before >= 0 && before <= shape.outer &&
                    std::equal(sizes.begin(), sizes.end(), whole.begin() + before);
  require(same, "rmsnorm: weight must be on the CPU, with the sizes of the last dimensions of input");
}

inline void check_same(const Tensor& tensor, const Tensor& input, const char* name) {
  bool same = tensor.dim() == input.dim() && code_of(tensor) == code_of(input);
  for (int64_t d = 0; same && d < input.dim(); ++d) same = tensor.size(d) == input.size(d);
  require(same, "rmsnorm: ", name, " must have the shape and dtype of input");
}

// The same of what may be of another type.
inline void check_sizes(const Tensor& tensor, const Tensor& input, const char* name) {
  const auto sizes = tensor.sizes(), whole = input.sizes();
  require(tensor.is_cpu() && std::equal(sizes.begin(), sizes.end(), whole.begin(), whole.end()), "rmsnorm: ", name,
          " must have the shape of input, and be on the CPU");
}

// What forward kept of each row, as it returned it.
inline void check_statistic(const Tensor& tensor, const Tensor& input, const Shape& shape, Type type,
                            const char* name) {
  const auto sizes = tensor.sizes(), whole = input.sizes();
  bool same = tensor.is_cpu() && sizes.size() == whole.size() && type_of(tensor) == type;
  for (size_t d = 0; same && d < whole.size(); ++d)
    same = sizes[d] == (static_cast<int64_t>(d) < shape.outer ? whole[d] : 1);
  require(same, "rmsnorm: ", name, " must be what the forward operator returned for this input");
}

}  // namespace rmsnorm
