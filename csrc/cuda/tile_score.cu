// tile_score_: merge a tile of some of the vocabulary's columns into the running statistics of its rows.
// Accesses of the tile: 1 read.
#include "launch.h"
#include "rows.cuh"

namespace unisd::cuda {
namespace {

template <bool kEntropy>
__global__ void __launch_bounds__(kThreads) score_kernel(const ScoreArguments a) {
  const int64_t row = blockIdx.x;
  const float* tile = a.tile.data + row * a.tile.row_stride;
  SoftmaxSum sum;
  float weighted = 0.0f;  // sum e^(z - highest) (z - highest)

  walk(row_shape(tile, a.tile.columns), [&](auto width, int column) {
    constexpr int N = decltype(width)::value;
    Pack<N> z = load<N>(tile, column);
    apply_cap(a.cap, z);
    if constexpr (kEntropy) {
      const float before = sum.highest, total = sum.total;
      const float scale = sum.raise(z);
      if (scale != 1.0f) weighted = scale == 0.0f ? 0.0f : scale * (weighted + total * (before - sum.highest));
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const float shifted = z.v[k] - sum.highest, e = expf(shifted);
        sum.total = fmaf(z.v[k], 0.0f, sum.total + e);
        weighted += e == 0.0f ? 0.0f : e * shifted;
      }
    } else {
      sum.add(z);
    }
  });

  float highest[1] = {sum.highest};
  block_max(highest);
  const float shift = sum.highest - highest[0], scale = expf(shift);
  float sums[kEntropy ? 2 : 1];
  sums[0] = scale * sum.total;
  if constexpr (kEntropy) sums[1] = scale == 0.0f ? 0.0f : scale * (weighted + sum.total * shift);
  block_sum(sums);

  if (threadIdx.x != 0) return;
  const float before = a.logsumexp[row], part = highest[0] + logf(sums[0]);
  // Both may be -inf, of which the difference would be NaN.
  const float top = fmaxf(before, part);
  const float after = before == part ? part + 0.693147181f : top + log1pf(expf(-fabsf(before - part)));
  a.logsumexp[row] = after;
  if constexpr (kEntropy) {
    // H = sum_i s_i (H_i - log s_i) over the parts' shares s_i of the probability, each from the difference of the two
    // log-sum-exps: `after` is rounded once more.
    float entropy = logf(sums[0]) - sums[1] / sums[0];
    if (before != -INFINITY) {
      const float apart = before - part, more = log1pf(expf(-fabsf(apart)));
      const float log_before = fminf(apart, 0.0f) - more, log_part = fminf(-apart, 0.0f) - more;
      const auto part_of = [](float log_share, float h) {
        const float share = expf(log_share);
        return share == 0.0f ? 0.0f : share * (h - log_share);
      };
      entropy = part_of(log_before, a.entropy[row]) + part_of(log_part, entropy);
    }
    a.entropy[row] = entropy;
  }
  if (a.target_ids != nullptr && a.target_logits != nullptr) {
    const int64_t id = a.target_ids[row], column = id - a.first_column;
    if (id < 0) {
      a.target_logits[row] = NAN;  // in no tile
    } else if (column >= 0 && column < a.tile.columns) {
      a.target_logits[row] = capped(a.cap, tile[column]);
    }
  }
}

}  // namespace

cudaError_t launch_score(const ScoreArguments& arguments, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(arguments.tile.rows);
  if (arguments.entropy != nullptr) {
    score_kernel<true><<<blocks, kThreads, 0, stream>>>(arguments);
  } else {
    score_kernel<false><<<blocks, kThreads, 0, stream>>>(arguments);
  }
  return cudaGetLastError();
}

}  // namespace unisd::cuda
