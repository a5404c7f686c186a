// A float vector for several instruction sets behind one interface. A translation unit picks one by defining
// UNISD_ISA_AVX512, UNISD_ISA_AVX2, UNISD_ISA_NEON or none (scalar) and, for the first two, a target pragma before it
// includes this (isa_*.cpp). UNISD_ISA names the set and is the namespace, so that no inline function is shared between sets.
//
// Kernels are written once against `Vec`; what differs is the width.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "half.h"

// For the bodies of loops: as calls they would keep accumulators in memory.
#define UNISD_INLINE __attribute__((always_inline))

namespace unisd {
namespace UNISD_ISA {

#if defined(UNISD_ISA_AVX512)

struct Vec {
  __m512 v;
  static constexpr int width = 16;
  static Vec set(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  // The first n lanes; the others get `fill`.
  static Vec load_part(const float* p, int n, float fill) {
    return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), static_cast<__mmask16>((1u << n) - 1), p)};
  }
  static Vec load_bf16(const uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  static Vec load_fp16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  // Past the cache, to an aligned address; order_streams() before another thread reads.
  void stream(float* p) const { _mm512_stream_ps(p, v); }
  void store_part(float* p, int n) const { _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v); }
};
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// Where one operand is NaN these give the second.
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec abs(Vec a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff)))};
}
// `magnitude` (not negative) with the sign of `sign`.
inline Vec with_sign(Vec magnitude, Vec sign) {
  const __m512i bit = _mm512_and_si512(_mm512_castps_si512(sign.v), _mm512_set1_epi32(static_cast<int>(0x80000000u)));
  return {_mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(magnitude.v), bit))};
}
// a < b ? yes : no; false where one is NaN.
inline Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
inline Vec where_equal(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ), no.v, yes.v)};
}
// Bit i: is lane i of a less than that of b?
inline uint32_t lanes_less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
// x * 2^n for integral n in [-252, 254].
inline Vec scale_by_power(Vec x, Vec n) { return {_mm512_scalef_ps(x.v, n.v)}; }
// Mantissa in [0.5, 1) and exponent of a positive normal number.
inline void split(Vec x, Vec* mantissa, Vec* exponent) {
  const __m512i bits = _mm512_castps_si512(x.v);
  exponent->v = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_srli_epi32(bits, 23), _mm512_set1_epi32(126)));
  mantissa->v = _mm512_castsi512_ps(
      _mm512_or_si512(_mm512_and_si512(bits, _mm512_set1_epi32(0x007fffff)), _mm512_set1_epi32(0x3f000000)));
}
// Element j of rows[i] and element i of rows[j] change places.
inline void transpose(Vec rows[16]) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a[i]), _mm512_castps_pd(a[i + 2])));
    b[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a[i]), _mm512_castps_pd(a[i + 2])));
    b[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a[i + 1]), _mm512_castps_pd(a[i + 3])));
    b[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a[i + 1]), _mm512_castps_pd(a[i + 3])));
  }
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_f32x4(b[i], b[4 + i], 0x88);
    a[4 + i] = _mm512_shuffle_f32x4(b[i], b[4 + i], 0xdd);
    a[8 + i] = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0x88);
    a[12 + i] = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i].v = _mm512_shuffle_f32x4(a[i], a[8 + i], 0x88);
    rows[8 + i].v = _mm512_shuffle_f32x4(a[i], a[8 + i], 0xdd);
    rows[4 + i].v = _mm512_shuffle_f32x4(a[4 + i], a[12 + i], 0x88);
    rows[12 + i].v = _mm512_shuffle_f32x4(a[4 + i], a[12 + i], 0xdd);
  }
}

#elif defined(UNISD_ISA_AVX2)

