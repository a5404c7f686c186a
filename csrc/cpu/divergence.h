// Divergence of two complete rows: their statistics, then the gradient. divergence_terms.h has the mathematics.
#pragma once

#include "divergence_terms.h"
#include "rows.h"

namespace unisd {
namespace UNISD_ISA {

struct DivergenceSums {
  double first = 0.0;   // forward or reverse KL, or KL(p_t || m)
  double second = 0.0;  // KL(p_s || m)
  double student_entropy = 0.0, teacher_entropy = 0.0;
};

// What the gradient needs of a column besides the statistics of its row, which are known only after the sum: p_s, and r
// (beta = 1) or u (0 < beta < 1). For beta = 0 it is known with the terms of D.
struct Kept {
  float* probs;
  float* logs;
};

// p_s - p_t = larger * (r > 0 ? E : -E)
template <class V>
inline UNISD_INLINE V forward_gradient(const Pair<V>& p) {
  const V difference = p.larger * p.e;
  return where_less(V::set(0.0f), p.r, difference, V::set(0.0f) - difference);
}

// With `keep`, the gradient of beta = 0 takes the student's place, and that of the others is kept.
template <Kind kind, bool keep>
inline DivergenceSums sum_divergence(const DivergenceTile& tile, float* student, const float* teacher,
                                     const PairScale& scale, Kept kept) {
  const CapSlope slope(tile.student_tanh_scale);
  const Vec zero = Vec::set(0.0f), lowest = Vec::set(-1e30f);
  const MixtureScale mixture_scale(tile.beta);
  const float fill = scale.row_is_delta ? 0.0f : -kInfinity;
  DivergenceSums total;
  for (int64_t start = 0; start < tile.columns; start += kSumColumns) {
    const int64_t length = at_most(kSumColumns, tile.columns - start);
    float* s = student + start;
    const float* t = teacher + start;
    float* probs = kept.probs + start;
    float* logs = kept.logs + start;
    Vec first = zero, second = zero, student_entropy = zero, teacher_entropy = zero;
    // put(where, value) stores a vector, or the part of it that there is.
    const auto add = [&](auto z_s, auto z_t, int64_t i, const auto& put) UNISD_INLINE {
      const auto p = make_pair(z_s, z_t, scale);
      if (kind == Kind::kForward) {
        first = add_product_to(first, p.larger, where_less(zero, p.r, term_a(p), term_b(p)));
      } else if (kind == Kind::kReverse) {
        first = add_product_to(first, p.larger, where_less(zero, p.r, term_b(p), term_a(p)));
      } else {
        const auto m = make_mixture<kind>(p, mixture_scale);
        const auto y = mixture_y<kind>(p, m);
        first = add_product_to(first, p.larger, where_less(zero, p.r, m.x, y));
        second = add_product_to(second, p.larger, where_less(zero, p.r, y, m.x));
        if (keep) put(logs + i, log_mixture_to_student<kind>(p, m));
      }
      if (keep) {
        if (kind == Kind::kForward) {
          put(s + i, forward_gradient(p) * slope.of(z_s));
        } else {
          put(probs + i, student_prob(p));
        }
        if (kind == Kind::kReverse) put(logs + i, p.r);
      }
      if (tile.want_entropy) {
        student_entropy = add_to(student_entropy, zero - student_prob(p) * max(lowest, p.student_logprob));
        teacher_entropy = add_to(teacher_entropy, zero - teacher_prob(p) * max(lowest, p.teacher_logprob));
      }
    };
    for_each_wide(
        length,
        [&](int64_t i, auto like) UNISD_INLINE {
          using V = decltype(like);
          add(V::load(s + i), V::load(t + i), i, [](float* where, V value) UNISD_INLINE { value.store(where); });
        },
        [&](int64_t i, int n) UNISD_INLINE {
          add(Vec::load_part(s + i, n, -kInfinity), Vec::load_part(t + i, n, fill), i,
              [&](float* where, Vec value) UNISD_INLINE { value.store_part(where, n); });
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

struct TeacherScale {
  float max, log_sum, log_ratio;  // kTeacherMax, kTeacherLogSum and kLogRatio
};

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// The teacher's row holds logits.
inline TeacherScale scale_of_logits(const float* teacher, int64_t columns) {
  const OnlineSum total = online_sum(teacher, columns);
  return {total.max, log_of_sum(total.sum), kInfinity};
}

// The teacher's row holds delta. L comes by expm1 where every delta is small, which keeps the digits of a small L;
// else by the log-sum-exp of z_t. (D is insensitive to L to first order, its gradient is not.)
inline TeacherScale scale_of_delta(const float* student, const float* delta, int64_t columns, float max_logit,
                                   float log_sum) {
  const float largest = largest_magnitude(delta, columns);
  const Vec shift = Vec::set(max_logit), logs = Vec::set(log_sum);
  if (largest <= 1.0f) {
    double mean = 0.0;
    for (int64_t start = 0; start < columns; start += kSumColumns) {
      const float* s = student + start;
      const float* d = delta + start;
      Vec sum = Vec::set(0.0f);
      const auto add = [&](auto z, auto x) UNISD_INLINE {
        sum = add_product_to(sum, exp((z - shift) - logs), fma(x * x, exp_remainder(x), x));
      };
      for_each_wide(
          at_most(kSumColumns, columns - start),
          [&](int64_t i, auto like) UNISD_INLINE { add(decltype(like)::load(s + i), decltype(like)::load(d + i)); },
          [&](int64_t i, int n) UNISD_INLINE {
            add(Vec::load_part(s + i, n, -kInfinity), Vec::load_part(d + i, n, 0.0f));
          });
      mean += sum_of_lanes(sum);
    }
    const float log_ratio = static_cast<float>(std::log1p(mean));
    return {0.0f, static_cast<float>(std::log1p(mean) + log_sum), log_ratio};
  }
  if (largest == kInfinity) return {kNaN, kNaN, kNaN};
  OnlineSum total;
  for (int64_t start = 0; start < columns; start += kSumColumns) {
    const float* s = student + start;
    const float* d = delta + start;
    add_block(
        at_most(kSumColumns, columns - start),
        [&](int64_t i, auto like) UNISD_INLINE {
          return (decltype(like)::load(s + i) - shift) + decltype(like)::load(d + i);
        },
        [&](int64_t i, int n, float fill) UNISD_INLINE {
          return (Vec::load_part(s + i, n, fill) - shift) + Vec::load_part(d + i, n, 0.0f);
        },
        &total);
  }
  const double log_ratio = static_cast<double>(total.max) + (std::log(total.sum) - log_sum);
  const bool far = total.max > kNear || total.max < -kNear;
  return {total.max, log_of_sum(total.sum), far ? kInfinity : static_cast<float>(log_ratio)};
}

template <bool keep>
inline DivergenceSums sum_row(const DivergenceTile& tile, float* student, const float* teacher, const PairScale& scale,
                              Kept kept) {
  switch (kind_of(tile.beta)) {
    case Kind::kForward:
      return sum_divergence<Kind::kForward, keep>(tile, student, teacher, scale, kept);
    case Kind::kReverse:
      return sum_divergence<Kind::kReverse, keep>(tile, student, teacher, scale, kept);
    case Kind::kMixture:
      return sum_divergence<Kind::kMixture, keep>(tile, student, teacher, scale, kept);
    default:
      return sum_divergence<Kind::kSkewed, keep>(tile, student, teacher, scale, kept);
  }
}

// The first half of a row's statistics: maxima and log-sums, and with a soft cap the logits.
inline void take_log_sums(const DivergenceTile& tile, int64_t n) {
  float* student = tile.student + n * tile.student_stride;
  float* teacher = tile.teacher + n * tile.teacher_stride;
  const auto statistic = [&](DivergenceStatistic which) -> float& { return tile.statistics[which * tile.rows + n]; };
  if (tile.student_tanh_scale != nullptr) apply_softcap(student, tile.columns, *tile.student_tanh_scale);
  if (tile.teacher_tanh_scale != nullptr) apply_softcap(teacher, tile.columns, *tile.teacher_tanh_scale);

  const OnlineSum student_sum = online_sum(student, tile.columns);
  statistic(kStudentMax) = student_sum.max;
  statistic(kStudentLogSum) = log_of_sum(student_sum.sum);
  const TeacherScale teacher_scale =
      is_delta(tile, n) ? scale_of_delta(student, teacher, tile.columns, student_sum.max, statistic(kStudentLogSum))
                        : scale_of_logits(teacher, tile.columns);
  statistic(kTeacherMax) = teacher_scale.max;
  statistic(kTeacherLogSum) = teacher_scale.log_sum;
  statistic(kLogRatio) = teacher_scale.log_ratio;
}

// Returns whether the row's logits are numbers.
template <bool keep>
inline bool take_statistics(const DivergenceTile& tile, int64_t n, Kept kept) {
  float* student = tile.student + n * tile.student_stride;
  float* teacher = tile.teacher + n * tile.teacher_stride;
  const int64_t rows = tile.rows;
  const bool row_is_delta = is_delta(tile, n);
  const auto statistic = [&](DivergenceStatistic which) -> float& { return tile.statistics[which * rows + n]; };
  if (!tile.has_log_sums) take_log_sums(tile, n);
  const float log_sums = statistic(kStudentLogSum) + statistic(kTeacherLogSum);
  if (log_sums != log_sums) {
    // A logit is not finite: nothing this row gives is a number, nor will be its gradient.
    for (int which = 0; which < kDivergenceStatistics; ++which) tile.statistics[which * rows + n] = kNaN;
    return false;
  }

  const PairScale scale(tile, n);
  statistic(kStudentLogprob) = 0.0f;
  statistic(kTeacherLogprob) = 0.0f;
  if (tile.target_ids != nullptr) {
    const int64_t y = tile.target_ids[n];
    const float shifted = student[y] - statistic(kStudentMax);
    const float student_logprob = shifted - statistic(kStudentLogSum);
    const float z_t = row_is_delta ? shifted + teacher[y] : teacher[y];
    statistic(kStudentLogprob) = student_logprob;
    statistic(kTeacherLogprob) = scale.near ? student_logprob + (teacher[y] - statistic(kLogRatio))
                                            : (z_t - statistic(kTeacherMax)) - statistic(kTeacherLogSum);
  }
  const DivergenceSums sums = sum_row<keep>(tile, student, teacher, scale, kept);
  const Kind kind = kind_of(tile.beta);
  const double divergence = kind == Kind::kForward || kind == Kind::kReverse
                                ? sums.first
                                : tile.beta * sums.first + (1.0 - tile.beta) * sums.second;
  // Not negative but for rounding; a NaN stays.
  statistic(kDivergence) = divergence < 0.0 ? 0.0f : static_cast<float>(divergence);
  statistic(kStudentToMixture) = static_cast<float>(sums.second);
  statistic(kStudentEntropy) = static_cast<float>(sums.student_entropy);
  statistic(kTeacherEntropy) = static_cast<float>(sums.teacher_entropy);
  return true;
}

inline void tile_divergence(const DivergenceTile& tile, int64_t n) {
  take_statistics<false>(tile, n, Kept{nullptr, nullptr});
}

// From p_s and r or u of a column.
template <Kind kind>
struct ReverseGradient {
  Vec other, constant;
  ReverseGradient(const DivergenceTile& tile, int64_t n)
      : other(MixtureScale(tile.beta).other),
        constant(PairScale::statistic(tile, kind == Kind::kReverse ? kDivergence : kStudentToMixture, n)) {}
  template <class V>
  V of(V probs, V log) const {
    const V zero = V::set(0.0f);
    if (kind == Kind::kReverse) return zero - probs * (log + constant);
    return (zero - other) * probs * (log + constant);
  }
};

template <Kind kind>
inline void write_gradient(const DivergenceTile& tile, int64_t n) {
  float* student = tile.student + n * tile.student_stride;
  const float* teacher = tile.teacher + n * tile.teacher_stride;
  const PairScale scale(tile, n);
  const MixtureScale mixture_scale(tile.beta);
  const CapSlope slope(tile.student_tanh_scale);
  const ReverseGradient<kind> reverse(tile, n);
  const Vec weight = Vec::set(tile.weight == nullptr ? 1.0f : tile.weight[n]);
  const Vec logprob_weight = Vec::set(tile.logprob_weight == nullptr ? 0.0f : tile.logprob_weight[n]);
  const int64_t target = tile.logprob_weight == nullptr ? -1 : tile.target_ids[n];
  const float target_z = target < 0 ? 0.0f : student[target];

  const auto gradient = [&](auto z_s, auto z_t) UNISD_INLINE {
    const auto p = make_pair(z_s, z_t, scale);
    const auto probs = student_prob(p);
    decltype(z_s) g;
    if (kind == Kind::kForward) {
      g = forward_gradient(p);
    } else if (kind == Kind::kReverse) {
      g = reverse.of(probs, p.r);
    } else {
      g = reverse.of(probs, log_mixture_to_student<kind>(p, make_mixture<kind>(p, mixture_scale)));
    }
    return (g * weight - logprob_weight * probs) * slope.of(z_s);
  };
  const float fill = scale.row_is_delta ? 0.0f : -kInfinity;
  for_each_wide(
      tile.columns,
      [&](int64_t i, auto like) UNISD_INLINE {
        using V = decltype(like);
        gradient(V::load(student + i), V::load(teacher + i)).store(student + i);
      },
      [&](int64_t i, int k) UNISD_INLINE {
        gradient(Vec::load_part(student + i, k, -kInfinity), Vec::load_part(teacher + i, k, fill))
            .store_part(student + i, k);
      });
  if (target >= 0) student[target] += tile.logprob_weight[n] * slope.of(target_z);
}

template <Kind kind>
inline void write_kept_gradient(const DivergenceTile& tile, int64_t n, Kept kept) {
  float* row = tile.student + n * tile.student_stride;
  const CapSlope slope(tile.student_tanh_scale);
  const ReverseGradient<kind> reverse(tile, n);
  const auto gradient = [&](Vec z, Vec probs, Vec log) UNISD_INLINE { return reverse.of(probs, log) * slope.of(z); };
  for_each_vector(
      tile.columns,
      [&](int64_t i) UNISD_INLINE {
        gradient(Vec::load(row + i), Vec::load(kept.probs + i), Vec::load(kept.logs + i)).store(row + i);
      },
      [&](int64_t i, int k) UNISD_INLINE {
        gradient(Vec::load_part(row + i, k, 0.0f), Vec::load_part(kept.probs + i, k, 0.0f),
                 Vec::load_part(kept.logs + i, k, 0.0f))
            .store_part(row + i, k);
      });
}

inline void tile_divergence_and_gradient(const DivergenceTile& tile, int64_t n, float* scratch) {
  const Kept kept{scratch, scratch + tile.columns};
  if (!take_statistics<true>(tile, n, kept)) {
    float* row = tile.student + n * tile.student_stride;
    for (int64_t j = 0; j < tile.columns; ++j) row[j] = kNaN;
    return;
  }
  switch (kind_of(tile.beta)) {
    case Kind::kForward:
      return;
    case Kind::kReverse:
      return write_kept_gradient<Kind::kReverse>(tile, n, kept);
    default:
      return write_kept_gradient<Kind::kMixture>(tile, n, kept);
  }
}

inline void tile_divergence_gradient(const DivergenceTile& tile, int64_t n) {
  switch (kind_of(tile.beta)) {
    case Kind::kForward:
      return write_gradient<Kind::kForward>(tile, n);
    case Kind::kReverse:
      return write_gradient<Kind::kReverse>(tile, n);
    case Kind::kMixture:
      return write_gradient<Kind::kMixture>(tile, n);
    case Kind::kSkewed:
      return write_gradient<Kind::kSkewed>(tile, n);
  }
}

}  // namespace UNISD_ISA
}  // namespace unisd
