// The only file that knows torch's tensors and our rows: checks, allocates what is returned, hands rows to the threads.
// Stable ABI only (TORCH_TARGET_VERSION): one binary for every torch from 2.10 on.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>

#include "ops.h"
#include "refuse.h"
#include "rows.h"

namespace rmsnorm {

using torch::headeronly::ScalarType;

// Work below this many elements stays on the calling thread: waking another costs as much as 30,000 elements.
constexpr int64_t kGrain = 32768;

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

// Where a tensor's elements begin, and where they end. All sizes by one call: each crosses the stable ABI.
struct Extent {
  explicit Extent(const Tensor& tensor) : begin(static_cast<const char*>(tensor.const_data_ptr())) {
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    int64_t last = 0;
    for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
    end = begin + (last + 1) * static_cast<int64_t>(tensor.element_size());
  }
  const char *begin, *end;
};

inline bool are_beside(const Extent& a, const Extent& b) { return a.end <= b.begin || b.end <= a.begin; }

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
  return has_plain_rows(tensor, outer) ? tensor : torch::stable::contiguous(tensor);
}

// The same without another reference, whose count takes 5 ns each way: the tensor, or what it was copied to.
inline const Tensor& plain_rows(const Tensor& tensor, int64_t outer, OptionalTensor& copy) {
  return has_plain_rows(tensor, outer) ? tensor : copy.emplace(torch::stable::contiguous(tensor));
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

// Operands are given by their tensors; null where the call has none.
template <int N>
Operands<N> operands_of(const Tensor& input, int64_t outer, const std::array<const Tensor*, N>& tensors) {
  Operands<N> operands;
  std::array<const int64_t*, N> strides = {};
  std::array<int64_t, N> bytes = {};
  for (int k = 0; k < N; ++k) {
    if (!tensors[k]) continue;
    operands.data[k] = static_cast<char*>(tensors[k]->data_ptr());
    strides[k] = tensors[k]->strides().data();
    bytes[k] = size_of(type_of(*tensors[k]));
  }
  const auto sizes = input.sizes();
  for (int64_t d = 0; d < outer; ++d) {
    std::array<int64_t, N> step = {};
    for (int k = 0; k < N; ++k)
      if (tensors[k]) step[k] = strides[k][d] * bytes[k];
    operands.push(sizes[d], step);
  }
  return operands;
}

// The gain as a kernel reads it: the weight in place, or offset + weight formed once in the wide type; without a weight
// none, or ones.
class Gain {
 public:
  enum For { kForward, kForwardWide, kBackward };
  Gain() = default;

  // A weight of several rows goes with as many of the input's, again and again.
  Gain(const OptionalTensor& weight, double offset, const Tensor& x, const Shape& shape, For use) {
    if (!weight) return;
    check_weight(*weight, x, shape);
    const Tensor& plain = plain_rows(*weight, 0, copy_);
    const auto sizes = weight->sizes();
    const int64_t spanned = static_cast<int64_t>(sizes.size()) - shape.dims;
    for (int64_t d = 0; d < spanned; ++d) rows.count *= std::max<int64_t>(sizes[d], 1);
    form(type_of(plain), static_cast<const char*>(plain.data_ptr()), plain.numel() != 0, offset, type_of(x),
         shape.columns, use);
  }

  // The same of plain memory: one row, or none if its type is.
  Gain(Type weight, const char* data, double offset, Type input, int64_t columns, For use) {
    if (weight != Type::none) form(weight, data, columns != 0, offset, input, columns, use);
  }

  // `count` times `value`.
  Gain(double value, Type input, int64_t count) : type(wide(input)), formed_(count * size_of(type)) {
    rows.data = formed_.get();
    if (type == Type::f64) std::fill_n(reinterpret_cast<double*>(formed_.get()), count, value);
    else std::fill_n(reinterpret_cast<float*>(formed_.get()), count, static_cast<float>(value));
  }

  Type type = Type::none;
  WeightRows rows;
  const Target* target = &current_target();  // the gain is in its order: no other may read it

 private:
  void form(Type weight, const char* data, bool any, double offset, Type input, int64_t columns, For use) {
    type = weight;
    require(type != Type::f64 || input == Type::f64,
            "rmsnorm: no native kernel for a float64 weight and a narrower input");
    rows.data = const_cast<char*>(data);
    rows.stride = columns * size_of(type);
    const bool own_order = use == kBackward && size_of(input) == 2;
    if (offset == 0.0 && !own_order && (type == wide(input) || (type == input && use == kForward))) return;
    const int64_t stride = padded(columns) * size_of(wide(input));
    formed_ = Lines(rows.count * stride);
    for (int64_t row = 0; row < rows.count && any; ++row)  // one of no rows has no data to read
      target->make_gain(own_order ? input : Type::none, type, rows.data + row * rows.stride, offset, wide(input),
                        formed_.get() + row * stride, columns);
    type = wide(input);
    rows.data = formed_.get(), rows.stride = stride;
  }

  OptionalTensor copy_;
  Lines formed_;
};

// The weight's gain, or ones: of forms whose kernels always multiply.
inline Gain gain_or_ones(const OptionalTensor& weight, double offset, const Tensor& x, const Shape& shape,
                         Gain::For use) {
  return weight ? Gain(weight, offset, x, shape, use) : Gain(1.0, type_of(x), padded(shape.columns));
}

// Whether the sandwich reads half weights where they are. To form gains takes as long as to widen a weight of each of 8
// rows: 1 row of 4096 bf16, with an offset, takes 8.0 us without and 9.1 with.
inline bool few_rows(Type input, int64_t rows) { return size_of(input) == 2 && rows < 8; }

// A gated call, whose gain is that or ones, in the wide type and the kernels' own order, forward and backward.
inline Forward gated(bool silu, bool gate_first, bool round_first, const OptionalTensor& weight, Type input) {
  Forward f = {};
  f.gate = silu ? Gate::silu : Gate::sigmoid, f.gate_first = gate_first, f.round_first = round_first;
  f.round_product = round_first && weight && type_of(*weight) == input;
  return f;
}

// The least work worth a thread: rows of so many columns each.
inline int64_t grain_rows(int64_t columns) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(columns, 1)); }

