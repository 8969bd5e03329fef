// orthogonality_penalty on the CPU: the modules are shared out over threads, one thread computes a whole module.
//
//     P = H A^T [B, r]    C = Bt Q [r, k]    E = s P C [B, k]    energy_b = |E_b|^2
//     loss = sum over modules, b of w_b energy_b,  w_b = gamma_b / (B M)
//     dgamma_b = energy_b / (B M)    G = 2 s w E    dP = G C^T    dC = P^T G
//     dBt = dC Q^T    dA = dP^T H    dH = dP A
//
// z [B, D_out] is never formed: Q is read by the expert's few rows, twice, whatever the batch. 2 r k D_out
// multiply-adds a module dominate. Determinism: fixed order inside a module, losses summed in module order.

#include "../vector.h"
#include "modules.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

namespace cram {
namespace {

// So much of a basis is read ahead of its use: 256 KiB, which fit into the second-level cache beside the rest.
constexpr int64_t kStreamed = 1 << 16;

// One thread's memory, reused from module to module.
struct Scratch {
  std::vector<float> hidden, a, bt, basis, p, c, e, dp, dc;
};

float* sized(std::vector<float>& buffer, int64_t count) {
  if (static_cast<int64_t>(buffer.size()) < count) buffer.resize(count);
  return buffer.data();
}

template <typename T>
CRAM_INLINE void convert(const void* from, int64_t count, float* to) {
  const T* values = static_cast<const T*>(from);
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(values[i]);
}

// The operand in float32: itself, or widened into the buffer.
CRAM_INLINE const float* widen(Operand operand, int64_t count, std::vector<float>& buffer) {
  if (operand.type == Type::float32) return static_cast<const float*>(operand.data);
  float* wide = sized(buffer, count);
  if (operand.type == Type::bfloat16) {
    convert<torch::headeronly::BFloat16>(operand.data, count, wide);
  } else {
    convert<torch::headeronly::Half>(operand.data, count, wide);
  }
  return wide;
}

template <typename T>
CRAM_INLINE void add_row(const void* tokens, int64_t row, int64_t depth, float* to) {
  const T* from = static_cast<const T*>(tokens) + row * depth;
  for (int64_t d = 0; d < depth; ++d) to[d] += static_cast<float>(from[d]);
}

// Mean of each sample's masked tokens [B, D_in]; 0 where it has none. Other tokens are not read.
CRAM_INLINE const float* pool(const Module& m, const bool* mask, int64_t tokens, std::vector<float>& buffer) {
  float* mean = sized(buffer, int64_t{m.batch} * m.d_in);
  for (int64_t b = 0; b < m.batch; ++b) {
    float* row = mean + b * m.d_in;
    std::fill_n(row, m.d_in, 0.0f);
    int64_t count = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t token = b * tokens + t;
      if (!mask[token]) continue;
      ++count;
      switch (m.hidden.type) {
        case Type::float32: add_row<float>(m.hidden.data, token, m.d_in, row); break;
        case Type::bfloat16: add_row<torch::headeronly::BFloat16>(m.hidden.data, token, m.d_in, row); break;
        case Type::float16: add_row<torch::headeronly::Half>(m.hidden.data, token, m.d_in, row); break;
      }
    }
    const float divisor = static_cast<float>(std::max<int64_t>(count, 1));
    for (int64_t d = 0; d < m.d_in; ++d) row[d] /= divisor;
  }
  return mean;
}

// Where the results go; null where a gradient is not wanted.
struct Output {
  float *dhidden, *da, *dbt, *dgamma;
};

template <int Lanes>
CRAM_INLINE void module_penalty(
    const Request& request, const Module& m, double scale, double* loss, const Output& out, Scratch& s) {
  const int64_t batch = m.batch, rank = m.rank, width = m.width;
  const float* hidden = request.masked ? pool(m, request.mask, request.tokens, s.hidden)
                                       : widen(m.hidden, batch * m.d_in, s.hidden);
  const float* a = widen(m.a, rank * m.d_in, s.a);
  const float* bt = widen(m.bt, rank * m.d_out, s.bt);
  const float* basis = widen(m.basis, width * m.d_out, s.basis);
  float *p = sized(s.p, batch * rank), *c = sized(s.c, rank * width), *e = sized(s.e, batch * width);
  stream(hidden, batch * m.d_in);
  stream(a, rank * m.d_in);
  stream(bt, rank * m.d_out);
  stream(basis, std::min(width * m.d_out, kStreamed));
  products<Lanes>(hidden, batch, a, rank, m.d_in, p);
  products<Lanes>(bt, rank, basis, width, m.d_out, c);
  combine<Lanes>({p, rank, 1}, batch, c, rank, width, e);
  // Few values, so their sums are exact to float32: in double.
  const double share = scale * scale / (static_cast<double>(batch) * static_cast<double>(request.modules.size()));
  *loss = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const double gamma = request.gamma[m.samples + b];
    double energy = 0;
    for (int64_t k = 0; k < width; ++k) energy += static_cast<double>(e[b * width + k]) * e[b * width + k];
    *loss += gamma * energy * share;
    if (out.dgamma) out.dgamma[m.samples + b] = static_cast<float>(energy * share);
    const float factor = static_cast<float>(2 * share * gamma);
    for (int64_t k = 0; k < width; ++k) e[b * width + k] *= factor;
  }
  if (out.dbt) {
    float* dc = sized(s.dc, rank * width);
    combine<Lanes>({p, 1, rank}, rank, e, batch, width, dc);
    combine<Lanes>({dc, width, 1}, rank, basis, width, m.d_out, out.dbt + m.row_out);
  }
  if (!out.da && !out.dhidden) return;
  float* dp = sized(s.dp, batch * rank);
  products<Lanes>(e, batch, c, rank, width, dp);
  if (out.da) combine<Lanes>({dp, 1, rank}, rank, hidden, batch, m.d_in, out.da + m.row_in);
  if (out.dhidden) combine<Lanes>({dp, rank, 1}, batch, a, rank, m.d_in, out.dhidden + m.inputs);
}

