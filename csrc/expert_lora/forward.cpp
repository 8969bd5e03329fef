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

#include "../tasks.h"
#include "base_linear.h"
#include "blocks.h"

#include <torch/csrc/stable/library.h>

#include <limits>
#include <numeric>
#include <optional>
#include <tuple>

namespace cram {
namespace {

// Up to some tokens (crossovers_table.h) the base linear is computed here too: its weight is read faster than by
// torch's linear, and y is written once. Beyond, and where x leaves the second-level cache, torch's blocking wins.
constexpr int64_t kOwnBytes = 1 << 20, kOwnColumns = 128, kMostOwnColumns = 512, kVectors = 32;

// Blocks of equal width, so that threads end together. One token reads each row of Bt once, and memory serves long
// runs of a row faster.
int64_t own_columns(int64_t tokens, int64_t columns, int64_t threads, Unit unit) {
  if (unit == Unit::tiles) return kOwnColumns;
  if (tokens > 1) return divided(divided(columns, divided(columns, kOwnColumns)), kVectors) * kVectors;
  return std::min(kMostOwnColumns, divided(divided(columns, threads), kOwnColumns) * kOwnColumns);
}

// What a forward reads and writes. Without `base`, y holds the base linear's output already.
struct Operands {
  Matrix x, down, up, y, base, bias, kept;
};

// One layer's tasks: for tiles what is packed, SHRINK blocks, for tiles U packed, and blocks of y.
class Forward {
 public:
  Forward(
      const Layer& layer, const Operands& to, int64_t tokens, int64_t first, const Keep* keep, Unit unit, Arena& arena)
      : layer_(layer), to_(to), tokens_(tokens), first_(first), keep_(keep), unit_(unit),
        gate_(gating(layer, tokens, first, true, true, summed_rows(unit))),
        rows_(static_cast<int64_t>(gate_.rows.size())),
        threads_(threads_for(layer, tokens, own() ? layer.d_out : rows_)),
        blocks_(shrink_blocks(tokens, rows_, keep || (tiles() && !own()), unit)), u_(arena, tokens, gate_.live, unit),
        step_(own() ? own_columns(tokens, layer.d_out, threads_, unit) : column_step(tokens, layer.d_out, threads_)),
        across_(divided(layer.d_out, step_)),
        block_tokens_(
            !own() ? token_step(tokens, across_, threads_, unit)
                   : tiles() ? tile_tokens(tokens, layer.d_in) : tokens) {
    if (!tiles()) return;
    if (own()) x_ = panels(arena, tokens, layer.d_in);
    if (!own() || keep) down_ = panels(arena, rows_, layer.d_in);
    if (!own()) up_ = panels(arena, layer.d_out, gate_.live);
    if (own() && gate_.live) {
      up_left_ = strips(arena, layer.d_out, gate_.live);
      u_right_ = panels(arena, tokens, gate_.live);
    }
  }

  int64_t threads() const { return threads_; }
  int64_t packs() const {
    return x_.tiles + down_.tiles + divided(up_.tiles, kPackedTiles) + divided(up_left_.count, copied_strips());
  }
  int64_t projects() const { return rows_ ? blocks_.count() : 0; }
  int64_t packs_u() const { return u_right_.tiles; }
  int64_t expands() const { return own() || gate_.live ? divided(tokens_, block_tokens_) * across_ : 0; }

  void pack(int64_t index) {
    if (index < x_.tiles) return pack_rows(rows_of(to_.x, tokens_), layer_.d_in, index, x_);
    index -= x_.tiles;
    if (index < down_.tiles) return pack_rows(rows_of(to_.down, gate_.down, rows_), layer_.d_in, index, down_);
    index -= down_.tiles;
    const Rows up = rows_of(to_.up, gate_.rows, gate_.live);
    const Range tiles = block(index, up_.tiles ? kPackedTiles : copied_strips(), tiles_of(layer_.d_out));
    (up_.tiles ? pack_columns(up, 0, layer_.d_out, tiles.begin, tiles.end, up_)
               : copy_columns(up, 0, layer_.d_out, tiles.begin, tiles.end, up_left_));
  }

