// Matrix products with the head. The work is cut along the vocabulary, or along the hidden width, at places that do not
// depend on the number of threads, and each sum is taken in one order: results are the same bits for any number.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "arguments.h"
#include "boxed.h"
#include "floats.h"
#include "parallel.h"

namespace unisd {
namespace {

// Columns of a piece of work: large against a block of the kernel, small against a vocabulary.
constexpr int64_t kLogitColumns = 512, kScoreColumns = 2048;
// Slices of the vocabulary in the backward product, and the step in which the hidden width is cut.
constexpr int64_t kBackwardSlices = 8, kBackwardColumns = 48;
// Rows whose sums stay in the second-level cache beside the weight's block; a multiple of every register tile.
constexpr int64_t kBackwardRows = 192;

struct Operands {
  Floats packed;
  PackedRows hidden;
  Matrix weight;
  const float* bias;
};

Operands operands(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Matrix rows = matrix(hidden, "hidden");
  Operands result;
  result.weight = matrix(weight, "weight");
  const int64_t count = hidden.size(0), width = hidden.size(1), columns = weight.size(0);
  STD_TORCH_CHECK(weight.size(1) == width, "weight must have shape [V, ", width, "], got [", columns, ", ",
                  weight.size(1), "]");
  const bool pairs = kernels().multiplies_pairs && width % 2 == 0 && rows.storage == Storage::kBFloat16 &&
                     result.weight.storage == Storage::kBFloat16;
  // Whole panels, packed by several threads.
  const int64_t panel = pairs ? kernels().pair_panel_rows : kernels().panel_rows, steps = pairs ? width / 2 : width;
  result.packed = allocate(kernels().packed_size(count, steps));
  float* packed = result.packed.get();
  for_each_span(count, panel, [&](int64_t, int64_t first, int64_t last) {
    kernels().pack_rows(rows_from(rows, first), last - first, width, pairs, packed + first * steps);
  });
  result.hidden = {packed, count, width, pairs};
  result.bias = bias_data(bias, columns);
  return result;
}

void linear_logits(Tensor hidden, Tensor weight, std::optional<Tensor> bias, double scale, Tensor out) {
  float* target = tile_data(out, "out");
  const int64_t columns = weight.size(0), stride = out.stride(0);
  STD_TORCH_CHECK(out.size(0) == hidden.size(0) && out.size(1) == columns, "out must have shape [", hidden.size(0),
                  ", ", columns, "]");
  const Operands given = operands(hidden, weight, bias);
  for_each_span(columns, kLogitColumns, [&](int64_t, int64_t begin, int64_t end) {
    kernels().logits(given.hidden, given.weight, given.bias, static_cast<float>(scale), begin, end, target, stride);
  });
}

void linear_score(Tensor hidden, Tensor weight, std::optional<Tensor> bias, double scale,
                  std::optional<double> tanh_scale, Tensor target_ids, Tensor logsumexp, Tensor target_logits,
                  std::optional<Tensor> entropy) {
  const int64_t rows = hidden.size(0), columns = weight.size(0);
  const OptionalFloat cap(tanh_scale);
  const int64_t* targets = ids(target_ids, rows, columns);
  float* sums = floats(logsumexp, "logsumexp", rows);
  float* logits = floats(target_logits, "target_logits", rows);
  float* entropies = floats(entropy, "entropy", rows);
  const Operands given = operands(hidden, weight, bias);
  const int64_t pieces = (columns + kScoreColumns - 1) / kScoreColumns;
  const Floats partial = allocate(pieces * kPartialScores * rows);
  for_each_span(columns, kScoreColumns, [&](int64_t piece, int64_t begin, int64_t end) {
    kernels().score(given.hidden, given.weight, given.bias, static_cast<float>(scale), cap.get(), targets,
                    entropies != nullptr, begin, end, partial.get() + piece * kPartialScores * rows);
  });
  for (int64_t n = 0; n < rows; ++n) {
    const auto part = [&](int64_t piece, PartialScore which) {
      return static_cast<double>(partial.get()[(piece * kPartialScores + which) * rows + n]);
    };
    double highest = -INFINITY;
    for (int64_t i = 0; i < pieces; ++i) highest = part(i, kPartMax) > highest ? part(i, kPartMax) : highest;
    // Nothing but -inf or NaN: the sums are NaN then, and any shift will do.
    if (highest == -INFINITY) highest = 0.0;
    double sum = 0.0, moment = 0.0;
    for (int64_t i = 0; i < pieces; ++i) {
      const double shift = part(i, kPartMax) - highest, share = std::exp(shift);
      sum += share * part(i, kPartSum);
      if (entropies != nullptr && share > 0.0) moment += share * (part(i, kPartMoment) + shift * part(i, kPartSum));
    }
    sums[n] = static_cast<float>(highest + std::log(sum));
    logits[n] = static_cast<float>(part(targets[n] / kScoreColumns, kPartTarget));
    if (entropies != nullptr) entropies[n] = static_cast<float>(std::log(sum) - moment / sum);
  }
}

void linear_backward(Tensor gradient, Tensor weight, double scale, Tensor out) {
  const float* data = tile_data(gradient, "gradient");
  float* target = tile_data(out, "out");
  const Matrix head = matrix(weight, "weight");
  const int64_t rows = gradient.size(0), length = weight.size(0), width = weight.size(1);
  STD_TORCH_CHECK(gradient.size(1) == length, "gradient must have shape [rows, ", length, "], got [", rows, ", ",
                  gradient.size(1), "]");
  STD_TORCH_CHECK(out.size(0) == rows && out.size(1) == width, "out must have shape [", rows, ", ", width, "]");
  const int64_t stride = gradient.stride(0), out_stride = out.stride(0);
  STD_TORCH_CHECK(length > 0 && width > 0, "weight must have at least one row and one column");
  if (rows == 0) return;
  // The sum over the vocabulary is cut into slices, so that a thread reads its part of the gradient once, and whole rows
  // of the weight once for so many rows. With more threads than slices the hidden width is cut as well, which changes no sum.
  const int64_t slice = ((length + kBackwardSlices - 1) / kBackwardSlices + 15) / 16 * 16;
  const int64_t slices = (length + slice - 1) / slice;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t cuts = (threads + slices - 1) / slices;
  const int64_t columns = (width + cuts * kBackwardColumns - 1) / (cuts * kBackwardColumns) * kBackwardColumns;
  const int64_t spans = (width + columns - 1) / columns;
  const Floats partial = allocate(slices * rows * width);
  for_each_piece(slices * spans, [&](int64_t i) {
    const int64_t first = i / spans * slice, count = first + slice < length ? slice : length - first;
    const int64_t begin = i % spans * columns, end = begin + columns < width ? begin + columns : width;
    for (int64_t row = 0; row < rows; row += kBackwardRows) {
      kernels().backward(data + row * stride + first, stride, row + kBackwardRows < rows ? kBackwardRows : rows - row,
                         count, rows_from(head, first), begin, end, partial.get() + (i / spans * rows + row) * width,
                         width);
    }
  });
  for_each_piece(rows, [&](int64_t n) {
    kernels().sum_rows(partial.get() + n * width, rows * width, slices, width, static_cast<float>(scale),
                       target + n * out_stride);
  });
}

void linear_weight_gradient(Tensor gradient, Tensor hidden, double scale, bool accumulate, Tensor out) {
  const float* data = tile_data(gradient, "gradient");
  float* target = tile_data(out, "out");
  const Matrix states = matrix(hidden, "hidden");
  const int64_t rows = gradient.size(0), columns = gradient.size(1), width = hidden.size(1);
  STD_TORCH_CHECK(hidden.size(0) == rows, "hidden must have shape [", rows, ", H], got [", hidden.size(0), ", ", width,
                  "]");
  STD_TORCH_CHECK(out.size(0) == columns && out.size(1) == width, "out must have shape [", columns, ", ", width, "]");
  STD_TORCH_CHECK(rows > 0, "gradient must have at least one row");
  const Floats packed = allocate(kernels().packed_size(width, rows + 1));
  kernels().pack_columns(states, rows, width, packed.get());
  const int64_t stride = gradient.stride(0), out_stride = out.stride(0);
  for_each_span(columns, kLogitColumns, [&](int64_t, int64_t begin, int64_t end) {
    kernels().weight_gradient(data, stride, rows, packed.get(), states.storage, width, static_cast<float>(scale), begin,
                              end, accumulate, target, out_stride);
  });
}

}  // namespace
}  // namespace unisd

STABLE_TORCH_LIBRARY_IMPL(unisd, CPU, m) {
  m.impl("linear_logits", UNISD_BOX(&unisd::linear_logits));
  m.impl("linear_score", UNISD_BOX(&unisd::linear_score));
  m.impl("linear_backward", UNISD_BOX(&unisd::linear_backward));
  m.impl("linear_weight_gradient", UNISD_BOX(&unisd::linear_weight_gradient));
}
