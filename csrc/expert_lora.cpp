// The packed expert layer on a CPU, forward: everything in one parallel region, but for the base linear of more than a
// few tokens, which is torch's.
//
//     Z = drop(X) A^T    U = Z o w    Y = X W0^T + b + U Bt
//
// w [S, R] are the gates of each packed row times the scale; a gate of exactly 0 selects. Rows that no token uses are
// not read by EXPAND, which would spread their NaN. Z's columns that backward reads are kept in x's dtype; U lives in
// float32, or in bfloat16 where pairs are multiplied.
//
// Deterministic: an element is computed by one thread, in an order that does not depend on the number of threads, and
// on the number of tokens only by whose linear is the base.

#include "expert_lora_base.h"
#include "expert_lora_layer.h"
#include "tasks.h"

#include <torch/csrc/stable/library.h>

#include <numeric>
#include <optional>
#include <tuple>

namespace cram {
namespace {

// Up to so many tokens the base linear is computed here too: its weight is read faster than by torch's linear, and y is
// written once. Beyond, and where x leaves the second-level cache, torch's blocking wins.
constexpr int64_t kFewTokens = 64, kFewHalfTokens = 32, kFewBytes = 1 << 20, kFewColumns = 128;

// What a forward reads and writes. Without `base`, y holds the base linear's output already.
struct Forward {
  const Layer& layer;
  const Keep* keep;
  const int64_t tokens;
  const Matrix x, down, up, y, base, bias, kept;
  const int64_t first;  // the row of Z's first column
  const bool pairs;

