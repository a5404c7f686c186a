// The matrix products and scores, in every storage.
#pragma once

#include "support.h"

namespace check {

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

struct Aligned {
  explicit Aligned(int64_t n)
      : data(static_cast<float*>(::operator new(static_cast<size_t>(n) * 4, std::align_val_t(64)))) {}
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
  // Numbers that a product with a bfloat16 weight need not round.
  for (int64_t i = 0; i < gradient.size; ++i)
    gradient[i] = static_cast<float>(rounded(normal(), storage == Storage::kBFloat16 ? storage : Storage::kFloat32));
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
    const bool pairs = k->multiplies_pairs && storage == Storage::kBFloat16 && width % 2 == 0;
    const int64_t steps = pairs ? width / 2 : width;
    Buffer<float> packed(k->packed_size(rows, steps), kNan), by_panel(k->packed_size(rows, steps), kNan);
    k->pack_rows(hidden.matrix(), rows, width, pairs, packed.data);
    const int64_t panel = pairs ? k->pair_panel_rows : k->panel_rows;
    for (int64_t first = 0; first < rows; first += panel) {
      Matrix part = hidden.matrix();
      part.data = static_cast<const char*>(part.data) + first * part.stride * bytes_of(storage);
      const int64_t left = rows - first;
      k->pack_rows(part, left < panel ? left : panel, width, pairs,
                   by_panel.data + first * steps);
    }
    for (int64_t i = 0; i < packed.size; ++i)
      expect_bits("pack_rows", i, by_panel[i], packed[i]);
    const PackedRows panels{packed.data, rows, width, pairs};

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
    // out = scale gradient^T hidden, and once more onto it.
    Buffer<float> columns_packed(k->packed_size(width, rows + 1), kNan);
    k->pack_columns(hidden.matrix(), rows, width, columns_packed.data);
    Buffer<float> weight_gradient((columns - 1) * back_stride + width, kNan);
    for (int repeat = 0; repeat < 2; ++repeat) {
      for (int part = 0; part < 2; ++part)
        k->weight_gradient(gradient.data, gradient_stride, rows, columns_packed.data, storage, width, 0.5f,
                           part == 0 ? 0 : middle, part == 0 ? middle : columns, repeat == 1, weight_gradient.data,
                           back_stride);
    }
    for (int64_t j = 0; j < columns; ++j) {
      for (int64_t h = 0; h < back_stride && j * back_stride + h < weight_gradient.size; ++h) {
        const double value = static_cast<double>(weight_gradient[j * back_stride + h]);
        if (h >= width) {
          if (!std::isnan(value)) report("weight gradient's padding", j * back_stride + h, value, 0.0, 0.0);
          continue;
        }
        double exact_sum = 0.0;
        for (int64_t n = 0; n < rows; ++n)
          exact_sum += static_cast<double>(gradient[n * gradient_stride + j]) * hidden.values[n * width + h];
        expect("weight gradient", j * back_stride + h, value, exact_sum,
               2e-6 * std::sqrt(static_cast<double>(rows)) + tolerance(exact_sum));
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
    k->pack_rows(hidden.matrix(), rows, 1, false, packed.data);
    const int64_t size = rows * stride;
    Aligned out(size);
    for (int64_t i = 0; i < size; ++i) out.data[i] = kNan;
    for (int64_t begin = 0; begin < columns; begin += 512)
      k->logits({packed.data, rows, 1, false}, weight.matrix(), nullptr, 1.0f, begin,
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

}  // namespace check
