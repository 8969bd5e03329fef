// orthogonality_penalty on CUDA: three launches for all modules (four with pooling), the same on every call.
//
//     pool      H = mean of each sample's masked tokens; tokens outside the mask are not read       (under a mask only)
//     products  P = H A^T and C = Bt Q, each as one plane a slice of the long axis
//     middle    planes summed in order; E = s P C, energies, loss of the module, G, dP = G C^T, dC = P^T G
//     combine   dBt = dC Q^T, dA = dP^T H, dH = dP A; one block adds the modules' losses in order
//
// Letters and formulas as in cpu.cpp. Bound by bytes: Q is read twice (it does not fit the cache between
// the launches), H twice, A and Bt once (A again for dH), gradients are written once. Long sums are accumulated
// in float32.
//
// Invariants
// * No atomics and no order left to the scheduler: every output element is written by one thread from a sum in fixed
//   order, so two runs are bitwise equal. Every workspace element that is read was written by an earlier launch of the
//   same stream or, in `middle`, by the same block before a barrier.
// * Nothing waits for the host or copies from it: the table of modules is a kernel argument, so a call can be captured
//   in a graph. More modules than fit one argument are served by further launches.
// * Offsets are int64. Sizes along one axis (D, r, k, B) are int32.
// * Four neighbouring elements are read at once where every row starts on such a boundary (readers.cuh), else one by
//   one; both ways see the same elements in the same lanes and give the same bits.

#include "modules.h"
#include "readers.cuh"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <cuda_runtime.h>

#include <algorithm>

namespace cram {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 8;      // rows of the smaller operand a thread accumulates for
constexpr int kColumns = 4;   // rows of the streamed operand a warp takes at a time
constexpr int kSlice = 1024;  // elements of the long axis a block of `products` sums: 32 KiB of shared memory
constexpr int kDepth = 256;   // inner rows whose weights `combine` keeps in shared memory at a time
constexpr int kPool = 128;    // threads of `pool`, four elements each
// A kernel's arguments may hold 32764 bytes (4 KiB before CUDA 12.1).
constexpr int kModules = CUDART_VERSION >= 12010 ? 224 : 28;

// One module as the kernels see it; `hidden` are tokens for `pool` and means for the others.
struct Entry {
  Rows hidden, a, bt, basis;
  int32_t batch, d_in, d_out, rank, width;
  int64_t samples, inputs, row_in, row_out;  // as in Module
  int64_t workspace;                         // its first float, on a boundary of four
};

struct Table {
  Entry modules[kModules];
};
static_assert(sizeof(Table) + 256 <= (CUDART_VERSION >= 12010 ? 32764 : 4096), "the table must fit the arguments");

struct Output {
  float *loss, *dhidden, *da, *dbt, *dgamma;  // null where not wanted, the loss apart
};

__host__ __device__ inline int slices(int depth) { return (depth + kSlice - 1) / kSlice; }

// Where a module's intermediate results lie in the workspace. The means come first, for their boundary.
struct Places {
  int64_t mean;                // [B, D_in], under a mask
  int64_t planes_p, planes_c;  // [slices, B, r], [slices, r, k]
  int64_t p, c, e, dp, dc;     // [B, r], [r, k], [B, k], [B, r], [r, k]
  int64_t end;
};

__host__ __device__ inline Places places(const Entry& m, bool masked) {
  const int64_t p = int64_t{m.batch} * m.rank, c = int64_t{m.rank} * m.width;
  Places at{};
  at.mean = m.workspace;
  at.planes_p = at.mean + (masked ? int64_t{m.batch} * m.d_in : 0);
  at.planes_c = at.planes_p + slices(m.d_in) * p;
  at.p = at.planes_c + slices(m.d_out) * c;
  at.c = at.p + p;
  at.e = at.c + c;
  at.dp = at.e + int64_t{m.batch} * m.width;
  at.dc = at.dp + p;
  at.end = at.dc + c;
  return at;
}

// grid (elements of D_in, samples, modules). The mask is the same for the whole block, so no thread diverges.
__global__ void __launch_bounds__(kPool) pool(
    const __grid_constant__ Table table, const bool* mask, int tokens, float* workspace) {
  const Entry& m = table.modules[blockIdx.z];
  const int b = blockIdx.y;
  const int d = 4 * (blockIdx.x * kPool + threadIdx.x);
  if (b >= m.batch || d >= m.d_in) return;
  const bool* visual = mask + int64_t{b} * tokens;
  float4 total = make_float4(0, 0, 0, 0);
  int count = 0;
  with_reader(m.hidden, [&](auto four) {
#pragma unroll 4
    for (int t = 0; t < tokens; ++t) {
      const bool read = visual[t];
      count += read;
      add(total, 1.0f, four((int64_t{b} * tokens + t) * m.d_in + d, read ? m.d_in - d : 0));
    }
  });
  const float divisor = static_cast<float>(max(count, 1));
  total = make_float4(total.x / divisor, total.y / divisor, total.z / divisor, total.w / divisor);
  put(workspace + places(m, true).mean + int64_t{b} * m.d_in + d, total, m.d_in - d);
}

// plane [nx, ny] = x [nx, slice] y [ny, slice]^T over one slice of the long axis. Eight rows of x wait in shared
// memory while every warp streams four rows of y at a time past them; lane l holds elements 128 j + 4 l .. + 3.
template <typename Reader>
__device__ void product_plane(
    float4 (*held)[kSlice / 4], const Rows& x, int nx, const Reader& y, int ny, int depth, int start, float* plane) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int i = 0; i < nx; i += kRows) {
    __syncthreads();
    with_reader(x, [&](auto four) {
      for (int j = threadIdx.x; j < kRows * (kSlice / 4); j += kThreads) {
        const int row = j / (kSlice / 4), d = start + 4 * (j % (kSlice / 4));
        held[row][j % (kSlice / 4)] = four(int64_t{i + row} * depth + d, i + row < nx ? depth - d : 0);
      }
    });
    __syncthreads();
    const int fours = (min(depth - start, kSlice) + 3) / 4;
    for (int k = warp * kColumns; k < ny; k += kWarps * kColumns) {
      float total[kRows][kColumns] = {};
      for (int j = 0; j < fours; j += 32) {
        const int d = start + 4 * (j + lane);
        float4 column[kColumns];
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          column[c] = y(int64_t{k + c} * depth + d, k + c < ny ? depth - d : 0);
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const float4 row = held[r][j + lane];
#pragma unroll
          for (int c = 0; c < kColumns; ++c) total[r][c] = dot(total[r][c], row, column[c]);
        }
      }
      float mine = 0;  // lane l keeps the sum of row l / kColumns and column l % kColumns
#pragma unroll
      for (int output = 0; output < kRows * kColumns; ++output) {
        float value = total[output / kColumns][output % kColumns];
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) {
          value += __shfl_xor_sync(0xffffffffu, value, distance);
        }
        if (lane == output) mine = value;
      }
      const int row = i + lane / kColumns, column = k + lane % kColumns;
      if (row < nx && column < ny) plane[int64_t{row} * ny + column] = mine;
    }
  }
}
static_assert(kRows * kColumns == 32, "one output a lane");