struct Vec {
  __m256 v;
  static constexpr int width = 8;
  static Vec set(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load_part(const float* p, int n, float fill) {
    alignas(32) float lanes[8];
    for (int i = 0; i < 8; ++i) lanes[i] = i < n ? p[i] : fill;
    return {_mm256_load_ps(lanes)};
  }
  static Vec load_bf16(const uint16_t* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
  }
  static Vec load_fp16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void stream(float* p) const { _mm256_stream_ps(p, v); }
  void store_part(float* p, int n) const {
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, v);
    for (int i = 0; i < n; ++i) p[i] = lanes[i];
  }
};
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline Vec with_sign(Vec magnitude, Vec sign) {
  return {_mm256_or_ps(magnitude.v, _mm256_and_ps(_mm256_set1_ps(-0.0f), sign.v))};
}
inline Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
inline Vec where_equal(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ))};
}
inline uint32_t lanes_less(Vec a, Vec b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)));
}
inline Vec scale_by_power(Vec x, Vec n) {
  // In two halves, so that each factor is a normal number.
  const __m256i total = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(total, 1);
  const __m256i rest = _mm256_sub_epi32(total, half);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 a = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 b = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(x.v, a), b)};
}
inline void split(Vec x, Vec* mantissa, Vec* exponent) {
  const __m256i bits = _mm256_castps_si256(x.v);
  exponent->v = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(bits, 23), _mm256_set1_epi32(126)));
  mantissa->v = _mm256_castsi256_ps(
      _mm256_or_si256(_mm256_and_si256(bits, _mm256_set1_epi32(0x007fffff)), _mm256_set1_epi32(0x3f000000)));
}
inline void transpose(Vec rows[8]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
    a[i + 1] = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i].v = _mm256_permute2f128_ps(b[i], b[4 + i], 0x20);
    rows[4 + i].v = _mm256_permute2f128_ps(b[i], b[4 + i], 0x31);
  }
}

#elif defined(UNISD_ISA_NEON)

struct Vec {
  float32x4_t v;
  static constexpr int width = 4;
  static Vec set(float x) { return {vdupq_n_f32(x)}; }
  static Vec load(const float* p) { return {vld1q_f32(p)}; }
  static Vec load_part(const float* p, int n, float fill) {
    float lanes[4];
    for (int i = 0; i < 4; ++i) lanes[i] = i < n ? p[i] : fill;
    return {vld1q_f32(lanes)};
  }
  static Vec load_bf16(const uint16_t* p) { return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16))}; }
  static Vec load_fp16(const uint16_t* p) { return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)))}; }
  void store(float* p) const { vst1q_f32(p, v); }
  void stream(float* p) const { vst1q_f32(p, v); }
  void store_part(float* p, int n) const {
    float lanes[4];
    vst1q_f32(lanes, v);
    for (int i = 0; i < n; ++i) p[i] = lanes[i];
  }
};
inline Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
// Not vmaxq_f32, which gives NaN where either is NaN.
inline Vec max(Vec a, Vec b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
inline Vec round(Vec a) { return {vrndnq_f32(a.v)}; }
inline Vec abs(Vec a) { return {vabsq_f32(a.v)}; }
inline Vec with_sign(Vec magnitude, Vec sign) { return {vbslq_f32(vdupq_n_u32(0x80000000u), sign.v, magnitude.v)}; }
inline Vec where_less(Vec a, Vec b, Vec yes, Vec no) { return {vbslq_f32(vcltq_f32(a.v, b.v), yes.v, no.v)}; }
inline Vec where_equal(Vec a, Vec b, Vec yes, Vec no) { return {vbslq_f32(vceqq_f32(a.v, b.v), yes.v, no.v)}; }
inline uint32_t lanes_less(Vec a, Vec b) {
  const uint32x4_t less = vcltq_f32(a.v, b.v), bits = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32(less, bits));
}
inline Vec scale_by_power(Vec x, Vec n) {
  // In two halves, as AVX2's; NaN has become 0, and NaN is then what x is.
  const int32x4_t total = vcvtnq_s32_f32(n.v), half = vshrq_n_s32(total, 1), bias = vdupq_n_s32(127);
  const float32x4_t a = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(half, bias), 23));
  const float32x4_t b = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vsubq_s32(total, half), bias), 23));
  return {vmulq_f32(vmulq_f32(x.v, a), b)};
}
inline void split(Vec x, Vec* mantissa, Vec* exponent) {
  const uint32x4_t bits = vreinterpretq_u32_f32(x.v);
  exponent->v = vcvtq_f32_s32(vsubq_s32(vreinterpretq_s32_u32(vshrq_n_u32(bits, 23)), vdupq_n_s32(126)));
  mantissa->v = vreinterpretq_f32_u32(vorrq_u32(vandq_u32(bits, vdupq_n_u32(0x007fffff)), vdupq_n_u32(0x3f000000)));
}
inline void transpose(Vec rows[4]) {
  const auto low = [](float32x4_t a, float32x4_t b) { return vcombine_f32(vget_low_f32(a), vget_low_f32(b)); };
  const auto high = [](float32x4_t a, float32x4_t b) { return vcombine_f32(vget_high_f32(a), vget_high_f32(b)); };
  const float32x4x2_t a = vtrnq_f32(rows[0].v, rows[1].v), b = vtrnq_f32(rows[2].v, rows[3].v);
  rows[0].v = low(a.val[0], b.val[0]);
  rows[1].v = low(a.val[1], b.val[1]);
  rows[2].v = high(a.val[0], b.val[0]);
  rows[3].v = high(a.val[1], b.val[1]);
}

