// Every kernel of every instruction set this processor has, on heap buffers that are exactly as long as they must be,
// against plain loops in double. Built with the sanitizers and run by test_sanitizers.py; needs no torch.
//
// Prints what differs and exits with 1, or prints one line for each instruction set and exits with 0.
#include "../../csrc/cpu/kernels.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

namespace {

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

// Sums of numbers of order one.
double tolerance(double exact) { return 5e-6 * (std::fabs(exact) > 1.0 ? std::fabs(exact) : 1.0); }
void expect_close(const char* what, int64_t i, double ours, double exact) { expect(what, i, ours, exact, tolerance(exact)); }

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

// A matrix with contiguous rows that ends with its last element.
struct Operand {
  Operand(int64_t rows, int64_t width, int64_t padding, Storage storage, double scale)
      : stride(width + padding),
        bytes((rows == 0 ? 0 : (rows - 1) * stride + width) * bytes_of(storage)),
        values(rows * width),
        storage(storage) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < width; ++j) {
        const double x = rounded(scale * normal(), storage);
        encode(bytes.data, i * stride + j, storage, x);
        values[i * width + j] = x;
      }
    }
  }
  Matrix matrix() const { return {bytes.data, stride, storage}; }
  int64_t stride;
  Buffer<unsigned char> bytes;
  Buffer<double> values;  // without the padding
  Storage storage;
};

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

// Products.

std::vector<const Kernels*> tables() {
  std::vector<const Kernels*> found = {&scalar::kernels()};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2) found.push_back(&avx2::kernels());
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    found.push_back(&avx512::kernels());
#endif
  return found;
}

