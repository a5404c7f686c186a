// Terms of the divergence and of its gradient at one column, from the logits of student and teacher: the mathematics.
//
// With r = log p_t - log p_s, q = -|r| and `larger` the larger of the two probabilities, every term is `larger` times a
// bounded function of q: nothing overflows, and nothing is NaN where both probabilities underflow. To each term is
// added one that sums to zero over the vocabulary (a multiple of p_s - p_t), which makes all terms non-negative and of
// second order in r: a small D keeps its digits, and the rounding of the two log-sum-exps cancels to first order.
//
//   E(q) = e^q - 1,   A(q) = E - q >= 0,   B(q) = q e^q - E >= 0
//   p_t r - (p_t - p_s) = larger * (r > 0 ? A : B)                      summed: KL(p_t || p_s)
//   (p_t - p_s) - p_s r = larger * (r > 0 ? B : A)                      summed: KL(p_s || p_t)
//   with c = (r > 0 ? 1 - beta : beta) and l = log(1 + c E) = log(m / larger):
//   X = c E - l,   Y = e^q (q - l) - (1 - c) E = (1 - c) E^2 + e^q (X - A)
//   p_s log(p_s / m) - p_s + m = larger * (r > 0 ? Y : X)               summed: KL(p_s || m)
//   p_t log(p_t / m) - p_t + m = larger * (r > 0 ? X : Y)               summed: KL(p_t || m)
//
// Where the share 1 - c of the larger probability in Y's own column is next to nothing, Y, which is of its order, is a
// difference of terms that are not, and so is log(m / smaller) = l - q. There both come from the mixture's excess over
// the smaller probability, m = smaller (1 + x) with x = (1 - c) (e^-q - 1) = -(1 - c) E / e^q:
//
//   log(m / smaller) = log(1 + x),   Y = e^q (x - log(1 + x))
//
// The logarithms come in one of three forms; divergence.h chooses, row by row. Always a(j) = log p_s(j) = (z_s(j) -
// max z_s) - log_sum_s and b(j) = log p_t(j) = (z_t(j) - max z_t) - log_sum_t.
//
//   logits   The second tile holds z_t; r = b - a.
//   near     It holds delta = z_t - z_s, from the projection of h_t - h_s, which keeps the digits of a small r:
//            r = delta - L with L = log sum_j p_s(j) e^delta(j); and z_t = (z_s - max z_s) + delta.
//   far      It holds delta, z_t is the same sum, and r = b - a.
//
// Why not b = a + r, and why `far`? Let u = 2^-24 and j a favourite of the teacher that the student finds impossible.
// There a + r is a sum of two numbers of size |r|, and p_t = e^(a + r), which stands before every term of D and should
// sum to one, is off by a factor 1 + u |r|: by 2e-4 at |r| = 5e3, and by any amount at low temperatures. b is relative
// to its own maximum and its own sum, so that p_t sums to one whatever the sizes are. What is left is the rounding of
// z_t, u |z_t - max z_s|, which is of the order of the products' own.
//
// L has the rounding of its largest term, u |M| with M = max z_t - max z_s. An error e of L, the probabilities left as
// they are, changes KL(p_t || p_s) by e G, G = sum_{r > 0} (p_t - p_s) + sum_{r < 0} p_t r. With both of the sums S+-
// = sum_{r > 0, r < 0} (p_t r - p_t + p_s) >= 0 and S+ + S- = D, G = D - S+ = S-: at most D, and at most 1. So D is
// off by u |M| of itself, which |M| <= kNear keeps at a few u. Beyond, the favourites of the two differ by many nats
// (or the teacher's logits are higher throughout, which their products' rounding pays for too): D has no digits to
// lose by r = b - a, whose error u (|a| + |b|) is relative to r where it matters.
#pragma once

#include "kernels.h"
#include "vec_math.h"

