// tile_divergence_: the statistics of complete rows of student and teacher (csrc/statistics.h).
// Accesses of each of the two tiles: 2 reads, and with a soft cap 1 write (by the logits). The first pass finds the two
// normalizations, the second the sums over columns, whose terms need both normalizations.
#include "../statistics.h"
#include "divergence_math.cuh"
#include "launch.h"
#include "rows.cuh"

namespace unisd::cuda {
namespace {

template <int N>
__device__ __forceinline__ Pack<N> load_logits(float* row, int column, const Cap& cap) {
  Pack<N> z = load<N>(row, column);
  if (cap.on) {
    apply_cap(cap, z);
    store(row, column, z);
  }
  return z;
}

// Normalizations of the two softmaxes.
__device__ __forceinline__ RowNorm norm_of_logits(const DivergenceArguments& a, const RowShape& shape, float* student,
                                                  float* teacher) {
  SoftmaxSum s, t;
  walk(shape, [&](auto width, int column) {
    constexpr int N = decltype(width)::value;
    const Pack<N> zs = load_logits<N>(student, column, a.student_cap);
    const Pack<N> zt = load_logits<N>(teacher, column, a.teacher_cap);
    s.add(zs);
    t.add(zt);
  });
  float highest[2] = {s.highest, t.highest};
  block_max(highest);
  float total[2] = {expf(s.highest - highest[0]) * s.total, expf(t.highest - highest[1]) * t.total};
  block_sum(total);
  return {highest[0], logf(total[0]), highest[1], logf(total[1]), INFINITY, false};
}

// Where every |delta| is at most this, log p_t - log p_s is delta - L, which keeps the digits of a small D, and p_t
// sums to one to 2^-24 (|log p_s| + 2 kNear). Beyond, log p_t has to come from its own maximum and sum
// (csrc/cpu/divergence.h says why, and chooses later because it knows the student's maximum earlier).
constexpr float kNear = 8.0f;

// With delta = z_t - z_s in the second tile: L = log sum_j p_s e^delta. As log1p(sum_j p_s (e^delta - 1)) it keeps the
// digits of a small delta; where a delta is large, as the difference of two log-sum-exps. Both come out of one pass.
__device__ __forceinline__ RowNorm norm_of_difference(const RowShape& shape, const float* student,
                                                      const float* delta_row) {
  SoftmaxSum s, t;
  float moved = 0.0f;  // sum e^(z_s - highest) (e^delta - 1); of use only where no |delta| exceeds 1
  float largest = 0.0f;
  walk(shape, [&](auto width, int column) {
    constexpr int N = decltype(width)::value;
    const Pack<N> zs = load<N>(student, column);
    const Pack<N> delta = load<N>(delta_row, column);
    Pack<N> zt;
    moved *= s.raise(zs);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float e = expf(zs.v[k] - s.highest);
      s.total = fmaf(zs.v[k], 0.0f, s.total + e);
      moved = fmaf(e, expm1_small(delta.v[k]), moved);
      largest = fmaxf(largest, fabsf(delta.v[k]));
      zt.v[k] = zs.v[k] + delta.v[k];
    }
    t.add(zt);
  });
  float highest[3] = {s.highest, t.highest, largest};
  block_max(highest);
  const float scale = expf(s.highest - highest[0]);
  float total[3] = {scale * s.total, expf(t.highest - highest[1]) * t.total, scale * moved};
  block_sum(total);
  const float log_total = logf(total[0]), log_teacher_total = logf(total[1]);
  // An infinite delta makes NaN of log_teacher_total.
  const float log_ratio = highest[2] <= 1.0f    ? log1pf(total[2] / total[0])
                          : highest[2] <= kNear ? (highest[1] - highest[0]) + (log_teacher_total - log_total)
                                                : INFINITY;
  return {highest[0], log_total, highest[1], log_teacher_total, log_ratio, true};
}

// With a logit that is not finite nothing the row gives is a number.
__device__ __forceinline__ RowNorm nan_unless_finite(const RowNorm& norm) {
  if (!isnan(norm.student_log_sum + norm.teacher_log_sum)) return norm;
  return {NAN, NAN, NAN, NAN, NAN, norm.difference};
}

template <Kind kKind, bool kDifference>
__global__ void __launch_bounds__(kThreads, 2) divergence_kernel(const DivergenceArguments a) {
  const int64_t row = blockIdx.x;
  float* student = a.student.data + row * a.student.row_stride;
  float* teacher = a.teacher.data + row * a.teacher.row_stride;
  const RowShape shape = row_shape(student, teacher, a.student.columns);
  const RowNorm norm = nan_unless_finite(kDifference && a.is_difference[row]
                                             ? norm_of_difference(shape, student, teacher)
                                             : norm_of_logits(a, shape, student, teacher));

  constexpr bool kMixed = kKind == Kind::kMixture || kKind == Kind::kSkewed;
  const Shares shares(a.beta);
  float sums[4] = {};  // divergence (kMixed: KL(p_t || m)), KL(p_s || m), student's entropy, teacher's
  walk(shape, [&](auto width, int column) {
    constexpr int N = decltype(width)::value;
    const Pack<N> zs = load<N>(student, column);
    const Pack<N> zt = load<N>(teacher, column);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const Column c = norm.column<kDifference>(zs.v[k], zt.v[k]);
      add_divergence<kKind>(c, shares, sums[0], sums[1]);
      if (a.want_entropy) {
        sums[2] -= times(c.student, c.log_student);
        sums[3] -= times(c.teacher, c.log_teacher);
      }
    }
  });
  block_sum(sums);

  if (threadIdx.x != 0) return;
  float divergence = sums[0];
  if constexpr (kMixed) divergence = shares.teacher * sums[0] + shares.student * sums[1];
  const auto write = [&](DivergenceStatistic statistic, float value) {
    a.statistics[statistic * a.statistics_stride + row] = value;
  };
  // Below zero there is only rounding. NaN stays.
  write(kDivergence, divergence < 0.0f ? 0.0f : divergence);
  write(kStudentMax, norm.student_max);
  write(kStudentLogSum, norm.student_log_sum);
  write(kTeacherMax, norm.teacher_max);
  write(kTeacherLogSum, norm.teacher_log_sum);
  write(kLogRatio, norm.log_ratio);
  write(kStudentToMixture, kMixed ? sums[1] : 0.0f);
  // What was not asked for is 0.
  write(kStudentEntropy, sums[2]);
  write(kTeacherEntropy, sums[3]);
  float log_student = 0.0f, log_teacher = 0.0f;
  if (a.target_ids != nullptr) {
    const int64_t id = a.target_ids[row];
    log_student = log_teacher = NAN;  // of a column that is not there
    if (id >= 0 && id < a.student.columns) {
      const Column target = norm.column<kDifference>(student[id], teacher[id]);
      log_student = target.log_student;
      log_teacher = target.log_teacher;
    }
  }
  write(kStudentLogprob, log_student);
  write(kTeacherLogprob, log_teacher);
}

}  // namespace

cudaError_t launch_divergence(const DivergenceArguments& arguments, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(arguments.student.rows);
  dispatch_divergence(arguments.beta, arguments.is_difference != nullptr, [&](auto kind, auto difference) {
    divergence_kernel<decltype(kind)::value, decltype(difference)::value><<<blocks, kThreads, 0, stream>>>(arguments);
  });
  return cudaGetLastError();
}

}  // namespace unisd::cuda