  void project_block(int64_t index) {
    const Range ts = block(index / blocks_.row_blocks(), blocks_.token_step, tokens_);
    const Range js = block(index % blocks_.row_blocks(), blocks_.row_step, rows_);
    const int64_t width = js.end - js.begin, sums = (ts.end - ts.begin) * width;
    float* values = scratch(sums + (keep_ ? (ts.end - ts.begin) * layer_.d_in : 0));
    if (tiles()) {
      project_by_tiles(ts, js, values, values + sums);
    } else {
      project(shrink(to_.down), to_.x, layer_.d_in, to_.down, gate_.down, ts, js, keep_, values, values + sums);
    }
    for (int64_t t = ts.begin; t < ts.end; ++t) {
      const float* row = values + (t - ts.begin) * width;
      u_.set(t, js.begin, std::min(js.end, gate_.live), row, gate_.of(t) + js.begin);
      if (!to_.kept.data) continue;
      if (gate_.plain && gate_.rows[js.begin] >= first_) {
        to_.kept.write(t, gate_.rows[js.begin] - first_, width, row);
      } else {
        to_.kept.set(t, gate_.rows.data() + js.begin, first_, width, row);
      }
    }
  }

  void pack_u(int64_t index) { transpose_strip(u_.strips, index, u_right_); }

  void expand_block(int64_t index) {
    const Range ts = block(index / across_, block_tokens_, tokens_);
    const Range columns = block(index % across_, step_, layer_.d_out);
    if (own()) return tiles() ? layer_by_tiles(ts, columns) : whole_block(columns);
    expand(expand_tile(to_.y.half), nullptr, u_, to_.up, gate_.rows.data(), up_, ts, columns, to_.y, nullptr);
  }

 private:
  // Strips of Bt that are copied in one task: runs of up to 1 KB of each row, and something for every thread.
  int64_t copied_strips() const {
    return std::clamp<int64_t>(divided(divided(up_left_.count, threads_), 2) * 2, 2, 32);
  }
  bool own() const { return to_.base.data; }
  bool tiles() const { return unit_ == Unit::tiles; }
  bool pairs() const { return unit_ == Unit::pairs; }
  ShrinkTile shrink(const Matrix& w) const { return pairs() ? pairs_shrink(w.half) : wide_shrink(to_.x.half, w.half); }
  ExpandTile expand_tile(bool half_y) const {
    return pairs() ? pairs_expand(to_.up.half, half_y) : wide_expand(to_.up.half, half_y);
  }

  void project_by_tiles(Range ts, Range js, float* values, float* memory) const {
    const int64_t count = ts.end - ts.begin, width = js.end - js.begin;
    if (!keep_ && own()) {
      Rows down = rows_of(to_.down, gate_.down, width);
      if (gate_.plain && to_.down.half && !layer_.shared()) {
        down = {to_.down.at(gate_.down[js.begin], 0), to_.down.stride, width, true, nullptr};
      } else {
        down.listed += js.begin;
      }
      return tile_shrink_few(x_, ts.begin / kDepth, count, down, layer_.d_in, values, width);
    }
    const Strips x = block_strips(to_.x, layer_.d_in, ts, keep_, memory);
    tile_shrink(x, 0, count, down_, rows_, values, width);
  }

  void layer_by_tiles(Range ts, Range columns) const {
    const Rows base{to_.base.at(columns.begin, 0), to_.base.stride, columns.end - columns.begin, true, nullptr};
    const Half* bias = to_.bias.data ? reinterpret_cast<const Half*>(to_.bias.at(0, columns.begin)) : nullptr;
    tile_layer({x_, ts.begin / kDepth, ts.end - ts.begin, base, layer_.d_in, u_right_, up_left_, columns.begin / kTile,
                bias, reinterpret_cast<Half*>(to_.y.at(ts.begin, columns.begin)), to_.y.stride});
  }

