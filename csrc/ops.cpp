// The only file with our own operators: checks what arrives, allocates what is returned, hands rows to the threads.
// Stable ABI only (TORCH_TARGET_VERSION): one binary for every torch from 2.10 on.
#include "ops.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>

#include "rows.h"

namespace rmsnorm {
namespace {

using torch::headeronly::ScalarType;

// Work below this many elements stays on the calling thread: waking another costs as much as 30,000 elements.
constexpr int64_t kGrain = 32768;

Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::Double: return Type::f64;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Half: return Type::f16;
    default:
      STD_TORCH_CHECK(false,
                      "rmsnorm: no native kernel for this dtype; call rmsnorm.rms_norm, which has a path for it");
  }
}

ScalarType scalar_of(Type type) {
  switch (type) {
    case Type::f32: return ScalarType::Float;
    case Type::f64: return ScalarType::Double;
    case Type::bf16: return ScalarType::BFloat16;
    default: return ScalarType::Half;
  }
}

Tensor empty(const int64_t* sizes, int64_t dims, Type type) {
  int64_t strides[kMaxDims], stride = 1;
  for (int64_t d = dims; d-- > 0; stride *= std::max<int64_t>(sizes[d], 1)) strides[d] = stride;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, static_cast<int32_t>(scalar_of(type)),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  Tensor tensor(handle);
  const int64_t bytes = stride * size_of(type);
  if (is_large(bytes)) ask_for_huge_pages(tensor.data_ptr(), bytes);
  return tensor;
}

Tensor empty_like(const Tensor& tensor, Type type) {
  const auto sizes = tensor.sizes();
  return empty(sizes.data(), static_cast<int64_t>(sizes.size()), type);
}

// What both directions need to know of the shape.
struct Shape {
  int64_t outer;    // outer dimensions
  int64_t columns;  // elements of a row
  Shape(const Tensor& input, int64_t dims) : columns(1) {
    const auto sizes = input.sizes();
    outer = static_cast<int64_t>(sizes.size()) - dims;
    STD_TORCH_CHECK(dims > 0 && outer >= 0, "rmsnorm: dims must be from 1 to ", sizes.size(), ", but is ", dims);
    for (size_t d = outer; d < sizes.size(); ++d) columns *= sizes[d];
  }
};

// A row can be read in place if its elements lie side by side.
bool has_plain_rows(const Tensor& tensor, int64_t outer) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t expected = 1;
  for (int64_t d = static_cast<int64_t>(sizes.size()); d-- > outer;) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

Tensor with_plain_rows(const Tensor& tensor, int64_t outer) {
  return has_plain_rows(tensor, outer) ? tensor : torch::stable::contiguous(tensor);
}

void check_weight(const Tensor& weight, const Tensor& input, const Shape& shape) {
  const auto sizes = weight.sizes(), row = input.sizes();
  bool same = weight.is_cpu() && sizes.size() == row.size() - shape.outer;
  for (size_t d = 0; same && d < sizes.size(); ++d) same = sizes[d] == row[shape.outer + d];
  STD_TORCH_CHECK(same, "rmsnorm: weight must be on the CPU, with the sizes of the last dimensions of input");
}

