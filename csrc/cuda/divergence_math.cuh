// The terms of a divergence at one column, from log p_s and r = log p_t - log p_s.
//
// Every term is non-negative: to each KL a term is added that sums to zero over the vocabulary, sum_j (p - q), so that
// neither the cancellation between columns nor the rounding of the two log-sum-exps enters at first order, and a small
// D keeps its digits. Where r is small, the terms are of second order in r, and series give them without cancellation.
#pragma once

#include <type_traits>

namespace unisd::cuda {

// m = (1 - beta) p_s + beta p_t
enum class Kind {
  kForward,  // beta = 0: KL(p_t || p_s)
  kReverse,  // beta = 1: KL(p_s || p_t)
  kMixture,  // between: beta KL(p_t || m) + (1 - beta) KL(p_s || m)
  kSkewed,   // the same where beta or 1 - beta is below kSmallShare; of its own, so that the others pay nothing for it
};

constexpr float kSmallShare = 1.0f / 16.0f;

// The two shares, each rounded once: 1 - beta has no digits of a beta rounded to float32 that is near one.
struct Shares {
  float teacher, student;  // beta and 1 - beta

  __device__ __forceinline__ explicit Shares(double beta)
      : teacher(static_cast<float>(beta)), student(static_cast<float>(1.0 - beta)) {}
};

struct Column {
  float log_student, log_teacher, ratio;  // ratio: r
  float student, teacher;                 // p_s and p_t
};

// How a row's statistics turn a pair of tile entries into a Column.
struct RowNorm {
  float student_max, student_log_sum, teacher_max, teacher_log_sum;
  float log_ratio;  // kLogRatio (statistics.h)
  bool difference;  // does the teacher's row hold z_t - z_s?