struct Aligned {
  explicit Aligned(int64_t n) : data(static_cast<float*>(::operator new(static_cast<size_t>(n) * 4, std::align_val_t(64)))) {}
  ~Aligned() { ::operator delete(data, std::align_val_t(64)); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  float* data;
};

void check_products(int64_t rows, int64_t columns, int64_t width, Storage storage, int variant) {
  const int64_t padding = variant % 3;
  const double scale_of_weight = 2.0 / std::sqrt(static_cast<double>(width));
  const Operand hidden(rows, width, padding, storage, 1.0), weight(columns, width, padding, storage, scale_of_weight);
  const bool with_bias = variant % 2 == 0;
  Buffer<float> bias(with_bias ? columns : 0);
  for (int64_t j = 0; j < bias.size; ++j) bias[j] = static_cast<float>(normal());
  const float* offsets = with_bias ? bias.data : nullptr;
  const float scale = variant % 5 == 0 ? -1.5f : 0.75f;
  const float* tanh_scale = variant % 4 == 3 ? &kCap : nullptr;
  const int64_t middle = variant % 2 == 0 ? columns / 2 : 0;

  Buffer<double> exact(rows * columns);
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t j = 0; j < columns; ++j) {
      const double* a = hidden.values.data + n * width;
      const double* b = weight.values.data + j * width;
      double sum = with_bias ? static_cast<double>(bias[j]) : 0.0;
      for (int64_t k = 0; k < width; ++k) sum += a[k] * b[k];
      exact[n * columns + j] = sum * static_cast<double>(scale);
    }
  }
  Buffer<int64_t> ids(rows);
  for (int64_t n = 0; n < rows; ++n) ids[n] = n == 0 ? columns - 1 : random_word() % static_cast<uint32_t>(columns);

  const int64_t gradient_stride = columns + 1;
  Buffer<float> gradient((rows - 1) * gradient_stride + columns);
  for (int64_t i = 0; i < gradient.size; ++i) gradient[i] = static_cast<float>(normal());
  Buffer<double> exact_back(rows * width);
  for (int64_t n = 0; n < rows; ++n) {
    double* out = exact_back.data + n * width;
    for (int64_t j = 0; j < columns; ++j) {
      const double g = static_cast<double>(gradient[n * gradient_stride + j]);
      for (int64_t k = 0; k < width; ++k) out[k] += g * weight.values[j * width + k];
    }
  }

  for (const Kernels* k : tables()) {
    isa = k->name;
    Buffer<float> packed(k->packed_size(rows, width), kNan), by_panel(k->packed_size(rows, width), kNan);
    k->pack_rows(hidden.matrix(), rows, width, packed.data);
    for (int64_t first = 0; first < rows; first += k->panel_rows) {
      Matrix part = hidden.matrix();
      part.data = static_cast<const char*>(part.data) + first * part.stride * bytes_of(storage);
      const int64_t left = rows - first;
      k->pack_rows(part, left < k->panel_rows ? left : k->panel_rows, width, by_panel.data + first * width);
    }
    for (int64_t i = 0; i < packed.size; ++i)
      expect("pack_rows", i, static_cast<double>(by_panel[i]), static_cast<double>(packed[i]), 0.0);
    const PackedRows panels{packed.data, rows, width};

    const int64_t stride = columns + padding;
    Buffer<float> out((rows - 1) * stride + columns, kNan);
    k->logits(panels, weight.matrix(), offsets, scale, middle, columns, out.data, stride);
    if (middle > 0) k->logits(panels, weight.matrix(), offsets, scale, 0, middle, out.data, stride);
    for (int64_t n = 0; n < rows; ++n) {
      for (int64_t j = 0; j < stride && n * stride + j < out.size; ++j) {
        const double value = static_cast<double>(out[n * stride + j]);
        if (j < columns) {
          expect_close("logits", n * stride + j, value, exact[n * columns + j]);
        } else if (!std::isnan(value)) {
          report("logits' padding", n * stride + j, value, 0.0, 0.0);
        }
      }
    }

    for (int part = 0; part < 2; ++part) {
      const int64_t begin = part == 0 ? 0 : middle, end = part == 0 ? middle : columns;
      if (begin == end) continue;
      const bool want_entropy = variant % 3 != 0;
      Buffer<float> partial(kPartialScores * rows, kNan);
      k->score(panels, weight.matrix(), offsets, scale, tanh_scale, ids.data, want_entropy, begin, end, partial.data);
      for (int64_t n = 0; n < rows; ++n) {
        const auto value = [&](int64_t j) { return capped(exact[n * columns + j], tanh_scale); };
        const Scores scores = score_of(begin, end, value);
        const auto part = [&](PartialScore which) { return static_cast<double>(partial[which * rows + n]); };
        const double log_sum = std::log(part(kPartSum));
        expect_close("score: logsumexp", n, part(kPartMax) + log_sum, scores.logsumexp);
        if (want_entropy)
          expect("score: entropy", n, log_sum - part(kPartMoment) / part(kPartSum), scores.entropy,
                 4 * tolerance(scores.entropy));
        const bool inside = ids[n] >= begin && ids[n] < end;
        expect_close("score: target", n, part(kPartTarget),
                     inside ? value(ids[n]) : static_cast<double>(kNan));
      }
    }

    const int64_t back_stride = width + padding, cut = width > 48 ? 48 : 0;
    Buffer<float> back((rows - 1) * back_stride + width, kNan);
    k->backward(gradient.data, gradient_stride, rows, columns, weight.matrix(), cut, width, back.data, back_stride);
    if (cut > 0)
      k->backward(gradient.data, gradient_stride, rows, columns, weight.matrix(), 0, cut, back.data, back_stride);
    for (int64_t n = 0; n < rows; ++n) {
      for (int64_t h = 0; h < back_stride && n * back_stride + h < back.size; ++h) {
        const double value = static_cast<double>(back[n * back_stride + h]);
        if (h < width) {
          // A sum of as many terms.
          const double allowed = 2e-6 * std::sqrt(static_cast<double>(columns)) * scale_of_weight + tolerance(0.0);
          expect("backward", n * back_stride + h, value, exact_back[n * width + h], 4 * allowed);
        } else if (!std::isnan(value)) {
          report("backward's padding", n * back_stride + h, value, 0.0, 0.0);
        }
      }
    }
    // Nothing to sum over.
    k->backward(gradient.data, gradient_stride, rows, 0, weight.matrix(), 0, width, back.data, back_stride);
    for (int64_t h = 0; h < width; ++h) expect("backward of nothing", h, static_cast<double>(back[h]), 0.0, 0.0);
  }
}

