// A tensor's element type as a `Storage`, for the operations of both devices.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "storage.h"

namespace unisd {

inline Storage storage_of(const torch::stable::Tensor& tensor, const char* name) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Storage::kFloat32;
    case ScalarType::BFloat16:
      return Storage::kBFloat16;
    case ScalarType::Half:
      return Storage::kFloat16;
    case ScalarType::Double:
      return Storage::kFloat64;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16, got scalar type ",
                      static_cast<int>(tensor.scalar_type()));
  }
}

}  // namespace unisd