  bool few() const { return base.data; }
};

// One block of y: the base linear, the experts and the bias summed in float32, rounded once.
void whole_block(const Forward& f, const Gating& gate, const Factors& u, Range columns) {
  static const std::vector<int32_t> counted = [] {
    std::vector<int32_t> rows(kFewColumns);
    std::iota(rows.begin(), rows.end(), 0);
    return rows;
  }();
  const int64_t width = columns.end - columns.begin;
  float* sums = scratch(f.tokens * width);
  const ShrinkTile shrink = f.pairs ? pairs_shrink(f.base.half) : wide_shrink(f.x.half, f.base.half);
  shrink({f.x.data, f.x.stride, f.tokens, f.base.at(columns.begin, 0), f.base.stride, counted.data(), width,
          f.x.stride, sums, width});
  if (gate.live) {
    const ExpandTile tile = f.pairs ? pairs_expand(f.up.half, false) : wide_expand(f.up.half, false);
    tile({u.at(0), f.tokens, f.up.at(0, columns.begin), f.up.stride, gate.rows.data(), gate.live, width, sums, width,
          true});
  }
  float added[kFewColumns] = {};
  if (f.bias.data) Matrix{f.bias.at(0, columns.begin), width, f.bias.half}.copy(0, width, added);
  for (int64_t t = 0; t < f.tokens; ++t) {
    float* row = sums + t * width;
    for (int64_t c = 0; c < width; ++c) row[c] += added[c];
    f.y.write(t, columns.begin, width, row);
  }
}

void run(const Forward& f) {
  const Layer& layer = f.layer;
  const Gating gate = gating(layer, f.tokens, f.first, true, true);
  const int64_t rows = static_cast<int64_t>(gate.rows.size());
  const int64_t threads = threads_for(layer, f.tokens, f.few() ? layer.d_out : rows);
  const Blocks blocks = shrink_blocks(f.tokens, rows, f.keep != nullptr);
  Factors u(f.tokens, gate.live, f.pairs);
  const ShrinkTile shrink = f.pairs ? pairs_shrink(f.down.half) : wide_shrink(f.x.half, f.down.half);
  const ExpandTile tile = f.pairs ? pairs_expand(f.up.half, f.y.half) : wide_expand(f.up.half, f.y.half);
  const int64_t step = f.few() ? kFewColumns : column_step(f.tokens, layer.d_out, threads);
  const int64_t across = divided(layer.d_out, step);
  const int64_t block_tokens = f.few() ? f.tokens : token_step(f.tokens, across, threads);
  auto project_block = [&](int64_t index) {
    const Range ts = block(index / blocks.row_blocks(), blocks.token_step, f.tokens);
    const Range js = block(index % blocks.row_blocks(), blocks.row_step, rows);
    const int64_t width = js.end - js.begin, sums = (ts.end - ts.begin) * width;
    float* values = scratch(sums + (f.keep ? (ts.end - ts.begin) * layer.d_in : 0));
    project(shrink, f.x, layer.d_in, f.down, gate.down, ts, js, f.keep, values, values + sums);
    for (int64_t t = ts.begin; t < ts.end; ++t) {
      const float* row = values + (t - ts.begin) * width;
      u.set(t, js.begin, std::min(js.end, gate.live), row, gate.of(t) + js.begin);
      if (f.kept.data) f.kept.set(t, gate.rows.data() + js.begin, f.first, width, row);
    }
  };
  auto expand_block = [&](int64_t index) {
    const Range ts = block(index / across, block_tokens, f.tokens), columns = block(index % across, step, layer.d_out);
    if (f.few()) return whole_block(f, gate, u, columns);
    expand(tile, nullptr, u, f.up, gate.rows.data(), ts, columns, f.y, nullptr);
  };
  const int64_t expands = f.few() || gate.live ? divided(f.tokens, block_tokens) * across : 0;
  two_phases(threads, rows ? blocks.count() : 0, project_block, expands, expand_block);
}

bool is_few(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const ScalarType type = x.scalar_type();
  const int64_t tokens = tokens_of(x), most = type == ScalarType::Float ? kFewTokens : kFewHalfTokens;
  return tokens && tokens <= most && x.numel() * static_cast<int64_t>(x.element_size()) <= kFewBytes &&
      weight.is_contiguous() && weight.scalar_type() == type && (!bias || bias->is_contiguous());
}

// Y, and in z its columns of Z from `first` on, if there are any.
Tensor forward(
    const Layer& layer, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t first,
    const Keep* keep, const Tensor* z) {
  const int64_t tokens = tokens_of(x);
  const bool few = is_few(x, weight, bias);
  const Tensor y = few ? empty_rows_of(x, layer.d_out) : dense(base_linear(x, weight, bias));
  if (!tokens || !(few || layer.rows)) return y;
  const Matrix none{};
  const Matrix from = matrix(x, "x"), to = matrix(y, "y");
  STD_TORCH_CHECK(from.stride == layer.d_in && to.stride == layer.d_out, "x and weight must fit a and bt");
  run({layer, keep, tokens, from, matrix(layer.a, "a"), matrix(layer.bt, "bt"), to,
       few ? matrix(weight, "weight") : none, few && bias ? matrix(*bias, "bias") : none,
       z ? matrix(*z, "z") : none, first, from.half && has_pairs()});
  return y;
}

Tensor packed_expert_lora(
    Tensor x_in, Tensor weight, std::optional<Tensor> bias, Tensor a, Tensor bt, Tensor owner, Tensor gates,
    double scale) {
  const Layer layer(a, bt, owner, gates, scale);
  return forward(layer, dense(x_in), weight, bias, layer.rows, nullptr, nullptr);
}

std::tuple<Tensor, Tensor> packed_expert_lora_forward(
    Tensor x_in, Tensor weight, std::optional<Tensor> bias, Tensor a, Tensor bt, Tensor owner, Tensor gates,
    double scale, int64_t first, int64_t dropped, int64_t row_word, int64_t pair_word) {
  const Layer layer(a, bt, owner, gates, scale);
  const Tensor x = dense(x_in), z = empty(tokens_of(x), layer.rows - first, x.scalar_type());
  const std::optional<Keep> keep = make_keep(dropped, row_word, pair_word, layer.d_in);
  const Tensor y = forward(layer, x, weight, bias, first, keep ? &*keep : nullptr, first < layer.rows ? &z : nullptr);
  return {y, z};
}

}  // namespace
}  // namespace cram

STABLE_TORCH_LIBRARY_IMPL(cram, CPU, m) {
  m.impl("packed_expert_lora", TORCH_BOX(&cram::packed_expert_lora));
  m.impl("packed_expert_lora_forward", TORCH_BOX(&cram::packed_expert_lora_forward));
}
