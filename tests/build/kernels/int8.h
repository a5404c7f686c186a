// Scores from int8 codes, exact logits in every storage.
#pragma once

#include "products.h"

namespace check {

void check_int8(int64_t rows, int64_t columns, int64_t width, Storage storage, int variant) {
  const int64_t quads = (width + 3) / 4, stride = 4 * quads, directions = width / 4 < 16 ? width / 4 : 16;
  const Operand hidden(rows, width, variant % 3, storage, 1.0);
  const Operand weight(columns, width, variant % 3, storage, 1.0 / std::sqrt(static_cast<double>(width)));
  const auto fill = [](Buffer<float>& values, double scale) {
    for (int64_t i = 0; i < values.size; ++i) values[i] = static_cast<float>(scale * normal());
  };
  Buffer<float> along(rows * directions), lead(columns * directions), bias(variant % 2 == 0 ? columns : 0);
  fill(along, 1.0);
  fill(lead, 0.25);
  fill(bias, 1.0);
  Buffer<int8_t> codes(rows * stride), head_codes(columns * stride);
  Buffer<float> scales(rows), head_scales(columns), floor(rows);
  Buffer<int32_t> offsets(columns);
  const float step = static_cast<float>(1.0 / (60.0 * std::sqrt(static_cast<double>(width))));
  const auto code = [](int64_t i) { return static_cast<int8_t>(i == 0 ? -127 : random_word() % 255 - 127); };
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t k = 0; k < stride; ++k) codes[n * stride + k] = k < width ? code(n) : 0;
    scales[n] = n == 1 ? 0.0f : step;
    floor[n] = variant % 2 == 0 ? -30.0f : -1e4f;
  }
  for (int64_t j = 0; j < columns; ++j) {
    int32_t sum = 0;
    for (int64_t k = 0; k < stride; ++k) {
      head_codes[j * stride + k] = k < width ? code(j) : 0;
      sum += head_codes[j * stride + k];
    }
    offsets[j] = 128 * sum;
    head_scales[j] = step * static_cast<float>(1 + j % 3);
  }
  const float scale = variant % 5 == 0 ? -1.5f : 1.0f;
  const float* tanh_scale = variant % 4 == 3 ? &kCap : nullptr;
  const CodedHead head{head_codes.data, head_scales.data, offsets.data,
                       lead.data,       columns,          quads,
                       directions,      weight.matrix(),  width,
                       bias.size == 0 ? nullptr : bias.data, scale, tanh_scale};
  const CodedRows given{codes.data, scales.data, along.data, floor.data, hidden.matrix(), rows};
  const double log_threshold = std::log(1e-3);

  for (const Kernels* k : tables()) {
    isa = k->name;
    Buffer<float> highest(rows, kNan), total(rows, kNan), rest(rows, kNan), squares(rows, kNan), sure(rows, kNan),
        last(rows, kNan);
    k->score_codes(given, head, static_cast<float>(log_threshold),
                   {highest.data, total.data, rest.data, squares.data, sure.data, last.data});
    for (int64_t n = 0; n < rows; ++n) {
      const auto finished = [&](double x, int64_t j) {
        const double offset = bias.size == 0 ? 0.0 : static_cast<double>(bias[j]);
        return capped(static_cast<double>(scale) * (x + offset), tanh_scale);
      };
      const auto approximate = [&](int64_t j) {
        int64_t sum = 0;
        for (int64_t i = 0; i < stride; ++i) sum += codes[n * stride + i] * head_codes[j * stride + i];
        double x = static_cast<double>(sum) * static_cast<double>(scales[n]) * static_cast<double>(head_scales[j]);
        for (int64_t i = 0; i < directions; ++i)
          x += static_cast<double>(along[n * directions + i]) * static_cast<double>(lead[j * directions + i]);
        return finished(x, j);
      };
      double top = -kInf, all = 0.0, left = 0.0, left_squares = 0.0, exact = 0.0;
      for (int64_t j = 0; j < columns; ++j) top = std::fmax(top, approximate(j));
      bool between = false;
      for (int64_t j = 0; j < columns; ++j) {
        const double z = approximate(j), e = std::exp(z - top), bar = static_cast<double>(last[n]);
        all += e;
        between = between || std::fabs(z - bar) < 1e-4;  // a rounding decides
        if (z > bar) {
          double x = 0.0;
          for (int64_t i = 0; i < width; ++i) x += hidden.values[n * width + i] * weight.values[j * width + i];
          exact += std::exp(finished(x, j) - top);
        } else {
          left += e;
          left_squares += e * e;
        }
      }
      expect_close("score_codes: highest", n, static_cast<double>(highest[n]), top);
      expect("score_codes: total", n, static_cast<double>(total[n]), all, 1e-4 * all);
      expect("score_codes: floor", n, static_cast<double>(last[n]),
             std::fmax(static_cast<double>(floor[n]), top + std::log(all) + log_threshold), 2e-4);
      if (between) continue;
      expect("score_codes: rest", n, static_cast<double>(rest[n]), left, 1e-4 * left + 1e-7 * all);
      expect("score_codes: squares", n, static_cast<double>(squares[n]), left_squares, 1e-4 * left_squares + 1e-9 * all);
      expect("score_codes: sure", n, static_cast<double>(sure[n]), exact, 1e-4 * exact);
    }
  }
}

}  // namespace check
