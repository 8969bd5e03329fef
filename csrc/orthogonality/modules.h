// What the orthogonality penalty is asked for, read out of its tensor lists: one flat record a module.
//
// Both devices compute from this table, so that shapes, offsets and refusals are decided in one place. Letters as
// in cram_kernels/README.md: M modules, B samples, r trained rank, k width of a module's basis, T tokens.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace cram {

using torch::stable::Tensor;

enum class Type : int32_t { float32, bfloat16, float16 };

struct Operand {
  const void* data;
  Type type;
};

struct Module {
  Operand hidden;  // [B, D_in], or [B, T, D_in] under a mask
  Operand a;       // [r, D_in]
  Operand bt;      // [r, D_out]
  Operand basis;   // Q transposed, [k, D_out]
  int32_t batch, d_in, d_out, rank, width;
  int64_t samples;  // first sample in gamma and its gradient
  int64_t inputs;   // first element in the gradient of hidden, [B, D_in]
  int64_t row_in;   // first element in the gradient of a
  int64_t row_out;  // first element in the gradient of bt
};

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // loss, dhidden, da, dbt, dgamma

struct Request {
  std::vector<Module> modules;
  std::vector<Tensor> kept;  // contiguous copies that the records point into
  const float* gamma;
  bool masked;       // whether hidden are tokens; an empty mask has no address
  const bool* mask;  // [B, T] if masked
  int32_t tokens;
  int64_t samples, inputs, row_ins, row_outs;  // totals
};

inline Type type_of(const Tensor& tensor, const char* name) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  if (dtype == aoti_torch_dtype_float32()) return Type::float32;
  if (dtype == aoti_torch_dtype_bfloat16()) return Type::bfloat16;
  STD_TORCH_CHECK(dtype == aoti_torch_dtype_float16(), name, " must be float32, bfloat16 or float16");
  return Type::float16;
}

// A pointer to row-major values; a tensor of another layout is copied and the copy kept alive by the request.
inline Operand operand(Request& request, const Tensor& tensor, const char* name, int64_t dimensions) {
  STD_TORCH_CHECK(tensor.dim() == dimensions, name, " must have ", dimensions, " dimensions, got ", tensor.dim());
  const Type type = type_of(tensor, name);
  if (tensor.is_contiguous()) return {tensor.const_data_ptr(), type};
  request.kept.push_back(torch::stable::contiguous(tensor));
  return {request.kept.back().const_data_ptr(), type};
}

// The rows of Q^T: free for a basis whose columns lie one after another, which is how `orthonormal_basis` makes it.
inline Operand basis_rows(Request& request, const Tensor& basis) {
  STD_TORCH_CHECK(basis.dim() == 2, "bases must have 2 dimensions, got ", basis.dim());
  const bool in_place = basis.stride(0) == 1 && basis.stride(1) == basis.size(0);
  if (in_place) return {basis.const_data_ptr(), type_of(basis, "bases")};
  return operand(request, torch::stable::transpose(basis, 0, 1), "bases", 2);
}

inline void same_device(const Tensor& tensor, const Tensor& first) {
  STD_TORCH_CHECK(
      tensor.is_cpu() == first.is_cpu() && tensor.get_device_index() == first.get_device_index(),
      "all tensors must be on one device");
}

inline Request read_request(
    const std::vector<Tensor>& hidden,
    const std::vector<Tensor>& a,
    const std::vector<Tensor>& bt,
    const std::vector<Tensor>& bases,
    const Tensor& gamma,
    const std::optional<Tensor>& mask) {
  const size_t count = hidden.size();
  STD_TORCH_CHECK(
      count > 0 && a.size() == count && bt.size() == count && bases.size() == count,
      "hidden, a, bt and bases must be equally long and not empty, got ",
      count, ", ", a.size(), ", ", bt.size(), " and ", bases.size());
  Request request{};
  request.modules.reserve(count);
  request.kept.reserve(4 * count + 2);
  const int64_t hidden_dimensions = mask ? 3 : 2;
  for (size_t m = 0; m < count; ++m) {
    for (const Tensor* tensor : {&hidden[m], &a[m], &bt[m], &bases[m]}) same_device(*tensor, gamma);
    Module record{};
    record.hidden = operand(request, hidden[m], "hidden", hidden_dimensions);
    record.a = operand(request, a[m], "a", 2);
    record.bt = operand(request, bt[m], "bt", 2);
    record.basis = basis_rows(request, bases[m]);
    record.batch = static_cast<int32_t>(hidden[m].size(0));
    record.d_in = static_cast<int32_t>(a[m].size(1));
    record.d_out = static_cast<int32_t>(bt[m].size(1));
    record.rank = static_cast<int32_t>(a[m].size(0));
    record.width = static_cast<int32_t>(bases[m].size(1));
    STD_TORCH_CHECK(
        hidden[m].size(hidden_dimensions - 1) == record.d_in && bt[m].size(0) == record.rank &&
            bases[m].size(0) == record.d_out,
        "module ", m, ": hidden, a, bt and bases must fit together");
    STD_TORCH_CHECK(
        !mask || (mask->dim() == 2 && hidden[m].size(0) == mask->size(0) && hidden[m].size(1) == mask->size(1)),
        "module ", m, ": hidden must be [B, T, D_in] for a mask [B, T]");
    record.samples = request.samples;
    record.inputs = request.inputs;
    record.row_in = request.row_ins;
    record.row_out = request.row_outs;
    request.samples += record.batch;
    request.inputs += int64_t{record.batch} * record.d_in;
    request.row_ins += int64_t{record.rank} * record.d_in;
    request.row_outs += int64_t{record.rank} * record.d_out;
    request.modules.push_back(record);
  }
  const Operand weights = operand(request, gamma, "gamma", 1);
  STD_TORCH_CHECK(
      weights.type == Type::float32 && gamma.numel() == request.samples,
      "gamma must be float32 with one value a sample of each module, ", request.samples, ", got ", gamma.numel());
  request.gamma = static_cast<const float*>(weights.data);
  request.masked = mask.has_value();
  if (mask) {
    int32_t dtype = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(mask->get(), &dtype));
    STD_TORCH_CHECK(dtype == aoti_torch_dtype_bool(), "mask must be bool");
    same_device(*mask, gamma);
    request.kept.push_back(torch::stable::contiguous(*mask));
    request.mask = static_cast<const bool*>(request.kept.back().const_data_ptr());
    request.tokens = static_cast<int32_t>(mask->size(1));
  }
  return request;
}

// Uninitialised float32 of `count` elements (none if not wanted) beside `like`.
inline Tensor values(const Tensor& like, int64_t count, bool wanted = true) {
  return torch::stable::new_empty(like, {wanted ? count : 0}, torch::headeronly::ScalarType::Float);
}

inline Tensor scalar(const Tensor& like) {
  return torch::stable::new_empty(like, {}, torch::headeronly::ScalarType::Float);
}

}  // namespace cram
