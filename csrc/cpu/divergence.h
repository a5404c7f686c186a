// Divergence of two complete rows, and its gradient.
//
// With r = log p_t - log p_s, q = -|r| and `larger` the larger of the two probabilities, every term is `larger` times a
// bounded function of q: nothing overflows, and nothing is NaN where both probabilities underflow. To each term is
// added one that sums to zero over the vocabulary (a multiple of p_s - p_t), which makes all terms non-negative and of second
// order in r: a small D keeps its digits, and the rounding of the two log-sum-exps cancels to first order.
//
//   E(q) = e^q - 1,   A(q) = E - q >= 0,   B(q) = q e^q - E >= 0
//   p_t r - (p_t - p_s) = larger * (r > 0 ? A : B)                      summed: KL(p_t || p_s)
//   (p_t - p_s) - p_s r = larger * (r > 0 ? B : A)                      summed: KL(p_s || p_t)
//   with c = (r > 0 ? 1 - beta : beta) and l = log(1 + c E) = log(m / larger):
//   X = c E - l,   Y = e^q (q - l) - (1 - c) E = (1 - c) E^2 + e^q (X - A)
//   p_s log(p_s / m) - p_s + m = larger * (r > 0 ? Y : X)               summed: KL(p_s || m)
//   p_t log(p_t / m) - p_t + m = larger * (r > 0 ? X : Y)               summed: KL(p_t || m)
#pragma once

#include "rows.h"

namespace unisd {
namespace UNISD_ISA {

enum class Kind { kForward, kReverse, kMixture };

// From the logits of one column to its log-probabilities.
struct PairScale {
  Vec student_max, student_log_sum, teacher_max, teacher_log_sum;
  bool delta;

