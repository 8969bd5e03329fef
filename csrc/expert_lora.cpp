// The packed expert layer on a CPU, forward: the base linear by torch, everything else in one parallel region.
//
//     Z = drop(X) A^T    U = Z o w    Y = X W0^T + b + U Bt
//
// w [S, R] are the gates of each packed row times the scale; a gate of exactly 0 selects. Rows that no token uses are
// not read by EXPAND, which would spread their NaN. Z's columns that backward reads are kept in x's dtype; U lives in
// float32, or in bfloat16 where pairs are multiplied.
//
// Deterministic: an element is computed by one thread, in an order that depends neither on the number of threads nor
// on the number of tokens.

#include "expert_lora_layer.h"
#include "tasks.h"

#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>
#include <tuple>

namespace cram {
namespace {

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(x), torch::stable::detail::from(weight), torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// y += what the experts add; Z's columns from `first` on are kept in z, if there are any.
void add_experts(
    const Layer& layer, const Tensor& x, int64_t first, const Keep* keep, const Tensor& y, const Tensor* z) {
  const int64_t tokens = tokens_of(x);
  if (!tokens || !layer.rows) return;
  const Matrix from = matrix(x, "x"), to = matrix(y, "y"), down = matrix(layer.a, "a"), up = matrix(layer.bt, "bt");
  const Matrix kept = z ? matrix(*z, "z") : Matrix{};
  STD_TORCH_CHECK(from.stride == layer.d_in && to.stride == layer.d_out, "x and weight must fit a and bt");
  const bool pairs = from.half && has_pairs();
  const Gating gate = gating(layer.gates, layer.owner, tokens, layer.scale, first, true, true);
  const int64_t rows = static_cast<int64_t>(gate.rows.size()), threads = threads_for(layer, tokens, rows);
  const Blocks blocks = shrink_blocks(tokens, rows, keep != nullptr);
  Factors u(tokens, gate.live, pairs);
  const ShrinkTile shrink = pairs ? pairs_shrink(down.half) : wide_shrink(from.half, down.half);
  const ExpandTile tile = pairs ? pairs_expand(up.half, to.half) : wide_expand(up.half, to.half);
  const int64_t step = column_step(tokens, layer.d_out, threads), across = divided(layer.d_out, step);
  const int64_t block_tokens = token_step(tokens, across, threads);
  auto project_block = [&](int64_t index) {
    const Range ts = block(index / blocks.row_blocks(), blocks.token_step, tokens);
    const Range js = block(index % blocks.row_blocks(), blocks.row_step, rows);
    const int64_t width = js.end - js.begin, sums = (ts.end - ts.begin) * width;
    float* values = scratch(sums + (keep ? (ts.end - ts.begin) * layer.d_in : 0));
    project(shrink, from, layer.d_in, down, gate, ts, js, keep, values, values + sums);
    for (int64_t t = ts.begin; t < ts.end; ++t) {
      const float* row = values + (t - ts.begin) * width;
      u.set(t, js.begin, std::min(js.end, gate.live), row, gate.of(t) + js.begin);
      if (z) kept.set(t, gate.rows.data() + js.begin, first, width, row);
    }
  };
  auto expand_block = [&](int64_t index) {
    const Range ts = block(index / across, block_tokens, tokens), columns = block(index % across, step, layer.d_out);
    expand(tile, nullptr, u, up, gate.rows.data(), ts, columns, to, nullptr);
  };
  const int64_t expands = gate.live ? divided(tokens, block_tokens) * across : 0;
  two_phases(threads, blocks.count(), project_block, expands, expand_block);
}

Tensor packed_expert_lora(
    Tensor x_in, Tensor weight, std::optional<Tensor> bias, Tensor a, Tensor bt, Tensor owner, Tensor gates,
    double scale) {
  const Layer layer(a, bt, owner, gates, scale);
  const Tensor x = dense(x_in), y = dense(linear(x, weight, bias));
  add_experts(layer, x, layer.rows, nullptr, y, nullptr);
  return y;
}

std::tuple<Tensor, Tensor> packed_expert_lora_forward(
    Tensor x_in, Tensor weight, std::optional<Tensor> bias, Tensor a, Tensor bt, Tensor owner, Tensor gates,
    double scale, int64_t first, int64_t dropped, int64_t row_word, int64_t pair_word) {
  const Layer layer(a, bt, owner, gates, scale);
  const Tensor x = dense(x_in), y = dense(linear(x, weight, bias));
  const Tensor z = empty(tokens_of(x), layer.rows - first, x.scalar_type());
  const std::optional<Keep> keep = make_keep(dropped, row_word, pair_word, layer.d_in);
  add_experts(layer, x, first, keep ? &*keep : nullptr, y, first < layer.rows ? &z : nullptr);
  return {y, z};
}

}  // namespace
}  // namespace cram

STABLE_TORCH_LIBRARY_IMPL(cram, CPU, m) {
  m.impl("packed_expert_lora", TORCH_BOX(&cram::packed_expert_lora));
  m.impl("packed_expert_lora_forward", TORCH_BOX(&cram::packed_expert_lora_forward));
}
