// The packed expert layer on a CPU, backward: dX of the base linear by torch, the rest in one parallel region.
//
//     V = dY Bt^T    dZ = V o w    dX = dY W0 + drop(dZ A)    dg_e = s sum of Z o V over tokens and the expert's rows
//     dA = dZ^T drop(X)    dBt = U^T dY    U = Z o w          both for the last rows, which are trained
//
// The products over tokens are EXPANDs too: their factors are dZ^T and U^T, their rows the tokens. Tokens for which
// all trained gates are 0 are left out of them. A shared A is trained whole, by the sum of dZ over all experts.

#include "../tasks.h"
#include "base_linear.h"
#include "blocks.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

namespace cram {
namespace {

// The trained rows and the tokens that use them.
struct Trained {
  int64_t first, rows;
  std::vector<int32_t> tokens;  // those with a trained gate other than 0
  std::vector<int32_t> place;   // of each token in `tokens`, or -1
  std::vector<float> factors;   // [S, rows]
  int64_t segment;

  const float* of(int64_t token) const { return factors.data() + token / segment * rows; }
};

Trained trained_rows(const Layer& layer, int64_t tokens, int64_t first) {
  Trained found{};
  const int64_t segments = layer.gates.size(0), experts = layer.gates.size(1);
  const int64_t* of_row = static_cast<const int64_t*>(layer.owner.const_data_ptr());
  const float* gate = static_cast<const float*>(layer.gates.const_data_ptr());
  found.first = first;
  found.rows = layer.rows - first;
  found.segment = tokens / segments;
  found.factors.resize(segments * found.rows);
  found.place.assign(tokens, -1);
  found.tokens.reserve(tokens);
  for (int64_t s = 0; s < segments; ++s) {
    bool busy = false;
    for (int64_t r = 0; r < found.rows; ++r) {
      const float factor = gate[s * experts + of_row[first + r]] * static_cast<float>(layer.scale);
      found.factors[s * found.rows + r] = factor;
      busy |= factor != 0;
    }
    for (int64_t t = s * found.segment; busy && t < (s + 1) * found.segment; ++t) {
      found.place[t] = static_cast<int32_t>(found.tokens.size());
      found.tokens.push_back(static_cast<int32_t>(t));
    }
  }
  return found;
}

// Columns of dX that are computed at a time where the base's is computed here.
constexpr int64_t kGradientColumns = 128;

// Columns of x whose dropped copy a thread holds at a time, over all tokens: about four megabytes, or the least.
inline int64_t dropped_columns(int64_t tokens) {
  constexpr int64_t kFloats = 1 << 20, kLeast = 64;
  return std::max(kLeast, kFloats / std::max<int64_t>(tokens, 1) / kLeast * kLeast);
}

struct Needs {
  bool x, gates, a, b;
};

struct Gradients {
  Tensor x, gates, a, b;
};

// One call's operands and intermediates; `first` and `second` are the tasks of its two phases.
struct Backward {
  const Layer& layer;
  const Needs need;
  const Keep* keep;
  const int64_t tokens, tail;
  const Matrix dy, x, z, down, up, dx, da, db;
  const Matrix base;  // W0 where dX of the base is computed here, else dX holds it
  const int64_t kept_from;  // the row of Z's first column
  const Unit unit;
  const Gating gate;
  const Trained trained;
  const std::optional<Trained> everyone;  // all rows and the tokens that use them, for a shared A
  const int64_t rows, threads;
  const Blocks blocks;
  Panels packed_bt{}, packed_a{};  // for tiles
  Strips dy_left{};                // for tiles, where dX of the base is computed here
  Panels packed_base{};            // the same, where the weight is read for more than one block of tokens
  Factors dz, dz_t, u_t;
  float* const products;  // Z o V [T, R]
  float* dgates;
  const ShrinkTile shrink;
  const ExpandTile expand_x, expand_kept, gram_a, gram_b;
  const int64_t step_in, step_out, block_tokens;
  int64_t expands, grams_a, grams_b;

