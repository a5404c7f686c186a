// What the host side (register_*.cpp, which checks tensors) calls of the device side (*.cu, which knows no tensors), so
// that torch's headers are parsed by the host compiler only. Every function launches on `stream` and returns the error
// of the launch. Nothing here synchronizes or allocates.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace unisd::cuda {

// Element types by name, for the operations that take several.
enum class Element : int { kFloat32, kFloat64, kBFloat16, kFloat16 };

// float32 [rows, columns], contiguous rows.
struct ConstTile {
  const float* data;
  int64_t rows;
  int64_t row_stride;
  int columns;
};

struct Tile {
  float* data;
  int64_t rows;
  int64_t row_stride;
  int columns;

  operator ConstTile() const { return {data, rows, row_stride, columns}; }
};

// The logit of a tile's entry x: `scale * tanh(x)`, or x itself without a cap.
struct Cap {
  bool on;
  float scale;
};

// Optional pointers may be null.
struct ScoreArguments {
  ConstTile tile;
  Cap cap;
  const int64_t* target_ids;
  int64_t first_column;
  float* logsumexp;
  float* target_logits;
  float* entropy;
};

struct SoftmaxArguments {
  Tile tile;
  Cap cap;
  const int64_t* target_ids;
  float* logsumexp;
  float* target_logits;
};

struct LogprobGradientArguments {
  Tile tile;
  Cap cap;
  const float* logsumexp;
  const int64_t* target_ids;
  const float* logprob_weight;
  const float* logsumexp_weight;
  const float* entropy;
  const float* entropy_weight;
};

// Rows of `statistics` are those of csrc/statistics.h, `statistics_stride` apart.
struct DivergenceArguments {
  Tile student;
  Tile teacher;
  Cap student_cap;
  Cap teacher_cap;
  const bool* is_difference;
  const int64_t* target_ids;
  double beta;
  bool want_entropy;
  float* statistics;
  int64_t statistics_stride;
};

struct DivergenceGradientArguments {
  Tile student;
  ConstTile teacher;
  Cap student_cap;
  const bool* is_difference;
  const int64_t* target_ids;
  double beta;
  const float* statistics;
  int64_t statistics_stride;
  const float* weight;
  const float* logprob_weight;
};

struct ScaleRowsArguments {
  ConstTile rows;
  const float* scale;
  void* out;
  Element out_type;  // not float64
  int64_t out_stride;
};

cudaError_t launch_score(const ScoreArguments& arguments, cudaStream_t stream);
cudaError_t launch_softmax(const SoftmaxArguments& arguments, cudaStream_t stream);
cudaError_t launch_logprob_gradient(const LogprobGradientArguments& arguments, cudaStream_t stream);
cudaError_t launch_divergence(const DivergenceArguments& arguments, cudaStream_t stream);
cudaError_t launch_divergence_gradient(const DivergenceGradientArguments& arguments, cudaStream_t stream);
cudaError_t launch_scale_rows(const ScaleRowsArguments& arguments, cudaStream_t stream);

// Tensors of one launch of the moving average, passed by value as the kernel's argument: no copy to the device, no
// allocation to keep alive, and a captured CUDA graph holds it. 96 of them stay within the 4 KiB of arguments that
// every architecture and driver takes.
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

// All tensors of one launch have the same types. kPlain is for float32 and float64 teachers, the others for 16 bits.
cudaError_t launch_ema(const EmaTensors& tensors, Element teacher, Element student, EmaRounding rounding, double decay,
                       uint64_t seed, cudaStream_t stream);

}  // namespace unisd::cuda