// Stores past the cache: a large tile on a cache line whose rows are whole cache lines.
void check_streamed_logits() {
  const int64_t rows = 49, columns = 21403, stride = 21408;
  const Operand hidden(rows, 1, 0, Storage::kFloat32, 1.0), weight(columns, 1, 0, Storage::kFloat32, 1.0);
  for (const Kernels* k : tables()) {
    isa = k->name;
    Buffer<float> packed(k->packed_size(rows, 1));
    k->pack_rows(hidden.matrix(), rows, 1, packed.data);
    const int64_t size = rows * stride;
    Aligned out(size);
    for (int64_t i = 0; i < size; ++i) out.data[i] = kNan;
    for (int64_t begin = 0; begin < columns; begin += 512)
      k->logits({packed.data, rows, 1}, weight.matrix(), nullptr, 1.0f, begin,
                begin + 512 < columns ? begin + 512 : columns, out.data, stride);
    for (int64_t n = 0; n < rows; ++n) {
      for (int64_t j = 0; j < stride; ++j) {
        const double exact = j < columns ? hidden.values[n] * weight.values[j] : static_cast<double>(kNan);
        expect_close("streamed logits", n * stride + j, static_cast<double>(out.data[n * stride + j]), exact);
      }
    }
  }
}

void check_sum_rows(int64_t width) {
  const int64_t parts = 5, stride = width + 3;
  Buffer<float> part((parts - 1) * stride + width);
  for (int64_t i = 0; i < part.size; ++i) part[i] = static_cast<float>(normal());
  for (const Kernels* k : tables()) {
    isa = k->name;
    Buffer<float> out(width);
    k->sum_rows(part.data, stride, parts, width, 0.5f, out.data);
    for (int64_t h = 0; h < width; ++h) {
      double exact = 0.0;
      for (int64_t i = 0; i < parts; ++i) exact += 0.5 * static_cast<double>(part[i * stride + h]);
      expect_close("sum_rows", h, static_cast<double>(out[h]), exact);
    }
  }
}

// Backend.

struct Tile {
  Tile(int64_t rows, int64_t columns, int64_t padding, double scale)
      : rows(rows), columns(columns), stride(columns + padding), data((rows - 1) * stride + columns, kNan) {
    for (int64_t n = 0; n < rows; ++n)
      for (int64_t j = 0; j < columns; ++j)
        data[n * stride + j] = static_cast<float>(scale * (normal() + (j == columns - 1 ? 1.0 : 0.0)));
  }
  Tile(const Tile& other) : rows(other.rows), columns(other.columns), stride(other.stride), data(other.data.size) {
    for (int64_t i = 0; i < data.size; ++i) data[i] = other.data[i];
  }
  double at(int64_t n, int64_t j) const { return static_cast<double>(data[n * stride + j]); }
  void expect_padding(const char* what) const {
    for (int64_t i = 0; i < data.size; ++i)
      if (i % stride >= columns && !std::isnan(data[i])) report(what, i, static_cast<double>(data[i]), 0.0, 0.0);
  }
  int64_t rows, columns, stride;
  Buffer<float> data;
};