  static int64_t first_wanted(const Layer& layer, Needs need, int64_t tail) {
    return need.gates ? 0 : need.a && !need.x ? (layer.shared() ? 0 : tail) : layer.rows;
  }

  static ExpandTile expand_tile(Unit unit, const Matrix& w, bool half) {
    return unit == Unit::pairs ? pairs_expand(w.half, half) : wide_expand(w.half, half);
  }

  Backward(
      const Layer& layer, Needs need, const Keep* keep, int64_t tail, const Tensor& dy_in, const Tensor& x_in,
      const Tensor& z_in, const Gradients& to, const Matrix& base, Arena& arena)
      : layer(layer), need(need), keep(keep), tokens(tokens_of(dy_in)), tail(tail), dy(matrix(dy_in, "dy")),
        x(matrix(x_in, "x")), z(matrix(z_in, "z")), down(matrix(layer.a, "a")), up(matrix(layer.bt, "bt")),
        dx(matrix(to.x, "dx")), da(matrix(to.a, "da")), db(matrix(to.b, "db")), base(base),
        kept_from(layer.rows - z_in.size(1)), unit(unit_for(dy.half)),
        gate(gating(layer, tokens, first_wanted(layer, need, tail), need.x, need.gates, 1)),
        trained(trained_rows(layer, tokens, need.a || need.b ? tail : layer.rows)),
        everyone(layer.shared() && need.a ? std::optional(trained_rows(layer, tokens, 0)) : std::nullopt),
        rows(static_cast<int64_t>(gate.rows.size())),
        threads(threads_for(layer, tokens, std::max(rows, trained.rows))),
        blocks(shrink_blocks(tokens, rows, everyone.has_value() || unit == Unit::tiles, unit)),
        dz(arena, tokens, need.x ? gate.live : 0, unit),
        dz_t(arena, rows_of_da(), static_cast<int64_t>(of_a().tokens.size()), unit),
        u_t(arena, need.b ? trained.rows : 0, static_cast<int64_t>(trained.tokens.size()), unit),
        products(reinterpret_cast<float*>(arena.take(need.gates ? 4 * tokens * layer.rows : 0))),
        dgates(static_cast<float*>(to.gates.mutable_data_ptr())),
        shrink(unit == Unit::pairs ? pairs_shrink(up.half) : wide_shrink(dy.half, up.half)),
        expand_x(expand_tile(unit, down, dx.half)), expand_kept(expand_tile(unit, down, false)),
        gram_a(expand_tile(unit, x, da.half)), gram_b(expand_tile(unit, dy, db.half)),
        step_in(base.data ? kGradientColumns : column_step(tokens, layer.d_in, threads)),
        step_out(column_step(tokens, layer.d_out, threads)),
        block_tokens(
            base.data ? tile_tokens(tokens, layer.d_out)
                      : token_step(tokens, divided(layer.d_in, step_in), threads, unit)) {
    expands = base.data || (need.x && gate.live) ? divided(tokens, block_tokens) * divided(layer.d_in, step_in) : 0;
    grams_a = rows_of_da() ? divided(layer.d_in, step_in) : 0;
    grams_b = need.b && trained.rows ? divided(layer.d_out, step_out) : 0;
    if (unit != Unit::tiles) return;
    packed_bt = panels(arena, rows, layer.d_out);
    if (base.data) dy_left = strips(arena, tokens, layer.d_out);
    if (base.data && block_tokens < tokens) packed_base = panels(arena, layer.d_in, layer.d_out);
    if (need.x && gate.live) packed_a = panels(arena, layer.d_in, gate.live);
  }

  const Trained& of_a() const { return everyone ? *everyone : trained; }

  int64_t rows_of_da() const { return !need.a ? 0 : everyone ? layer.a_rows : trained.rows; }

  void run() {
    const int64_t packs = packed_bt.tiles + dy_left.count + divided(packed_a.tiles, kPackedTiles) +
        divided(packed_base.tiles, kPackedTiles);
    const std::array<int64_t, 3> counts{packs, blocks.count(), expands + grams_a + grams_b + (need.gates ? 1 : 0)};
    in_phases(threads, counts, [this](size_t phase, int64_t index) {
      phase == 0 ? pack(index) : phase == 1 ? first(index) : second(index);
    });
  }

