// The moving average in every pair of storages, and the bias of its random rounding.
#pragma once

#include "support.h"

namespace check {

constexpr Storage kStorages[] = {Storage::kFloat32, Storage::kBFloat16, Storage::kFloat16, Storage::kFloat64};

void fill(Buffer<unsigned char>* bytes, int64_t size, Storage storage) {
  const double largest = format_of(storage).largest;
  const double special[] = {kInf, -kInf, static_cast<double>(kNan), 0.0, -0.0, largest, -largest,
                            std::ldexp(1.0, format_of(storage).lowest - format_of(storage).fraction)};
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t kind = random_word() % 8;
    double x = normal();
    if (kind == 0) x = special[random_word() % 8];
    if (kind == 1) x = std::ldexp(x, format_of(storage).lowest - static_cast<int>(random_word() % 4));
    if (kind == 2) x = std::ldexp(x, -10);
    encode(bytes->data, i, storage, rounded(x, storage));
  }
}

// Is `ours` what `value` rounds to: to nearest, or to one of its neighbours?
void expect_rounded(const char* what, int64_t i, double ours, double value, Storage storage, bool stochastic,
                    double slack) {
  if (std::isnan(value)) {
    expect(what, i, ours, value, 0.0);
    return;
  }
  const double largest = format_of(storage).largest, magnitude = std::fabs(value);
  if (magnitude > largest || std::isinf(ours)) {
    // The next number after the largest would be `last` further on; infinity stands for it.
    const double last = quantum(largest, storage);
    const double to_infinity = largest + (stochastic ? 0.0 : last / 2) - slack;
    const double to_largest = largest + (stochastic ? last : last / 2) + slack;
    const bool right =
        std::isinf(ours) ? magnitude >= to_infinity : std::fabs(ours) == largest && magnitude <= to_largest;
    if (!right || std::signbit(ours) != std::signbit(value)) report(what, i, ours, value, last);
    return;
  }
  const double q = quantum(value, storage);
  expect(what, i, ours, value, (stochastic ? q * 0.9999999 : q / 2) + slack);
}

// As ema_average.h says, infinities and NaN included.
template <class F>
F averaged(F teacher, F student, double decay) {
  if (decay == 0.0) return student;
  return decay < 0.5 ? student + static_cast<F>(decay) * (teacher - student)
                     : teacher + static_cast<F>(1.0 - decay) * (student - teacher);
}

void check_ema(int64_t size, Storage teacher_storage, Storage student_storage, bool stochastic, double decay) {
  const bool narrow = is_16_bit(teacher_storage);
  const bool compensated = narrow && !stochastic;
  const int64_t element = bytes_of(teacher_storage);
  Buffer<unsigned char> teacher(size * element), student(size * bytes_of(student_storage));
  Buffer<unsigned char> compensation(compensated ? size * element : 0);
  fill(&teacher, size, teacher_storage);
  fill(&student, size, student_storage);
  for (int64_t i = 0; i < size && compensated; ++i) {
    const double t = decode(teacher.data, i, teacher_storage);
    const double half = std::isfinite(t) ? quantum(t, teacher_storage) / 2 : 0.0;
    encode(compensation.data, i, teacher_storage, rounded((uniform() - 0.5) * half, teacher_storage));
  }
  const int64_t begin = size > 20 ? 3 : 0, end = size > 20 ? size - 2 : size;
  std::vector<std::unique_ptr<Buffer<unsigned char>>> results;
  for (const Kernels* k : tables()) {
    isa = k->name;
    results.emplace_back(new Buffer<unsigned char>(teacher.size));
    Buffer<unsigned char>& out = *results.back();
    Buffer<unsigned char> rest(compensation.size);
    std::memcpy(out.data, teacher.data, static_cast<size_t>(teacher.size));
    if (compensated) std::memcpy(rest.data, compensation.data, static_cast<size_t>(rest.size));
    const EmaTensor tensor{out.data,        student.data,    compensated ? rest.data : nullptr,
                           teacher_storage, student_storage, size,
                           rounding_key(12345, 7)};
    k->ema(tensor, begin, end, decay, stochastic);
    const bool same = std::memcmp(out.data, results[0]->data, static_cast<size_t>(out.size)) == 0;
    // But for the bits of a NaN.
    for (int64_t i = 0; i < size && !same; ++i)
      expect("ema, against the first instruction set", i, decode(out.data, i, teacher_storage),
             decode(results[0]->data, i, teacher_storage), 0.0);
    for (int64_t i = 0; i < size; ++i) {
      const double before = decode(teacher.data, i, teacher_storage), ours = decode(out.data, i, teacher_storage);
      if (i < begin || i >= end) {
        expect("ema outside of the span", i, ours, before, 0.0);
        continue;
      }
      const double target = decode(student.data, i, student_storage);
      if (teacher_storage == Storage::kFloat64) {
        const double exact = averaged(before, target, decay);
        const bool finite = std::isfinite(exact) && std::isfinite(before);
        expect("ema float64", i, ours, exact, finite ? 4e-16 * (std::fabs(before) + std::fabs(target)) : 0.0);
        continue;
      }
      // As specified: float32 arithmetic.
      const float old = static_cast<float>(before) +
                        (compensated ? static_cast<float>(decode(compensation.data, i, teacher_storage)) : 0.0f);
      const float value = averaged(old, static_cast<float>(target), decay);
      const auto magnitude = [](float x) { return std::isfinite(x) ? std::fabs(static_cast<double>(x)) : 0.0; };
      const double slack = std::isfinite(value) ? 2e-7 * (magnitude(old) + magnitude(value)) : 0.0;
      if (!narrow) {
        expect("ema float32", i, ours, static_cast<double>(value), slack + 1e-45);
        continue;
      }
      expect_rounded(stochastic ? "ema stochastic" : "ema compensated", i, ours, static_cast<double>(value),
                     teacher_storage, stochastic, slack);
      const double wide = static_cast<double>(value);
      if (stochastic && rounded(wide, teacher_storage) == wide)
        expect("ema stochastic of a number of the format", i, ours, wide, 0.0);
      if (compensated && std::isfinite(value) && std::isfinite(ours)) {
        const double left = static_cast<double>(value) - ours, kept = decode(rest.data, i, teacher_storage);
        expect_rounded("ema compensation", i, kept, left, teacher_storage, false, slack);
      }
    }
  }
}

// Up with the probability of what lies below: over many elements the mean is exact.
void check_stochastic_mean(Storage storage, double at, double fraction) {
  const int64_t size = 40000;
  const double q = quantum(at, storage), value = at + fraction * q;
  Buffer<unsigned char> teacher(size * 2), student(size * 4);
  for (int64_t i = 0; i < size; ++i) {
    encode(teacher.data, i, storage, at);
    encode(student.data, i, Storage::kFloat32, value);
  }
  for (const Kernels* k : tables()) {
    isa = k->name;
    Buffer<unsigned char> out(teacher.size);
    std::memcpy(out.data, teacher.data, static_cast<size_t>(out.size));
    const EmaTensor tensor{out.data, student.data, nullptr, storage, Storage::kFloat32, size, rounding_key(99, 0)};
    k->ema(tensor, 0, size, 0.0, true);
    double mean = 0.0;
    for (int64_t i = 0; i < size; ++i) mean += (decode(out.data, i, storage) - at) / q;
    expect("mean of stochastic rounding", 0, mean / static_cast<double>(size), fraction, 4 * 0.5 / 200.0);
  }
}

}  // namespace check
