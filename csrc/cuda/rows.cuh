// One thread block per row of a float32 tile: walking the row with 16-byte accesses, and reductions over the block.
// Every reduction has a fixed order, so results do not change from run to run.
#pragma once

#include <cfloat>
#include <cstdint>
#include <type_traits>

#include "launch.h"

namespace unisd::cuda {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

template <int N>
struct alignas(4 * N) Pack {
  float v[N];
};

template <int N>
__device__ __forceinline__ Pack<N> load(const float* row, int column) {
  return *reinterpret_cast<const Pack<N>*>(row + column);
}

template <int N>
__device__ __forceinline__ void store(float* row, int column, const Pack<N>& pack) {
  *reinterpret_cast<Pack<N>*>(row + column) = pack;
}

// How a row divides into 16-byte groups: `lead` single columns up to the first aligned address, `groups` of four
// columns, and the rest again single. Rows of an odd number of columns start at any multiple of 4 bytes.
struct RowShape {
  int columns, lead, groups;
};

__device__ __forceinline__ int columns_to_alignment(const float* row) {
  return -static_cast<int>(reinterpret_cast<uintptr_t>(row) >> 2) & 3;
}

__device__ __forceinline__ RowShape row_shape(const float* row, int columns) {
  const int lead = min(columns_to_alignment(row), columns);
  return {columns, lead, (columns - lead) / 4};
}

// Two rows walked together. Unless both are equally far from alignment, all columns are single.
__device__ __forceinline__ RowShape row_shape(const float* row, const float* other, int columns) {
  if (columns_to_alignment(row) != columns_to_alignment(other)) return {columns, columns, 0};
  return row_shape(row, columns);
}

// Calls body(width, column), with width std::integral_constant<int, 4> or <int, 1>, such that the threads of the block
// cover every column once. A thread covers the same columns in every walk over the same shape.
template <typename Body>
__device__ __forceinline__ void walk(const RowShape& shape, Body&& body) {
  const int thread = threadIdx.x;
  for (int group = thread; group < shape.groups; group += kThreads) {
    body(std::integral_constant<int, 4>{}, shape.lead + 4 * group);
  }
  const int singles = shape.columns - 4 * shape.groups;
  for (int i = thread; i < singles; i += kThreads) {
    body(std::integral_constant<int, 1>{}, i < shape.lead ? i : i + 4 * shape.groups);
  }
}

// The reduction of `values` over the block, the same bits in every thread.
template <int N, typename Combine>
__device__ __forceinline__ void block_reduce(float (&values)[N], Combine combine) {
  static_assert(kWarps <= 32, "the second step is one warp wide");
  __shared__ float partial[N][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      values[i] = combine(values[i], __shfl_xor_sync(0xffffffffu, values[i], offset));
    }
  }
  __syncthreads();  // the last reduction's readers are done
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) partial[i][warp] = values[i];
  }
  __syncthreads();
  // Every warp does the second step for itself, so nothing has to be handed back.
#pragma unroll
  for (int i = 0; i < N; ++i) {
    values[i] = partial[i][lane % kWarps];
#pragma unroll
    for (int offset = kWarps / 2; offset > 0; offset /= 2) {
      values[i] = combine(values[i], __shfl_xor_sync(0xffffffffu, values[i], offset));
    }
  }
}

template <int N>
__device__ __forceinline__ void block_sum(float (&values)[N]) {
  block_reduce(values, [](float a, float b) { return a + b; });
}

// fmaxf drops NaN. A NaN logit shows in the sum of exponentials instead.
template <int N>
__device__ __forceinline__ void block_max(float (&values)[N]) {
  block_reduce(values, [](float a, float b) { return fmaxf(a, b); });
}

// The highest of the logits seen so far and sum e^(z - highest). It starts at the lowest finite number rather than at
// -inf, of which the difference with itself is NaN. A logit that is not finite makes NaN of the sum, and so of all that
// its row gives: minus infinity would pass for a probability of zero.
struct SoftmaxSum {
  float highest = -FLT_MAX;
  float total = 0.0f;

  // Raises `highest` to that of the pack; returns what sums relative to the old one have to be multiplied by.
  template <int N>
  __device__ __forceinline__ float raise(const Pack<N>& z) {
    float top = z.v[0];
#pragma unroll
    for (int k = 1; k < N; ++k) top = fmaxf(top, z.v[k]);
    if (!(top > highest)) return 1.0f;
    const float scale = expf(highest - top);
    highest = top;
    total *= scale;
    return scale;
  }

  template <int N>
  __device__ __forceinline__ void add(const Pack<N>& z) {
    raise(z);
#pragma unroll
    for (int k = 0; k < N; ++k) total = fmaf(z.v[k], 0.0f, total + expf(z.v[k] - highest));
  }
};

// The tanh of an infinity is a number like any other: it becomes NaN.
template <int N>
__device__ __forceinline__ void apply_cap(const Cap& cap, Pack<N>& x) {
  if (!cap.on) return;
#pragma unroll
  for (int k = 0; k < N; ++k) x.v[k] = fmaf(x.v[k], 0.0f, cap.scale * tanhf(x.v[k]));
}

__device__ __forceinline__ float capped(const Cap& cap, float x) { return cap.on ? cap.scale * tanhf(x) : x; }

}  // namespace unisd::cuda
