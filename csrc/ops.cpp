// The operations `torch.ops.unisd.*`: every schema, in one place. Implementations register themselves for their device
// (cpu/*_ops.cpp, cuda/ema_ops.cpp); fake ones for torch.compile are in unisd_kernels/backends/extension.py. Autograd
// stays in Python.
//
// Conventions. Tiles are float32 [rows, columns] with contiguous rows (any stride between rows) and arrive as
// `product_scale * (h W^T + b)`; `tanh_scale` is c / tau with a soft cap c, else absent, and the logit is then
// `tanh_scale * tanh(tile)`. Statistics are float32 [rows]. Ids are int64. Results go to arguments, so nothing here
// allocates a tensor.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(unisd, m) {
  // Overwrite complete rows with d logsumexp / d (a x / tau).
  m.def(
      "tile_softmax_(Tensor(a!) tile, float? tanh_scale, Tensor target_ids, Tensor(b!) logsumexp, "
      "Tensor(c!) target_logits) -> ()");
  // Overwrite complete rows with the gradient of sum_n weight_n statistic_n with respect to a x / tau.
  m.def(
      "tile_logprob_gradient_(Tensor(a!) tile, float? tanh_scale, Tensor logsumexp, Tensor target_ids, "
      "Tensor? logprob_weight, Tensor? logsumexp_weight, Tensor? entropy, Tensor? entropy_weight) -> ()");
  // Statistics of complete rows into `statistics` [kDivergenceStatistics, rows] (cpu/statistics.h). With a soft cap the
  // tiles are overwritten by their logits. `teacher_is_delta` (bool [rows]): these rows of the teacher's tile hold
  // z_t - z_s. `with_gradient`: the student's tile is overwritten by the gradient of sum_n D_n with respect to a x / tau.
  // `has_log_sums`: the tiles are logits, and maxima, log-sums and the log-ratio are there: of more columns than these,
  // over which the other statistics then are sums.
  m.def(
      "tile_divergence_(Tensor(a!) student, Tensor(b!) teacher, float? student_tanh_scale, float? teacher_tanh_scale, "
      "Tensor? teacher_is_delta, Tensor? target_ids, float beta, bool want_entropy, Tensor(c!) statistics, "
      "bool with_gradient=False, bool has_log_sums=False) -> ()");
  // After tile_divergence_ without a gradient: overwrite the student's tile with the gradient of
  // sum_n weight_n D_n + logprob_weight_n logp_n(y_n) with respect to a x / tau. No weight is a weight of one; a target
  // of -1 is in no column.
  m.def(
      "tile_divergence_gradient_(Tensor(a!) student, Tensor teacher, float? student_tanh_scale, "
      "Tensor? teacher_is_delta, Tensor? target_ids, float beta, Tensor statistics, Tensor? weight, "
      "Tensor? logprob_weight) -> ()");
  // out[n] = scale[n] * rows[n] in float32, then rounded to out's dtype.
  m.def("scale_rows(Tensor rows, Tensor scale, Tensor(a!) out) -> ()");

  // The matrix products with their epilogue.
  // Log-sum-exp, target's logit and entropy of the rows of scale * (hidden weight^T + bias), without that tile.
  m.def(
      "linear_score(Tensor hidden, Tensor weight, Tensor? bias, float scale, float? tanh_scale, Tensor target_ids, "
      "Tensor(a!) logsumexp, Tensor(b!) target_logits, Tensor(c!)? entropy) -> ()");
  // The same rows from int8 codes of `hidden` and `weight` (cpu/kernels.h: CodedRows, CodedHead), into `sums` [6, rows],
  // the fields of CodeSums in their order.
  m.def(
      "int8_score(Tensor codes, Tensor scales, Tensor along, Tensor floor, Tensor hidden, Tensor head_codes, "
      "Tensor head_scales, Tensor head_offsets, Tensor head_lead, Tensor weight, Tensor? bias, float scale, "
      "float? tanh_scale, float log_threshold, Tensor(a!) sums) -> ()");
  // out [rows, V] = scale * (hidden weight^T + bias)
  m.def("linear_logits(Tensor hidden, Tensor weight, Tensor? bias, float scale, Tensor(a!) out) -> ()");
  // out [rows, H] = scale * gradient weight
  m.def("linear_backward(Tensor gradient, Tensor weight, float scale, Tensor(a!) out) -> ()");
  // out [V, H] = scale * gradient^T hidden, or that much more
  m.def(
      "linear_weight_gradient(Tensor gradient, Tensor hidden, float scale, bool accumulate, Tensor(a!) out) -> ()");
  // exp, log, expm1 or tanh of a float32 tensor, as the kernels compute them; for their tests.
  m.def("vector_math(str function, Tensor x, Tensor(a!) out) -> ()");

  // The one operation that has a CUDA implementation too.
  // teacher = decay teacher + (1 - decay) student over all tensors (ema_average.h). 16-bit teachers: `compensation`
  // (one tensor each) or `stochastic` rounding from `seed` (ema_rounding.h).
  m.def(
      "ema_update_(Tensor(a!)[] teacher, Tensor[] student, float decay, Tensor(b!)[] compensation, bool stochastic, "
      "int seed) -> ()");
}
