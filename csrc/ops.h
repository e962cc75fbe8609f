// The only file that all torch-facing sources include: what one defines and another calls.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace rmsnorm {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor rms_norm(Tensor input, OptionalTensor weight, int64_t dims, double eps, double offset, bool round_first);
std::tuple<Tensor, Tensor> rms_norm_forward(Tensor input, OptionalTensor weight, int64_t dims, double eps,
                                            double offset, bool round_first);
std::tuple<Tensor, Tensor> rms_norm_backward(Tensor grad, OptionalTensor grad_sum, Tensor input, Tensor rstd,
                                             OptionalTensor weight, int64_t dims, double eps, double offset,
                                             bool need_input, bool need_weight);

// The kernel of an operator as torch calls it: the arguments on a stack, then the results.
using Boxed = void (*)(StableIValue* stack, uint64_t arguments, uint64_t results);
// Registers one that Python calls past torch's dispatcher, too.
void serve(torch::stable::detail::StableLibrary& library, const char* name, Boxed kernel);

// Calls an operator that is written in Python, of ours, with its arguments on the stack, and leaves the results there.
// What is raised there is raised here, by its name and its words (_native.telling).
void dispatch(const char* name, StableIValue* stack);

}  // namespace rmsnorm