  void pack(int64_t index) const {
    if (index < packed_bt.tiles) return pack_rows(rows_of(up, gate.rows, rows), layer.d_out, index, packed_bt);
    index -= packed_bt.tiles;
    if (index < dy_left.count) return copy_strip(rows_of(dy, tokens), layer.d_out, index, dy_left);
    index -= dy_left.count;
    if (index < divided(packed_base.tiles, kPackedTiles)) {
      const Range tiles = block(index, kPackedTiles, packed_base.tiles);
      return pack_columns(rows_of(base, layer.d_out), 0, layer.d_in, tiles.begin, tiles.end, packed_base);
    }
    index -= divided(packed_base.tiles, kPackedTiles);
    const Range tiles = block(index, kPackedTiles, packed_a.tiles);
    pack_columns(rows_of(down, gate.down, gate.live), 0, layer.d_in, tiles.begin, tiles.end, packed_a);
  }

  // V of some tokens and rows, and all that it is multiplied into.
  void first(int64_t index) {
    const Range ts = block(index / blocks.row_blocks(), blocks.token_step, tokens);
    const Range js = block(index % blocks.row_blocks(), blocks.row_step, rows);
    const int64_t width = js.end - js.begin, sums = (ts.end - ts.begin) * width;
    float* values = scratch(sums + layer.rows + layer.a_rows);
    float *kept = values + sums, *summed = kept + layer.rows;
    if (unit == Unit::tiles) {
      const bool left = dy_left.count;
      const Strips strips = left ? dy_left : block_strips(dy, layer.d_out, ts, nullptr, nullptr);
      tile_shrink(strips, left ? ts.begin / kTile : 0, ts.end - ts.begin, packed_bt, rows, values, width);
    } else if (width > 0) {
      project(shrink, dy, layer.d_out, up, gate.rows, ts, js, nullptr, values, nullptr);
    }
    const int32_t* of_row = gate.rows.data() + js.begin;
    for (int64_t t = ts.begin; t < ts.end; ++t) {
      const float* factor = gate.of(t) + js.begin;
      const float* row = values + (t - ts.begin) * width;
      const int32_t place = trained.place[t];
      const bool factors_b = need.b && place >= 0 && index % blocks.row_blocks() == 0;
      if (need.gates || factors_b) z.copy(t, layer.rows - kept_from, kept);
      if (need.gates && gate.plain && width) {
        float* to = products + t * layer.rows + of_row[0];
        for (int64_t j = 0; j < width; ++j) to[j] = kept[of_row[0] - kept_from + j] * row[j];
      } else {
        for (int64_t j = 0; need.gates && j < width; ++j) {
          products[t * layer.rows + of_row[j]] = kept[of_row[j] - kept_from] * row[j];
        }
      }
      if (need.x) dz.set(t, js.begin, std::min(js.end, gate.live), row, factor);
      if (everyone) {
        sum_experts(t, row, factor, width, summed);
      } else {
        for (int64_t j = 0; need.a && place >= 0 && j < width; ++j) {
          if (of_row[j] >= tail) dz_t.set(of_row[j] - tail, place, factor[j] == 0 ? 0 : row[j] * factor[j]);
        }
      }
      for (int64_t r = 0; factors_b && r < trained.rows; ++r) {
        const float w = trained.of(t)[r];
        u_t.set(r, place, w == 0 ? 0 : w * kept[tail + r - kept_from]);
      }
    }
  }

  // The columns of dZ of a token that reach the same row of a shared A, summed.
  void sum_experts(int64_t token, const float* row, const float* factor, int64_t width, float* summed) {
    const int32_t place = everyone->place[token];
    if (place < 0) return;
    std::fill(summed, summed + layer.a_rows, 0.0f);
    for (int64_t j = 0; j < width; ++j) summed[gate.down[j]] += factor[j] == 0 ? 0 : row[j] * factor[j];
    for (int64_t r = 0; r < layer.a_rows; ++r) dz_t.set(r, place, summed[r]);
  }

