// exp, log and their relatives on `Vec`, and on `Vec2` the same lane for lane. exp and log are within 2 ulp over their whole range (tests/ops/
// test_native_math.py). Polynomials are relative minimax fits in float64, rounded to float32.
#pragma once

#include <limits>

#include "vec.h"

namespace unisd {
namespace UNISD_ISA {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// exp(x): 2^n e^r with |r| <= ln(2)/2, ln 2 in two parts. Overflows to infinity, underflows through the subnormals.
template <class V>
inline UNISD_INLINE V exp(V x) {
  // min and max give their second operand for NaN, so NaN passes.
  x = min(V::set(89.0f), max(V::set(-105.0f), x));
  const V n = round(x * V::set(1.44269504088896341f));
  V r = fma(n, V::set(-0.693359375f), x);
  r = fma(n, V::set(2.12194440e-4f), r);
  V q = V::set(1.390128164e-03f);
  q = fma(q, r, V::set(8.363200352e-03f));
  q = fma(q, r, V::set(4.166685417e-02f));
  q = fma(q, r, V::set(1.666657627e-01f));
  q = fma(q, r, V::set(0.5f));
  return scale_by_power(fma(r * r, q, r) + V::set(1.0f), n);
}

// e^x, e^x - 1 and (e^x - 1 - x) / x^2 for x <= 0 from one polynomial: x = n ln 2 + r, e^r - 1 - r = r^2 q(r), and for
// n = 0 the last is q itself, without cancellation.
template <class V>
struct ExpParts {
  V exp, expm1;
  V remainder;  // (e^x - 1 - x) / x^2 where n = 0
  V n;
};

template <class V>
inline UNISD_INLINE ExpParts<V> exp_parts(V x) {
  const V bounded = max(V::set(-105.0f), x);
  ExpParts<V> parts;
  parts.n = round(bounded * V::set(1.44269504088896341f));
  V r = fma(parts.n, V::set(-0.693359375f), bounded);
  r = fma(parts.n, V::set(2.12194440e-4f), r);
  V q = V::set(1.390128164e-03f);
  q = fma(q, r, V::set(8.363200352e-03f));
  q = fma(q, r, V::set(4.166685417e-02f));
  q = fma(q, r, V::set(1.666657627e-01f));
  parts.remainder = fma(q, r, V::set(0.5f));
  const V low = fma(r * r, parts.remainder, r);  // e^r - 1
  const V power = scale_by_power(V::set(1.0f), parts.n);
  parts.expm1 = fma(power, low, power - V::set(1.0f));
  parts.exp = fma(power, low, power);
  return parts;
}

// (e^x - 1 - x) / x^2 for |x| <= 1.
template <class V>
inline UNISD_INLINE V exp_remainder(V x) {
  V q = V::set(2.772263088e-06f);
  q = fma(q, x, V::set(2.535493695e-05f));
  q = fma(q, x, V::set(1.984402916e-04f));
  q = fma(q, x, V::set(1.388545032e-03f));
  q = fma(q, x, V::set(8.333310485e-03f));
  q = fma(q, x, V::set(4.166673496e-02f));
  q = fma(q, x, V::set(1.666666716e-01f));
  return fma(q, x, V::set(0.5f));
}

template <class V>
inline UNISD_INLINE V expm1(V x) {
  const V bounded = min(V::set(1.0f), max(V::set(-1.0f), x));
  const V small = fma(bounded * bounded, exp_remainder(bounded), bounded);
  return where_less(abs(x), V::set(1.0f), small, exp(x) - V::set(1.0f));
}

// log(x) for every x: NaN below zero, -inf at zero. Cephes' scheme: x = 2^e m with m in [sqrt(1/2), sqrt(2)).
template <class V>
inline UNISD_INLINE V log(V x) {
  const V one = V::set(1.0f);
  const V smallest = V::set(std::numeric_limits<float>::min());
  const V normal = where_less(x, smallest, x * V::set(8388608.0f), x);
  V m, e;
  split(normal, &m, &e);
  e = where_less(x, smallest, e - V::set(23.0f), e);
  const V low = V::set(0.707106781186547524f);
  e = where_less(m, low, e - one, e);
  const V f = where_less(m, low, m + m, m) - one;
  V p = V::set(7.0376836292e-2f);
  p = fma(p, f, V::set(-1.1514610310e-1f));
  p = fma(p, f, V::set(1.1676998740e-1f));
  p = fma(p, f, V::set(-1.2420140846e-1f));
  p = fma(p, f, V::set(1.4249322787e-1f));
  p = fma(p, f, V::set(-1.6668057665e-1f));
  p = fma(p, f, V::set(2.0000714765e-1f));
  p = fma(p, f, V::set(-2.4999993993e-1f));
  p = fma(p, f, V::set(3.3333331174e-1f));
  const V square = f * f;
  V tail = p * f * square;
  tail = fma(e, V::set(-2.12194440e-4f), tail);
  tail = fma(square, V::set(-0.5f), tail);
  V result = fma(e, V::set(0.693359375f), f + tail);
  result = where_less(x, V::set(kInfinity), result, x);  // +inf, and NaN
  result = where_equal(x, V::set(0.0f), V::set(-kInfinity), result);
  return where_less(x, V::set(0.0f), V::set(std::numeric_limits<float>::quiet_NaN()), result);
}

// (w - log(1 + w)) / w^2 for -1/4 <= w <= 0.
template <class V>
inline UNISD_INLINE V log_remainder(V w) {
  V q = V::set(2.955475152e-01f);
  q = fma(q, w, V::set(-7.405737042e-02f));
  q = fma(q, w, V::set(1.793489456e-01f));
  q = fma(q, w, V::set(-1.988381594e-01f));
  q = fma(q, w, V::set(2.500498295e-01f));
  q = fma(q, w, V::set(-3.333325386e-01f));
  return fma(q, w, V::set(0.5f));
}

// tanh(x) = -E / (2 + E), E = expm1(-2 |x|).
template <class V>
inline UNISD_INLINE V tanh(V x) {
  const V e = expm1(V::set(-2.0f) * abs(x));
  const V magnitude = (V::set(0.0f) - e) / (V::set(2.0f) + e);
  return with_sign(abs(magnitude), x);
}

}  // namespace UNISD_ISA
}  // namespace unisd
