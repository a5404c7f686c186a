// Working memory of the operations, on a cache line.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace unisd {

struct AlignedDelete {
  void operator()(float* p) const { ::operator delete(p, std::align_val_t(64)); }
};
using Floats = std::unique_ptr<float, AlignedDelete>;

inline Floats allocate(int64_t size) {
  return Floats(static_cast<float*>(
      ::operator new(static_cast<size_t>(size < 1 ? 1 : size) * sizeof(float), std::align_val_t(64))));
}

}  // namespace unisd