  void second(int64_t index) {
    const int64_t across = divided(layer.d_in, step_in);
    if (index < expands) {
      const Range ts = block(index / across, block_tokens, tokens);
      const Range cs = block(index % across, step_in, layer.d_in);
      if (base.data) return whole_gradient(ts, cs);
      return expand(expand_x, expand_kept, dz, down, gate.down.data(), packed_a, ts, cs, dx, keep);
    }
    index -= expands;
    if (index < grams_a) {
      return gram(gram_a, dz_t, of_a(), rows_of_da(), x, block(index, step_in, layer.d_in), da, keep);
    }
    index -= grams_a;
    const Range cs = block(index, step_out, layer.d_out);
    if (index < grams_b) return gram(gram_b, u_t, trained, trained.rows, dy, cs, db, nullptr);
    sum_gates();
  }

  // dX of the base and of the experts, summed in float32, rounded once.
  void whole_gradient(Range ts, Range cs) const {
    const int64_t width = cs.end - cs.begin, count = ts.end - ts.begin, first = ts.begin / kTile;
    const Rows rows{base.at(0, cs.begin), base.stride, layer.d_out, true, nullptr};
    TileGradient call{dy_left, first, count, rows, packed_base, keep ? Strips{} : dz.strips, packed_a, cs.begin, width,
                      dx.at(ts.begin, cs.begin), dx.stride, true};
    if (!keep) return tile_gradient(call);
    float* const sums = scratch(2 * count * width);
    call.y = sums, call.y_stride = width, call.half_y = false;
    tile_gradient(call);
    if (gate.live) {
      float* const added = sums + count * width;
      tile_expand({dz.strips, first, count, packed_a, cs.begin, width, added, width, false, false});
      keep->add(added, ts.begin, count, cs.begin, width, sums, width, false);
    }
    for (int64_t t = 0; t < count; ++t) dx.write(ts.begin + t, cs.begin, width, sums + t * width);
  }

  // to [r, columns of the block] = factors [r, busy tokens] times those tokens' rows of `from`.
  void gram(
      ExpandTile tile, const Factors& factors, const Trained& busy, int64_t count, const Matrix& from, Range columns,
      const Matrix& to, const Keep* dropped) const {
    const int64_t width = columns.end - columns.begin, part = dropped ? dropped_columns(tokens) : width;
    if (part < width) {
      for (int64_t c = columns.begin; c < columns.end; c += part) {
        gram(tile, factors, busy, count, from, {c, std::min(columns.end, c + part)}, to, dropped);
      }
      return;
    }
    Matrix of{from.at(0, columns.begin), from.stride, from.half};
    if (dropped) {
      float* memory = scratch(tokens * width);
      dropped->copy(of.data, of.stride, of.half, 0, tokens, columns.begin, width, memory);
      of = {reinterpret_cast<char*>(memory), width, of.half};
    }
    if (factors.unit == Unit::tiles) {
      const bool all = static_cast<int64_t>(busy.tokens.size()) == tokens;
      const Rows rows{of.data, of.stride, factors.count, of.half, all ? nullptr : busy.tokens.data()};
      return tile_gram({factors.strips, count, rows, width, to.at(0, columns.begin), to.stride, to.half});
    }
    tile({factors.at(0), count, of.data, of.stride, busy.tokens.data(), factors.count, width,
          to.at(0, columns.begin), to.stride, false});
  }

