// tile_logprob_gradient_: overwrite complete rows with the gradient of weighted statistics.
//   d logp_y / dz = 1[y] - p,   d logsumexp / dz = p,   d entropy / dz = -p (log p + entropy)
// Accesses of the tile: 1 read, 1 write.
#include "launch.h"
#include "rows.cuh"

namespace unisd::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) logprob_gradient_kernel(const LogprobGradientArguments a) {
  const int64_t row = blockIdx.x;
  float* tile = a.tile.data + row * a.tile.row_stride;
  const float logsumexp = a.logsumexp[row];
  const bool has_entropy = a.entropy_weight != nullptr;
  const float entropy = has_entropy ? a.entropy[row] : 0.0f;
  const float entropy_weight = has_entropy ? a.entropy_weight[row] : 0.0f;
  float logprob_weight = 0.0f;
  int target = -1;
  if (a.logprob_weight != nullptr) {
    const int64_t id = a.target_ids[row];
    const bool inside = id >= 0 && id < a.tile.columns;
    // There is no gradient towards a column that is not there: the row becomes NaN rather than quietly wrong.
    logprob_weight = inside ? a.logprob_weight[row] : NAN;
    target = inside ? static_cast<int>(id) : -1;
  }
  const float probs_weight = (a.logsumexp_weight != nullptr ? a.logsumexp_weight[row] : 0.0f) - logprob_weight;

  walk(row_shape(tile, a.tile.columns), [&](auto width, int column) {
    constexpr int N = decltype(width)::value;
    Pack<N> x = load<N>(tile, column);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      float cap_gradient = 1.0f, z = x.v[k];
      if (a.cap.on) {
        const float t = tanhf(z);
        z = a.cap.scale * t;
        cap_gradient = 1.0f - t * t;
      }
      const float logprob = z - logsumexp, p = expf(logprob);
      float gradient = p * probs_weight;
      if (has_entropy) {
        gradient -= p == 0.0f ? 0.0f : p * (entropy_weight * (logprob + entropy));  // 0 * -inf
      }
      if (column + k == target) gradient += logprob_weight;
      x.v[k] = gradient * cap_gradient;
    }
    store(tile, column, x);
  });
}

}  // namespace

cudaError_t launch_logprob_gradient(const LogprobGradientArguments& arguments, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(arguments.tile.rows);
  logprob_gradient_kernel<<<blocks, kThreads, 0, stream>>>(arguments);
  return cudaGetLastError();
}

}  // namespace unisd::cuda