void check_same(const Tensor& tensor, const Tensor& input, const char* name) {
  bool same = tensor.dim() == input.dim() && tensor.scalar_type() == input.scalar_type();
  for (int64_t d = 0; same && d < input.dim(); ++d) same = tensor.size(d) == input.size(d);
  STD_TORCH_CHECK(same, "rmsnorm: ", name, " must have the shape and dtype of input");
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

// The gain as a kernel reads it: the weight in place, or offset + weight formed once in the wide type.
class Gain {
 public:
  Gain(const OptionalTensor& weight, double offset, const Tensor& x, const Shape& shape, bool may_be_input_type) {
    if (!weight) return;
    const Type input = type_of(x);
    const int64_t columns = shape.columns;
    check_weight(*weight, x, shape);
    plain_ = with_plain_rows(*weight, 0);
    type = type_of(plain_);
    STD_TORCH_CHECK(type != Type::f64 || input == Type::f64,
                    "rmsnorm: no native kernel for a float64 weight and a narrower input");
    data = plain_.data_ptr();
    if (offset == 0.0 && (type == wide(input) || (type == input && may_be_input_type))) return;
    formed_.reset(new char[columns * size_of(wide(input))]);
    current_target().make_gain(type, data, offset, wide(input), formed_.get(), columns);
    type = wide(input);
    data = formed_.get();
  }

  Type type = Type::none;
  const void* data = nullptr;

 private:
  Tensor plain_;
  std::unique_ptr<char[]> formed_;
};

template <class Function>
void parallel(int64_t count, int64_t grain, const Function& function) {
  if (count == 0) return;  // a cursor needs a row to stand on
  if (count <= grain) function(0, count);
  else torch::stable::parallel_for(0, count, grain, function);
}

// The type of the output: promoted under rounding first, where a half input meets another type.
Type output_type(Type input, const OptionalTensor& weight, bool round_first) {
  if (!weight || !round_first || type_of(*weight) == input) return input;
  return wide(input);
}

void run_forward(const Tensor& input, const Tensor* residual, const OptionalTensor& weight, int64_t dims, double eps,
                 double offset, bool round_first, const Tensor& output, const Tensor* sum, const Tensor* rstd) {
  const Shape shape(input, dims);
  const Type type = type_of(input);
  const Gain gain(weight, offset, input, shape, true);
  const Tensor x = with_plain_rows(input, shape.outer);
  const Tensor added = residual ? with_plain_rows(*residual, shape.outer) : Tensor();
  const auto operands = operands_of<kForwardOperands>(x, shape.outer, {&x, &output, residual ? &added : nullptr, sum});
  const Forward f = {shape.columns, eps, type, type_of(output), gain.type, round_first, residual != nullptr, gain.data};
  char* statistic = rstd ? static_cast<char*>(rstd->data_ptr()) : nullptr;
  const Target& target = current_target();
  parallel(operands.rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(shape.columns, 1)),
           [&](int64_t begin, int64_t end) { forward_rows(target, f, operands, statistic, begin, end); });
}

Tensor empty_rstd(const Tensor& input, int64_t dims) {
  std::array<int64_t, kMaxDims> sizes;
  for (int64_t d = 0; d < input.dim(); ++d) sizes[d] = d < input.dim() - dims ? input.size(d) : 1;
  return empty(sizes.data(), input.dim(), wide(type_of(input)));
}

Tensor rms_norm(Tensor input, OptionalTensor weight, int64_t dims, double eps, double offset, bool round_first) {
  Tensor output = empty_like(input, output_type(type_of(input), weight, round_first));
  run_forward(input, nullptr, weight, dims, eps, offset, round_first, output, nullptr, nullptr);
  return output;
}

// Whether rows may be written while others are still to be read: nothing shared, or the very same elements.
bool may_write(const Tensor& out, const Tensor& read) {
  const auto begin = [](const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); };
  const auto end = [&](const Tensor& t) {
    int64_t last = 0;
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
    return begin(t) + (last + 1) * static_cast<int64_t>(t.element_size());
  };
  if (end(out) <= begin(read) || end(read) <= begin(out)) return true;
  bool same = begin(out) == begin(read) && out.scalar_type() == read.scalar_type() && out.dim() == read.dim();
  for (int64_t d = 0; same && d < out.dim(); ++d) same = out.size(d) == 1 || out.stride(d) == read.stride(d);
  return same;
}

void rms_norm_out(Tensor input, OptionalTensor weight, int64_t dims, double eps, double offset, bool round_first,
                  Tensor out) {
  bool direct =
      has_plain_rows(out, input.dim() - dims) && may_write(out, input) && (!weight || may_write(out, *weight));
  if (direct || out.numel() == 0) {
    run_forward(input, nullptr, weight, dims, eps, offset, round_first, out, nullptr, nullptr);
  } else {  // copy_ takes any strides
    torch::stable::copy_(out, rms_norm(input, weight, dims, eps, offset, round_first));
  }
}

}  // namespace

std::tuple<Tensor, Tensor> rms_norm_forward(Tensor input, OptionalTensor weight, int64_t dims, double eps,
                                            double offset, bool round_first) {
  Tensor output = empty_like(input, output_type(type_of(input), weight, round_first));
  Tensor rstd = empty_rstd(input, dims);
  run_forward(input, nullptr, weight, dims, eps, offset, round_first, output, nullptr, &rstd);
  return {output, rstd};
}

