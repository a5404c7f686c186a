// The element types that operations take, by name. No torch: kernels of both devices include this.
#pragma once

#include <cstdint>

namespace unisd {

enum class Storage : int { kFloat32, kBFloat16, kFloat16, kFloat64 };

// Static, as the translation units for different instruction sets must not share a function.
static constexpr bool is_16_bit(Storage storage) {
  return storage == Storage::kBFloat16 || storage == Storage::kFloat16;
}

static constexpr int64_t bytes_of(Storage storage) {
  return is_16_bit(storage) ? 2 : storage == Storage::kFloat32 ? 4 : 8;
}

}  // namespace unisd