// grid (slices, modules, 2). The return at the top is the same for a whole block: no thread misses a barrier.
__global__ void __launch_bounds__(kThreads) products(
    const __grid_constant__ Table table, bool masked, float* workspace) {
  const Entry& m = table.modules[blockIdx.y];
  const bool inner = blockIdx.z == 0;
  const int depth = inner ? m.d_in : m.d_out;
  if (static_cast<int>(blockIdx.x) >= slices(depth)) return;
  const int nx = inner ? m.batch : m.rank, ny = inner ? m.rank : m.width;
  const Places at = places(m, masked);
  float* planes = workspace + (inner ? at.planes_p : at.planes_c);
  __shared__ float4 held[kRows][kSlice / 4];
  with_reader(inner ? m.a : m.basis, [&](auto y) {
    product_plane(
        held, inner ? m.hidden : m.bt, nx, y, ny, depth, blockIdx.x * kSlice,
        planes + int64_t{blockIdx.x} * nx * ny);
  });
}

__device__ void sum_planes(const float* planes, int count, int size, float* to) {
  for (int i = threadIdx.x; i < size; i += kThreads) {
    float total = 0;
    for (int s = 0; s < count; ++s) total += planes[int64_t{s} * size + i];
    to[i] = total;
  }
}

// Small products [rows, columns] of one block: the sum over j of x[row xr + j xj] y[column yc + j yj].
struct Strides {
  int row, inner;
};

__device__ void small_product(
    const float* x, Strides xs, const float* y, Strides ys, int rows, int columns, int inner, float* to) {
  for (int i = threadIdx.x; i < rows * columns; i += kThreads) {
    const int row = i / columns, column = i % columns;
    float total = 0;
    for (int j = 0; j < inner; ++j) {
      total = fmaf(x[row * xs.row + j * xs.inner], y[column * ys.row + j * ys.inner], total);
    }
    to[i] = total;
  }
}

