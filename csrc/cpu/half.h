// The two 16-bit formats, to float32 and back. Integer arithmetic: the same bits with every instruction set.
#pragma once

#include <cstdint>
#include <cstring>

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

struct BFloat16 {
  uint16_t bits;
  float value() const { return float_of(static_cast<uint32_t>(bits) << 16); }
  static BFloat16 nearest(float x) {
    const uint32_t b = bits_of(x);
    const uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16, nan = (b >> 16) | 0x40u;
    return {static_cast<uint16_t>(x != x ? nan : rounded)};
  }
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
};

}  // namespace UNISD_ISA
}  // namespace unisd