void check_softmax(int64_t columns, const float* tanh_scale, int64_t padding) {
  const int64_t rows = 3;
  const Tile tile(rows, columns, padding, tanh_scale == nullptr ? 2.0 : 0.5);
  Buffer<int64_t> ids(rows);
  for (int64_t n = 0; n < rows; ++n) ids[n] = n == 0 ? columns - 1 : random_word() % static_cast<uint32_t>(columns);
  for (const Kernels* k : tables()) {
    isa = k->name;
    Tile softmax(tile);
    Buffer<float> sums(rows), logits(rows);
    Tile gradient(tile);
    Buffer<float> a(rows), b(rows), entropy(rows), c(rows), exact_sums(rows);
    for (int64_t n = 0; n < rows; ++n) {
      const auto value = [&](int64_t j) { return capped(tile.at(n, j), tanh_scale); };
      const Scores exact = score_of(0, columns, value);
      a[n] = static_cast<float>(normal());
      b[n] = static_cast<float>(normal());
      c[n] = static_cast<float>(normal());
      exact_sums[n] = static_cast<float>(exact.logsumexp);
      entropy[n] = static_cast<float>(exact.entropy);
    }
    for (int64_t n = 0; n < rows; ++n)
      k->tile_softmax(softmax.data.data + n * tile.stride, columns, tanh_scale, ids[n], sums.data + n, logits.data + n);
    const LogprobTile all{gradient.data.data, tile.stride, columns, tanh_scale,   exact_sums.data,
                          ids.data,           a.data,      b.data,  entropy.data, c.data};
    for (int64_t n = 0; n < rows; ++n) k->tile_logprob_gradient(all, n);
    Tile bare(tile);
    const LogprobTile nothing{bare.data.data, tile.stride, columns, tanh_scale, exact_sums.data,
                              ids.data,       nullptr,     nullptr, nullptr,    nullptr};
    for (int64_t n = 0; n < rows; ++n) k->tile_logprob_gradient(nothing, n);
    for (int64_t n = 0; n < rows; ++n) {
      const auto value = [&](int64_t j) { return capped(tile.at(n, j), tanh_scale); };
      const Scores exact = score_of(0, columns, value);
      expect_close("tile_softmax: logsumexp", n, static_cast<double>(sums[n]), exact.logsumexp);
      expect_close("tile_softmax: target", n, static_cast<double>(logits[n]), value(ids[n]));
      for (int64_t j = 0; j < columns; ++j) {
        const double t = std::tanh(tile.at(n, j)), slope = tanh_scale == nullptr ? 1.0 : 1.0 - t * t;
        const double logprob = value(j) - exact.logsumexp, p = std::exp(logprob);
        expect("tile_softmax", n * tile.stride + j, softmax.at(n, j), p * slope, 2e-6);
        const double on_target = j == ids[n] ? static_cast<double>(a[n]) : 0.0;
        const double on_probs = static_cast<double>(b[n]) - static_cast<double>(a[n]) -
                                static_cast<double>(c[n]) * (logprob + static_cast<double>(entropy[n]));
        expect_close("tile_logprob_gradient", n * tile.stride + j, gradient.at(n, j), (on_target + p * on_probs) * slope);
        expect("tile_logprob_gradient without weights", n * tile.stride + j, bare.at(n, j), 0.0, 0.0);
      }
    }
    softmax.expect_padding("tile_softmax's padding");
    gradient.expect_padding("tile_logprob_gradient's padding");
  }
}

void check_divergence(int64_t columns, double beta, int variant) {
  const int64_t rows = 3;
  const bool delta = variant % 3 == 2, with_cap = variant % 3 == 1, with_targets = variant % 2 == 0;
  const bool with_weights = variant % 4 < 2, want_entropy = variant % 5 != 0;
  const float* cap = with_cap ? &kCap : nullptr;
  const Tile student(rows, columns, variant % 4, with_cap ? 0.6 : 2.0);
  const Tile teacher(rows, columns, variant % 3, with_cap ? 0.6 : delta && variant % 2 == 0 ? 0.2 : 1.5);
  Buffer<int64_t> ids(rows);
  Buffer<bool> differences(rows, true);
  Buffer<float> weight(rows), logprob_weight(rows);
  for (int64_t n = 0; n < rows; ++n) {
    ids[n] = n == 0 ? columns - 1 : random_word() % static_cast<uint32_t>(columns);
    weight[n] = static_cast<float>(normal());
    logprob_weight[n] = static_cast<float>(normal());
  }
  for (const Kernels* k : tables()) {
    isa = k->name;
    Tile s(student), t(teacher);
    Buffer<float> statistics(kDivergenceStatistics * rows, kNan);
    DivergenceTile tile{};
    tile.student = s.data.data;
    tile.teacher = t.data.data;
    tile.student_stride = s.stride;
    tile.teacher_stride = t.stride;
    tile.columns = columns;
    tile.student_tanh_scale = tile.teacher_tanh_scale = cap;
    tile.is_difference = delta ? differences.data : nullptr;
    tile.target_ids = with_targets ? ids.data : nullptr;
    tile.beta = beta;
    tile.want_entropy = want_entropy;
    tile.statistics = statistics.data;
    tile.rows = rows;
    for (int64_t n = 0; n < rows; ++n) k->tile_divergence(tile, n);
    tile.weight = with_weights ? weight.data : nullptr;
    tile.logprob_weight = with_weights && with_targets ? logprob_weight.data : nullptr;
    for (int64_t n = 0; n < rows; ++n) k->tile_divergence_gradient(tile, n);

    for (int64_t n = 0; n < rows; ++n) {
      const auto z_s = [&](int64_t j) { return capped(student.at(n, j), cap); };
      const auto z_t = [&](int64_t j) { return delta ? student.at(n, j) + teacher.at(n, j) : capped(teacher.at(n, j), cap); };
      const double sum_s = score_of(0, columns, z_s).logsumexp, sum_t = score_of(0, columns, z_t).logsumexp;
      double divergence = 0.0, student_entropy = 0.0, teacher_entropy = 0.0, to_mixture = 0.0;
      const auto log_mixture = [&](double a, double b) {
        return std::log((1.0 - beta) * std::exp(a) + beta * std::exp(b));
      };
      for (int64_t j = 0; j < columns; ++j) {
        const double a = z_s(j) - sum_s, b = z_t(j) - sum_t, p = std::exp(a), q = std::exp(b);
        student_entropy -= p * a;
        teacher_entropy -= q * b;
        to_mixture += p * (a - log_mixture(a, b));
        divergence += beta == 0.0   ? q * (b - a)
                      : beta == 1.0 ? p * (a - b)
                                    : beta * q * (b - log_mixture(a, b)) + (1.0 - beta) * p * (a - log_mixture(a, b));
      }
      const auto statistic = [&](int which) { return static_cast<double>(statistics[which * rows + n]); };
      expect_close("divergence", n, statistic(kDivergence), divergence);
      if (want_entropy) {
        expect_close("student entropy", n, statistic(kStudentEntropy), student_entropy);
        expect_close("teacher entropy", n, statistic(kTeacherEntropy), teacher_entropy);
      }
      if (with_targets) {
        expect_close("student logprob", n, statistic(kStudentLogprob), z_s(ids[n]) - sum_s);
        expect_close("teacher logprob", n, statistic(kTeacherLogprob), z_t(ids[n]) - sum_t);
      }
      for (int64_t j = 0; j < columns; ++j) {
        const double a = z_s(j) - sum_s, b = z_t(j) - sum_t, p = std::exp(a), q = std::exp(b);
        double g = beta == 0.0   ? p - q
                   : beta == 1.0 ? p * (a - b - divergence)
                                 : (1.0 - beta) * p * (a - log_mixture(a, b) - to_mixture);
        if (with_weights) g *= static_cast<double>(weight[n]);
        if (with_weights && with_targets) g += static_cast<double>(logprob_weight[n]) * ((j == ids[n] ? 1.0 : 0.0) - p);
        const double u = std::tanh(student.at(n, j));
        expect_close("divergence gradient", n * s.stride + j, s.at(n, j), g * (with_cap ? 1.0 - u * u : 1.0));
        expect_close("teacher tile", n * t.stride + j, t.at(n, j), delta ? teacher.at(n, j) : z_t(j));
      }
    }
    s.expect_padding("student's padding");
    t.expect_padding("teacher's padding");
  }
}

