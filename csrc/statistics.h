// The rows of the `statistics` argument of tile_divergence_ and tile_divergence_gradient_. Read from Python by name in
// unisd_kernels/tiles/native.py.
#pragma once

namespace unisd {

enum DivergenceStatistic {
  kDivergence = 0,        // D >= 0
  kStudentLogprob = 1,    // log p_s(y); with target_ids
  kTeacherLogprob = 2,    // log p_t(y); with target_ids
  kStudentEntropy = 3,    // with want_entropy
  kTeacherEntropy = 4,    // with want_entropy
  // log p_s(j) = (z_s(j) - kStudentMax) - kStudentLogSum. Two numbers, because one, rounded, would lose digits of a
  // small D.
  kStudentMax = 5,
  kStudentLogSum = 6,
  // The same of the teacher. With teacher_is_delta: 0 and L = log sum_j p_s(j) e^delta(j), so that
  // log p_t(j) - log p_s(j) = delta(j) - L.
  kTeacherMax = 7,
  kTeacherLogSum = 8,
  kStudentToMixture = 9,  // KL(p_s || m), for 0 < beta < 1, else 0
  kDivergenceStatistics = 10,
};

}  // namespace unisd
