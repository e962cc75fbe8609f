// The only file that says which steps of a GPU's kernels a norm has, and what its launches return: gpu/steps.py in C++.
#pragma once

#include <vector>

#include "gpu.h"

namespace rmsnorm::gpu {

// The constants LOAD and STORE, in the order of STEPS in gpu/launcher.py.
enum class Step : int8_t { plain, unrounded, gated, gated_each, silu, sigmoid, lean, none, each };

// Tensors and numbers of single forms, in the order of More in gpu/steps.py. A number below 0 isn't there.
struct More {
  Matrix gate, scale, shift;
  int64_t group = -1;
  Row bias;
  Row mean;  // LayerNorm's, which forward writes and backward reads
  int64_t counted = -1;
  Row grad_rstd;
  Matrix input;
  const Tensor* dgate = nullptr;
  const Tensor* dsum = nullptr;

  void push(Launch& launch, const Tensor* bias_sums = nullptr, const Tensor* gate_sums = nullptr) const;
};

// What heads [*, heads, tokens, head_dim] are turned by: Turn of gpu/heads.py.
struct Turn {
  Row cos, sin;
  int64_t rows = 0, turned = 0;
  bool interleaved = false;

  void push(Launch& launch, const Tensor& heads) const;
  static Matrix matrix(const Tensor* heads);
  static Tensor room(const Input& input);  // where a projection wrote
};

// Of one norm.
struct Steps {
  const More* more = nullptr;
  Step load = Step::plain, store = Step::plain;
  bool layer = false, floor = false;
  int64_t number = 0;          // what the sum of squares is divided by; 0 for the number of columns
  const Turn* turn = nullptr;  // backwards

  double part(int64_t columns) const { return 1.0 / static_cast<double>(number ? number : columns); }
  void push_constants(Launch& launch) const {
    launch.constant(static_cast<int>(load)), launch.constant(layer), launch.constant(floor);
    launch.constant(static_cast<int>(store));
  }
};

inline void push_more(Launch& launch, const More* more, const Tensor* bias_sums = nullptr,
                      const Tensor* gate_sums = nullptr) {
  if (more) more->push(launch, bias_sums, gate_sums);
  else launch.none();
}

// What a forward pass is asked for, beside the tensors.
struct Norm {
  double eps, offset;
  bool round_first, keep;
  OptionalTensor out = std::nullopt;  // contiguous; where the output goes
  Type dtype = Type::none;            // the output's; none: what follows from input and weight
  bool store = true;                  // whether there is an output
  OptionalTensor sum = std::nullopt;  // of another type than the input's
};

struct Normed {
  Tensor output;
  OptionalTensor sum, rstd;
};

// One launch: forward() of gpu/launch.py.
Normed forward(const Input& input, const Tensor* residual, const OptionalTensor& weight, const Norm& norm,
               const Steps& steps = {});

// The gradient of the input, and sums over rows for tensors like these, null for what isn't wanted: of the gradient
// times x̂ for a weight or a scale, of the gradient for a bias or a shift, and for a gate that rows share: derive() of
// gpu/backward.py. An input's that isn't wanted has the shape [0].
struct Gradients {
  Tensor input;
  std::array<OptionalTensor, 3> sums;
};
Gradients derive(const Input& input, const Tensor* grad, const Tensor* grad_sum, const Tensor* rstd,
                 const OptionalTensor& weight, double offset, bool need_input, const std::array<const Tensor*, 3>& like,
                 const Steps& steps = {});

// An operator of a GPU, as it is registered.
struct Served {
  const char* name;
  void (*boxed)(StableIValue*, uint64_t, uint64_t);
};
extern const std::vector<Served> gated_operators, modulated_operators, general_operators, forms_operators,
    heads_operators;

// rms_norm_backward, where that is served here.
std::optional<std::tuple<Tensor, Tensor>> norm_backward(const Tensor& grad, const OptionalTensor& grad_sum,
                                                        const Tensor& input, const Tensor& rstd,
                                                        const OptionalTensor& weight, int64_t dims, double eps,
                                                        double offset, bool need_input, bool need_weight);

}  // namespace rmsnorm::gpu