// grid (modules). Works in global memory, which holds any B, r and k; a barrier orders a block's own writes and reads.
__global__ void __launch_bounds__(kThreads) middle(
    const __grid_constant__ Table table, bool masked, const float* gamma, double scale, double modules,
    float* workspace, double* losses, Output out) {
  const Entry& m = table.modules[blockIdx.x];
  const int batch = m.batch, rank = m.rank, width = m.width;
  const Places at = places(m, masked);
  float *p = workspace + at.p, *c = workspace + at.c, *e = workspace + at.e;
  __shared__ double partial[kThreads];
  sum_planes(workspace + at.planes_p, slices(m.d_in), batch * rank, p);
  sum_planes(workspace + at.planes_c, slices(m.d_out), rank * width, c);
  __syncthreads();
  small_product(p, {rank, 1}, c, {1, width}, batch, width, rank, e);
  __syncthreads();
  // Few values, so their sums are exact to float32: in double.
  const double share = scale * scale / (batch * modules);
  double loss = 0;
  for (int b = threadIdx.x; b < batch; b += kThreads) {
    const double weight = gamma[m.samples + b];
    const float factor = static_cast<float>(2 * share * weight);
    double energy = 0;
    for (int k = 0; k < width; ++k) {
      const float value = e[int64_t{b} * width + k];
      energy += static_cast<double>(value) * value;
      e[int64_t{b} * width + k] = factor * value;
    }
    if (out.dgamma) out.dgamma[m.samples + b] = static_cast<float>(energy * share);
    loss += weight * energy * share;
  }
  partial[threadIdx.x] = loss;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int t = 1; t < min(batch, kThreads); ++t) loss += partial[t];
    losses[blockIdx.x] = loss;
  }
  if (out.da || out.dhidden) small_product(e, {width, 1}, c, {width, 1}, batch, rank, width, workspace + at.dp);
  if (out.dbt) small_product(p, {1, rank}, e, {1, width}, rank, width, batch, workspace + at.dc);
}

