// What the checks share: buffers of exact size, random numbers, numbers in every storage, reports, formulas in double.
#pragma once

#include "../../../csrc/cpu/cpu_features.h"
#include "../../../csrc/cpu/kernels.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

namespace check {

using namespace unisd;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

const char* isa = "";
int failures = 0;

// No spare capacity: what lies past the end belongs to the sanitizer.
template <class T>
struct Buffer {
  explicit Buffer(int64_t n, T fill = T()) : size(n), data(new T[static_cast<size_t>(n)]) {
    for (int64_t i = 0; i < n; ++i) data[i] = fill;
  }
  ~Buffer() { delete[] data; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T& operator[](int64_t i) { return data[i]; }
  const T& operator[](int64_t i) const { return data[i]; }
  int64_t size;
  T* data;
};

uint32_t random_state = 1;
uint32_t random_word() {
  random_state = random_state * 1664525u + 1013904223u;
  return mix32(random_state);
}
double uniform() { return random_word() / 4294967296.0; }
// Roughly normal.
double normal() { return (uniform() + uniform() + uniform() + uniform() - 2.0) * 1.7; }

void report(const char* what, int64_t i, double ours, double exact, double allowed) {
  if (++failures <= 40)
    std::printf("%s %s[%lld]: %.9g, exact %.9g, allowed error %.3g\n", isa, what, static_cast<long long>(i), ours,
                exact, allowed);
}

void expect(const char* what, int64_t i, double ours, double exact, double allowed) {
  if (std::isnan(exact) ? std::isnan(ours) : ours == exact || std::fabs(ours - exact) <= allowed) return;
  report(what, i, ours, exact, allowed);
}

// Pairs of 16-bit numbers are no float32 numbers.
void expect_bits(const char* what, int64_t i, float ours, float exact) {
  uint32_t a, b;
  std::memcpy(&a, &ours, sizeof a);
  std::memcpy(&b, &exact, sizeof b);
  if (a != b) report(what, i, a, b, 0.0);
}

// Sums of numbers of order one.
double tolerance(double exact) { return 5e-6 * (std::fabs(exact) > 1.0 ? std::fabs(exact) : 1.0); }
void expect_close(const char* what, int64_t i, double ours, double exact) {
  expect(what, i, ours, exact, tolerance(exact));
}

// Numbers in storage.

// Fraction bits and the smallest exponent of a format.
struct Format {
  int fraction, lowest;
  double largest;
};
Format format_of(Storage storage) {
  if (storage == Storage::kBFloat16) return {7, -126, std::ldexp(255.0, 120)};
  if (storage == Storage::kFloat16) return {10, -14, 65504.0};
  if (storage == Storage::kFloat32) return {23, -126, std::ldexp(16777215.0, 104)};
  return {52, -1022, std::numeric_limits<double>::max()};
}

double quantum(double x, Storage storage) {
  const Format format = format_of(storage);
  int exponent = 0;
  std::frexp(x, &exponent);
  exponent = x == 0.0 || exponent - 1 < format.lowest ? format.lowest : exponent - 1;
  return std::ldexp(1.0, exponent - format.fraction);
}

// To the nearest number of the format, even where two are.
double rounded(double x, Storage storage) {
  if (!std::isfinite(x) || storage == Storage::kFloat64) return x;
  const double q = quantum(x, storage), y = std::nearbyint(x / q) * q;
  return std::fabs(y) > format_of(storage).largest ? std::copysign(kInf, x) : y;
}

double decode(const void* data, int64_t i, Storage storage) {
  const char* p = static_cast<const char*>(data) + i * bytes_of(storage);
  if (storage == Storage::kFloat64) {
    double x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  if (storage == Storage::kFloat32) {
    float x;
    std::memcpy(&x, p, sizeof x);
    return static_cast<double>(x);
  }
  uint16_t bits;
  std::memcpy(&bits, p, sizeof bits);
  const Format format = format_of(storage);
  const int sign = bits >> 15, exponent = (bits & 0x7fff) >> format.fraction;
  const int fraction = bits & ((1 << format.fraction) - 1), special = (1 << (15 - format.fraction)) - 1;
  double x;
  if (exponent == special) {
    x = fraction != 0 ? std::numeric_limits<double>::quiet_NaN() : kInf;
  } else if (exponent == 0) {
    x = std::ldexp(fraction, format.lowest - format.fraction);
  } else {
    x = std::ldexp(fraction + (1 << format.fraction), format.lowest - format.fraction + exponent - 1);
  }
  return sign ? -x : x;
}

// `x` must be a number of the format.
void encode(void* data, int64_t i, Storage storage, double x) {
  char* p = static_cast<char*>(data) + i * bytes_of(storage);
  if (storage == Storage::kFloat64) {
    std::memcpy(p, &x, sizeof x);
    return;
  }
  if (storage == Storage::kFloat32) {
    const float y = static_cast<float>(x);
    std::memcpy(p, &y, sizeof y);
    return;
  }
  const Format format = format_of(storage);
  const int special = (1 << (15 - format.fraction)) - 1;
  uint16_t bits;
  if (std::isnan(x)) {
    bits = static_cast<uint16_t>((special << format.fraction) | (1 << (format.fraction - 1)));
  } else if (std::isinf(x)) {
    bits = static_cast<uint16_t>(special << format.fraction);
  } else {
    // Consecutive numbers have consecutive bits.
    int exponent = 0;
    std::frexp(x, &exponent);
    const int steps = x == 0.0 || exponent - 1 < format.lowest ? 0 : exponent - 1 - format.lowest;
    bits = static_cast<uint16_t>(static_cast<int>(std::fabs(x) / quantum(x, storage)) + (steps << format.fraction));
  }
  if (std::signbit(x)) bits |= 0x8000;
  std::memcpy(p, &bits, sizeof bits);
}

double capped(double x, const float* tanh_scale) {
  return tanh_scale == nullptr ? x : static_cast<double>(*tanh_scale) * std::tanh(x);
}

struct Scores {
  double logsumexp, entropy;
};

template <class Value>
Scores score_of(int64_t begin, int64_t end, const Value& value) {
  double highest = -kInf, sum = 0.0, moment = 0.0;
  for (int64_t j = begin; j < end; ++j) highest = std::fmax(highest, value(j));
  for (int64_t j = begin; j < end; ++j) {
    const double e = std::exp(value(j) - highest);
    sum += e;
    moment += e * (value(j) - highest);
  }
  return {highest + std::log(sum), std::log(sum) - moment / sum};
}

const float kCap = 3.0f;

// The kernels to check: of every instruction set that this processor has, or of the one that CHECK_ONLY names.
std::vector<const Kernels*> tables() {
#if defined(CHECK_ONLY)
  return {&CHECK_ONLY::kernels()};
#else
  std::vector<const Kernels*> found = {&scalar::kernels()};
#if defined(__x86_64__)
  const CpuFeatures has = detect_cpu_features();
  if (has.avx2) found.push_back(&avx2::kernels());
  if (has.avx512) found.push_back(&avx512::kernels());
  if (has.avx512_vnni) found.push_back(&avx512_vnni::kernels());
  if (has.avx512_bf16) found.push_back(&avx512_bf16::kernels());
  // With tiles in software they need no more.
#if defined(UNISD_SOFTWARE_TILES)
  if (has.avx512_bf16) found.push_back(&amx_bf16::kernels());
#else
  if (has.avx512_bf16 && has.amx_bf16 && request_amx()) found.push_back(&amx_bf16::kernels());
#endif
#elif defined(__aarch64__)
  found.push_back(&neon::kernels());
#endif
  return found;
#endif
}

}  // namespace check
