// The rows of the `statistics` argument of tile_divergence_ and tile_divergence_gradient_. Python reads the first five,
// and repeats their order and the count in unisd_kernels/backends/native.py.
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
  // The same of the teacher. In a row that holds the difference delta of the logits, z_t(j) is z_s(j) + delta(j) less
  // kStudentMax.
  kTeacherMax = 7,
  kTeacherLogSum = 8,
  kStudentToMixture = 9,  // KL(p_s || m), for 0 < beta < 1, else 0
  // L = log sum_j p_s(j) e^delta(j) of a row whose log p_t(j) - log p_s(j) is to be taken as delta(j) - L; infinity in
  // the others, where it is the difference of the two log-probabilities.
  kLogRatio = 10,
  kDivergenceStatistics = 11,
};

}  // namespace unisd
