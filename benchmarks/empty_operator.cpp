// Operators that do nothing but return room for their results: what torch itself takes for a call. launcher.py compiles
// them against the same stable ABI as our library, gives each the schema of one of ours, and with that its arguments.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace {

using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using Two = std::tuple<Tensor, Tensor>;

Tensor room(const Tensor& on, const int64_t* sizes, const int64_t* strides, int64_t dims, int32_t code) {
  int32_t device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(on.get(), &device));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, code, device, on.get_device_index(), &handle));
  return Tensor(handle);
}

Tensor like(const Tensor& tensor) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return room(tensor, tensor.sizes().data(), tensor.strides().data(), tensor.dim(), code);
}

// One number for each row of a matrix.
Tensor statistic(const Tensor& matrix) {
  const int64_t sizes[] = {matrix.size(0), 1}, strides[] = {1, 1};
  return room(matrix, sizes, strides, 2, aoti_torch_dtype_float32());
}

Tensor rms_norm(Tensor input, Maybe, int64_t, double, double, bool) { return like(input); }

Two rms_norm_forward(Tensor input, Maybe, int64_t, double, double, bool) { return {like(input), statistic(input)}; }

Two rms_norm_backward(Tensor, Maybe, Tensor input, Tensor, Maybe weight, int64_t, double, double, bool, bool) {
  return {like(input), like(*weight)};
}

Two add_rms_norm(Tensor input, Tensor residual, Maybe, int64_t, double, double, bool) {
  return {like(input), like(residual)};
}

Tensor gated_rms_norm(Tensor input, Tensor, Maybe, int64_t, double, double, bool, bool, bool) { return like(input); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rmsnorm, CPU, m) {
  m.impl("_empty_rms_norm", TORCH_BOX(&rms_norm));
  m.impl("_empty_rms_norm_forward", TORCH_BOX(&rms_norm_forward));
  m.impl("_empty_rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("_empty_add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("_empty_gated_rms_norm", TORCH_BOX(&gated_rms_norm));
}