namespace unisd {
namespace UNISD_ISA {

// kSkewed: a mixture of which one share is below kSmallShare. Of its own, so that the others pay nothing for it.
enum class Kind { kForward, kReverse, kMixture, kSkewed };

constexpr float kSmallShare = 1.0f / 16.0f;

inline Kind kind_of(double beta) {
  if (beta == 0.0) return Kind::kForward;
  if (beta == 1.0) return Kind::kReverse;
  return beta < static_cast<double>(kSmallShare) || 1.0 - beta < static_cast<double>(kSmallShare) ? Kind::kSkewed
                                                                                                  : Kind::kMixture;
}

// A row of deltas is `near` up to this |M|.
constexpr float kNear = 8.0f;

inline bool is_delta(const DivergenceTile& tile, int64_t n) {
  return tile.teacher_is_delta != nullptr && tile.teacher_is_delta[n];
}

// From the logits of one column to its log-probabilities.
struct PairScale {
  Vec student_max, student_log_sum, teacher_max, teacher_log_sum, log_ratio;
  bool row_is_delta, near;

  PairScale(const DivergenceTile& tile, int64_t n)
      : student_max(statistic(tile, kStudentMax, n)),
        student_log_sum(statistic(tile, kStudentLogSum, n)),
        teacher_max(statistic(tile, kTeacherMax, n)),
        teacher_log_sum(statistic(tile, kTeacherLogSum, n)),
        log_ratio(statistic(tile, kLogRatio, n)),
        row_is_delta(is_delta(tile, n)),
        near(tile.statistics[kLogRatio * tile.rows + n] < kInfinity) {}

