// The element types of the operations that take several, and packs of them moved with 16-byte accesses.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "launch.h"

namespace unisd::cuda {

// To the type of the arithmetic: float, or double where float64 takes part.
template <typename Math, typename T>
__device__ __forceinline__ Math widen(T value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return static_cast<Math>(__bfloat162float(value));
  } else if constexpr (std::is_same_v<T, __half>) {
    return static_cast<Math>(__half2float(value));
  } else {
    return static_cast<Math>(value);
  }
}

// Round to nearest even; to 16 bits from float.
template <typename T, typename Math>
__device__ __forceinline__ T narrow(Math value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else {
    return static_cast<T>(value);
  }
}

template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) ElementPack {
  T v[N];
};

template <typename T, int N>
__device__ __forceinline__ ElementPack<T, N> load_pack(const T* from) {
  return *reinterpret_cast<const ElementPack<T, N>*>(from);
}

template <typename T, int N>
__device__ __forceinline__ void store_pack(T* to, const ElementPack<T, N>& pack) {
  *reinterpret_cast<ElementPack<T, N>*>(to) = pack;
}

__device__ __forceinline__ bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Calls function(value of the C++ type).
template <typename Function>
void dispatch(Element element, Function&& function) {
  switch (element) {
    case Element::kFloat32:
      return function(float{});
    case Element::kFloat64:
      return function(double{});
    case Element::kBFloat16:
      return function(__nv_bfloat16{});
    case Element::kFloat16:
      return function(__half{});
  }
}

}  // namespace unisd::cuda
