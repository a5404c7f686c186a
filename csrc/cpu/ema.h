// The moving average (ema_average.h, ema_rounding.h) over a span of one tensor.
#pragma once

#include "../ema_average.h"
#include "../ema_rounding.h"
#include "half.h"
#include "kernels.h"
#include "vec.h"

namespace unisd {
namespace UNISD_ISA {

// A draw as the bits of a float32 that the 16-bit type holds exactly.
inline uint32_t stochastic(BFloat16, float x, uint32_t random) { return stochastic_bfloat16(x, random); }
inline uint32_t stochastic(Float16, float x, uint32_t random) { return stochastic_float16(x, random); }

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
    const uint32_t random = random_bits(key, static_cast<uint64_t>(i));
    teacher[i] = T::nearest(float_of(stochastic(T(), value, random)));
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

}  // namespace UNISD_ISA
}  // namespace unisd