// One value per row.
inline Tensor empty_statistic(const Tensor& input, int64_t dims, Type type) {
  std::array<int64_t, kMaxDims> sizes;
  for (int64_t d = 0; d < input.dim(); ++d) sizes[d] = d < input.dim() - dims ? input.size(d) : 1;
  return empty(sizes.data(), input.dim(), type);
}

// Forward, for all rows of operands that are known.
inline void run_forward(const Forward& f, const Operands<kForwardOperands>& operands, const Target& target,
                        const Statistics& kept) {
  const int64_t bytes = scratch_bytes(f);
  parallel(operands.rows, grain_rows(f.columns), [&](int64_t begin, int64_t end) {
    const Lines scratch = bytes ? Lines(bytes) : Lines();
    forward_rows(target, f, operands, kept, scratch.get(), begin, end);
  });
}

// The same, where what is kept is tensors.
inline void run_forward(const Forward& f, const Operands<kForwardOperands>& operands, const Target& target,
                        const Tensor* rstd, const Tensor* mean, const Tensor* first_rstd = nullptr) {
  const auto data = [](const Tensor* kept) { return kept ? static_cast<char*>(kept->data_ptr()) : nullptr; };
  run_forward(f, operands, target, {data(rstd), data(first_rstd), reinterpret_cast<double*>(data(mean))});
}

// Calls run(operands), with what tensors say filled in in `f`. `other` is the gate if there is one, else the residual
// or null; the type of the output is in `f`, and there may be none.
template <class Run>
void with_operands(Forward& f, const Tensor& input, const Tensor* other, const Gain& gain, const Shape& shape,
                   const Tensor* output, const Tensor* sum, const Run& run) {
  OptionalTensor copies[2];
  const Tensor& x = plain_rows(input, shape.outer, copies[0]);
  const Tensor* second = other ? &plain_rows(*other, shape.outer, copies[1]) : nullptr;
  const bool gated = f.gate != Gate::none;
  f.columns = shape.columns, f.input = type_of(input);
  f.add = other && !gated && !f.add_after && !f.twice;
  f.gain_type = gain.type, f.gain = gain.rows;
  run(operands_of<kForwardOperands>(x, shape.outer,
                                    {&x, output, gated ? nullptr : second, sum, gated ? second : nullptr}));
}

// 1/rms of each of so many rows, one behind the other, as forward finds it.
inline std::unique_ptr<char[]> inverse_rms(Type type, const char* data, int64_t rows, int64_t columns, double eps) {
  std::unique_ptr<char[]> rstd(new char[rows * size_of(wide(type))]);
  Forward f = {};
  f.columns = f.counted = f.divisor = columns, f.eps = eps;
  f.general = true, f.input = f.x = f.residual = f.sum = type, f.output = Type::none;
  Operands<kForwardOperands> operands;
  operands.data = {const_cast<char*>(data)};
  operands.push(rows, {columns * size_of(type)});
  run_forward(f, operands, current_target(), Statistics{rstd.get(), nullptr, nullptr});
  return rstd;
}

// Forward, of tensors, whose part of `f` is filled in here; `first_rstd` is for two norms.
inline void run_forward(Forward& f, const Tensor& input, const Tensor* other, const Gain& gain, const Shape& shape,
                        const Tensor& output, const Tensor* sum, const Tensor* rstd, const Tensor* mean,
                        const Tensor* first_rstd = nullptr) {
  f.output = type_of(output);
  with_operands(f, input, other, gain, shape, &output, sum,
                [&](const auto& operands) { run_forward(f, operands, *gain.target, rstd, mean, first_rstd); });
}

// Where the gradient of a weight, or of a bias, goes; nobody wants it if there is no data.
struct GradWeight {
  char* data = nullptr;
  Type type = Type::none;
  int64_t count = 0;
  GradWeight() = default;
  GradWeight(char* data, Type type, int64_t count) : data(data), type(type), count(count) {}
  explicit GradWeight(const Tensor* tensor) {
    if (tensor) data = static_cast<char*>(tensor->data_ptr()), type = type_of(*tensor), count = tensor->numel();
  }
};