  // The base linear, the experts and the bias summed in float32, rounded once.
  void whole_block(Range columns) {
    static const std::vector<int32_t> counted = [] {
      std::vector<int32_t> rows(kMostOwnColumns);
      std::iota(rows.begin(), rows.end(), 0);
      return rows;
    }();
    const int64_t width = columns.end - columns.begin;
    float *const sums = scratch((tokens_ + 1) * width), *const added = sums + tokens_ * width;
    shrink(to_.base)({to_.x.data, to_.x.stride, tokens_, to_.base.at(columns.begin, 0), to_.base.stride,
                      counted.data(), width, to_.x.stride, sums, width});
    if (gate_.live) {
      expand_tile(false)({u_.at(0), tokens_, to_.up.at(0, columns.begin), to_.up.stride, gate_.rows.data(), gate_.live,
                          width, sums, width, true});
    }
    if (to_.bias.data) Matrix{to_.bias.at(0, columns.begin), width, to_.bias.half}.copy(0, width, added);
    for (int64_t t = 0; t < tokens_; ++t) {
      float* row = sums + t * width;
      for (int64_t c = 0; to_.bias.data && c < width; ++c) row[c] += added[c];
      to_.y.write(t, columns.begin, width, row);
    }
  }

  const Layer& layer_;
  const Operands to_;
  const int64_t tokens_, first_;  // first_: the row of Z's first column
  const Keep* const keep_;
  const Unit unit_;
  const Gating gate_;
  const int64_t rows_, threads_;
  const Blocks blocks_;
  Factors u_;
  const int64_t step_, across_, block_tokens_;
  // For tiles. The base product here: x and U on the right, B on the left. Else A and Bt on the right.
  Panels x_{}, u_right_{}, down_{}, up_{};
  Strips up_left_{};
};

// All layers in one parallel region, phase by phase.
void run(std::vector<Forward>& layers) {
  using Count = int64_t (Forward::*)() const;
  using Work = void (Forward::*)(int64_t);
  constexpr std::array<Count, 4> kCounts{
      &Forward::packs, &Forward::projects, &Forward::packs_u, &Forward::expands};
  constexpr std::array<Work, 4> kWork{
      &Forward::pack, &Forward::project_block, &Forward::pack_u, &Forward::expand_block};
  int64_t threads = 1;
  std::array<int64_t, 4> counts{};
  for (const Forward& each : layers) {
    threads = std::max(threads, each.threads());
    for (size_t phase = 0; phase < counts.size(); ++phase) counts[phase] += (each.*kCounts[phase])();
  }
  in_phases(threads, counts, [&](size_t phase, int64_t index) {
    auto at = layers.begin();
    for (int64_t count; index >= (count = ((*at).*kCounts[phase])()); ++at) index -= count;
    ((*at).*kWork[phase])(index);
  });
}

bool is_own(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const ScalarType type = x.scalar_type();
  const bool half = type == ScalarType::BFloat16;
  const bool blocked = unit_for(half) == Unit::tiles;
  const bool fits = blocked || x.numel() * static_cast<int64_t>(x.element_size()) <= kOwnBytes;
  return tokens_of(x) && crossover(half).has_base(tokens_of(x)) && fits && weight.is_contiguous() &&
         weight.scalar_type() == type && (!bias || bias->is_contiguous());
}

struct Base {
  Tensor weight;
  std::optional<Tensor> bias;
};

// The y of each layer, and in z the columns of the first one's Z from `first` on, if there are any.
std::vector<Tensor> forward(
    const std::vector<Layer>& layers, const Tensor& x, const std::vector<Base>& bases, int64_t first, const Keep* keep,
    const Tensor* z) {
  const int64_t tokens = tokens_of(x);
  const Matrix none{}, from = matrix(x, "x");
  const Unit unit = unit_for(from.half);
  Arena& arena = Arena::of_thread();
  std::vector<Tensor> made;
  std::vector<Forward> passes;
  passes.reserve(layers.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    const Layer& layer = layers[i];
    const auto& [weight, bias] = bases[i];
    layer.check_base(x, layer.d_in, weight, bias);
    layer.check_gates(tokens);
    const bool own = is_own(x, weight, bias);
    made.push_back(own ? empty_rows_of(x, layer.d_out) : dense(base_linear(x, weight, bias)));
    if (!tokens || !(own || layer.rows)) continue;
    const Matrix to = matrix(made.back(), "y");
    const Operands operands{
        from, matrix(layer.a, "a"), matrix(layer.bt, "bt"), to, own ? matrix(weight, "weight") : none,
        own && bias ? matrix(*bias, "bias") : none, z ? matrix(*z, "z") : none};
    passes.emplace_back(layer, operands, tokens, std::min(first, layer.rows), keep, unit, arena);
  }
  if (!passes.empty()) run(passes);
  return made;
}

Tensor packed_expert_lora(
    Tensor x_in, Tensor weight, std::optional<Tensor> bias, Tensor a, Tensor bt, Tensor owner, Tensor gates,
    double scale) {
  const Layer layer(a, bt, owner, gates, scale);
  return forward({layer}, dense(x_in), {{weight, bias}}, layer.rows, nullptr, nullptr)[0];
}

std::vector<Tensor> packed_expert_lora_stack(
    Tensor x_in, std::vector<Tensor> weights, std::vector<Tensor> biases, std::vector<Tensor> a,
    std::vector<Tensor> bt, std::vector<Tensor> owners, Tensor gates, double scale) {
  STD_TORCH_CHECK(
      a.size() == weights.size() && bt.size() == weights.size() && owners.size() == weights.size() &&
          (biases.empty() || biases.size() == weights.size()),
      "each layer of a stack must have a weight, a, bt and owner, and a bias if another one has");
  std::vector<Layer> layers;
  std::vector<Base> bases;
  for (size_t i = 0; i < weights.size(); ++i) {
    layers.emplace_back(a[i], bt[i], owners[i], gates, scale);
    bases.push_back({weights[i], biases.empty() ? std::nullopt : std::optional(biases[i])});
  }
  return forward(layers, dense(x_in), bases, std::numeric_limits<int64_t>::max(), nullptr, nullptr);
}

std::tuple<Tensor, Tensor> packed_expert_lora_forward(
    Tensor x_in, Tensor weight, std::optional<Tensor> bias, Tensor a, Tensor bt, Tensor owner, Tensor gates,
    double scale, int64_t first, int64_t dropped, int64_t row_word, int64_t pair_word) {
  const Layer layer(a, bt, owner, gates, scale);
  STD_TORCH_CHECK(0 <= first && first <= layer.rows, "first must lie in [0, ", layer.rows, "], got ", first);
  const Tensor x = dense(x_in), z = empty(tokens_of(x), layer.rows - first, x.scalar_type());
  const std::optional<Keep> keep = make_keep(dropped, row_word, pair_word, layer.d_in);
  const Keep* const drop = keep ? &*keep : nullptr;
  return {forward({layer}, x, {{weight, bias}}, first, drop, first < layer.rows ? &z : nullptr)[0], z};
}

}  // namespace
}  // namespace cram

STABLE_TORCH_LIBRARY_IMPL(cram, CPU, m) {
  m.impl("packed_expert_lora", TORCH_BOX(&cram::packed_expert_lora));
  m.impl("packed_expert_lora_stack", TORCH_BOX(&cram::packed_expert_lora_stack));
  m.impl("packed_expert_lora_forward", TORCH_BOX(&cram::packed_expert_lora_forward));
}
