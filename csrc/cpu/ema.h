// One moving-average step over a span of one tensor.
#pragma once

#include <cmath>
#include <cstring>

#include "../ema_average.h"
#include "kernels.h"

namespace unisd {
namespace UNISD_ISA {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// A 16-bit number and how it is rounded.
struct BFloat16 {
  uint16_t bits;
  float value() const { return float_of(static_cast<uint32_t>(bits) << 16); }
  static BFloat16 nearest(float x) {
    const uint32_t b = bits_of(x);
    const uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16, nan = (b >> 16) | 0x40u;
    return {static_cast<uint16_t>(x != x ? nan : rounded)};
  }
  static uint32_t stochastic(float x, uint32_t random) { return stochastic_bfloat16(x, random); }
};

struct Float16 {
  uint16_t bits;
  float value() const {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
    const uint32_t exponent = (bits >> 10) & 0x1fu, mantissa = bits & 0x3ffu;
    if (exponent == 0x1fu) return float_of(sign | 0x7f800000u | (mantissa << 13));
    if (exponent != 0) return float_of(sign | ((exponent + 112u) << 23) | (mantissa << 13));
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  static Float16 nearest(float x) {
    const uint32_t b = bits_of(x), sign = (b >> 16) & 0x8000u, magnitude = b & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
    if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
    if (magnitude < 0x38800000u) {
      // Subnormal: adding 0.5 leaves the multiple of 2^-24, rounded to nearest even, in the low bits.
      const uint32_t shifted = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
      return {static_cast<uint16_t>(sign | shifted)};
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
  }
  static uint32_t stochastic(float x, uint32_t random) { return stochastic_float16(x, random); }
};

inline float read(const float* p, int64_t i) { return p[i]; }
inline double read(const double* p, int64_t i) { return p[i]; }
inline float read(const BFloat16* p, int64_t i) { return p[i].value(); }
inline float read(const Float16* p, int64_t i) { return p[i].value(); }

// ema_average.h in the arithmetic of F. The choices are the same for a whole loop, which stays vectorized.
template <class F>
struct Average {
  F factor;
  bool from_student, is_copy;
  explicit Average(double decay)
      : factor(static_cast<F>(ema_average(decay).factor)),
        from_student(ema_average(decay).from_student),
        is_copy(ema_average(decay).is_copy) {}
  UNISD_INLINE F operator()(F teacher, F student) const {
    const F base = from_student ? student : teacher, other = from_student ? teacher : student;
    const F value = base + factor * (other - base);
    return is_copy ? student : value;
  }
};

template <class F, class S>
inline void ema_plain(F* teacher, const S* student, int64_t begin, int64_t end, double decay) {
  const Average<F> average(decay);
  for (int64_t i = begin; i < end; ++i) teacher[i] = average(teacher[i], static_cast<F>(read(student, i)));
}

// No aliasing between them, or the loop is not vectorized.
template <class T, class S>
inline void ema_compensated(T* __restrict teacher, T* __restrict compensation, const S* __restrict student,
                            int64_t begin, int64_t end, double decay) {
  const Average<float> average(decay);
  for (int64_t i = begin; i < end; ++i) {
    const float old = teacher[i].value() + compensation[i].value();
    const float value = average(old, static_cast<float>(read(student, i)));
    const T rounded = T::nearest(value);
    teacher[i].bits = rounded.bits;
    compensation[i].bits = T::nearest(value - rounded.value()).bits;
  }
}

template <class T, class S>
inline void ema_stochastic(T* __restrict teacher, const S* __restrict student, int64_t begin, int64_t end,
                           double decay, RoundingKey key) {
  const Average<float> average(decay);
  for (int64_t i = begin; i < end; ++i) {
    const float value = average(teacher[i].value(), static_cast<float>(read(student, i)));
    teacher[i] = T::nearest(float_of(T::stochastic(value, random_bits(key, static_cast<uint64_t>(i)))));
  }
}

template <class T, class S>
inline void ema_narrow(const EmaTensor& tensor, const S* student, int64_t begin, int64_t end, double decay,
                       bool stochastically) {
  T* teacher = static_cast<T*>(tensor.teacher);
  if (stochastically) {
    ema_stochastic(teacher, student, begin, end, decay, tensor.key);
  } else {
    ema_compensated(teacher, static_cast<T*>(tensor.compensation), student, begin, end, decay);
  }
}

template <class S>
inline void ema_from(const EmaTensor& tensor, const S* student, int64_t begin, int64_t end, double decay,
                     bool stochastically) {
  switch (tensor.teacher_storage) {
    case Storage::kFloat32:
      return ema_plain(static_cast<float*>(tensor.teacher), student, begin, end, decay);
    case Storage::kFloat64:
      return ema_plain(static_cast<double*>(tensor.teacher), student, begin, end, decay);
    case Storage::kBFloat16:
      return ema_narrow<BFloat16>(tensor, student, begin, end, decay, stochastically);
    case Storage::kFloat16:
      return ema_narrow<Float16>(tensor, student, begin, end, decay, stochastically);
  }
}

inline void ema(const EmaTensor& tensor, int64_t begin, int64_t end, double decay, bool stochastically) {
  switch (tensor.student_storage) {
    case Storage::kFloat32:
      return ema_from(tensor, static_cast<const float*>(tensor.student), begin, end, decay, stochastically);
    case Storage::kFloat64:
      return ema_from(tensor, static_cast<const double*>(tensor.student), begin, end, decay, stochastically);
    case Storage::kBFloat16:
      return ema_from(tensor, static_cast<const BFloat16*>(tensor.student), begin, end, decay, stochastically);
    case Storage::kFloat16:
      return ema_from(tensor, static_cast<const Float16*>(tensor.student), begin, end, decay, stochastically);
  }
}

inline void scale_row(const float* row, float scale, int64_t width, void* out, Storage storage) {
  for (int64_t i = 0; i < width; ++i) {
    const float value = row[i] * scale;
    if (storage == Storage::kFloat32) {
      static_cast<float*>(out)[i] = value;
    } else if (storage == Storage::kBFloat16) {
      static_cast<BFloat16*>(out)[i] = BFloat16::nearest(value);
    } else {
      static_cast<Float16*>(out)[i] = Float16::nearest(value);
    }
  }
}

}  // namespace UNISD_ISA
}  // namespace unisd
