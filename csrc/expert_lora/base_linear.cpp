// Where torch has no fast bfloat16 product, operands are widened to float32, the weight a block at a time, multiplied
// by torch in float32, and the result is rounded once.

#include "base_linear.h"

#include "operands.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include <array>

namespace cram {
namespace {

// A widened block of the weight; large enough for a full product, small beside a model.
constexpr int64_t kBlockBytes = 16 << 20;

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(x), torch::stable::detail::from(weight), torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Builds of torch without oneDNN have neither the question nor the products.
bool ask_torch() {
  StableIValue answer{};
  const auto failed =
      torch_call_dispatcher("mkldnn::_is_mkldnn_bf16_supported", "", &answer, TORCH_ABI_VERSION);
  return !failed && torch::stable::detail::to<bool>(answer);
}

bool is_widened(const Tensor& x, const Tensor& weight) {
  return !torch_multiplies_halves() && x.numel() && x.scalar_type() == ScalarType::BFloat16 &&
      weight.scalar_type() == ScalarType::BFloat16;
}

Tensor wide(const Tensor& tensor) { return torch::stable::to(tensor, ScalarType::Float); }

// product(block of the weight) gives so many columns of the result [..., columns].
template <class Product>
Tensor by_blocks(const Tensor& like, const Tensor& weight, int64_t dim, const Product& product) {
  const int64_t columns = weight.size(dim), depth = weight.size(1 - dim);
  const int64_t step = std::max<int64_t>(1, kBlockBytes / (4 * std::max<int64_t>(depth, 1)));
  const Tensor result = empty_rows_of(like, columns);
  for (int64_t begin = 0; begin < columns; begin += step) {
    const int64_t count = std::min(step, columns - begin);
    Tensor rows = weight, to = result;
    rows = torch::stable::narrow(rows, dim, begin, count);
    to = torch::stable::narrow(to, result.dim() - 1, begin, count);
    torch::stable::copy_(to, product(wide(rows), begin, count));
  }
  return result;
}

}  // namespace

bool torch_multiplies_halves() {
  static const bool answer = ask_torch();
  return answer;
}

Tensor base_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  if (!is_widened(x, weight)) return linear(x, weight, bias);
  const Tensor from = wide(x);
  return by_blocks(x, weight, 0, [&](const Tensor& rows, int64_t begin, int64_t count) {
    std::optional<Tensor> added;
    if (bias) {
      Tensor whole = *bias;
      added = wide(torch::stable::narrow(whole, 0, begin, count));
    }
    return linear(from, rows, added);
  });
}

Tensor base_gradient(const Tensor& dy, const Tensor& weight) {
  if (!is_widened(dy, weight)) return torch::stable::matmul(dy, weight);
  const Tensor from = wide(dy);
  return by_blocks(dy, weight, 1, [&](const Tensor& columns, int64_t, int64_t) {
    return torch::stable::matmul(from, columns);
  });
}

}  // namespace cram
