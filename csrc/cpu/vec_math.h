// exp, log and their relatives on `Vec`. exp and log are within 2 ulp over their whole range (tests/ops/
// test_native_math.py). Polynomials are relative minimax fits in float64, rounded to float32.
#pragma once

#include <limits>

#include "vec.h"

namespace unisd {
namespace UNISD_ISA {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// exp(x): 2^n e^r with |r| <= ln(2)/2, ln 2 in two parts. Overflows to infinity, underflows through the subnormals.
inline Vec exp(Vec x) {
  // min and max give their second operand for NaN, so NaN passes.
  x = min(Vec::set(89.0f), max(Vec::set(-105.0f), x));
  const Vec n = round(x * Vec::set(1.44269504088896341f));
  Vec r = fma(n, Vec::set(-0.693359375f), x);
  r = fma(n, Vec::set(2.12194440e-4f), r);
  Vec q = Vec::set(1.390128164e-03f);
  q = fma(q, r, Vec::set(8.363200352e-03f));
  q = fma(q, r, Vec::set(4.166685417e-02f));
  q = fma(q, r, Vec::set(1.666657627e-01f));
  q = fma(q, r, Vec::set(0.5f));
  return scale_by_power(fma(r * r, q, r) + Vec::set(1.0f), n);
}

// e^x, e^x - 1 and (e^x - 1 - x) / x^2 for x <= 0 from one polynomial: x = n ln 2 + r, e^r - 1 - r = r^2 q(r), and for
// n = 0 the last is q itself, without cancellation.
struct ExpParts {
  Vec exp, expm1;
  Vec remainder;  // (e^x - 1 - x) / x^2 where n = 0
  Vec n;
};

inline ExpParts exp_parts(Vec x) {
  const Vec bounded = max(Vec::set(-105.0f), x);
  ExpParts parts;
  parts.n = round(bounded * Vec::set(1.44269504088896341f));
  Vec r = fma(parts.n, Vec::set(-0.693359375f), bounded);
  r = fma(parts.n, Vec::set(2.12194440e-4f), r);
  Vec q = Vec::set(1.390128164e-03f);
  q = fma(q, r, Vec::set(8.363200352e-03f));
  q = fma(q, r, Vec::set(4.166685417e-02f));
  q = fma(q, r, Vec::set(1.666657627e-01f));
  parts.remainder = fma(q, r, Vec::set(0.5f));
  const Vec low = fma(r * r, parts.remainder, r);  // e^r - 1
  const Vec power = scale_by_power(Vec::set(1.0f), parts.n);
  parts.expm1 = fma(power, low, power - Vec::set(1.0f));
  parts.exp = fma(power, low, power);
  return parts;
}

// (e^x - 1 - x) / x^2 for |x| <= 1.
inline Vec exp_remainder(Vec x) {
  Vec q = Vec::set(2.772263088e-06f);
  q = fma(q, x, Vec::set(2.535493695e-05f));
  q = fma(q, x, Vec::set(1.984402916e-04f));
  q = fma(q, x, Vec::set(1.388545032e-03f));
  q = fma(q, x, Vec::set(8.333310485e-03f));
  q = fma(q, x, Vec::set(4.166673496e-02f));
  q = fma(q, x, Vec::set(1.666666716e-01f));
  return fma(q, x, Vec::set(0.5f));
}

inline Vec expm1(Vec x) {
  const Vec bounded = min(Vec::set(1.0f), max(Vec::set(-1.0f), x));
  const Vec small = fma(bounded * bounded, exp_remainder(bounded), bounded);
  return where_less(abs(x), Vec::set(1.0f), small, exp(x) - Vec::set(1.0f));
}

// log(x) for every x: NaN below zero, -inf at zero. Cephes' scheme: x = 2^e m with m in [sqrt(1/2), sqrt(2)).
inline Vec log(Vec x) {
  const Vec one = Vec::set(1.0f);
  const Vec smallest = Vec::set(std::numeric_limits<float>::min());
  const Vec normal = where_less(x, smallest, x * Vec::set(8388608.0f), x);
  Vec m, e;
  split(normal, &m, &e);
  e = where_less(x, smallest, e - Vec::set(23.0f), e);
  const Vec low = Vec::set(0.707106781186547524f);
  e = where_less(m, low, e - one, e);
  const Vec f = where_less(m, low, m + m, m) - one;
  Vec p = Vec::set(7.0376836292e-2f);
  p = fma(p, f, Vec::set(-1.1514610310e-1f));
  p = fma(p, f, Vec::set(1.1676998740e-1f));
  p = fma(p, f, Vec::set(-1.2420140846e-1f));
  p = fma(p, f, Vec::set(1.4249322787e-1f));
  p = fma(p, f, Vec::set(-1.6668057665e-1f));
  p = fma(p, f, Vec::set(2.0000714765e-1f));
  p = fma(p, f, Vec::set(-2.4999993993e-1f));
  p = fma(p, f, Vec::set(3.3333331174e-1f));
  const Vec square = f * f;
  Vec tail = p * f * square;
  tail = fma(e, Vec::set(-2.12194440e-4f), tail);
  tail = fma(square, Vec::set(-0.5f), tail);
  Vec result = fma(e, Vec::set(0.693359375f), f + tail);
  result = where_less(x, Vec::set(kInfinity), result, x);  // +inf, and NaN
  result = where_equal(x, Vec::set(0.0f), Vec::set(-kInfinity), result);
  return where_less(x, Vec::set(0.0f), Vec::set(std::numeric_limits<float>::quiet_NaN()), result);
}

// (w - log(1 + w)) / w^2 for -1/4 <= w <= 0.
inline Vec log_remainder(Vec w) {
  Vec q = Vec::set(2.955475152e-01f);
  q = fma(q, w, Vec::set(-7.405737042e-02f));
  q = fma(q, w, Vec::set(1.793489456e-01f));
  q = fma(q, w, Vec::set(-1.988381594e-01f));
  q = fma(q, w, Vec::set(2.500498295e-01f));
  q = fma(q, w, Vec::set(-3.333325386e-01f));
  return fma(q, w, Vec::set(0.5f));
}

// tanh(x) = -E / (2 + E), E = expm1(-2 |x|).
inline Vec tanh(Vec x) {
  const Vec e = expm1(Vec::set(-2.0f) * abs(x));
  const Vec magnitude = (Vec::set(0.0f) - e) / (Vec::set(2.0f) + e);
  return with_sign(abs(magnitude), x);
}

}  // namespace UNISD_ISA
}  // namespace unisd