  static Vec statistic(const DivergenceTile& tile, DivergenceStatistic which, int64_t n) {
    return Vec::set(tile.statistics[which * tile.rows + n]);
  }
};

template <class V>
struct Pair {
  V student_logprob, teacher_logprob;
  V r, q;           // clamped to be finite
  V larger, ratio;  // the larger probability, and e^q = smaller / larger
  V e;              // E(q)
  V remainder, n;   // (E(q) - q) / q^2 where n = 0, which is for |q| < ln(2) / 2
};

template <class V>
inline UNISD_INLINE Pair<V> make_pair(V student, V teacher, const PairScale& scale) {
  const V zero = V::set(0.0f), bound = V::set(1e30f);
  Pair<V> pair;
  const V shifted = student - scale.student_max;
  const V a = shifted - scale.student_log_sum;
  const V z_t = scale.row_is_delta ? shifted + teacher : teacher;
  const V b = (z_t - scale.teacher_max) - scale.teacher_log_sum;
  V r = scale.near ? teacher - scale.log_ratio : b - a;
  const V higher = max(a, b);
  pair.larger = exp(higher);
  // Where both are zero r does not matter and may be -inf - -inf.
  r = where_equal(pair.larger, zero, zero, r);
  pair.r = max(zero - bound, min(bound, r));
  pair.q = zero - abs(pair.r);
  const ExpParts<V> parts = exp_parts(pair.q);
  pair.ratio = parts.exp;
  pair.e = parts.expm1;
  pair.remainder = parts.remainder;
  pair.n = parts.n;
  pair.student_logprob = a;
  pair.teacher_logprob = b;
  return pair;
}

template <class V>
inline UNISD_INLINE V term_a(const Pair<V>& p) {
  return where_less(p.n, V::set(0.0f), p.e - p.q, p.q * p.q * p.remainder);
}

template <class V>
inline UNISD_INLINE V term_b(const Pair<V>& p) {
  const V small = p.q * p.q * fma(p.q - V::set(1.0f), p.remainder, V::set(1.0f));
  return where_less(p.n, V::set(0.0f), p.q * p.ratio - p.e, small);
}

template <class V>
struct Mixture {
  V x, log_share;  // X, and l = log(m / larger)
  V other_share;   // 1 - c
};

struct MixtureScale {
  Vec beta, other;  // beta and 1 - beta, each rounded once
  explicit MixtureScale(double b)
      : beta(Vec::set(static_cast<float>(b))), other(Vec::set(static_cast<float>(1.0 - b))) {}
};

template <Kind kind, class V>
inline UNISD_INLINE Mixture<V> make_mixture(const Pair<V>& p, const MixtureScale& scale) {
  const V zero = V::set(0.0f);
  const V c = where_less(zero, p.r, scale.other, scale.beta);
  Mixture<V> mixture;
  mixture.other_share = where_less(zero, p.r, scale.beta, scale.other);
  const V w = c * p.e;
  const V limit = V::set(-0.25f);
  const V bounded = max(limit, w);
  const V small_x = bounded * bounded * log_remainder(bounded);
  // 1 + w, without cancellation where c is close to 1 and the ratio to 0.
  V large_log = log(fma(c, p.ratio, mixture.other_share));
  // m is at least the smaller probability; computed, it is zero where share and ratio underflow.
  if (kind == Kind::kSkewed) large_log = max(large_log, p.q);
  mixture.x = where_less(w, limit, w - large_log, small_x);
  mixture.log_share = where_less(w, limit, large_log, bounded - small_x);
  return mixture;
}

// In the second form, whose terms are all of second order.
template <class V>
inline UNISD_INLINE V term_y(const Pair<V>& p, const Mixture<V>& m) {
  return fma(p.ratio, m.x - term_a(p), m.other_share * p.e * p.e);
}

// From the mixture's excess over the smaller probability, for 1 - c < kSmallShare.
template <class V>
struct Excess {
  V log_mixture;  // log(m / smaller)
  V y;
};

template <class V>
inline UNISD_INLINE Excess<V> make_excess(const Pair<V>& p, const Mixture<V>& m) {
  const V zero = V::set(0.0f), one = V::set(1.0f), quarter = V::set(0.25f);
  const V share = m.other_share * p.e;
  const V x = (zero - share) / p.ratio;  // infinite or NaN where the ratio underflows
  // With w = x / (1 + x): log(1 + x) = -log(1 - w) = w + w^2 R and x - log(1 + x) = w (x - w R), R = log_remainder(-w).
  const V w = x / (one + x), bounded = min(w, quarter), weighted = bounded * log_remainder(zero - bounded);
  // Beyond e^80 the log-ratio is all of log(1 + x) but for log(m / larger), and the quotient may overflow.
  const V large = where_less(p.q, V::set(-80.0f), m.log_share - p.q, log(one + x));
  Excess<V> excess;
  excess.log_mixture = where_less(w, quarter, fma(bounded, weighted, bounded), large);
  excess.y = where_less(w, quarter, p.ratio * bounded * (x - weighted), (zero - share) - p.ratio * large);
  return excess;
}

template <Kind kind, class V>
inline UNISD_INLINE V mixture_y(const Pair<V>& p, const Mixture<V>& m) {
  const V y = term_y(p, m);
  return kind == Kind::kSkewed ? where_less(m.other_share, V::set(kSmallShare), make_excess(p, m).y, y) : y;
}

// u = log(m / p_s): l for r <= 0; and for r > 0, where l is log(m / p_t), l + r.
template <Kind kind, class V>
inline UNISD_INLINE V log_mixture_to_student(const Pair<V>& p, const Mixture<V>& m) {
  const V zero = V::set(0.0f), u = m.log_share + max(p.r, zero);
  if (kind != Kind::kSkewed) return u;
  const V risen = where_less(m.other_share, V::set(kSmallShare), make_excess(p, m).log_mixture, u);
  return where_less(zero, p.r, risen, u);
}

template <class V>
inline UNISD_INLINE V student_prob(const Pair<V>& p) { return where_less(V::set(0.0f), p.r, p.larger * p.ratio, p.larger); }
template <class V>
inline UNISD_INLINE V teacher_prob(const Pair<V>& p) { return where_less(V::set(0.0f), p.r, p.larger, p.larger * p.ratio); }

}  // namespace UNISD_ISA
}  // namespace unisd
