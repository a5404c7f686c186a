// The current CUDA stream of a tensor's device, through the stable ABI. The one place that depends on which torch the
// library is built for (csrc/nvcc.py chooses):
// - target 2.13 and later: device-generic calls, all in libtorch_cpu. The library then loads under a CPU-only torch
//   too, which is how its registrations are tested without a GPU.
// - target 2.10: the older call lives in libtorch_cuda, which must be there at load time.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

// Spelled out: the headers of torch 2.10 to 2.12 have no name for 2.13, and an unknown name would count as 0.
#define UNISD_TORCH_2_13 (((0ULL + 2) << 56) | ((0ULL + 13) << 48))
#ifndef TORCH_TARGET_VERSION
#error "build with csrc/nvcc.py, which defines TORCH_TARGET_VERSION"
#endif

namespace unisd::cuda {

// Makes a tensor's device current while it lives, and knows the stream that torch uses there.
class StreamScope {
 public:
  explicit StreamScope(const torch::stable::Tensor& tensor)
      : device_(tensor.get_device_index()), guard_(device_), stream_(current(device_)) {
    // The CUDA runtime is linked statically, so it is another copy than torch's, with a current device of its own.
    check(cudaSetDevice(device_), "selecting the device");
  }

  cudaStream_t stream() const { return stream_; }

  static void check(cudaError_t error, const char* what) {
    STD_TORCH_CHECK(error == cudaSuccess, "unisd: ", what, ": ", cudaGetErrorString(error));
  }

 private:
  static cudaStream_t current(int32_t device) {
#if TORCH_TARGET_VERSION >= UNISD_TORCH_2_13
    return static_cast<cudaStream_t>(torch::stable::accelerator::getCurrentStream(device).nativeHandle());
#else
    void* stream = nullptr;
    // Not by torch's macro for such calls, which has had three names.
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
                    "unisd: no current stream on CUDA device ", device);
    return static_cast<cudaStream_t>(stream);
#endif
  }

  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace unisd::cuda
