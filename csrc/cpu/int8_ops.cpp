// Scores from int8 codes. The work is cut along the rows, which do not depend on each other: results are the same bits for
// any number of threads.
#include <torch/csrc/stable/library.h>

#include "arguments.h"
#include "boxed.h"
#include "parallel.h"

namespace unisd {
namespace {

// Rows that pass the head together at most, and what their number is a multiple of.
constexpr int64_t kMostRows = 192, kRowStep = 16;

void int8_score(Tensor codes, Tensor scales, Tensor along, Tensor floor, Tensor hidden, Tensor head_codes,
                Tensor head_scales, Tensor head_offsets, Tensor head_lead, Tensor weight, std::optional<Tensor> bias,
                double scale, std::optional<double> tanh_scale, double log_threshold, Tensor sums) {
  const Matrix rows = matrix(hidden, "hidden");
  const OptionalFloat cap(tanh_scale);
  CodedHead head;
  head.columns = weight.size(0);
  head.width = weight.size(1);
  head.quads = (head.width + 3) / 4;
  head.directions = head_lead.size(1);
  const int64_t count = hidden.size(0), width = head.quads * 4, directions = head.directions;
  STD_TORCH_CHECK(hidden.size(1) == head.width, "hidden must have shape [N, ", head.width, "], got [", count, ", ",
                  hidden.size(1), "]");
  head.weight = matrix(weight, "weight");
  head.codes = dense_data<int8_t>(head_codes, "head_codes", head.columns, width, ScalarType::Char);
  head.scales = floats(head_scales, "head_scales", head.columns);
  head.offsets = vector_data<int32_t>(head_offsets, "head_offsets", head.columns, ScalarType::Int);
  head.lead = dense_data<float>(head_lead, "head_lead", head.columns, directions, ScalarType::Float);
  head.bias = bias_data(bias, head.columns);
  head.scale = static_cast<float>(scale);
  head.tanh_scale = cap.get();
  const int8_t* row_codes = dense_data<int8_t>(codes, "codes", count, width, ScalarType::Char);
  const float* row_scales = floats(scales, "scales", count);
  const float* row_along = dense_data<float>(along, "along", count, directions, ScalarType::Float);
  const float* row_floor = floats(floor, "floor", count);
  constexpr int64_t kSums = sizeof(CodeSums) / sizeof(float*);
  dense_data<float>(sums, "sums", kSums, count, ScalarType::Float);
  float* out = static_cast<float*>(sums.mutable_data_ptr());

  // As many pieces for each thread, and few of them: each reads the whole head.
  const int64_t threads = torch::stable::get_num_threads(), each = threads * kMostRows;
  const int64_t pieces = threads * ((count + each - 1) / each);
  const int64_t step = pieces == 0 ? kRowStep : ((count + pieces - 1) / pieces + kRowStep - 1) / kRowStep * kRowStep;
  for_each_span(count, step, [&](int64_t, int64_t begin, int64_t end) {
    const CodedRows part{row_codes + begin * width, row_scales + begin, row_along + begin * directions,
                         row_floor + begin,         rows_from(rows, begin), end - begin};
    float* const results = out + begin;
    const CodeSums into{results,             results + count,     results + 2 * count,
                        results + 3 * count, results + 4 * count, results + 5 * count};
    kernels().score_codes(part, head, static_cast<float>(log_threshold), into);
  });
}

}  // namespace
}  // namespace unisd

STABLE_TORCH_LIBRARY_IMPL(unisd, CPU, m) { m.impl("int8_score", UNISD_BOX(&unisd::int8_score)); }