namespace {

std::tuple<Tensor, Tensor> add_rms_norm(Tensor input, Tensor residual, OptionalTensor weight, int64_t dims, double eps,
                                        double offset, bool round_first) {
  check_same(residual, input, "residual");
  Tensor output = empty_like(input, output_type(type_of(input), weight, round_first));
  Tensor sum = empty_like(input, type_of(input));
  run_forward(input, &residual, weight, dims, eps, offset, round_first, output, &sum, nullptr);
  return {output, sum};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_forward(Tensor input, Tensor residual, OptionalTensor weight,
                                                        int64_t dims, double eps, double offset, bool round_first) {
  check_same(residual, input, "residual");
  Tensor output = empty_like(input, output_type(type_of(input), weight, round_first));
  Tensor sum = empty_like(input, type_of(input)), rstd = empty_rstd(input, dims);
  run_forward(input, &residual, weight, dims, eps, offset, round_first, output, &sum, &rstd);
  return {output, sum, rstd};
}

}  // namespace

std::tuple<Tensor, Tensor> rms_norm_backward(Tensor grad, OptionalTensor grad_sum, Tensor input, Tensor rstd,
                                             OptionalTensor weight, int64_t dims, double eps, double offset,
                                             bool need_input, bool need_weight) {
  check_same(grad, input, "grad");
  if (grad_sum) check_same(*grad_sum, input, "grad_sum");
  need_weight = need_weight && weight;
  const Shape shape(input, dims);
  const Type type = type_of(input);
  const Gain gain(weight, offset, input, shape, false);
  const int64_t none = 0;
  const Tensor grad_input = need_input ? empty_like(input, type) : empty(&none, 1, type);
  const Tensor grad_weight = need_weight ? empty_like(*weight, type_of(*weight)) : empty(&none, 1, type);
  if (!need_input && !need_weight) return {grad_input, grad_weight};

  const Tensor x = with_plain_rows(input, shape.outer), dy = with_plain_rows(grad, shape.outer);
  const bool add = grad_sum && need_input;
  const Tensor ds = add ? with_plain_rows(*grad_sum, shape.outer) : Tensor(), r = torch::stable::contiguous(rstd);
  const auto operands = operands_of<kBackwardOperands>(
      x, shape.outer, {&x, &dy, need_input ? &grad_input : nullptr, add ? &ds : nullptr});
  const Backward b = {shape.columns, eps, type, need_input, need_weight, add, gain.data};
  const char* statistic = static_cast<const char*>(r.data_ptr());
  const Target& target = current_target();
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(shape.columns, 1));
  if (!need_weight) {
    parallel(operands.rows, grain, [&](int64_t begin, int64_t end) {
      backward_rows(target, b, operands, statistic, nullptr, nullptr, begin, end);
    });
    return {grad_input, grad_weight};
  }

  const int64_t rows = operands.rows, each = chunk_rows(rows), chunks = (rows + each - 1) / each;
  const auto totals = std::make_unique<double[]>(chunks * shape.columns);  // zeros
  parallel(chunks, std::max<int64_t>(1, grain / each), [&](int64_t begin, int64_t end) {
    const auto partial = std::make_unique<char[]>(shape.columns * size_of(wide(type)));
    for (int64_t chunk = begin; chunk < end; ++chunk)
      backward_rows(target, b, operands, statistic, partial.get(), totals.get() + chunk * shape.columns, chunk * each,
                    std::min(rows, (chunk + 1) * each));
  });
  parallel(shape.columns, std::max<int64_t>(1, kGrain / std::max<int64_t>(chunks, 1)), [&](int64_t begin, int64_t end) {
    target.finish(totals.get(), chunks, shape.columns, begin, end, type_of(*weight), grad_weight.data_ptr());
  });
  return {grad_input, grad_weight};
}

STABLE_TORCH_LIBRARY_IMPL(rmsnorm, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_out", TORCH_BOX(&rms_norm_out));
  m.impl("rms_norm_forward", TORCH_BOX(&rms_norm_forward));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("add_rms_norm_forward", TORCH_BOX(&add_rms_norm_forward));
}

}  // namespace rmsnorm

extern "C" __attribute__((visibility("default"))) int64_t rmsnorm_large_bytes() { return rmsnorm::large_bytes(); }

extern "C" __attribute__((visibility("default"))) void rmsnorm_set_large_bytes(int64_t bytes) {
  rmsnorm::large_bytes() = bytes;
}
