// tile_divergence_gradient_: overwrite the student's tile with the gradient, from the statistics of tile_divergence_.
// Accesses: 1 read of each tile, 1 write of the student's.
#include "../statistics.h"
#include "divergence_math.cuh"
#include "launch.h"
#include "rows.cuh"

namespace unisd::cuda {
namespace {

template <Kind kKind, bool kDifference>
__global__ void __launch_bounds__(kThreads, 2) divergence_gradient_kernel(const DivergenceGradientArguments a) {
  const int64_t row = blockIdx.x;
  float* student = a.student.data + row * a.student.row_stride;
  const float* teacher = a.teacher.data + row * a.teacher.row_stride;
  const auto read = [&](DivergenceStatistic statistic) {
    return a.statistics[statistic * a.statistics_stride + row];
  };
  const RowNorm norm{read(kStudentMax),    read(kStudentLogSum), read(kTeacherMax),
                     read(kTeacherLogSum), read(kLogRatio),      kDifference && a.is_difference[row]};
  constexpr bool kMixed = kKind == Kind::kMixture || kKind == Kind::kSkewed;
  const float statistic = read(kMixed ? kStudentToMixture : kDivergence);
  const Shares shares(a.beta);
  const float weight = a.weight != nullptr ? a.weight[row] : 1.0f;
  float logprob_weight = 0.0f;
  int target = -1;
  if (a.logprob_weight != nullptr) {
    const int64_t id = a.target_ids[row];
    const bool inside = id >= 0 && id < a.student.columns;
    // There is no gradient towards a column that is not there: the row becomes NaN rather than quietly wrong.
    logprob_weight = inside ? a.logprob_weight[row] : NAN;
    target = inside ? static_cast<int>(id) : -1;
  }
  const float inverse_cap = 1.0f / a.student_cap.scale;  // used only with a cap

  walk(row_shape(student, teacher, a.student.columns), [&](auto width, int column) {
    constexpr int N = decltype(width)::value;
    Pack<N> zs = load<N>(student, column);
    const Pack<N> zt = load<N>(teacher, column);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const Column c = norm.column<kDifference>(zs.v[k], zt.v[k]);
      float gradient = weight * divergence_gradient<kKind>(c, shares, statistic) - logprob_weight * c.student;
      if (column + k == target) gradient += logprob_weight;
      if (a.student_cap.on) {
        const float t = zs.v[k] * inverse_cap;
        gradient *= 1.0f - t * t;
      }
      zs.v[k] = gradient;
    }
    store(student, column, zs);
  });
}

}  // namespace

cudaError_t launch_divergence_gradient(const DivergenceGradientArguments& arguments, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(arguments.student.rows);
  dispatch_divergence(arguments.beta, arguments.is_difference != nullptr, [&](auto kind, auto difference) {
    divergence_gradient_kernel<decltype(kind)::value, decltype(difference)::value>
        <<<blocks, kThreads, 0, stream>>>(arguments);
  });
  return cudaGetLastError();
}

}  // namespace unisd::cuda