void check_scale_row(int64_t width, Storage storage) {
  Buffer<float> row(width);
  const double magnitudes[] = {1.0, 1e-6, 1e-39, 7e4, 3e38};
  for (int64_t i = 0; i < width; ++i) row[i] = static_cast<float>(normal() * magnitudes[i % 5]);
  const float special[] = {0.0f, -0.0f, static_cast<float>(kInf), static_cast<float>(-kInf), kNan, 1e-45f, 65519.0f, 65520.0f};
  for (int64_t i = 0; i < 8 && 2 * i + 1 < width; ++i) row[2 * i + 1] = special[i];
  const float scale = 1.5f;
  for (const Kernels* k : tables()) {
    isa = k->name;
    Buffer<unsigned char> out(width * bytes_of(storage));
    k->scale_row(row.data, scale, width, out.data, storage);
    for (int64_t i = 0; i < width; ++i) {
      const double product = static_cast<double>(row[i] * scale);
      expect("scale_row", i, decode(out.data, i, storage), rounded(product, storage), 0.0);
    }
  }
}

// The moving average.

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
void expect_rounded(const char* what, int64_t i, double ours, double value, Storage storage, bool stochastic, double slack) {
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
    const bool right = std::isinf(ours) ? magnitude >= to_infinity : std::fabs(ours) == largest && magnitude <= to_largest;
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
        expect("ema float64", i, ours, exact, std::isfinite(exact) && std::isfinite(before) ? 4e-16 * (std::fabs(before) + std::fabs(target)) : 0.0);
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
      if (stochastic && value == value && rounded(static_cast<double>(value), teacher_storage) == static_cast<double>(value))
        expect("ema stochastic of a number of the format", i, ours, static_cast<double>(value), 0.0);
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
    k->ema({out.data, student.data, nullptr, storage, Storage::kFloat32, size, rounding_key(99, 0)}, 0, size, 0.0, true);
    double mean = 0.0;
    for (int64_t i = 0; i < size; ++i) mean += (decode(out.data, i, storage) - at) / q;
    expect("mean of stochastic rounding", 0, mean / static_cast<double>(size), fraction, 4 * 0.5 / 200.0);
  }
}

