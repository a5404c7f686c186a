// The moving average's launch: what the host side (ema_ops.cpp, which checks tensors) calls of the device side (ema.cu,
// which knows no tensors), so that torch's headers are parsed by the host compiler only. Nothing here synchronizes or
// allocates.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../storage.h"

namespace unisd::cuda {

// Tensors of one launch, passed by value as the kernel's argument: no copy to the device, no allocation to keep alive,
// and a captured CUDA graph holds it. 96 of them stay within the 4 KiB of arguments that every architecture and driver
// takes.
constexpr int kEmaTensors = 96;

struct EmaTensors {
  void* teacher[kEmaTensors];
  const void* student[kEmaTensors];
  void* compensation[kEmaTensors];
  int64_t numel[kEmaTensors];
  int32_t first_block[kEmaTensors + 1];  // tensor i has blocks first_block[i] to first_block[i + 1] - 1
  int32_t position[kEmaTensors];         // in the caller's list: the tensor's number for the random bits
  int32_t count;
};

enum class EmaRounding : int { kPlain, kCompensated, kStochastic };

// Elements of one thread block; the host derives first_block from it.
constexpr int64_t kEmaBlockElements = 16384;

// Launches on `stream` and returns the error of the launch. All tensors have the same types; kPlain is for float32 and
// float64 teachers, the others are for 16 bits.
cudaError_t launch_ema(const EmaTensors& tensors, Storage teacher, Storage student, EmaRounding rounding, double decay,
                       uint64_t seed, cudaStream_t stream);

}  // namespace unisd::cuda
