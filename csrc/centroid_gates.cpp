// centroid_gates on the CPU: each sample of each layer is a task of its own.
//
//     g[l, s, :] = softmax over the members of -|v_s - c_le|^2 / (2 sigma^2)      0 elsewhere
//
// Only differences between a sample's distances matter. They are taken from its nearest member p, found by a first
// pass, so that no large term cancels:
//
//     |v - c|^2 - |v - p|^2 = sum_d b_d (b_d - 2 (v_d - p_d)),  b = c - p
//
// A sample's gates do not depend on the other samples, in any bit. Bytes: the centroids once; the second pass finds
// them in the cache. 7 L S E D_q FLOPs.

#include "tasks.h"
#include "tensors.h"
#include "vector.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

namespace cram {
namespace {

struct Router {
  const float *query, *centroids;
  const bool* members;  // null for all
  float* gates;
  int64_t samples, experts, width;
  float scale;  // -1 / (2 sigma^2)
};

// |v - c|^2 - |v - p|^2; with p = v the first of the two.
template <int Lanes>
CRAM_INLINE float beyond(const float* v, const float* c, const float* p, int64_t width) {
  constexpr int kSums = 4;  // independent sums: one alone would wait for itself
  Vector<Lanes> sums[kSums]{};
  int64_t d = 0;
  for (; d + kSums * Lanes <= width; d += kSums * Lanes) {
    for (int i = 0; i < kSums; ++i) {
      const Vector<Lanes> near = load<Lanes>(p + d + i * Lanes), b = load<Lanes>(c + d + i * Lanes) - near;
      sums[i] += b * (b - 2.0f * (load<Lanes>(v + d + i * Lanes) - near));
    }
  }
  float total = sum<Lanes>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; d < width; ++d) {
    const float b = c[d] - p[d];
    total += b * (b - 2.0f * (v[d] - p[d]));
  }
  return total;
}

// The powers over their sum; NaN among the members makes all of them NaN.
CRAM_INLINE void softmax(float* logits, const bool* members, int64_t experts) {
  float highest = -std::numeric_limits<float>::infinity(), total = 0;
  for (int64_t e = 0; e < experts; ++e) {
    if (!members || members[e]) highest = std::max(highest, logits[e]);
  }
  for (int64_t e = 0; e < experts; ++e) {
    logits[e] = !members || members[e] ? std::exp(logits[e] - highest) : 0.0f;
    total += logits[e];
  }
  for (int64_t e = 0; e < experts; ++e) {
    if (!members || members[e]) logits[e] /= total;
  }
}

template <int Lanes>
CRAM_INLINE void sample_gates(const Router& r, int64_t layer, int64_t sample) {
  const float *const v = r.query + sample * r.width, *const rows = r.centroids + layer * r.experts * r.width;
  const bool* const members = r.members ? r.members + sample * r.experts : nullptr;
  float* const gates = r.gates + (layer * r.samples + sample) * r.experts;
  int64_t nearest = -1;
  float least = 0;
  for (int64_t e = 0; e < r.experts; ++e) {
    if (members && !members[e]) continue;
    const float distance = beyond<Lanes>(v, rows + e * r.width, v, r.width);
    if (nearest >= 0 && !(distance < least)) continue;
    nearest = e;
    least = distance;
  }
  for (int64_t e = 0; e < r.experts; ++e) {
    if (members && !members[e]) continue;
    gates[e] = r.scale * beyond<Lanes>(v, rows + e * r.width, rows + nearest * r.width, r.width);
  }
  softmax(gates, members, r.experts);
}

template <int Lanes>
CRAM_INLINE void range_gates(const Router& r, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) sample_gates<Lanes>(r, task / r.samples, task % r.samples);
}

CRAM_FOR_EACH_TARGET(router_gates, range_gates, (const Router& r, int64_t begin, int64_t end), (r, begin, end))

Tensor floats(const Tensor& tensor, int64_t dimensions, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, " must be float32");
  return dense(checked(tensor, dimensions, name));
}

Tensor native_centroid_gates(Tensor query_in, Tensor centroids_in, double sigma, std::optional<Tensor> members_in) {
  const Tensor query = floats(query_in, 2, "query"), centroids = floats(centroids_in, 3, "centroids");
  const int64_t samples = query.size(0), layers = centroids.size(0), experts = centroids.size(1);
  STD_TORCH_CHECK(
      centroids.size(2) == query.size(1), "query [S, D_q] and centroids [L, E, D_q] must fit, got ", query.size(1),
      " and ", centroids.size(2), " columns");
  STD_TORCH_CHECK(sigma > 0, "sigma must be positive, got ", sigma);
  std::optional<Tensor> members;
  if (members_in) {
    members = dense(checked(*members_in, 2, "members"));
    STD_TORCH_CHECK(
        members->scalar_type() == ScalarType::Bool && members->size(0) == samples && members->size(1) == experts,
        "members must be bool [", samples, ", ", experts, "]");
  }
  Tensor gates = empty({layers, samples, experts}, ScalarType::Float);
  const Router router{
      static_cast<const float*>(query.const_data_ptr()), static_cast<const float*>(centroids.const_data_ptr()),
      members ? static_cast<const bool*>(members->const_data_ptr()) : nullptr,
      static_cast<float*>(gates.mutable_data_ptr()), samples, experts, query.size(1),
      static_cast<float>(-0.5 / (sigma * sigma))};
  static const auto run = router_gates_best();
  const int64_t tasks = layers * samples, grain = kSerial / std::max<int64_t>(1, 2 * experts * router.width) + 1;
  if (tasks <= grain) {
    run(router, 0, tasks);
  } else {
    torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) { run(router, begin, end); });
  }
  return gates;
}

}  // namespace
}  // namespace cram

STABLE_TORCH_LIBRARY_IMPL(cram, CPU, m) {
  m.impl("native_centroid_gates", TORCH_BOX(&cram::native_centroid_gates));
}