  PairScale(const float* statistics, int64_t rows, int64_t n, bool teacher_is_delta)
      : student_max(Vec::set(statistics[kStudentMax * rows + n])),
        student_log_sum(Vec::set(statistics[kStudentLogSum * rows + n])),
        teacher_max(Vec::set(statistics[kTeacherMax * rows + n])),
        teacher_log_sum(Vec::set(statistics[kTeacherLogSum * rows + n])),
        delta(teacher_is_delta) {}
};

struct Pair {
  Vec student_logprob, teacher_logprob;
  Vec r, q;           // clamped to be finite
  Vec larger, ratio;  // the larger probability, and e^q = smaller / larger
  Vec e;              // E(q)
  Vec remainder, n;   // (E(q) - q) / q^2 where n = 0, which is for |q| < ln(2) / 2
};

inline Pair make_pair(Vec student, Vec teacher, const PairScale& scale) {
  const Vec zero = Vec::set(0.0f), bound = Vec::set(1e30f);
  Pair pair;
  const Vec a = (student - scale.student_max) - scale.student_log_sum;
  Vec b, r;
  if (scale.delta) {
    r = teacher - scale.teacher_log_sum;
    b = a + r;
  } else {
    b = (teacher - scale.teacher_max) - scale.teacher_log_sum;
    r = b - a;
  }
  const Vec higher = max(a, b);
  pair.larger = exp(higher);
  // Where both are zero r does not matter and may be -inf - -inf.
  r = where_equal(pair.larger, zero, zero, r);
  pair.r = max(zero - bound, min(bound, r));
  pair.q = zero - abs(pair.r);
  const ExpParts parts = exp_parts(pair.q);
  pair.ratio = parts.exp;
  pair.e = parts.expm1;
  pair.remainder = parts.remainder;
  pair.n = parts.n;
  pair.student_logprob = a;
  pair.teacher_logprob = b;
  return pair;
}

inline Vec term_a(const Pair& p) {
  return where_less(p.n, Vec::set(0.0f), p.e - p.q, p.q * p.q * p.remainder);
}

inline Vec term_b(const Pair& p) {
  const Vec small = p.q * p.q * fma(p.q - Vec::set(1.0f), p.remainder, Vec::set(1.0f));
  return where_less(p.n, Vec::set(0.0f), p.q * p.ratio - p.e, small);
}

struct Mixture {
  Vec x, log_share;  // X, and l = log(m / larger)
  Vec other_share;   // 1 - c
};

struct MixtureScale {
  Vec beta, other;  // beta and 1 - beta, each rounded once
  explicit MixtureScale(double b)
      : beta(Vec::set(static_cast<float>(b))), other(Vec::set(static_cast<float>(1.0 - b))) {}
};

inline Mixture make_mixture(const Pair& p, const MixtureScale& scale) {
  const Vec zero = Vec::set(0.0f);
  const Vec c = where_less(zero, p.r, scale.other, scale.beta);
  Mixture mixture;
  mixture.other_share = where_less(zero, p.r, scale.beta, scale.other);
  const Vec w = c * p.e;
  const Vec limit = Vec::set(-0.25f);
  const Vec bounded = max(limit, w);
  const Vec small_x = bounded * bounded * log_remainder(bounded);
  // 1 + w, without cancellation where c is close to 1 and the ratio to 0.
  const Vec large_log = log(fma(c, p.ratio, mixture.other_share));
  mixture.x = where_less(w, limit, w - large_log, small_x);
  mixture.log_share = where_less(w, limit, large_log, bounded - small_x);
  return mixture;
}

// In the second form, whose terms are all of second order.
inline Vec term_y(const Pair& p, const Mixture& m) {
  return fma(p.ratio, m.x - term_a(p), m.other_share * p.e * p.e);
}

inline Vec student_prob(const Pair& p) { return where_less(Vec::set(0.0f), p.r, p.larger * p.ratio, p.larger); }
inline Vec teacher_prob(const Pair& p) { return where_less(Vec::set(0.0f), p.r, p.larger, p.larger * p.ratio); }

struct DivergenceSums {
  double first = 0.0;   // forward or reverse KL, or KL(p_t || m)
  double second = 0.0;  // KL(p_s || m)
  double student_entropy = 0.0, teacher_entropy = 0.0;
};

template <Kind kind>
inline DivergenceSums sum_divergence(const DivergenceTile& tile, const float* student, const float* teacher,
                                     const PairScale& scale) {
  const Vec zero = Vec::set(0.0f), lowest = Vec::set(-1e30f);
  const MixtureScale mixture_scale(tile.beta);
  const float fill = tile.teacher_is_delta ? 0.0f : -kInfinity;
  DivergenceSums total;
  for (int64_t start = 0; start < tile.columns; start += kSumColumns) {
    const int64_t length = at_most(kSumColumns, tile.columns - start);
    const float* s = student + start;
    const float* t = teacher + start;
    Vec first = zero, second = zero, student_entropy = zero, teacher_entropy = zero;
    const auto add = [&](Vec z_s, Vec z_t) UNISD_INLINE {
      const Pair p = make_pair(z_s, z_t, scale);
      if (kind == Kind::kForward) {
        first = fma(p.larger, where_less(zero, p.r, term_a(p), term_b(p)), first);
      } else if (kind == Kind::kReverse) {
        first = fma(p.larger, where_less(zero, p.r, term_b(p), term_a(p)), first);
      } else {
        const Mixture m = make_mixture(p, mixture_scale);
        const Vec y = term_y(p, m);
        first = fma(p.larger, where_less(zero, p.r, m.x, y), first);
        second = fma(p.larger, where_less(zero, p.r, y, m.x), second);
      }
      if (tile.want_entropy) {
        student_entropy = student_entropy - student_prob(p) * max(lowest, p.student_logprob);
        teacher_entropy = teacher_entropy - teacher_prob(p) * max(lowest, p.teacher_logprob);
      }
    };
    for_each_vector(
        length, [&](int64_t i) UNISD_INLINE { add(Vec::load(s + i), Vec::load(t + i)); },
        [&](int64_t i, int n) UNISD_INLINE {
          add(Vec::load_part(s + i, n, -kInfinity), Vec::load_part(t + i, n, fill));
        });
    total.first += sum_of_lanes(first);
    total.second += sum_of_lanes(second);
    total.student_entropy += sum_of_lanes(student_entropy);
    total.teacher_entropy += sum_of_lanes(teacher_entropy);
  }
  return total;
}

inline float largest_magnitude(const float* x, int64_t columns) {
  Vec largest = Vec::set(0.0f);
  for_each_vector(
      columns, [&](int64_t i) UNISD_INLINE { largest = max(abs(Vec::load(x + i)), largest); },
      [&](int64_t i, int n) UNISD_INLINE { largest = max(abs(Vec::load_part(x + i, n, 0.0f)), largest); });
  return max_of_lanes(largest);
}

// L = log sum_j p_s(j) e^delta(j). By expm1 where every delta is small, which keeps the digits of a small L; else by
// the log-sum-exp of z_s + delta. (D is insensitive to L to first order, its gradient is not.)
inline float log_mean_exp_delta(const float* student, const float* delta, int64_t columns, float max_logit,
                                float log_sum) {
  if (largest_magnitude(delta, columns) <= 1.0f) {
    const Vec shift = Vec::set(max_logit), logs = Vec::set(log_sum);
    double mean = 0.0;
    for (int64_t start = 0; start < columns; start += kSumColumns) {
      const float* s = student + start;
      const float* d = delta + start;
      Vec sum = Vec::set(0.0f);
      const auto add = [&](Vec z, Vec x) UNISD_INLINE {
        sum = fma(exp((z - shift) - logs), fma(x * x, exp_remainder(x), x), sum);
      };
      for_each_vector(
          at_most(kSumColumns, columns - start),
          [&](int64_t i) UNISD_INLINE { add(Vec::load(s + i), Vec::load(d + i)); },
          [&](int64_t i, int n) UNISD_INLINE {
            add(Vec::load_part(s + i, n, -kInfinity), Vec::load_part(d + i, n, 0.0f));
          });
      mean += sum_of_lanes(sum);
    }
    return static_cast<float>(std::log1p(mean));
  }
  OnlineSum total;
  for (int64_t start = 0; start < columns; start += kSumColumns) {
    const float* s = student + start;
    const float* d = delta + start;
    add_block(
        at_most(kSumColumns, columns - start), false,
        [&](int64_t i) UNISD_INLINE { return Vec::load(s + i) + Vec::load(d + i); },
        [&](int64_t i, int n) UNISD_INLINE {
          return Vec::load_part(s + i, n, -kInfinity) + Vec::load_part(d + i, n, 0.0f);
        },
        &total);
  }
  return static_cast<float>((static_cast<double>(total.max) - max_logit) + (std::log(total.sum) - log_sum));
}

inline void tile_divergence(const DivergenceTile& tile, int64_t n) {
  float* student = tile.student + n * tile.student_stride;
  float* teacher = tile.teacher + n * tile.teacher_stride;
  const int64_t rows = tile.rows;
  const auto statistic = [&](DivergenceStatistic which) -> float& { return tile.statistics[which * rows + n]; };
  if (tile.student_tanh_scale != nullptr) cap_row(student, tile.columns, *tile.student_tanh_scale);
  if (tile.teacher_tanh_scale != nullptr) cap_row(teacher, tile.columns, *tile.teacher_tanh_scale);

  const OnlineSum student_sum = online_sum(student, tile.columns, false);
  statistic(kStudentMax) = student_sum.max;
  statistic(kStudentLogSum) = log_of_sum(student_sum.sum);
  if (tile.teacher_is_delta) {
    statistic(kTeacherMax) = 0.0f;
    statistic(kTeacherLogSum) =
        log_mean_exp_delta(student, teacher, tile.columns, statistic(kStudentMax), statistic(kStudentLogSum));
  } else {
    const OnlineSum teacher_sum = online_sum(teacher, tile.columns, false);
    statistic(kTeacherMax) = teacher_sum.max;
    statistic(kTeacherLogSum) = log_of_sum(teacher_sum.sum);
  }

  const PairScale scale(tile.statistics, rows, n, tile.teacher_is_delta);
  DivergenceSums sums;
  double divergence;
  if (tile.beta == 0.0) {
    sums = sum_divergence<Kind::kForward>(tile, student, teacher, scale);
    divergence = sums.first;
  } else if (tile.beta == 1.0) {
    sums = sum_divergence<Kind::kReverse>(tile, student, teacher, scale);
    divergence = sums.first;
  } else {
    sums = sum_divergence<Kind::kMixture>(tile, student, teacher, scale);
    divergence = tile.beta * sums.first + (1.0 - tile.beta) * sums.second;
  }
  // Not negative but for rounding; a NaN stays.
  statistic(kDivergence) = divergence < 0.0 ? 0.0f : static_cast<float>(divergence);
  statistic(kStudentToMixture) = static_cast<float>(sums.second);
  statistic(kStudentEntropy) = static_cast<float>(sums.student_entropy);
  statistic(kTeacherEntropy) = static_cast<float>(sums.teacher_entropy);
  statistic(kStudentLogprob) = 0.0f;
  statistic(kTeacherLogprob) = 0.0f;
  if (tile.target_ids != nullptr) {
    const int64_t y = tile.target_ids[n];
    const float student_logprob = (student[y] - statistic(kStudentMax)) - statistic(kStudentLogSum);
    statistic(kStudentLogprob) = student_logprob;
    statistic(kTeacherLogprob) = tile.teacher_is_delta
                                     ? student_logprob + (teacher[y] - statistic(kTeacherLogSum))
                                     : (teacher[y] - statistic(kTeacherMax)) - statistic(kTeacherLogSum);
  }
}

template <Kind kind>
inline void write_gradient(const DivergenceTile& tile, int64_t n) {
  float* student = tile.student + n * tile.student_stride;
  const float* teacher = tile.teacher + n * tile.teacher_stride;
  const int64_t rows = tile.rows;
  const PairScale scale(tile.statistics, rows, n, tile.teacher_is_delta);
  const MixtureScale mixture_scale(tile.beta);
  const Vec zero = Vec::set(0.0f), lowest = Vec::set(-1e30f);
  const Vec divergence = Vec::set(tile.statistics[kDivergence * rows + n]);
  const Vec student_to_mixture = Vec::set(tile.statistics[kStudentToMixture * rows + n]);
  const Vec weight = Vec::set(tile.weight == nullptr ? 1.0f : tile.weight[n]);
  const Vec logprob_weight = Vec::set(tile.logprob_weight == nullptr ? 0.0f : tile.logprob_weight[n]);
  const Vec inverse = Vec::set(tile.student_tanh_scale == nullptr ? 0.0f : 1.0f / *tile.student_tanh_scale);
  const int64_t target = tile.logprob_weight == nullptr ? 0 : tile.target_ids[n];
  const float target_z = tile.columns == 0 ? 0.0f : student[target];

  const auto gradient = [&](Vec z_s, Vec z_t) UNISD_INLINE {
    const Pair p = make_pair(z_s, z_t, scale);
    const Vec probs = student_prob(p);
    Vec g;
    if (kind == Kind::kForward) {
      // p_s - p_t = larger * (r > 0 ? E : -E)
      const Vec difference = p.larger * p.e;
      g = where_less(zero, p.r, difference, zero - difference);
    } else if (kind == Kind::kReverse) {
      g = zero - probs * (p.r + divergence);
    } else {
      // log(m / p_s) = l for r <= 0; log(m / p_t) = l, so l + r, for r > 0.
      const Mixture m = make_mixture(p, mixture_scale);
      const Vec u = m.log_share + max(p.r, zero);
      g = (zero - mixture_scale.other) * probs * (u + student_to_mixture);
    }
    g = g * weight - logprob_weight * probs;
    const Vec t = max(lowest, z_s) * inverse;
    return g * (Vec::set(1.0f) - t * t);
  };
  const float fill = tile.teacher_is_delta ? 0.0f : -kInfinity;
  for_each_vector(
      tile.columns,
      [&](int64_t i) UNISD_INLINE { gradient(Vec::load(student + i), Vec::load(teacher + i)).store(student + i); },
      [&](int64_t i, int k) UNISD_INLINE {
        gradient(Vec::load_part(student + i, k, -kInfinity), Vec::load_part(teacher + i, k, fill))
            .store_part(student + i, k);
      });
  if (tile.logprob_weight != nullptr) {
    const float t = tile.student_tanh_scale == nullptr ? 0.0f : target_z / *tile.student_tanh_scale;
    student[target] += tile.logprob_weight[n] * (1.0f - t * t);
  }
}

inline void tile_divergence_gradient(const DivergenceTile& tile, int64_t n) {
  if (tile.beta == 0.0) {
    write_gradient<Kind::kForward>(tile, n);
  } else if (tile.beta == 1.0) {
    write_gradient<Kind::kReverse>(tile, n);
  } else {
    write_gradient<Kind::kMixture>(tile, n);
  }
}

}  // namespace UNISD_ISA
}  // namespace unisd