// exp and its relatives; test_native_math.py looks at every bit.
void check_math() {
  for (const Kernels* k : tables()) {
    isa = k->name;
    for (int64_t n = 0; n <= 49; ++n) {
      Buffer<float> x(n), out(n);
      for (int64_t i = 0; i < n; ++i) x[i] = static_cast<float>(normal() * (i % 7 == 0 ? 60.0 : i % 7 == 1 ? 1e-20 : 1.0));
      if (n > 40) {
        const double special[] = {kInf, -kInf, 0.0, static_cast<double>(kNan), 1e38, -1e38, 1e-45, -1e-45};
        for (int i = 0; i < 8; ++i) x[5 * i] = static_cast<float>(special[i]);
      }
      const auto compare = [&](const char* what, void (*function)(const float*, int64_t, float*), double (*exact)(double)) {
        function(x.data, n, out.data);
        for (int64_t i = 0; i < n; ++i) {
          const double right = exact(static_cast<double>(x[i]));
          const double limit = format_of(Storage::kFloat32).largest;
          expect(what, i, static_cast<double>(out[i]), right > limit ? kInf : right < -limit ? -kInf : right,
                 4e-7 * std::fabs(right) + 3e-45);
        }
      };
      compare("exp", k->exp, [](double v) { return std::exp(v); });
      compare("log", k->log, [](double v) { return std::log(v); });
      compare("expm1", k->expm1, [](double v) { return std::expm1(v); });
      compare("tanh", k->tanh, [](double v) { return std::tanh(v); });
    }
  }
}

}  // namespace

int main() {
  const int64_t all_rows[] = {1, 3, 47, 48, 49}, all_widths[] = {1, 5, 16, 33, 200};
  const int64_t all_columns[] = {1, 7, 15, 16, 17, 63, 64, 65, 1023, 1025};
  int variant = 0;
  for (const int64_t rows : all_rows) {
    for (const int64_t columns : all_columns) {
      for (const int64_t width : all_widths) {
        // Every storage with every width, rows and columns, if not with every combination of them.
        const int which = variant % 3;
        if (columns < 1000 || rows == 1 || rows == 49)
          check_products(rows, columns, width, kStorages[which], variant);
        ++variant;
      }
      ++variant;
    }
  }
  check_products(100, 130, 131, Storage::kFloat32, 2);  // several panels, and more than one slice of the width
  check_products(100, 200, 300, Storage::kBFloat16, 1);
  check_streamed_logits();
  for (const int64_t columns : all_columns) {
    check_sum_rows(columns);
    for (int64_t padding = 0; padding < 3; ++padding) {
      check_softmax(columns, nullptr, padding);
      check_softmax(columns, &kCap, padding);
    }
    for (const double beta : {0.0, 1.0, 0.5, 0.05, 1e-6, 1.0 - 1e-6})
      for (variant = 0; variant < 12; ++variant) check_divergence(columns, beta, variant);
    for (const Storage storage : {Storage::kFloat32, Storage::kBFloat16, Storage::kFloat16})
      check_scale_row(columns, storage);
    for (const Storage teacher : kStorages) {
      for (const Storage student : kStorages) {
        for (const double decay : {0.0, 0.1, 0.5, 0.99, 1.0}) {
          check_ema(columns, teacher, student, false, decay);
          check_ema(columns, teacher, student, true, decay);
        }
      }
    }
  }
  for (const Storage storage : {Storage::kBFloat16, Storage::kFloat16}) {
    for (const double fraction : {0.1, 0.5, 0.75}) {
      check_stochastic_mean(storage, 1.5, fraction);
      check_stochastic_mean(storage, std::ldexp(1.0, -16), fraction);
      check_stochastic_mean(storage, std::ldexp(3.0, -24), fraction);
      check_stochastic_mean(storage, 0.0, fraction);
    }
  }
  check_math();
  if (failures != 0) {
    std::printf("%d differences\n", failures);
    return 1;
  }
  for (const Kernels* k : tables()) std::printf("%s ok\n", k->name);
  return 0;
}
