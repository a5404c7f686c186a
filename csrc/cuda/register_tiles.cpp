// unisd::tile_* and unisd::scale_rows for CUDA: arguments checked, then one launch each. Schemas: csrc/ops.cpp.
#include <torch/csrc/stable/library.h>

#include "../statistics.h"
#include "checks.h"
#include "launch.h"
#include "stream.h"

namespace unisd::cuda {
namespace {

using OptionalTensor = std::optional<Tensor>;
using OptionalDouble = std::optional<double>;

void tile_score_(const Tensor& tile, OptionalDouble tanh_scale, OptionalTensor target_ids, int64_t first_column,
                 const Tensor& logsumexp, OptionalTensor target_logits, OptionalTensor entropy) {
  ScoreArguments a{};
  a.tile = const_tile_of(tile, "tile", tile);
  const int64_t rows = a.tile.rows;
  a.cap = cap_of(tanh_scale);
  a.target_ids = ids_of(target_ids, "target_ids", tile, rows);
  STD_TORCH_CHECK(first_column >= 0, "first_column must not be negative, got ", first_column);
  a.first_column = first_column;
  a.logsumexp = mutable_floats_of(logsumexp, "logsumexp", tile, rows);
  a.target_logits = mutable_floats_of(target_logits, "target_logits", tile, rows);
  a.entropy = mutable_floats_of(entropy, "entropy", tile, rows);
  if (rows == 0 || a.tile.columns == 0) return;
  const StreamScope scope(tile);
  StreamScope::check(launch_score(a, scope.stream()), "tile_score_");
}

void tile_softmax_(const Tensor& tile, OptionalDouble tanh_scale, const Tensor& target_ids, const Tensor& logsumexp,
                   const Tensor& target_logits) {
  SoftmaxArguments a{};
  a.tile = tile_of(tile, "tile", tile);
  const int64_t rows = a.tile.rows;
  a.cap = cap_of(tanh_scale);
  a.target_ids = ids_of(target_ids, "target_ids", tile, rows);
  a.logsumexp = mutable_floats_of(logsumexp, "logsumexp", tile, rows);
  a.target_logits = mutable_floats_of(target_logits, "target_logits", tile, rows);
  if (rows == 0) return;
  const StreamScope scope(tile);
  StreamScope::check(launch_softmax(a, scope.stream()), "tile_softmax_");
}

void tile_logprob_gradient_(const Tensor& tile, OptionalDouble tanh_scale, const Tensor& logsumexp,
                            const Tensor& target_ids, OptionalTensor logprob_weight, OptionalTensor logsumexp_weight,
                            OptionalTensor entropy, OptionalTensor entropy_weight) {
  LogprobGradientArguments a{};
  a.tile = tile_of(tile, "tile", tile);
  const int64_t rows = a.tile.rows;
  a.cap = cap_of(tanh_scale);
  a.logsumexp = floats_of(logsumexp, "logsumexp", tile, rows);
  a.target_ids = ids_of(target_ids, "target_ids", tile, rows);
  a.logprob_weight = floats_of(logprob_weight, "logprob_weight", tile, rows);
  a.logsumexp_weight = floats_of(logsumexp_weight, "logsumexp_weight", tile, rows);
  a.entropy = floats_of(entropy, "entropy", tile, rows);
  a.entropy_weight = floats_of(entropy_weight, "entropy_weight", tile, rows);
  STD_TORCH_CHECK(a.entropy_weight == nullptr || entropy.has_value(), "entropy_weight needs entropy, got none");
  if (rows == 0) return;
  const StreamScope scope(tile);
  StreamScope::check(launch_logprob_gradient(a, scope.stream()), "tile_logprob_gradient_");
}

void check_pair(const ConstTile& student, const ConstTile& teacher, double beta) {
  STD_TORCH_CHECK(student.rows == teacher.rows && student.columns == teacher.columns, "student is ", student.rows,
                  " x ", student.columns, ", teacher ", teacher.rows, " x ", teacher.columns);
  STD_TORCH_CHECK(beta >= 0.0 && beta <= 1.0, "beta must be in [0, 1], got ", beta);
}

void check_no_cap(const OptionalTensor& is_difference, const OptionalDouble& tanh_scale, const char* whose) {
  STD_TORCH_CHECK(!is_difference.has_value() || !tanh_scale.has_value(),
                  "logits differ linearly in the hidden states only without a soft cap, got is_difference and the ",
                  whose, "'s tanh_scale ", tanh_scale.value_or(0.0));
}

void check_statistics(const Tensor& statistics, const Tensor& first, int64_t rows) {
  check_device(statistics, "statistics", first);
  STD_TORCH_CHECK(statistics.scalar_type() == ScalarType::Float, "statistics must be float32, got scalar type ",
                  static_cast<int>(statistics.scalar_type()));
  check_rows_of_columns(statistics, "statistics", true);
  STD_TORCH_CHECK(statistics.size(0) == kDivergenceStatistics && statistics.size(1) == rows, "statistics must be ",
                  static_cast<int>(kDivergenceStatistics), " x ", rows, ", got ", statistics.size(0), " x ",
                  statistics.size(1));
}

void tile_divergence_(const Tensor& student, const Tensor& teacher, OptionalDouble student_tanh_scale,
                      OptionalDouble teacher_tanh_scale, OptionalTensor is_difference, OptionalTensor target_ids,
                      double beta, bool want_entropy, const Tensor& statistics) {
  DivergenceArguments a{};
  a.student = tile_of(student, "student", student);
  a.teacher = tile_of(teacher, "teacher", student);
  check_pair(a.student, a.teacher, beta);
  check_statistics(statistics, student, a.student.rows);
  check_no_cap(is_difference, student_tanh_scale, "student");
  check_no_cap(is_difference, teacher_tanh_scale, "teacher");
  a.student_cap = cap_of(student_tanh_scale);
  a.teacher_cap = cap_of(teacher_tanh_scale);
  a.is_difference = bools_of(is_difference, "is_difference", student, a.student.rows);
  a.target_ids = ids_of(target_ids, "target_ids", student, a.student.rows);
  a.beta = beta;
  a.want_entropy = want_entropy;
  a.statistics = static_cast<float*>(statistics.mutable_data_ptr());
  a.statistics_stride = statistics.stride(0);
  if (a.student.rows == 0) return;
  const StreamScope scope(student);
  StreamScope::check(launch_divergence(a, scope.stream()), "tile_divergence_");
}

void tile_divergence_gradient_(const Tensor& student, const Tensor& teacher, OptionalDouble student_tanh_scale,
                               OptionalTensor is_difference, OptionalTensor target_ids, double beta,
                               const Tensor& statistics, OptionalTensor weight, OptionalTensor logprob_weight) {
  DivergenceGradientArguments a{};
  a.student = tile_of(student, "student", student);
  a.teacher = const_tile_of(teacher, "teacher", student);
  check_pair(a.student, a.teacher, beta);
  const int64_t rows = a.student.rows;
  check_statistics(statistics, student, rows);
  check_no_cap(is_difference, student_tanh_scale, "student");
  a.student_cap = cap_of(student_tanh_scale);
  a.is_difference = bools_of(is_difference, "is_difference", student, a.student.rows);
  a.target_ids = ids_of(target_ids, "target_ids", student, rows);
  a.beta = beta;
  a.statistics = static_cast<const float*>(statistics.const_data_ptr());
  a.statistics_stride = statistics.stride(0);
  a.weight = floats_of(weight, "weight", student, rows);
  a.logprob_weight = floats_of(logprob_weight, "logprob_weight", student, rows);
  STD_TORCH_CHECK(!logprob_weight.has_value() || target_ids.has_value(), "logprob_weight needs target_ids, got none");
  if (rows == 0) return;
  const StreamScope scope(student);
  StreamScope::check(launch_divergence_gradient(a, scope.stream()), "tile_divergence_gradient_");
}

void scale_rows(const Tensor& rows, const Tensor& scale, const Tensor& out) {
  ScaleRowsArguments a{};
  a.rows = const_tile_of(rows, "rows", rows);
  a.scale = floats_of(scale, "scale", rows, a.rows.rows);
  check_device(out, "out", rows);
  check_rows_of_columns(out, "out", true);
  a.out_type = element_of(out, "out");
  STD_TORCH_CHECK(a.out_type != Element::kFloat64, "out must be float32, bfloat16 or float16, got float64");
  STD_TORCH_CHECK(out.size(0) == a.rows.rows && out.size(1) == a.rows.columns, "rows are ", a.rows.rows, " x ",
                  a.rows.columns, ", out is ", out.size(0), " x ", out.size(1));
  a.out = out.mutable_data_ptr();
  a.out_stride = out.stride(0);
  if (a.rows.rows == 0 || a.rows.columns == 0) return;
  const StreamScope scope(rows);
  StreamScope::check(launch_scale_rows(a, scope.stream()), "scale_rows");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(unisd, CUDA, m) {
  m.impl("tile_score_", TORCH_BOX(&tile_score_));
  m.impl("tile_softmax_", TORCH_BOX(&tile_softmax_));
  m.impl("tile_logprob_gradient_", TORCH_BOX(&tile_logprob_gradient_));
  m.impl("tile_divergence_", TORCH_BOX(&tile_divergence_));
  m.impl("tile_divergence_gradient_", TORCH_BOX(&tile_divergence_gradient_));
  m.impl("scale_rows", TORCH_BOX(&scale_rows));
}

}  // namespace unisd::cuda
