// The frozen linear under the experts, and its gradient to the input, by torch.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace cram {

// Whether torch multiplies bfloat16 at full speed. Without instructions for it, it is many times slower than float32.
bool torch_multiplies_halves();

// x W^T + b.
torch::stable::Tensor base_linear(
    const torch::stable::Tensor& x, const torch::stable::Tensor& weight,
    const std::optional<torch::stable::Tensor>& bias);

// dY W.
torch::stable::Tensor base_gradient(const torch::stable::Tensor& dy, const torch::stable::Tensor& weight);

}  // namespace cram