template <int Lanes>
CRAM_INLINE void range_penalty(
    const Request& request, double scale, double* losses, const Output& out, int64_t begin, int64_t end) {
  Scratch scratch;
  for (int64_t m = begin; m < end; ++m) {
    module_penalty<Lanes>(request, request.modules[m], scale, losses + m, out, scratch);
  }
}

CRAM_FOR_EACH_TARGET(
    modules_penalty,
    range_penalty,
    (const Request& request, double scale, double* losses, const Output& out, int64_t begin, int64_t end),
    (request, scale, losses, out, begin, end))

float* data_or_null(const Tensor& tensor, bool wanted) {
  return wanted ? static_cast<float*>(tensor.mutable_data_ptr()) : nullptr;
}

Result orthogonality_penalty(
    std::vector<Tensor> hidden,
    std::vector<Tensor> a,
    std::vector<Tensor> bt,
    std::vector<Tensor> bases,
    Tensor gamma,
    std::optional<Tensor> mask,
    double scale,
    bool want_hidden,
    bool want_a,
    bool want_bt,
    bool want_gamma) {
  const Request request = read_request(hidden, a, bt, bases, gamma, mask);
  Tensor loss = scalar(gamma);
  Tensor dhidden = values(gamma, request.inputs, want_hidden);
  Tensor da = values(gamma, request.row_ins, want_a);
  Tensor dbt = values(gamma, request.row_outs, want_bt);
  Tensor dgamma = values(gamma, request.samples, want_gamma);
  const Output out{
      data_or_null(dhidden, want_hidden),
      data_or_null(da, want_a),
      data_or_null(dbt, want_bt),
      data_or_null(dgamma, want_gamma)};
  const auto compute = modules_penalty_best();
  const int64_t count = static_cast<int64_t>(request.modules.size());
  std::vector<double> losses(count);
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    compute(request, scale, losses.data(), out, begin, end);
  });
  double total = 0;
  for (double each : losses) total += each;
  *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(total);
  return {loss, dhidden, da, dbt, dgamma};
}

}  // namespace
}  // namespace cram

STABLE_TORCH_LIBRARY_IMPL(cram, CPU, m) {
  m.impl("orthogonality_penalty", TORCH_BOX(&cram::orthogonality_penalty));
}
