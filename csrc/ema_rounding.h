// Rounding of an exponential moving average to 16 bits, the same on every device: bit for bit, and whatever the number
// of threads, because the random bits are a function of (seed, tensor, element) alone. Functions are static: the
// translation units for different instruction sets must not share them.
//
// Stochastic rounding after Gupta et al., arXiv 1502.02551. The integer mixing is the "lowbias32" finalizer found by
// Wellons' hash prospector.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define UNISD_HOST_DEVICE __host__ __device__
#else
#define UNISD_HOST_DEVICE
#endif

namespace unisd {

UNISD_HOST_DEVICE static inline uint32_t mix32(uint32_t x) {
  x ^= x >> 16;
  x *= 0x21f0aaadu;
  x ^= x >> 15;
  x *= 0x735a2d97u;
  x ^= x >> 15;
  return x;
}

// Two keys for one tensor of the update.
struct RoundingKey {
  uint32_t low, high;
};

UNISD_HOST_DEVICE static inline RoundingKey rounding_key(uint64_t seed, uint32_t tensor) {
  return {mix32(static_cast<uint32_t>(seed) ^ mix32(tensor + 0x9e3779b9u)),
          mix32(static_cast<uint32_t>(seed >> 32) + mix32(tensor ^ 0x85ebca6bu))};
}

UNISD_HOST_DEVICE static inline uint32_t random_bits(RoundingKey key, uint64_t element) {
  const uint32_t upper = mix32(static_cast<uint32_t>(element >> 32) ^ key.high);
  return mix32(mix32(static_cast<uint32_t>(element) ^ key.low) + upper);
}

// The bits of `value` (a finite float32's bits) rounded to a multiple of 2^dropped in its last places, up in magnitude
// with the probability of what lies below. Magnitudes carry into the exponent as they should.
UNISD_HOST_DEVICE static inline uint32_t round_bits_stochastically(uint32_t bits, uint32_t random, uint32_t dropped) {
  const uint32_t mask = (1u << dropped) - 1u;
  return (bits + (random & mask)) & ~mask;
}

// A float32 rounded to 16 bits from given random bits, as the bits of a float32 that the 16-bit type holds exactly.

UNISD_HOST_DEVICE static inline uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// A draw that rounds to infinity, which no finite value should: then the nearest decides, which is infinity only for
// magnitudes from `overflow` (half a unit above `largest`) on.
UNISD_HOST_DEVICE static inline uint32_t bounded(uint32_t rounded, uint32_t magnitude, uint32_t largest,
                                                  uint32_t overflow) {
  if (rounded <= largest) return rounded;
  return magnitude < overflow ? largest : 0x7f800000u;
}

UNISD_HOST_DEVICE static inline uint32_t stochastic_bfloat16(float value, uint32_t random) {
  const uint32_t bits = float_bits(value), sign = bits & 0x80000000u, magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x7f800000u) return bits;
  return sign | bounded(round_bits_stochastically(magnitude, random, 16), magnitude, 0x7f7f0000u, 0x7f7f8000u);
}

UNISD_HOST_DEVICE static inline uint32_t stochastic_float16(float value, uint32_t random) {
  const uint32_t bits = float_bits(value), sign = bits & 0x80000000u, magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x7f800000u) return bits;
  if (magnitude >= 0x38800000u) {  // 2^-14, the smallest normal number
    return sign | bounded(round_bits_stochastically(magnitude, random, 13), magnitude, 0x477fe000u, 0x477ff000u);
  }
  // Subnormal numbers are multiples of 2^-24.
  if (magnitude >= 0x33800000u) {  // 2^-24
    return sign | round_bits_stochastically(magnitude, random, 126 - (magnitude >> 23));
  }
  // Below the smallest of them: to it with probability magnitude / 2^-24.
  float small;
  memcpy(&small, &magnitude, sizeof(small));
  const float draw = static_cast<float>(random >> 8) * 0x1p-24f;
  return sign | (draw < small * 0x1p24f ? 0x33800000u : 0u);
}

}  // namespace unisd
