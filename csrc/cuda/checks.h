// Checks of arguments for the registrations: what the kernels rely on, refused with what was got.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <climits>
#include <optional>

#include "launch.h"

namespace unisd::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Element element_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Element::kFloat32;
    case ScalarType::Double:
      return Element::kFloat64;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Half:
      return Element::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16, got scalar type ",
                      static_cast<int>(tensor.scalar_type()));
  }
}

inline void check_device(const Tensor& tensor, const char* name, const Tensor& first) {
  STD_TORCH_CHECK(tensor.is_cuda(), name, " must be on a CUDA device");
  STD_TORCH_CHECK(tensor.get_device_index() == first.get_device_index(), name, " is on CUDA device ",
                  tensor.get_device_index(), ", the first argument on ", first.get_device_index());
}

inline void check_rows_of_columns(const Tensor& tensor, const char* name, bool written) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, " must be [rows, columns], got ", tensor.dim(), " dimensions");
  const int64_t rows = tensor.size(0), columns = tensor.size(1);
  STD_TORCH_CHECK(rows <= INT_MAX, name, " must have at most 2^31 - 1 rows, got ", rows);
  STD_TORCH_CHECK(columns <= (1 << 30), name, " must have at most 2^30 columns, got ", columns);
  STD_TORCH_CHECK(columns <= 1 || tensor.stride(1) == 1, name, " must have contiguous rows, got a stride of ",
                  tensor.stride(1), " between columns");
  STD_TORCH_CHECK(!written || rows <= 1 || tensor.stride(0) >= columns, name, " is written, but its rows overlap: ",
                  columns, " columns at a stride of ", tensor.stride(0));
}

inline Tile tile_of(const Tensor& tensor, const char* name, const Tensor& first) {
  check_device(tensor, name, first);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, " must be float32, got scalar type ",
                  static_cast<int>(tensor.scalar_type()));
  check_rows_of_columns(tensor, name, true);
  return {static_cast<float*>(tensor.mutable_data_ptr()), tensor.size(0), tensor.stride(0),
          static_cast<int>(tensor.size(1))};
}

inline ConstTile const_tile_of(const Tensor& tensor, const char* name, const Tensor& first) {
  check_device(tensor, name, first);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, " must be float32, got scalar type ",
                  static_cast<int>(tensor.scalar_type()));
  check_rows_of_columns(tensor, name, false);
  return {static_cast<const float*>(tensor.const_data_ptr()), tensor.size(0), tensor.stride(0),
          static_cast<int>(tensor.size(1))};
}

// One number a row.
inline void check_row_vector(const Tensor& tensor, const char* name, const Tensor& first, ScalarType type,
                             int64_t rows) {
  check_device(tensor, name, first);
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " must be ",
                  type == ScalarType::Long   ? "int64"
                  : type == ScalarType::Bool ? "bool"
                                             : "float32",
                  ", got scalar type ", static_cast<int>(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == rows, name, " must hold one number for each of the ", rows,
                  " rows, got ", tensor.numel(), " in ", tensor.dim(), " dimensions");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous, got a stride of ", tensor.stride(0));
}

inline const float* floats_of(const Tensor& tensor, const char* name, const Tensor& first, int64_t rows) {
  check_row_vector(tensor, name, first, ScalarType::Float, rows);
  return static_cast<const float*>(tensor.const_data_ptr());
}

inline const float* floats_of(const std::optional<Tensor>& tensor, const char* name, const Tensor& first,
                              int64_t rows) {
  return tensor.has_value() ? floats_of(*tensor, name, first, rows) : nullptr;
}

inline float* mutable_floats_of(const Tensor& tensor, const char* name, const Tensor& first, int64_t rows) {
  check_row_vector(tensor, name, first, ScalarType::Float, rows);
  return static_cast<float*>(tensor.mutable_data_ptr());
}

inline float* mutable_floats_of(const std::optional<Tensor>& tensor, const char* name, const Tensor& first,
                                int64_t rows) {
  return tensor.has_value() ? mutable_floats_of(*tensor, name, first, rows) : nullptr;
}

inline const int64_t* ids_of(const std::optional<Tensor>& tensor, const char* name, const Tensor& first,
                             int64_t rows) {
  if (!tensor.has_value()) return nullptr;
  check_row_vector(*tensor, name, first, ScalarType::Long, rows);
  return static_cast<const int64_t*>(tensor->const_data_ptr());
}

inline const bool* bools_of(const std::optional<Tensor>& tensor, const char* name, const Tensor& first, int64_t rows) {
  if (!tensor.has_value()) return nullptr;
  check_row_vector(*tensor, name, first, ScalarType::Bool, rows);
  return static_cast<const bool*>(tensor->const_data_ptr());
}

inline Cap cap_of(const std::optional<double>& tanh_scale) {
  return {tanh_scale.has_value(), static_cast<float>(tanh_scale.value_or(1.0))};
}

}  // namespace unisd::cuda
