// The only file with a GPU's operators of the plain norm and of add + norm, and the one that registers all of them.
//
// They are what gpu/route.py and gpu/serve.py do for an everyday call, by the same rule of who serves it. Whatever else
// there is goes to those, which are operators of their own for it: the same name with _python_ in front.
#include <memory>
#include <string>
#include <vector>

#include "gpu_steps.h"

namespace rmsnorm::gpu {

using torch::stable::detail::StableLibrary;
using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

namespace {

// torch's own operator; nothing if it failed, as Python then says why.
template <class... Given>
std::optional<Two> ask_torch(const char* name, const Given&... given) {
  std::array<StableIValue, std::max<size_t>(sizeof...(given), 2)> stack{torch::stable::detail::from(given)...};
  if (torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS) return std::nullopt;
  return Two{torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

std::vector<int64_t> normalised(const Input& in) { return {in.sizes.data + in.outer, in.sizes.data + in.sizes.count}; }

std::optional<Normed> plain(const Tensor& input, const OptionalTensor& weight, int64_t dims, const Norm& norm) {
  Input in(input, dims);
  if (in.serving == Serving::python || norm.eps < 0 || !in.fits(weight)) return std::nullopt;
  if (in.is_torchs(weight, norm.offset, norm.round_first)) {
    auto both = ask_torch("aten::_fused_rms_norm", input, normalised(in), weight, std::optional<double>(norm.eps));
    if (!both) return std::nullopt;
    return Normed{std::get<0>(*both), std::nullopt, std::get<1>(*both)};
  }
  if (!in) return std::nullopt;
  return forward(in, nullptr, weight, norm);
}

Tensor rms_norm(Tensor input, OptionalTensor weight, int64_t dims, double eps, double offset, bool round_first) {
  const auto attempt = [&]() -> OptionalTensor {
    const auto results = plain(input, weight, dims, {eps, offset, round_first, false});
    if (!results) return std::nullopt;
    return results->output;
  };
  return or_python<Tensor>("rmsnorm::_python_rms_norm", attempt, input, weight, dims, eps, offset, round_first);
}

Tensor rms_norm_weighted(Tensor input, Tensor weight, double eps) {
  const int64_t dims = weight.dim();
  return rms_norm(std::move(input), std::move(weight), dims, eps, 0.0, false);
}

Tensor rms_norm_rounded(Tensor input, Tensor weight, double eps) {
  const int64_t dims = weight.dim();
  return rms_norm(std::move(input), std::move(weight), dims, eps, 0.0, true);
}

Two rms_norm_forward(Tensor input, OptionalTensor weight, int64_t dims, double eps, double offset, bool round_first) {
  const auto attempt = [&]() -> std::optional<Two> {
    const auto results = plain(input, weight, dims, {eps, offset, round_first, true});
    if (!results) return std::nullopt;
    return Two{results->output, *results->rstd};
  };
  return or_python<Two>("rmsnorm::_python_rms_norm_forward", attempt, input, weight, dims, eps, offset, round_first);
}

// Where the kernel may write by itself; torch's writes nowhere but into its own.
bool written(const Tensor& input, const OptionalTensor& weight, int64_t dims, const Norm& norm, const Tensor& out) {
  Input in(input, dims);
  if (!in || norm.eps < 0 || !in.fits(weight) || !out.is_contiguous() || !aligned(out.const_data_ptr())) return false;
  if (in.is_torchs(weight, norm.offset, norm.round_first)) return false;
  const Type gain = weight && norm.round_first ? known_type(rmsnorm::code_of(*weight)) : in.type;
  if (Sizes(out) != in.sizes || !in.beside(out) || known_type(rmsnorm::code_of(out)) != promoted(in.type, gain))
    return false;
  forward(in, nullptr, weight, norm);
  return true;
}

void rms_norm_out(Tensor input, OptionalTensor weight, int64_t dims, double eps, double offset, bool round_first,
                  Tensor out) {
  bool done = false;
  try {
    done = written(input, weight, dims, {eps, offset, round_first, false, out}, out);
  } catch (const Elsewhere&) {
  }
  if (!done) python<void>("rmsnorm::_python_rms_norm_out", input, weight, dims, eps, offset, round_first, out);
}

void rms_norm_weighted_out(Tensor input, Tensor weight, double eps, Tensor out) {
  const int64_t dims = weight.dim();
  rms_norm_out(std::move(input), std::move(weight), dims, eps, 0.0, false, std::move(out));
}

}  // namespace

std::optional<Two> norm_backward(const Tensor& grad, const OptionalTensor& grad_sum, const Tensor& input,
                                 const Tensor& rstd, const OptionalTensor& weight, int64_t dims, double eps,
                                 double offset, bool need_input, bool need_weight) {
  const bool learns = need_weight && weight;
  Input in(input, dims);
  if (in.serving == Serving::python || eps < 0 || !in.fits(weight)) return std::nullopt;
  if (!in.like(grad) || (grad_sum && !in.like(*grad_sum))) return std::nullopt;
  if (!grad_sum && in.is_torchs(weight, offset, false)) {
    const bool needed[] = {need_input, learns};
    const torch::headeronly::HeaderOnlyArrayRef<bool> needs(needed, 2);
    auto both = ask_torch("aten::_fused_rms_norm_backward", grad, input, normalised(in), rstd, weight, needs);
    if (!both) return std::nullopt;
    return Two{need_input ? std::get<0>(*both) : in.none(), learns ? std::get<1>(*both) : in.none()};
  }
  if (!in) return std::nullopt;
  const auto found = derive(in, &grad, address(grad_sum), &rstd, weight, offset, need_input,
                            {learns ? &*weight : nullptr, nullptr, nullptr});
  return Two{found.input, in.or_none(found.sums[0])};
}

namespace {

Two rms_norm_backward(Tensor grad, OptionalTensor grad_sum, Tensor input, Tensor rstd, OptionalTensor weight,
                      int64_t dims, double eps, double offset, bool need_input, bool need_weight) {
  const auto attempt = [&] {
    return norm_backward(grad, grad_sum, input, rstd, weight, dims, eps, offset, need_input, need_weight);
  };
  return or_python<Two>("rmsnorm::_python_rms_norm_backward", attempt, grad, grad_sum, input, rstd, weight, dims, eps,
                        offset, need_input, need_weight);
}

std::optional<Normed> added(const Tensor& input, const Tensor& residual, const OptionalTensor& weight, int64_t dims,
                            const Norm& norm) {
  Input in(input, dims);
  if (!in || norm.eps < 0 || !in.fits(weight) || !in.like(residual)) return std::nullopt;
  return forward(in, &residual, weight, norm);
}

Two add_rms_norm(Tensor input, Tensor residual, OptionalTensor weight, int64_t dims, double eps, double offset,
                 bool round_first) {
  const auto attempt = [&]() -> std::optional<Two> {
    const auto results = added(input, residual, weight, dims, {eps, offset, round_first, false});
    if (!results) return std::nullopt;
    return Two{results->output, *results->sum};
  };
  return or_python<Two>("rmsnorm::_python_add_rms_norm", attempt, input, residual, weight, dims, eps, offset,
                        round_first);
}

Two add_rms_norm_weighted(Tensor input, Tensor residual, Tensor weight, double eps) {
  const int64_t dims = weight.dim();
  return add_rms_norm(std::move(input), std::move(residual), std::move(weight), dims, eps, 0.0, false);
}

Two add_rms_norm_rounded(Tensor input, Tensor residual, Tensor weight, double eps) {
  const int64_t dims = weight.dim();
  return add_rms_norm(std::move(input), std::move(residual), std::move(weight), dims, eps, 0.0, true);
}

Three add_rms_norm_forward(Tensor input, Tensor residual, OptionalTensor weight, int64_t dims, double eps,
                           double offset, bool round_first) {
  const auto attempt = [&]() -> std::optional<Three> {
    const auto results = added(input, residual, weight, dims, {eps, offset, round_first, true});
    if (!results) return std::nullopt;
    return Three{results->output, *results->sum, *results->rstd};
  };
  return or_python<Three>("rmsnorm::_python_add_rms_norm_forward", attempt, input, residual, weight, dims, eps, offset,
                          round_first);
}

const std::vector<Served> plain_operators = {
    {"rms_norm", TORCH_BOX(&rms_norm)},
    {"rms_norm_weighted", TORCH_BOX(&rms_norm_weighted)},
    {"rms_norm_rounded", TORCH_BOX(&rms_norm_rounded)},
    {"rms_norm_out", TORCH_BOX(&rms_norm_out)},
    {"rms_norm_weighted_out", TORCH_BOX(&rms_norm_weighted_out)},
    {"rms_norm_forward", TORCH_BOX(&rms_norm_forward)},
    {"rms_norm_backward", TORCH_BOX(&rms_norm_backward)},
    {"add_rms_norm", TORCH_BOX(&add_rms_norm)},
    {"add_rms_norm_weighted", TORCH_BOX(&add_rms_norm_weighted)},
    {"add_rms_norm_rounded", TORCH_BOX(&add_rms_norm_rounded)},
    {"add_rms_norm_forward", TORCH_BOX(&add_rms_norm_forward)},
};

const std::vector<Served>* const all_operators[] = {&plain_operators,   &gated_operators, &modulated_operators,
                                                    &general_operators, &forms_operators, &heads_operators};

}  // namespace
}  // namespace rmsnorm::gpu

// For _native.py, through ctypes. The names of what there is, divided by spaces.
extern "C" __attribute__((visibility("default"))) const char* rmsnorm_gpu_operators() {
  static const std::string names = [] {
    std::string all;
    for (const auto* served : rmsnorm::gpu::all_operators)
      for (const auto& one : *served) all += (all.empty() ? "" : " ") + std::string(one.name);
    return all;
  }();
  return names.c_str();
}

// Serves them for a dispatch key from here on, under their names with `prefix` in front. Returns null, or why it did
// not work; the text lives until the next call.
extern "C" __attribute__((visibility("default"))) const char* rmsnorm_gpu_register(const char* key,
                                                                                   const char* prefix) {
  using namespace rmsnorm::gpu;
  static std::string error;
  static std::vector<std::unique_ptr<StableLibrary>> libraries;
  try {
    libraries.push_back(std::make_unique<StableLibrary>(StableLibrary::Kind::IMPL, "rmsnorm", key, __FILE__, __LINE__));
    for (const auto* served : all_operators)
      for (const auto& one : *served) libraries.back()->impl((prefix + std::string(one.name)).c_str(), one.boxed);
    return nullptr;
  } catch (const std::exception& caught) {
    error = std::string(caught.what());  // not assigned as text: torch's libraries for macOS never ask libc++ for that
    return error.c_str();
  }
}
