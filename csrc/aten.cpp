// The only file that stands in for torch's own operators: aten::_fused_rms_norm and its backward have no CPU kernel,
// and rmsnorm.install() puts ours into that empty slot. What the kernels don't take goes back to torch's own formula,
// through the two operators of _install.py that hold it.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <array>
#include <exception>
#include <limits>
#include <memory>
#include <string>

#include "ops.h"
#include "raise.h"
#include "tensors.h"

namespace rmsnorm {
namespace {

using torch::stable::detail::StableLibrary;
using Sizes = std::vector<int64_t>;

bool is_native(int32_t code) {
  return code == aoti_torch_dtype_float32() || code == aoti_torch_dtype_bfloat16() ||
         code == aoti_torch_dtype_float16() || code == aoti_torch_dtype_float64();
}

// One native type throughout, a weight of the normalised shape, and a row that ends with that shape.
bool takes(const Tensor& input, const Sizes& shape, OptionalTensor& weight) {
  if (weight && !weight->defined()) weight.reset();  // what autograd saves for a missing weight
  const int64_t dims = static_cast<int64_t>(shape.size()), outer = input.dim() - dims;
  bool good = is_native(code_of(input)) && dims > 0 && outer >= 0;
  for (int64_t d = 0; good && d < dims; ++d) good = input.size(outer + d) == shape[d];
  if (!good || !weight) return good;
  good = code_of(*weight) == code_of(input) && weight->dim() == dims && weight->is_cpu();
  for (int64_t d = 0; good && d < dims; ++d) good = weight->size(d) == shape[d];
  return good;
}

// Why an operator in Python failed. The stable ABI tells that a call did, not why; _native.telling, which is around it,
// says it here on its way out.
thread_local std::string failed_as, failed_with;

template <class... Arguments>
std::tuple<Tensor, Tensor> call(const char* name, const Tensor& first, const Arguments&... others) {
  std::array<StableIValue, 1 + sizeof...(others)> stack{torch::stable::detail::from(first),
                                                        torch::stable::detail::from(others)...};
  dispatch(name, stack.data());
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

std::tuple<Tensor, Tensor> fused_rms_norm(Tensor input, Sizes shape, OptionalTensor weight, std::optional<double> eps) {
  // A negative eps would be a floor in our kernels; here it is added as any other.
  if (!takes(input, shape, weight) || (eps && *eps < 0))
    return call("rmsnorm::torch_fused_rms_norm", input, shape, weight, eps);
  const bool wide = code_of(input) == aoti_torch_dtype_float64();
  const double machine = wide ? std::numeric_limits<double>::epsilon() : std::numeric_limits<float>::epsilon();
  return rms_norm_forward(input, weight, static_cast<int64_t>(shape.size()), eps.value_or(machine), 0.0, false);
}

std::tuple<Tensor, Tensor> fused_rms_norm_backward(Tensor grad, Tensor input, Sizes shape, Tensor rstd,
                                                   OptionalTensor weight, std::vector<bool> mask) {
  if (!takes(input, shape, weight) || code_of(grad) != code_of(input))
    return call("rmsnorm::torch_fused_rms_norm_backward", grad, input, shape, rstd, weight, bool(mask.at(0)),
                bool(mask.at(1)));
  // eps isn't told. The kernel asks for it only where 1/rms isn't a normal number, and there it matters only if it is
  // below 1e-77 itself, as 1/rms is above 3e38 then (docs/numerics.md, 6).
  auto [dx, dw] = rms_norm_backward(grad, std::nullopt, input, rstd, weight, static_cast<int64_t>(shape.size()), 0.0,
                                    0.0, mask[0], mask[1]);
  return {mask[0] ? dx : Tensor(), mask[1] && weight ? dw : Tensor()};
}

std::unique_ptr<StableLibrary> forward, backward;

std::unique_ptr<StableLibrary> fill(const char* name, void (*kernel)(StableIValue*, uint64_t, uint64_t)) {
  auto library = std::make_unique<StableLibrary>(StableLibrary::Kind::IMPL, "aten", "CPU", __FILE__, __LINE__);
  library->impl(name, kernel);
  return library;
}

}  // namespace

void dispatch(const char* name, StableIValue* stack) {
  failed_as.clear(), failed_with = std::string(name) + " failed";
  if (torch_call_dispatcher(name, "", stack, TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS)
    raise_as_torch(failed_as, failed_with);
}

}  // namespace rmsnorm

// Returns null, or why it did not work; the text lives until the next call. For _install.py, through ctypes.
//
// The backward kernel stays once it is there: graphs recorded before uninstall() still need it, and nothing else calls
// it.
extern "C" __attribute__((visibility("default"))) const char* rmsnorm_install(bool on) {
  using namespace rmsnorm;
  static std::string error;
  try {
    forward.reset();
    if (on && !backward) backward = fill("_fused_rms_norm_backward", TORCH_BOX(&fused_rms_norm_backward));
    if (on) forward = fill("_fused_rms_norm", TORCH_BOX(&fused_rms_norm));
    return nullptr;
  } catch (const std::exception& caught) {
    error = caught.what();
    return error.c_str();
  }
}

// The name of a Python exception, and its text.
extern "C" __attribute__((visibility("default"))) void rmsnorm_failed(const char* type, const char* text) {
  rmsnorm::failed_as = type, rmsnorm::failed_with = text;
}
