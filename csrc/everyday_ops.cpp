// The only file with the operators of an everyday call: a weight, and rows that lie side by side. A row or a few take
// less time than the way to them, so that counts; what else is given goes to ops.cpp.
#include <algorithm>
#include <span>
#include <utility>

#include "run.h"

namespace rmsnorm {
namespace {

namespace stack = torch::stable::detail;  // values of the dispatcher's stack

// A tensor of the stack, or for it. As a torch::stable::Tensor it is a block of the heap more, which takes two on its
// way out: 0.1 of the 1.8 us that a call takes.
class Handle {
 public:
  explicit Handle(AtenTensorHandle handle) : handle_(handle) {}
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  ~Handle() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }
  AtenTensorHandle get() const { return handle_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }
  char* data() const {
    void* data;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle_, &data));
    return static_cast<char*>(held(handle_, data));
  }

 private:
  AtenTensorHandle handle_;
};

// One that is given. What is asked of it is asked once: each question crosses the stable ABI.
class Given : public Handle {
 public:
  explicit Given(StableIValue value) : Handle(stack::to<AtenTensorHandle>(value)) {
    int64_t *first, *steps, count;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(get(), &count));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(get(), &first));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(get(), &steps));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(get(), &code));
    sizes = {first, static_cast<size_t>(count)}, strides = {steps, static_cast<size_t>(count)};
  }
  int64_t dims() const { return static_cast<int64_t>(sizes.size()); }
  Tensor tensor() const {
    AtenTensorHandle another;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(get(), &another));
    return Tensor(another);
  }
  bool is_contiguous() const {
    int64_t expected = 1;
    for (size_t d = sizes.size(); d-- > 0; expected *= sizes[d])
      if (sizes[d] != 1 && strides[d] != expected) return false;
    return true;
  }

  std::span<const int64_t> sizes, strides;
  int32_t code;
};

Handle empty_like(const Given& tensor, Type type) {
  return Handle(new_empty(tensor.sizes.data(), tensor.dims(), tensor.code, size_of(type)));
}

// Rows side by side, and a weight of one of them in the same type; none if that isn't what is given.
struct Rows {
  Rows(const Given& input, const Given& weight) {
    int32_t device;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(weight.get(), &device));
    const int64_t outer = input.dims() - weight.dims();
    if (device != aoti_torch_device_type_cpu() || weight.code != input.code || weight.dims() == 0 || outer < 0) return;
    if (!std::equal(weight.sizes.begin(), weight.sizes.end(), input.sizes.begin() + outer)) return;
    if (!input.is_contiguous() || !weight.is_contiguous()) return;
    for (int64_t size : weight.sizes) columns *= size;
    if (columns == 0) return;
    type = type_of(input.code), count = 1;
    for (int64_t d = 0; d < outer; ++d) count *= input.sizes[d];
  }
  int64_t bytes() const { return columns * size_of(type); }

  int64_t count = 0, columns = 1;
  Type type = Type::none;
};

template <bool RoundFirst>
void rms_norm_weighted(StableIValue* values, uint64_t, uint64_t) {
  const Given input(values[0]), weight(values[1]);
  const double eps = stack::to<double>(values[2]);
  const Rows rows(input, weight);
  if (rows.count == 0) {
    values[0] = stack::from(rms_norm(input.tensor(), weight.tensor(), weight.dims(), eps, 0.0, RoundFirst));
    return;
  }
  const Gain gain(rows.type, weight.data(), 0.0, rows.type, rows.columns, Gain::kForward);
  Forward f = {};
  f.columns = rows.columns, f.input = f.output = rows.type, f.eps = eps, f.round_first = RoundFirst;
  f.gain_type = gain.type, f.gain = gain.rows;
  Handle output = empty_like(input, rows.type);
  Operands<kForwardOperands> operands;
  operands.data = {input.data(), output.data()};
  operands.push(rows.count, {rows.bytes(), rows.bytes()});
  run_forward(f, operands, *gain.target, Statistics{});
  values[0] = stack::from(output.release());
}

// Of a call that kept its input and its weight alone. To find 1/rms again takes 0.15 us for 4096 columns, and to make
// a tensor of it, hand it out, keep it and read it 0.8.
void rms_norm_weighted_backward(StableIValue* values, uint64_t, uint64_t) {
  const Given grad(values[0]), input(values[1]), weight(values[2]);
  const double eps = stack::to<double>(values[3]);
  const bool need_input = stack::to<bool>(values[4]), need_weight = stack::to<bool>(values[5]);
  const Rows rows(input, weight);
  if (rows.count == 0 || grad.code != input.code ||
      !std::equal(grad.sizes.begin(), grad.sizes.end(), input.sizes.begin(), input.sizes.end()) ||
      !grad.is_contiguous()) {
    const Tensor x = input.tensor(), gain = weight.tensor();
    const Tensor rstd = std::get<1>(rms_norm_forward(x, gain, weight.dims(), eps, 0.0, false));
    const auto [dx, dw] =
        rms_norm_backward(grad.tensor(), std::nullopt, x, rstd, gain, weight.dims(), eps, 0.0, need_input, need_weight);
    values[0] = stack::from(dx), values[1] = stack::from(dw);
    return;
  }
  const Gain gain(rows.type, weight.data(), 0.0, rows.type, rows.columns, Gain::kBackward);
  Backward b = {};
  b.columns = rows.columns, b.input = rows.type, b.eps = eps, b.gain = gain.rows;
  b.need_input = need_input, b.need_weight = need_weight;
  const auto result = [&](const Given& of, bool needed) {
    const int64_t none = 0;
    return needed ? empty_like(of, rows.type) : Handle(new_empty(&none, 1, of.code, 0));
  };
  Handle grad_input = result(input, need_input), grad_weight = result(weight, need_weight);
  if (need_input || need_weight) {
    char* const x = input.data();
    const auto rstd = inverse_rms(rows.type, x, rows.count, rows.columns, eps);
    Operands<kBackwardOperands> operands;
    operands.data = {x, grad.data(), need_input ? grad_input.data() : nullptr};
    operands.push(rows.count, {rows.bytes(), rows.bytes(), rows.bytes()});
    GradWeight to_weight;
    if (need_weight) to_weight = {grad_weight.data(), rows.type, rows.columns};
    run_backward(*gain.target, b, operands, rstd.get(), nullptr, {to_weight, GradWeight()});
  }
  values[0] = stack::from(grad_input.release()), values[1] = stack::from(grad_weight.release());
}

STABLE_TORCH_LIBRARY_IMPL(rmsnorm, CPU, m) {
  m.impl("rms_norm_weighted", &rms_norm_weighted<false>);
  m.impl("rms_norm_rounded", &rms_norm_weighted<true>);
  m.impl("rms_norm_weighted_backward", &rms_norm_weighted_backward);
}

}  // namespace
}  // namespace rmsnorm
