// tile_softmax_: overwrite complete rows with the gradient of their log-sum-exp.
// Accesses of the tile: 2 reads, 1 write.
#include "launch.h"
#include "rows.cuh"

namespace unisd::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) softmax_kernel(const SoftmaxArguments a) {
  const int64_t row = blockIdx.x;
  float* tile = a.tile.data + row * a.tile.row_stride;
  const RowShape shape = row_shape(tile, a.tile.columns);
  SoftmaxSum sum;
  walk(shape, [&](auto width, int column) {
    constexpr int N = decltype(width)::value;
    Pack<N> z = load<N>(tile, column);
    apply_cap(a.cap, z);
    sum.add(z);
  });
  // Before the reductions, whose barriers keep the overwriting below behind it.
  float target_logit = NAN;
  if (threadIdx.x == 0) {
    const int64_t id = a.target_ids[row];
    if (id >= 0 && id < a.tile.columns) target_logit = capped(a.cap, tile[id]);
  }

  float highest[1] = {sum.highest};
  block_max(highest);
  float total[1] = {expf(sum.highest - highest[0]) * sum.total};
  block_sum(total);
  const float log_total = logf(total[0]);
  if (threadIdx.x == 0) {
    a.logsumexp[row] = highest[0] + log_total;
    a.target_logits[row] = target_logit;
  }

  walk(shape, [&](auto width, int column) {
    constexpr int N = decltype(width)::value;
    Pack<N> x = load<N>(tile, column);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (a.cap.on) {
        const float t = tanhf(x.v[k]);
        x.v[k] = expf((a.cap.scale * t - highest[0]) - log_total) * (1.0f - t * t);
      } else {
        x.v[k] = expf((x.v[k] - highest[0]) - log_total);
      }
    }
    store(tile, column, x);
  });
}

}  // namespace

cudaError_t launch_softmax(const SoftmaxArguments& arguments, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(arguments.tile.rows);
  softmax_kernel<<<blocks, kThreads, 0, stream>>>(arguments);
  return cudaGetLastError();
}

}  // namespace unisd::cuda