// to [nout, 4 of depth] = weights [nout, nin] y [nin, depth]: a thread owns four neighbours of the long axis and eight
// outputs at a time. Weight (i, j) is weights[i * by.row + j * by.inner].
template <typename Reader>
__device__ void combine_rows(
    float (*held)[kRows], const float* weights, Strides by, int nout, const Reader& y, int nin, int depth, int start,
    float* to) {
  const int d = start + 4 * threadIdx.x;
  for (int i = 0; i < nout; i += kRows) {
    float4 total[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) total[r] = make_float4(0, 0, 0, 0);
    for (int first = 0; first < nin; first += kDepth) {
      const int count = min(kDepth, nin - first);
      __syncthreads();
      for (int j = threadIdx.x; j < count * kRows; j += kThreads) {
        const int row = i + j % kRows, inner = first + j / kRows;
        held[j / kRows][j % kRows] = row < nout ? weights[row * by.row + inner * by.inner] : 0;
      }
      __syncthreads();
#pragma unroll 4
      for (int j = 0; j < count; ++j) {
        const float4 value = y(int64_t{first + j} * depth + d, depth - d);
        const float4 low = *reinterpret_cast<const float4*>(&held[j][0]);
        const float4 high = *reinterpret_cast<const float4*>(&held[j][4]);
        add(total[0], low.x, value);
        add(total[1], low.y, value);
        add(total[2], low.z, value);
        add(total[3], low.w, value);
        add(total[4], high.x, value);
        add(total[5], high.y, value);
        add(total[6], high.z, value);
        add(total[7], high.w, value);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (i + r < nout) put(to + int64_t{i + r} * depth + d, total[r], depth - d);
    }
  }
}
static_assert(kRows == 8, "combine_rows reads two fours of weights");

// grid (elements of the long axis, modules, 3). The first block of the last table adds the losses of all modules.
__global__ void __launch_bounds__(kThreads) combine(
    const __grid_constant__ Table table, bool masked, const float* workspace, const double* losses, int count,
    Output out) {
  if (out.loss && blockIdx.x + blockIdx.y + blockIdx.z == 0 && threadIdx.x == 0) {
    double total = 0;
    for (int i = 0; i < count; ++i) total += losses[i];
    *out.loss = static_cast<float>(total);
  }
  const Entry& m = table.modules[blockIdx.y];
  const Places at = places(m, masked);
  const int start = 4 * kThreads * blockIdx.x;
  Rows y = m.basis;
  Strides by = {m.width, 1};
  int nout = m.rank, nin = m.width, depth = m.d_out;
  const float* weights = workspace + at.dc;
  float* to = out.dbt;
  int64_t offset = m.row_out;
  if (blockIdx.z == 1) {
    y = m.hidden, by = {1, m.rank}, nin = m.batch, depth = m.d_in;
    weights = workspace + at.dp, to = out.da, offset = m.row_in;
  } else if (blockIdx.z == 2) {
    y = m.a, by = {m.rank, 1}, nout = m.batch, nin = m.rank, depth = m.d_in;
    weights = workspace + at.dp, to = out.dhidden, offset = m.inputs;
  }
  if (!to || start >= depth) return;
  __shared__ __align__(16) float held[kDepth][kRows];
  with_reader(y, [&](auto four) {
    combine_rows(held, weights, by, nout, four, nin, depth, start, to + offset);
  });
}

Entry entry_of(const Module& m, int64_t workspace) {
  Entry entry{};
  entry.hidden = rows_of(m.hidden, m.d_in);
  entry.a = rows_of(m.a, m.d_in);
  entry.bt = rows_of(m.bt, m.d_out);
  entry.basis = rows_of(m.basis, m.d_out);
  entry.batch = m.batch;
  entry.d_in = m.d_in;
  entry.d_out = m.d_out;
  entry.rank = m.rank;
  entry.width = m.width;
  entry.samples = m.samples;
  entry.inputs = m.inputs;
  entry.row_in = m.row_in;
  entry.row_out = m.row_out;
  entry.workspace = workspace;
  return entry;
}

int blocks(int size, int block) { return (size + block - 1) / block; }

// The launches for the first `count` modules of a table.
void launch(
    Table& table, int count, const Request& request, double scale, float* workspace, double* losses,
    const double* all_losses, Output out, cudaStream_t stream) {
  int depth_in = 1, depth_out = 1, batch = 1;
  for (int i = 0; i < count; ++i) {
    depth_in = std::max(depth_in, table.modules[i].d_in);
    depth_out = std::max(depth_out, table.modules[i].d_out);
    batch = std::max(batch, table.modules[i].batch);
  }
  const int deepest = std::max(depth_in, depth_out), all = static_cast<int>(request.modules.size());
  const bool masked = request.masked;
  if (masked) {
    pool<<<dim3(blocks(depth_in, 4 * kPool), batch, count), kPool, 0, stream>>>(
        table, request.mask, request.tokens, workspace);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    for (int i = 0; i < count; ++i) {
      Entry& m = table.modules[i];
      m.hidden = rows_of({workspace + places(m, true).mean, Type::float32}, m.d_in);
    }
  }
  products<<<dim3(slices(deepest), count, 2), kThreads, 0, stream>>>(table, masked, workspace);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  middle<<<count, kThreads, 0, stream>>>(
      table, masked, request.gamma, scale, all, workspace, losses, out);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  combine<<<dim3(blocks(deepest, 4 * kThreads), count, 3), kThreads, 0, stream>>>(
      table, masked, workspace, all_losses, all, out);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

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
  const torch::stable::accelerator::DeviceGuard guard(gamma.get_device_index());
  const Request request = read_request(hidden, a, bt, bases, gamma, mask);
  Tensor loss = scalar(gamma);
  Tensor dhidden = values(gamma, request.inputs, want_hidden);
  Tensor da = values(gamma, request.row_ins, want_a);
  Tensor dbt = values(gamma, request.row_outs, want_bt);
  Tensor dgamma = values(gamma, request.samples, want_gamma);
  const Output out{
      static_cast<float*>(loss.mutable_data_ptr()),
      data_or_null(dhidden, want_hidden),
      data_or_null(da, want_a),
      data_or_null(dbt, want_bt),
      data_or_null(dgamma, want_gamma)};
  const int64_t total = static_cast<int64_t>(request.modules.size());
  std::vector<Entry> entries;
  int64_t floats = blocks(static_cast<int>(2 * total), 4) * 4;  // the losses of all modules come first, in double
  for (const Module& m : request.modules) {
    entries.push_back(entry_of(m, floats));
    floats = (places(entries.back(), request.masked).end + 3) / 4 * 4;
  }
  // Freed on return: the caching allocator hands it out again only to later work of this stream.
  const Tensor memory = values(gamma, floats);
  float* workspace = static_cast<float*>(memory.mutable_data_ptr());
  double* losses = reinterpret_cast<double*>(workspace);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(gamma.get_device_index(), &stream));
  Table table;
  for (int64_t first = 0; first < total; first += kModules) {
    const int count = static_cast<int>(std::min<int64_t>(kModules, total - first));
    std::copy_n(entries.begin() + first, count, table.modules);
    Output part = out;
    if (first + count < total) part.loss = nullptr;
    launch(
        table, count, request, scale, workspace, losses + first, losses, part, static_cast<cudaStream_t>(stream));
  }
  return {loss, dhidden, da, dbt, dgamma};
}

}  // namespace
}  // namespace cram

STABLE_TORCH_LIBRARY_IMPL(cram, CUDA, m) {
  m.impl("orthogonality_penalty", TORCH_BOX(&cram::orthogonality_penalty));
}
