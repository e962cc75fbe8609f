// The only file that knows a GPU's tensors: what the kernels take of them, room for results, rows as kernels get them.
//
// Rules of gpu/launch.py and gpu/route.py, for calls that nothing is unusual about; whatever is goes to Python, which
// is what served all calls before there was a launcher.
#pragma once

#include <bit>

#include "launch.h"
#include "tensors.h"

namespace rmsnorm::gpu {

// Thrown where the way ends in the middle: no memory, or a kernel that Triton has to launch itself.
struct Elsewhere {};

// The same operator in Python, which raises what is to be raised.
template <class Result, class... Given>
Result python(const char* name, const Given&... given) {
  constexpr bool one = std::is_same_v<Result, Tensor>, nothing = std::is_void_v<Result>;
  std::array<StableIValue, std::max<size_t>(sizeof...(given), 8)> stack{torch::stable::detail::from(given)...};
  dispatch(name, stack.data());
  if constexpr (one) return torch::stable::detail::to<Tensor>(stack[0]);
  else if constexpr (!nothing)
    return [&]<size_t... I>(std::index_sequence<I...>) {
      return Result{torch::stable::detail::to<Tensor>(stack[I])...};
    }(std::make_index_sequence<std::tuple_size_v<Result>>());
}

// What `attempt` returns, or if that is nothing, what Python does.
template <class Result, class Attempt, class... Given>
Result or_python(const char* name, const Attempt& attempt, const Given&... given) {
  try {
    if (std::optional<Result> result = attempt()) return std::move(*result);
  } catch (const Elsewhere&) {
  }
  return python<Result>(name, given...);
}

inline void run(Launch& launch, int64_t x, int64_t y = 1, int64_t z = 1) {
  if (!launch.run(x, y, z)) throw Elsewhere();
}

inline int64_t ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int32_t code_of(Type type) { return static_cast<int32_t>(scalar_of(type)); }

inline Type known_type(int32_t code) {
  for (const Type type : {Type::f32, Type::bf16, Type::f16, Type::f64})
    if (code == code_of(type)) return type;
  return Type::none;
}

// The type of a product under type promotion: of two of ours.
inline Type promoted(Type a, Type b) { return a == b ? a : a == Type::f64 || b == Type::f64 ? Type::f64 : Type::f32; }

inline bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

struct Sizes {
  const int64_t* data;
  int64_t count;
  explicit Sizes(const Tensor& tensor) : data(tensor.sizes().data()), count(tensor.dim()) {}
  bool operator==(const Sizes& other) const {
    return count == other.count && std::equal(data, data + count, other.data);
  }
};

// The input of a call, and what follows from it.
struct Input {
  const Tensor& tensor;
  Sizes sizes;
  Type type = Type::none;
  int32_t device_type = 0, index = 0;
  Serving serving = Serving::python;
  int64_t dims, outer = 0, rows = 0, columns = 1, span = 1;  // rows: for each of the weight's, of which span are there

  // Of no serving where the kernels don't take the tensors: see served() and fits() of gpu/route.py.
  Input(const Tensor& tensor, int64_t dims) : tensor(tensor), sizes(tensor), dims(dims) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device_type));
    index = std::max(tensor.get_device_index(), 0);  // the CPU, where tests are, has no index
    const Serving known = rmsnorm::serving(index);
    outer = sizes.count - dims;
    if (known == Serving::python || dims <= 0 || outer < 0) return;
    type = known_type(rmsnorm::code_of(tensor));
    for (int64_t d = outer; d < sizes.count; ++d) columns *= sizes.data[d];
    rows = 1;
    for (int64_t d = 0; d < outer; ++d) rows *= sizes.data[d];
    if (type != Type::none && columns * rows > 0) serving = known;
  }

  explicit operator bool() const { return serving == Serving::ours || serving == Serving::torch_first; }

  bool beside(const Tensor& other) const {
    int32_t other_type;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(other.get(), &other_type));
    return other_type == device_type && std::max(other.get_device_index(), 0) == index;
  }

  // Whether it lies beside the input, has its sizes and its type.
  bool like(const Tensor& other) const {
    return Sizes(other) == sizes && known_type(rmsnorm::code_of(other)) == type && beside(other);
  }

  // Whether the kernels take these gains; then rows are those of each of its rows.
  bool fits(const Tensor& weight) {
    const Sizes own(weight);
    const Type kind = known_type(rmsnorm::code_of(weight));
    const int64_t before = sizes.count - own.count;
    if (kind == Type::none || (kind == Type::f64 && type != Type::f64) || own.count < dims || before < 0) return false;
    if (!std::equal(own.data, own.data + own.count, sizes.data + before) || !beside(weight)) return false;
    int64_t several = 1;
    for (int64_t d = 0; d < own.count - dims; ++d) several *= own.data[d];
    if (several != span) rows = rows * span / several, span = several;
    return several <= 65535;  // the second dimension of a grid
  }
  bool fits(const OptionalTensor& weight) { return !weight || fits(*weight); }

  // Whether torch's fused kernel is asked for it, which means the same: see is_torchs() of reference.py.
  bool is_torchs(const OptionalTensor& weight, double offset, bool round_first) const {
    if (serving != Serving::torch_first && serving != Serving::torch_alone) return false;
    if (!weight) return true;
    return weight->dim() == dims && known_type(rmsnorm::code_of(*weight)) == type && offset == 0 && !round_first;
  }

  Tensor room(const int64_t* shape, int64_t count, int32_t code) const {
    std::array<int64_t, kMaxDims> strides;
    int64_t stride = 1;
    for (int64_t d = count; d-- > 0;) strides[d] = stride, stride *= std::max<int64_t>(shape[d], 1);
    AtenTensorHandle handle;
    if (aoti_torch_empty_strided(count, shape, strides.data(), code, device_type, tensor.get_device_index(), &handle) !=
        AOTI_TORCH_SUCCESS)
      throw Elsewhere();  // Python finds no room, either, and says so
    return Tensor(handle);
  }
  Tensor room(const int64_t* shape, int64_t count, Type of) const { return room(shape, count, code_of(of)); }
  Tensor room(Type of) const { return room(sizes.data, sizes.count, of); }
  Tensor room_like(const Tensor& other) const {
    const Sizes own(other);
    return room(own.data, own.count, known_type(rmsnorm::code_of(other)));
  }
  Tensor none(Type of) const {
    const int64_t empty = 0;
    return room(&empty, 1, of);
  }
  Tensor none() const { return none(type); }
  Tensor or_none(const OptionalTensor& wanted) const { return wanted ? *wanted : none(); }

  // One number per row.
  Tensor statistic(Type of) const {
    std::array<int64_t, kMaxDims> shape;
    for (int64_t d = 0; d < sizes.count; ++d) shape[d] = d < outer ? sizes.data[d] : 1;
    return room(shape.data(), sizes.count, of);
  }
};

