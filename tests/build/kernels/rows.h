// Softmax, gradients and divergences of complete rows of logits; rows scaled and rounded.
#pragma once

#include "support.h"

namespace check {

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
        expect_close("tile_logprob_gradient", n * tile.stride + j, gradient.at(n, j),
                     (on_target + p * on_probs) * slope);
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
    tile.teacher_is_delta = delta ? differences.data : nullptr;
    tile.target_ids = with_targets ? ids.data : nullptr;
    tile.beta = beta;
    tile.want_entropy = want_entropy;
    tile.statistics = statistics.data;
    tile.rows = rows;
    for (int64_t n = 0; n < rows; ++n) k->tile_divergence(tile, n);
    tile.weight = with_weights ? weight.data : nullptr;
    tile.logprob_weight = with_weights && with_targets ? logprob_weight.data : nullptr;
    for (int64_t n = 0; n < rows; ++n) k->tile_divergence_gradient(tile, n);

    if (!with_weights) {
      // The two in one are the same bits.
      Tile joint_s(student), joint_t(teacher);
      Buffer<float> joint_statistics(kDivergenceStatistics * rows, kNan), scratch(2 * columns, kNan);
      DivergenceTile joint = tile;
      joint.student = joint_s.data.data;
      joint.teacher = joint_t.data.data;
      joint.statistics = joint_statistics.data;
      for (int64_t n = 0; n < rows; ++n) k->tile_divergence_and_gradient(joint, n, scratch.data);
      for (int64_t i = 0; i < statistics.size; ++i)
        expect_bits("divergence and gradient: statistics", i, joint_statistics[i], statistics[i]);
      for (int64_t i = 0; i < s.data.size; ++i)
        expect_bits("divergence and gradient: gradient", i, joint_s.data[i], s.data[i]);
    }

    for (int64_t n = 0; n < rows; ++n) {
      const auto z_s = [&](int64_t j) { return capped(student.at(n, j), cap); };
      const auto z_t = [&](int64_t j) {
        return delta ? student.at(n, j) + teacher.at(n, j) : capped(teacher.at(n, j), cap);
      };
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
  const float infinity = static_cast<float>(kInf);
  const float special[] = {0.0f, -0.0f, infinity, -infinity, kNan, 1e-45f, 65519.0f, 65520.0f};
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

}  // namespace check
