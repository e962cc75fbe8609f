// An operator that does nothing but return room for a result: what torch itself takes for a call. launcher.py compiles
// it, against the same stable ABI as our library.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

using torch::stable::Tensor;

namespace {

Tensor empty(Tensor input, std::optional<Tensor> weight, int64_t dims, double eps, double offset, bool round_first) {
  (void)weight, (void)dims, (void)eps, (void)offset, (void)round_first;
  int32_t code, device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(input.get(), &code));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(input.get(), &device));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(input.dim(), input.sizes().data(), input.strides().data(), code,
                                                  device, input.get_device_index(), &handle));
  return Tensor(handle);
}

}  // namespace

STABLE_TORCH_LIBRARY(rmsnorm_benchmark, m) {
  m.def("empty(Tensor input, Tensor? weight, int dims, float eps, float offset, bool round_first) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(rmsnorm_benchmark, CompositeExplicitAutograd, m) { m.impl("empty", TORCH_BOX(&empty)); }