#else

struct Vec {
  float v;
  static constexpr int width = 1;
  static Vec set(float x) { return {x}; }
  static Vec load(const float* p) { return {*p}; }
  static Vec load_part(const float* p, int n, float fill) { return {n > 0 ? *p : fill}; }
  static Vec load_bf16(const uint16_t* p) { return {BFloat16{*p}.value()}; }
  static Vec load_fp16(const uint16_t* p) { return {Float16{*p}.value()}; }
  void store(float* p) const { *p = v; }
  void stream(float* p) const { *p = v; }
  void store_part(float* p, int n) const {
    if (n > 0) *p = v;
  }
};
inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
// Rounded twice: without a hardware instruction std::fma is a slow function call.
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
inline Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
inline Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
inline Vec round(Vec a) { return {std::nearbyint(a.v)}; }
inline Vec abs(Vec a) { return {std::fabs(a.v)}; }
inline Vec with_sign(Vec magnitude, Vec sign) { return {std::copysign(magnitude.v, sign.v)}; }
inline Vec where_less(Vec a, Vec b, Vec yes, Vec no) { return a.v < b.v ? yes : no; }
inline Vec where_equal(Vec a, Vec b, Vec yes, Vec no) { return a.v == b.v ? yes : no; }
inline uint32_t lanes_less(Vec a, Vec b) { return a.v < b.v ? 1 : 0; }
inline Vec scale_by_power(Vec x, Vec n) {
  // NaN has no integer.
  return {n.v == n.v ? std::ldexp(x.v, static_cast<int>(n.v)) : n.v};
}
inline void split(Vec x, Vec* mantissa, Vec* exponent) {
  int e = 0;
  mantissa->v = std::frexp(x.v, &e);
  exponent->v = static_cast<float>(e);
}
inline void transpose(Vec*) {}

#endif

#if defined(UNISD_ISA_AVX512) || defined(UNISD_ISA_AVX2)
inline void order_streams() { _mm_sfence(); }
#else
inline void order_streams() {}
#endif

inline float sum_of_lanes(Vec a) {
  float lanes[Vec::width];
  a.store(lanes);
  float total = 0.0f;
  for (int i = 0; i < Vec::width; ++i) total += lanes[i];
  return total;
}

inline float max_of_lanes(Vec a) {
  float lanes[Vec::width];
  a.store(lanes);
  float best = lanes[0];
  for (int i = 1; i < Vec::width; ++i) best = lanes[i] > best ? lanes[i] : best;
  return best;
}