  // p_t comes from its own logarithm, never as p_s e^r, which is 0 * inf where p_s underflows.
  template <bool kDifference>
  __device__ __forceinline__ Column column(float student, float teacher) const {
    Column c;
    c.log_student = (student - student_max) - student_log_sum;
    if (kDifference && log_ratio < INFINITY) {
      c.ratio = teacher - log_ratio;
      c.log_teacher = c.log_student + c.ratio;
    } else {
      const float logit = kDifference && difference ? student + teacher : teacher;
      c.log_teacher = (logit - teacher_max) - teacher_log_sum;
      c.ratio = c.log_teacher - c.log_student;
    }
    c.student = expf(c.log_student);
    c.teacher = expf(c.log_teacher);
    return c;
  }
};

// 0 * infinity is 0 here; a NaN probability stays NaN.
__device__ __forceinline__ float times(float probability, float value) {
  return probability == 0.0f ? 0.0f : probability * value;
}

// (e^r - 1 - r) / r^2 for |r| <= 1: its Taylor series, to below half a unit in the last place.
__device__ __forceinline__ float phi2(float r) {
  float value = 1.0f / 3628800.0f;
  value = fmaf(value, r, 1.0f / 362880.0f);
  value = fmaf(value, r, 1.0f / 40320.0f);
  value = fmaf(value, r, 1.0f / 5040.0f);
  value = fmaf(value, r, 1.0f / 720.0f);
  value = fmaf(value, r, 1.0f / 120.0f);
  value = fmaf(value, r, 1.0f / 24.0f);
  value = fmaf(value, r, 1.0f / 6.0f);
  return fmaf(value, r, 0.5f);
}

// e^r - 1 for |r| <= 1
__device__ __forceinline__ float expm1_small(float r) { return fmaf(r * r, phi2(r), r); }

// x - log(1 + x) for |x| <= 1/2, from log(1 + x) = 2 artanh(s), s = x / (2 + x), and x - 2 s = x s.
__device__ __forceinline__ float minus_log1p_small(float x) {
  const float s = __fdividef(x, 2.0f + x), q = s * s;
  float series = 1.0f / 13.0f;
  series = fmaf(series, q, 1.0f / 11.0f);
  series = fmaf(series, q, 1.0f / 9.0f);
  series = fmaf(series, q, 1.0f / 7.0f);
  series = fmaf(series, q, 1.0f / 5.0f);
  series = fmaf(series, q, 1.0f / 3.0f);
  return s * fmaf(-2.0f * q, series, x);
}

// log(m / max(p_s, p_t)). So u = log(m / p_s) is this plus max(r, 0), and log(m / p_t) = u - r is this minus min(r, 0):
// both finite for every finite r, and the one that matters also where one probability is exactly 0.
__device__ __forceinline__ float log_mixture_share(float r, const Shares& shares) {
  return log1pf((r <= 0.0f ? shares.teacher : shares.student) * expm1f(-fabsf(r)));
}

// log(m / larger) and log(m / smaller) of the larger and the smaller of the two probabilities.
struct MixtureLogs {
  float larger, smaller;
};

// For kSkewed. Let c be the smaller one's share and E = e^-|r| - 1. As m = larger (1 + w) with w = (1 - c) E, the first is
// log(1 + w), or log(c + (1 - c) e^-|r|) where 1 + w would cancel. As m = smaller (1 + x) with x = c (e^|r| - 1), the
// second is log(1 + x), of c's order where c is small; the first plus |r| would be a difference of numbers that are not.
__device__ __forceinline__ MixtureLogs skewed_logs(float r, const Shares& shares) {
  // Finite, so that a share of zero times this is zero.
  const float q = fmaxf(-1e30f, -fabsf(r)), c = r <= 0.0f ? shares.student : shares.teacher;
  const float rest = r <= 0.0f ? shares.teacher : shares.student;
  const float w = rest * expm1f(q);
  MixtureLogs logs;
  // m is at least the smaller probability; computed, it is zero where share and ratio underflow.
  logs.larger = w < -0.5f ? fmaxf(logf(fmaf(rest, expf(q), c)), q) : log1pf(w);
  // Beyond e^80 the log-ratio is all of it but for log(m / larger).
  logs.smaller = c < kSmallShare && q > -80.0f ? log1pf(c * expm1f(-q)) : logs.larger - q;
  return logs;
}

// Adds the column's terms: to `first` those of D, or for a mixture those of KL(p_t || m); then to `second` those of
// KL(p_s || m).
template <Kind kKind>
__device__ __forceinline__ void add_divergence(const Column& c, const Shares& shares, float& first, float& second) {
  const float r = c.ratio;
  if constexpr (kKind == Kind::kForward) {
    // p_t r - (p_t - p_s) = p_s (r e^r - (e^r - 1))
    first += fabsf(r) < 1.0f ? c.student * (r * r * fmaf(r - 1.0f, phi2(r), 1.0f))
                             : times(c.teacher, r) - (c.teacher - c.student);
  } else if constexpr (kKind == Kind::kReverse) {
    // -p_s r + (p_t - p_s) = p_s (e^r - 1 - r)
    first += fabsf(r) < 1.0f ? c.student * (r * r * phi2(r)) : (c.teacher - c.student) - times(c.student, r);
  } else if (fabsf(r) < 0.4f) {
    // With m = p_s (1 + w) = p_t (1 + v): p (x - log(1 + x)). Below 0.4, |w| and |v| are below 1/2.
    const float growth = expm1_small(r);
    first += c.teacher * minus_log1p_small(-shares.student * __fdividef(growth, 1.0f + growth));
    second += c.student * minus_log1p_small(shares.teacher * growth);
  } else {
    const float difference = fabsf(r) < 1.0f ? c.student * expm1_small(r) : c.teacher - c.student;
    if constexpr (kKind == Kind::kMixture) {
      const float share = log_mixture_share(r, shares);
      first += times(c.teacher, fminf(r, 0.0f) - share) - shares.student * difference;
      second += shares.teacher * difference - times(c.student, fmaxf(r, 0.0f) + share);
    } else {
      const MixtureLogs logs = skewed_logs(r, shares);
      first -= times(c.teacher, r > 0.0f ? logs.larger : logs.smaller) + shares.student * difference;
      second += shares.teacher * difference - times(c.student, r > 0.0f ? logs.smaller : logs.larger);
    }
  }
}

// d D / d z_s at this column. `statistic` is D for kReverse and KL(p_s || m) for a mixture.
template <Kind kKind>
__device__ __forceinline__ float divergence_gradient(const Column& c, const Shares& shares, float statistic) {
  if constexpr (kKind == Kind::kForward) {
    return fabsf(c.ratio) < 1.0f ? -c.student * expm1_small(c.ratio) : c.student - c.teacher;
  } else if constexpr (kKind == Kind::kReverse) {
    return -times(c.student, c.ratio + statistic);
  } else if constexpr (kKind == Kind::kMixture) {
    const float u = fmaxf(c.ratio, 0.0f) + log_mixture_share(c.ratio, shares);
    return -shares.student * times(c.student, u + statistic);
  } else {
    const MixtureLogs logs = skewed_logs(c.ratio, shares);
    return -shares.student * times(c.student, (c.ratio > 0.0f ? logs.smaller : logs.larger) + statistic);
  }
}

// Calls launch(kind, difference) with both as compile-time constants.
template <typename Launch>
void dispatch_divergence(double beta, bool with_differences, const Launch& launch) {
  const auto with_kind = [&](auto kind) {
    if (with_differences) {
      launch(kind, std::true_type{});
    } else {
      launch(kind, std::false_type{});
    }
  };
  constexpr double small = kSmallShare;
  if (beta == 0.0) {
    with_kind(std::integral_constant<Kind, Kind::kForward>{});
  } else if (beta == 1.0) {
    with_kind(std::integral_constant<Kind, Kind::kReverse>{});
  } else if (beta < small || 1.0 - beta < small) {
    with_kind(std::integral_constant<Kind, Kind::kSkewed>{});
  } else {
    with_kind(std::integral_constant<Kind, Kind::kMixture>{});
  }
}

}  // namespace unisd::cuda