// Of two weights, or of a weight and a bias: threads begin once for both. `stride` doubles are a chunk's; of both
// weights as many chunks are left.
inline void finish_weights(const Target& target, const std::array<const double*, 2>& totals, int64_t chunks,
                           int64_t stride, const std::array<GradWeight, 2>& to) {
  const auto count = [&](int k) { return to[k].data ? to[k].count : 0; };
  parallel(std::max(count(0), count(1)), grain_rows(chunks), [&](int64_t begin, int64_t end) {
    for (int k = 0; k < 2; ++k)
      if (begin < count(k))
        target.finish(totals[k], chunks, stride, begin, std::min(end, count(k)), to[k].type, to[k].data);
  });
}

// Backward, for all rows of operands that are known. The weight's gradient, and the bias's, come as totals per chunk:
// finish() adds those of the columns asked for.
inline void run_backward(const Target& target, const Backward& b, const Operands<kBackwardOperands>& operands,
                         const char* rstd, const double* means, const std::array<GradWeight, 2>& grad_weights,
                         const Around* around = nullptr) {
  const int64_t grain = grain_rows(b.columns), bytes = scratch_bytes(b, operands.rows, around);
  const auto room = [&] { return bytes ? Lines(bytes) : Lines(); };
  if (!b.need_weight && !b.need_bias) {
    parallel(operands.rows, grain, [&](int64_t begin, int64_t end) {
      const auto scratch = room();
      backward_rows(target, b, operands, rstd, means, scratch.get(), nullptr, {}, begin, end, around);
    });
    return;
  }
  const int64_t rows = operands.rows, each = chunk_rows(b, rows), chunks = (rows + each - 1) / each;
  if (rows > 0 && rows <= kFlush && grad_rows(b) == 1 && grad_weights[0].data) {
    const auto scratch = room();
    const GradWeight& to = grad_weights[0];
    // A sum of fp32 lies where it goes: 16 KiB of L1 less, of 4096 columns.
    const bool there = to.type == Type::f32 && b.input == Type::f32 && grad_stride(b) == b.columns * size_of(to.type);
    const Lines own = there ? Lines() : Lines::zeros(grad_stride(b));
    char* const partial = there ? to.data : own.get();
    if (there) std::fill_n(partial, grad_stride(b), 0);
    backward_rows(target, b, operands, rstd, means, scratch.get(), partial, {}, 0, rows, around);
    target.finish_one(b.input, partial, b.columns, to.type, to.data);
    return;
  }
  const int64_t columns = grad_rows(b) * b.columns;
  Totals totals(b, chunks, columns, each);  // set by the first flush of a chunk
  parallel(chunks, std::max<int64_t>(1, grain / each), [&](int64_t begin, int64_t end) {
    const auto scratch = room();
    const Lines partial = Lines::zeros(grad_rows(b) * grad_stride(b));
    for (int64_t chunk = begin; chunk < end; ++chunk)
      backward_rows(target, b, operands, rstd, means, scratch.get(), partial.get(), totals.of(chunk, begin, end),
                    chunk * each, std::min(rows, (chunk + 1) * each), around);
  });
  finish_weights(target, {totals.data(), totals.data() + b.columns}, totals.count(), columns, grad_weights);
}

// The same of tensors.
inline void run_backward(const Target& target, Backward b, const Tensor* grad, const Tensor* grad_sum,
                         const Tensor& input, const Tensor* gate, const Tensor& rstd, const Tensor* mean,
                         const Shape& shape, const Tensor& grad_input, const Tensor* grad_gate,
                         const std::array<const Tensor*, 2>& grad_weights) {
  b.columns = shape.columns, b.input = type_of(input), b.add = grad_sum && b.need_input, b.need_gate = grad_gate;
  if (!b.need_input && !b.need_gate && !b.need_weight && !b.need_bias) return;
  check_statistic(rstd, input, shape, wide(b.input), "rstd");
  if (mean) check_statistic(*mean, input, shape, Type::f64, "mean");
  const Tensor x = with_plain_rows(input, shape.outer), r = with_plain_rows(rstd, 0);
  const OptionalTensor dy = with_plain_rows(grad, shape.outer);
  const OptionalTensor ds = with_plain_rows(b.add ? grad_sum : nullptr, shape.outer);
  const OptionalTensor m = with_plain_rows(mean, 0), g = with_plain_rows(gate, shape.outer);
  const auto operands = operands_of<kBackwardOperands>(
      x, shape.outer, {&x, address(dy), b.need_input ? &grad_input : nullptr, address(ds), address(g), grad_gate});
  run_backward(target, b, operands, static_cast<const char*>(r.data_ptr()),
               m ? static_cast<const double*>(m->data_ptr()) : nullptr,
               {GradWeight(grad_weights[0]), GradWeight(grad_weights[1])});
}

}  // namespace rmsnorm