// Two vectors, of which every operation does the first and then the second, so that there is always one that does not wait
// for the result of the last: what is done to a column of logits is one long chain, and a processor looks some hundred
// instructions ahead. Lane for lane what Vec gives.
struct Vec2 {
  Vec low, high;
  static constexpr int width = 2 * Vec::width;
  Vec2() = default;
  UNISD_INLINE Vec2(Vec a, Vec b) : low(a), high(b) {}
  UNISD_INLINE Vec2(Vec both) : low(both), high(both) {}
  static UNISD_INLINE Vec2 set(float x) { return {Vec::set(x)}; }
  static UNISD_INLINE Vec2 load(const float* p) { return {Vec::load(p), Vec::load(p + Vec::width)}; }
  UNISD_INLINE void store(float* p) const {
    low.store(p);
    high.store(p + Vec::width);
  }
  // Not templates: a Vec beside a Vec2 is meant for both.
  friend UNISD_INLINE Vec2 operator+(Vec2 a, Vec2 b) { return {a.low + b.low, a.high + b.high}; }
  friend UNISD_INLINE Vec2 operator-(Vec2 a, Vec2 b) { return {a.low - b.low, a.high - b.high}; }
  friend UNISD_INLINE Vec2 operator*(Vec2 a, Vec2 b) { return {a.low * b.low, a.high * b.high}; }
  friend UNISD_INLINE Vec2 operator/(Vec2 a, Vec2 b) { return {a.low / b.low, a.high / b.high}; }
  friend UNISD_INLINE Vec2 fma(Vec2 a, Vec2 b, Vec2 c) { return {fma(a.low, b.low, c.low), fma(a.high, b.high, c.high)}; }
  friend UNISD_INLINE Vec2 max(Vec2 a, Vec2 b) { return {max(a.low, b.low), max(a.high, b.high)}; }
  friend UNISD_INLINE Vec2 min(Vec2 a, Vec2 b) { return {min(a.low, b.low), min(a.high, b.high)}; }
  friend UNISD_INLINE Vec2 round(Vec2 a) { return {round(a.low), round(a.high)}; }
  friend UNISD_INLINE Vec2 abs(Vec2 a) { return {abs(a.low), abs(a.high)}; }
  friend UNISD_INLINE Vec2 where_less(Vec2 a, Vec2 b, Vec2 yes, Vec2 no) {
    return {where_less(a.low, b.low, yes.low, no.low), where_less(a.high, b.high, yes.high, no.high)};
  }
  friend UNISD_INLINE Vec2 where_equal(Vec2 a, Vec2 b, Vec2 yes, Vec2 no) {
    return {where_equal(a.low, b.low, yes.low, no.low), where_equal(a.high, b.high, yes.high, no.high)};
  }
  friend UNISD_INLINE Vec2 scale_by_power(Vec2 x, Vec2 n) { return {scale_by_power(x.low, n.low), scale_by_power(x.high, n.high)}; }
  friend UNISD_INLINE void split(Vec2 x, Vec2* mantissa, Vec2* exponent) {
    split(x.low, &mantissa->low, &exponent->low);
    split(x.high, &mantissa->high, &exponent->high);
  }
};

// Sums over columns, in their order: sum + a, and sum + a * b rounded once.
inline UNISD_INLINE Vec add_to(Vec sum, Vec a) { return sum + a; }
inline UNISD_INLINE Vec add_to(Vec sum, Vec2 a) { return (sum + a.low) + a.high; }
inline UNISD_INLINE Vec add_product_to(Vec sum, Vec a, Vec b) { return fma(a, b, sum); }
inline UNISD_INLINE Vec add_product_to(Vec sum, Vec2 a, Vec2 b) { return fma(a.high, b.high, fma(a.low, b.low, sum)); }

inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// Call whole(position) or part(position, lanes) over [0, n): whole vectors, then what is left.
template <class Whole, class Part>
inline UNISD_INLINE void for_each_vector(int64_t n, const Whole& whole, const Part& part) {
  int64_t i = 0;
  for (; i + Vec::width <= n; i += Vec::width) whole(i);
  if (i < n) part(i, static_cast<int>(n - i));
}

#if defined(UNISD_ISA_AVX512) || defined(UNISD_ISA_NEON)
constexpr bool kTwoAtATime = true;
#else
constexpr bool kTwoAtATime = false;  // sixteen registers, or a compiler's own
#endif

// The same with whole(position, Vec2()) for two vectors at a time where there are registers for it, and whole(position,
// Vec()) for a single one; the second argument says what to load.
template <class Whole, class Part>
inline UNISD_INLINE void for_each_wide(int64_t n, const Whole& whole, const Part& part) {
  int64_t i = 0;
  if (kTwoAtATime) {
    for (; i + Vec2::width <= n; i += Vec2::width) whole(i, Vec2());
  }
  for (; i + Vec::width <= n; i += Vec::width) whole(i, Vec());
  if (i < n) part(i, static_cast<int>(n - i));
}

}  // namespace UNISD_ISA
}  // namespace unisd