// A contiguous copy, at an address as an allocation has it.
inline Tensor copied(const Tensor& tensor) {
  return tensor.is_contiguous() ? torch::stable::clone(tensor) : torch::stable::contiguous(tensor);
}

// Rows as kernels get them; none by itself. What is copied lives as long as this.
struct Matrix {
  OptionalTensor copy;
  const void* data = nullptr;
  int32_t code = 0;
  int64_t stride = 0;
  bool of_heads = false;  // then the stride is that of sequences, and there are
  int64_t tokens = 0, heads = 0;

  Matrix() = default;

  // A tensor whose rows are of so many columns, the last dimensions; see _matrix() of gpu/launch.py for what is copied.
  Matrix(const Tensor* tensor, int64_t columns) : stride(columns) {
    if (!tensor) return;
    code = rmsnorm::code_of(*tensor), data = held(tensor->get(), tensor->const_data_ptr());
    const bool whole = columns % 16 == 0;
    if (!view(*tensor, columns) || (stride % 16 == 0) != whole || (stride == 1) != (columns == 1) ||
        (whole && !aligned(data))) {
      copy = copied(*tensor);
      data = copy->const_data_ptr(), stride = columns;
    }
  }

  void push(Launch& launch) const {
    if (!data) return launch.none();
    launch.open(), launch.pointer(data, code), launch.integer(stride);
    if (of_heads) launch.integer(tokens), launch.integer(heads);
    launch.close();
  }

 private:
  // Finds the stride of rows; false if there is no single one, or elements lie apart.
  bool view(const Tensor& tensor, int64_t columns) {
    if (tensor.is_contiguous()) return true;
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    int64_t d = static_cast<int64_t>(sizes.size()), done = 1;
    for (; d > 0 && done < columns; --d) {
      if (sizes[d - 1] != 1 && strides[d - 1] != done) return false;
      done *= sizes[d - 1];
    }
    bool first = true;
    for (int64_t expected = 0; d > 0; --d) {
      if (sizes[d - 1] == 1) continue;
      if (first) stride = strides[d - 1], first = false;
      else if (strides[d - 1] != expected) return false;
      expected = strides[d - 1] * sizes[d - 1];
    }
    return true;
  }
};

// A tensor that kernels read from end to end; none by itself.
struct Row {
  OptionalTensor copy;
  const void* data = nullptr;
  int32_t code = 0;

  Row() = default;
  explicit Row(const Tensor* tensor) {
    if (!tensor) return;
    code = rmsnorm::code_of(*tensor), data = held(tensor->get(), tensor->const_data_ptr());
    if (aligned(data) && tensor->is_contiguous()) return;
    copy = copied(*tensor), data = copy->const_data_ptr();
  }

  void push(Launch& launch) const { launch.pointer(data, code); }
};

// Where a kernel writes.
inline void push(Launch& launch, const Tensor* tensor) {
  if (tensor) launch.pointer(data_of(*tensor), rmsnorm::code_of(*tensor));
  else launch.none();
}

// Columns and rows of a tile, and warps: tile_of() of gpu/launch.py.
struct Tile {
  int64_t block, rows, warps;
  Tile(int64_t columns, Tiles::Way way) {
    const Tiles& t = tiles();
    block = columns <= t.widest[way] ? static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(columns)))
                                     : t.loop_block[way];
    rows = std::max<int64_t>(1, t.tile[way][columns > t.narrow] / block);
    warps = std::min(t.most_warps, std::max(t.fewest_warps, rows * block / t.per_warp[way]));
  }
};

}  // namespace rmsnorm::gpu