  // dg from the products, summed in double: a softmax behind the gates subtracts sums that are nearly equal. An unused
  // expert may hold NaN, which its gate's gradient must not carry into a softmax over all gates.
  void sum_gates() const {
    const int64_t experts = layer.gates.size(1);
    const int64_t* of_row = static_cast<const int64_t*>(layer.owner.const_data_ptr());
    const float* value = static_cast<const float*>(layer.gates.const_data_ptr());
    std::vector<double> sums(layer.rows), of_expert(experts);
    for (int64_t s = 0; s < gate.segments; ++s) {
      std::fill(sums.begin(), sums.end(), 0.0);
      for (int64_t t = s * gate.tokens; t < (s + 1) * gate.tokens; ++t) {
        for (int64_t r = 0; r < layer.rows; ++r) sums[r] += products[t * layer.rows + r];
      }
      float* row = dgates + s * experts;
      std::fill(of_expert.begin(), of_expert.end(), 0.0);
      for (int64_t r = 0; r < layer.rows; ++r) of_expert[of_row[r]] += sums[r];
      for (int64_t e = 0; e < experts; ++e) {
        row[e] = static_cast<float>(of_expert[e] * layer.scale);
        if (value[s * experts + e] != 0) continue;
        if (std::isnan(row[e])) row[e] = 0;
        if (std::isinf(row[e])) row[e] = std::copysign(std::numeric_limits<float>::max(), row[e]);
      }
    }
  }
};

// Up to some tokens (crossovers_table.h) dX of the base is computed here too.
bool is_own_gradient(const Tensor& dy, const Tensor& weight) {
  const ScalarType type = dy.scalar_type();
  const bool half = type == ScalarType::BFloat16;
  return half && unit_for(half) == Unit::tiles && crossover(half).has_gradient(tokens_of(dy)) &&
      weight.is_contiguous() && weight.scalar_type() == type;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> packed_expert_lora_backward(
    Tensor dy_in, std::optional<Tensor> x_in, Tensor z_in, Tensor weight, Tensor a, Tensor bt, Tensor owner,
    Tensor gates, double scale, int64_t tail, int64_t dropped, int64_t row_word, int64_t pair_word, bool need_x,
    bool need_gates, bool need_a, bool need_b) {
  const Layer layer(a, bt, owner, gates, scale);
  const Tensor dy = dense(dy_in), z = dense(checked(z_in, 2, "z"));
  const int64_t tokens = tokens_of(dy), trained = layer.rows - tail;
  layer.check_base(dy, layer.d_out, weight, std::nullopt);
  STD_TORCH_CHECK(0 <= tail && tail <= layer.rows, "tail must lie in [0, ", layer.rows, "], got ", tail);
  STD_TORCH_CHECK(
      z.size(0) == tokens && z.size(1) <= layer.rows && z.size(1) >= (need_gates ? layer.rows : need_b ? trained : 0),
      "z must be [T, rows from the first that is read], got ", z.size(1), " columns");
  const bool own = need_x && is_own_gradient(dy, weight) && layer.rows;
  const Gradients to{
      !need_x ? empty(0, 0, dy.scalar_type())
              : own ? empty_rows_of(dy, layer.d_in) : dense(base_gradient(dy, weight)),
      empty(need_gates ? gates.size(0) : 0, gates.size(1), ScalarType::Float),
      empty(!need_a ? 0 : layer.shared() ? layer.a_rows : trained, layer.d_in, a.scalar_type()),
      empty(need_b ? trained : 0, layer.d_out, bt.scalar_type())};
  if (!tokens || !layer.rows) {
    for (Tensor each : {to.gates, to.a, to.b}) torch::stable::zero_(each);
    return {to.x, to.gates, to.a, to.b};
  }
  const Tensor x = x_in ? dense(*x_in) : dy;
  STD_TORCH_CHECK(
      !need_a || (x_in && tokens_of(x) == tokens && x.size(x.dim() - 1) == layer.d_in),
      "the gradient of a must be given x [T, D_in]");
  const std::optional<Keep> keep = make_keep(dropped, row_word, pair_word, layer.d_in);
  const Needs need{need_x, need_gates, need_a, need_b};
  Backward(layer, need, keep ? &*keep : nullptr, tail, dy, x, z, to, own ? matrix(weight, "weight") : Matrix{},
           Arena::of_thread()).run();
  return {to.x, to.gates, to.a, to.b};
}

}  // namespace
}  // namespace cram

STABLE_TORCH_LIBRARY_IMPL(cram, CPU, m) {
  m.impl("packed_expert_lora_backward", TORCH_BOX(&cram::packed_expert_lora_backward));
}
