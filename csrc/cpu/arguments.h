// Checks on the tensors an operation gets, and their translation to what the kernels take. Messages name the argument.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "../storage_of.h"
#include "kernels.h"

namespace unisd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_matrix(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2, name, " must have two dimensions, got ", t.dim());
  STD_TORCH_CHECK(t.size(1) <= 1 || t.stride(1) == 1, name, " must have contiguous rows, got a stride of ",
                  t.stride(1), " between columns");
}

// A float32 tile [rows, columns] with contiguous rows.
inline float* tile_data(const Tensor& t, const char* name) {
  check_matrix(t, name);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, " must be float32");
  return static_cast<float*>(t.mutable_data_ptr());
}

// Hidden states [N, H] or a weight [V, H], of any storage up to 32 bits.
inline Matrix matrix(const Tensor& t, const char* name) {
  check_matrix(t, name);
  const Storage storage = storage_of(t, name);
  STD_TORCH_CHECK(storage != Storage::kFloat64, name, " must be float32, bfloat16 or float16, got float64");
  return {t.const_data_ptr(), t.stride(0), storage};
}

// The matrix without its first rows.
inline Matrix rows_from(const Matrix& m, int64_t first) {
  return {static_cast<const char*>(m.data) + first * m.stride * bytes_of(m.storage), m.stride, m.storage};
}

// One number a row: [size], contiguous.
template <class T>
inline T* vector_data(const Tensor& t, const char* name, int64_t size, ScalarType type) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size, name, " must have shape [", size, "]");
  STD_TORCH_CHECK(t.scalar_type() == type, name, " has the wrong dtype");
  STD_TORCH_CHECK(size <= 1 || t.stride(0) == 1, name, " must be contiguous");
  return static_cast<T*>(t.mutable_data_ptr());
}

inline float* floats(const Tensor& t, const char* name, int64_t size) {
  return vector_data<float>(t, name, size, ScalarType::Float);
}

// A contiguous matrix [rows, columns].
template <class T>
inline const T* dense_data(const Tensor& t, const char* name, int64_t rows, int64_t columns, ScalarType type) {
  check_matrix(t, name);
  STD_TORCH_CHECK(t.scalar_type() == type, name, " has the wrong dtype");
  STD_TORCH_CHECK(t.size(0) == rows && t.size(1) == columns && (t.numel() == 0 || rows <= 1 || t.stride(0) == columns),
                  name,
                  " must be contiguous [", rows, ", ", columns, "]");
  return static_cast<const T*>(t.const_data_ptr());
}

inline float* floats(const std::optional<Tensor>& t, const char* name, int64_t size) {
  return t.has_value() ? floats(*t, name, size) : nullptr;
}

// The head's bias [columns] or null.
inline const float* bias_data(const std::optional<Tensor>& bias, int64_t columns) {
  if (!bias.has_value()) return nullptr;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == columns && (columns <= 1 || bias->stride(0) == 1),
                  "bias must be contiguous [", columns, "]");
  STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float, "bias must be float32");
  return static_cast<const float*>(bias->const_data_ptr());
}

// Target ids [size]. They are read here once more, because a bad one would be a read outside of the tile. `lowest`: -1
// where a target may be in no column.
inline const int64_t* ids(const Tensor& t, int64_t size, int64_t columns, int64_t lowest = 0) {
  const int64_t* data = vector_data<int64_t>(t, "target_ids", size, ScalarType::Long);
  for (int64_t n = 0; n < size; ++n)
    STD_TORCH_CHECK(data[n] >= lowest && data[n] < columns, "target_ids must be in [", lowest, ", ", columns,
                    "), got ", data[n], " at position ", n);
  return data;
}

inline const int64_t* ids(const std::optional<Tensor>& t, int64_t size, int64_t columns, int64_t lowest = 0) {
  return t.has_value() ? ids(*t, size, columns, lowest) : nullptr;
}

// A double option as a pointer to a float that lives as long as this.
class OptionalFloat {
 public:
  explicit OptionalFloat(const std::optional<double>& value)
      : value_(value.has_value() ? static_cast<float>(*value) : 0.0f), has_(value.has_value()) {}
  const float* get() const { return has_ ? &value_ : nullptr; }

 private:
  float value_;
  bool has_;
};

}  // namespace unisd
