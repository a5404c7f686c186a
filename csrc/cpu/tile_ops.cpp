// Operations on tiles of logits, a row being one piece of work; and vector_math, which their tests ask for.
#include <torch/csrc/stable/library.h>

#include "arguments.h"
#include "boxed.h"
#include "floats.h"
#include "parallel.h"

namespace unisd {
namespace {

void tile_softmax(Tensor tile, std::optional<double> tanh_scale, Tensor target_ids, Tensor logsumexp,
                  Tensor target_logits) {
  float* data = tile_data(tile, "tile");
  const int64_t rows = tile.size(0), columns = tile.size(1), stride = tile.stride(0);
  const OptionalFloat cap(tanh_scale);
  const int64_t* targets = ids(target_ids, rows, columns);
  float* sums = floats(logsumexp, "logsumexp", rows);
  float* logits = floats(target_logits, "target_logits", rows);
  for_each_piece(rows, [&](int64_t n) {
    kernels().tile_softmax(data + n * stride, columns, cap.get(), targets[n], sums + n, logits + n);
  });
}

void tile_logprob_gradient(Tensor tile, std::optional<double> tanh_scale, Tensor logsumexp, Tensor target_ids,
                           std::optional<Tensor> logprob_weight, std::optional<Tensor> logsumexp_weight,
                           std::optional<Tensor> entropy, std::optional<Tensor> entropy_weight) {
  float* data = tile_data(tile, "tile");
  const int64_t rows = tile.size(0), columns = tile.size(1);
  const OptionalFloat cap(tanh_scale);
  STD_TORCH_CHECK(!entropy_weight.has_value() || entropy.has_value(), "entropy_weight needs entropy");
  const LogprobTile arguments{data,
                              tile.stride(0),
                              columns,
                              cap.get(),
                              floats(logsumexp, "logsumexp", rows),
                              ids(target_ids, rows, columns),
                              floats(logprob_weight, "logprob_weight", rows),
                              floats(logsumexp_weight, "logsumexp_weight", rows),
                              floats(entropy, "entropy", rows),
                              floats(entropy_weight, "entropy_weight", rows)};
  for_each_piece(rows, [&](int64_t n) { kernels().tile_logprob_gradient(arguments, n); });
}

DivergenceTile divergence_tile(const Tensor& student, const Tensor& teacher, const OptionalFloat& student_softcap,
                               const OptionalFloat& teacher_softcap, const std::optional<Tensor>& teacher_is_delta,
                               const std::optional<Tensor>& target_ids, double beta, const Tensor& statistics,
                               int64_t lowest_id = 0) {
  DivergenceTile tile{};
  tile.student = tile_data(student, "student");
  tile.teacher = tile_data(teacher, "teacher");
  tile.rows = student.size(0);
  tile.columns = student.size(1);
  STD_TORCH_CHECK(teacher.size(0) == tile.rows && teacher.size(1) == tile.columns, "teacher must have the student's ",
                  "shape [", tile.rows, ", ", tile.columns, "], got [", teacher.size(0), ", ", teacher.size(1), "]");
  STD_TORCH_CHECK(tile.columns > 0, "a tile of complete rows needs at least one column");
  STD_TORCH_CHECK(beta >= 0.0 && beta <= 1.0, "beta must be in [0, 1], got ", beta);
  const bool capped = student_softcap.get() != nullptr || teacher_softcap.get() != nullptr;
  STD_TORCH_CHECK(!teacher_is_delta.has_value() || !capped,
                  "the difference of logits is linear in the hidden states only without a soft cap");
  STD_TORCH_CHECK(statistics.dim() == 2 && statistics.size(0) == kDivergenceStatistics &&
                      statistics.size(1) == tile.rows && statistics.scalar_type() == ScalarType::Float &&
                      (statistics.numel() == 0 || (statistics.stride(1) == 1 && statistics.stride(0) == tile.rows)),
                  "statistics must be contiguous float32 [", static_cast<int64_t>(kDivergenceStatistics), ", ",
                  tile.rows, "]");
  tile.student_stride = student.stride(0);
  tile.teacher_stride = teacher.stride(0);
  tile.student_tanh_scale = student_softcap.get();
  tile.teacher_tanh_scale = teacher_softcap.get();
  tile.teacher_is_delta = teacher_is_delta.has_value()
                              ? vector_data<bool>(*teacher_is_delta, "teacher_is_delta", tile.rows, ScalarType::Bool)
                              : nullptr;
  tile.target_ids = ids(target_ids, tile.rows, tile.columns, lowest_id);
  tile.beta = beta;
  tile.statistics = static_cast<float*>(statistics.mutable_data_ptr());
  return tile;
}

void tile_divergence(Tensor student, Tensor teacher, std::optional<double> student_tanh_scale,
                     std::optional<double> teacher_tanh_scale, std::optional<Tensor> teacher_is_delta,
                     std::optional<Tensor> target_ids, double beta, bool want_entropy, Tensor statistics,
                     bool with_gradient, bool has_log_sums) {
  const OptionalFloat student_softcap(student_tanh_scale), teacher_softcap(teacher_tanh_scale);
  DivergenceTile tile = divergence_tile(student, teacher, student_softcap, teacher_softcap, teacher_is_delta,
                                        target_ids, beta, statistics);
  tile.want_entropy = want_entropy;
  tile.has_log_sums = has_log_sums;
  if (!with_gradient) {
    for_each_piece(tile.rows, [&](int64_t n) { kernels().tile_divergence(tile, n); });
    return;
  }
  // Of each thread, so that it stays in its cache from row to row.
  for_each_piece_with(
      tile.rows, [&] { return allocate(2 * tile.columns); },
      [&](int64_t n, const Floats& scratch) { kernels().tile_divergence_and_gradient(tile, n, scratch.get()); });
}

void tile_divergence_gradient(Tensor student, Tensor teacher, std::optional<double> student_tanh_scale,
                              std::optional<Tensor> teacher_is_delta, std::optional<Tensor> target_ids, double beta,
                              Tensor statistics, std::optional<Tensor> weight, std::optional<Tensor> logprob_weight) {
  const OptionalFloat student_softcap(student_tanh_scale), teacher_softcap(std::nullopt);
  STD_TORCH_CHECK(!logprob_weight.has_value() || target_ids.has_value(), "logprob_weight needs target_ids");
  DivergenceTile tile = divergence_tile(student, teacher, student_softcap, teacher_softcap, teacher_is_delta,
                                        target_ids, beta, statistics, -1);
  tile.weight = floats(weight, "weight", tile.rows);
  tile.logprob_weight = floats(logprob_weight, "logprob_weight", tile.rows);
  for_each_piece(tile.rows, [&](int64_t n) { kernels().tile_divergence_gradient(tile, n); });
}

void scale_rows(Tensor rows, Tensor scale, Tensor out) {
  const float* data = tile_data(rows, "rows");
  check_matrix(out, "out");
  const int64_t height = rows.size(0), width = rows.size(1), stride = rows.stride(0), out_stride = out.stride(0);
  STD_TORCH_CHECK(out.size(0) == height && out.size(1) == width, "out must have the shape of rows");
  const float* factors = floats(scale, "scale", height);
  const Storage storage = storage_of(out, "out");
  STD_TORCH_CHECK(storage != Storage::kFloat64, "out must be float32, bfloat16 or float16");
  char* target = static_cast<char*>(out.mutable_data_ptr());
  const int64_t size = bytes_of(storage);
  for_each_piece(height, [&](int64_t n) {
    kernels().scale_row(data + n * stride, factors[n], width, target + n * out_stride * size, storage);
  });
}

void vector_math(std::string function, Tensor x, Tensor out) {
  const float* data = floats(x, "x", x.numel());
  float* target = floats(out, "out", x.numel());
  const Kernels& k = kernels();
  void (*map)(const float*, int64_t, float*) = function == "exp"     ? k.exp
                                               : function == "log"   ? k.log
                                               : function == "expm1" ? k.expm1
                                               : function == "tanh"  ? k.tanh
                                                                     : nullptr;
  STD_TORCH_CHECK(map != nullptr, "function must be exp, log, expm1 or tanh, got ", function);
  map(data, x.numel(), target);
}

}  // namespace
}  // namespace unisd

STABLE_TORCH_LIBRARY_IMPL(unisd, CPU, m) {
  m.impl("tile_softmax_", UNISD_BOX(&unisd::tile_softmax));
  m.impl("tile_logprob_gradient_", UNISD_BOX(&unisd::tile_logprob_gradient));
  m.impl("tile_divergence_", UNISD_BOX(&unisd::tile_divergence));
  m.impl("tile_divergence_gradient_", UNISD_BOX(&unisd::tile_divergence_gradient));
  m.impl("scale_rows", UNISD_BOX(&unisd::scale_rows));
  m.impl("vector_math", UNISD_BOX(&unisd::vector_math));
}
