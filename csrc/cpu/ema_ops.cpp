// The moving average over many tensors: the list is one piece of work, cut into spans that do not depend on the number
// of threads (the random bits are a function of seed, tensor and element, so neither do the results).
#include <torch/csrc/stable/library.h>

#include <vector>

#include "../ema_arguments.h"
#include "arguments.h"
#include "boxed.h"
#include "parallel.h"

namespace unisd {
namespace {

constexpr int64_t kSpan = 1 << 16;

struct Span {
  size_t tensor;
  int64_t begin, end;
};

void ema_update(std::vector<Tensor> teacher, std::vector<Tensor> student, double decay,
                std::vector<Tensor> compensation, bool stochastic, int64_t seed) {
  check_ema_arguments(teacher, student, decay, compensation, stochastic);
  std::vector<EmaTensor> tensors;
  std::vector<Span> spans;
  for (size_t i = 0; i < teacher.size(); ++i) {
    const int64_t size = teacher[i].numel();
    STD_TORCH_CHECK(student[i].numel() == size, "tensor ", i, ": teacher has ", size, " elements but student has ",
                    student[i].numel());
    STD_TORCH_CHECK(teacher[i].is_contiguous() && student[i].is_contiguous(), "tensor ", i, " must be contiguous");
    EmaTensor tensor{teacher[i].mutable_data_ptr(),
                     student[i].const_data_ptr(),
                     nullptr,
                     storage_of(teacher[i], "teacher"),
                     storage_of(student[i], "student"),
                     size,
                     rounding_key(static_cast<uint64_t>(seed), static_cast<uint32_t>(i))};
    if (is_16_bit(tensor.teacher_storage) && !stochastic) {
      STD_TORCH_CHECK(!compensation.empty(), "tensor ", i,
                      ": a 16-bit teacher needs compensation or stochastic rounding");
      STD_TORCH_CHECK(compensation[i].numel() == size && compensation[i].is_contiguous() &&
                          compensation[i].scalar_type() == teacher[i].scalar_type(),
                      "tensor ", i, ": compensation must be contiguous, of the teacher's shape and dtype");
      tensor.compensation = compensation[i].mutable_data_ptr();
    }
    tensors.push_back(tensor);
    for (int64_t begin = 0; begin < size; begin += kSpan)
      spans.push_back({i, begin, begin + kSpan < size ? begin + kSpan : size});
  }
  if (decay == 1.0) return;
  for_each_piece(static_cast<int64_t>(spans.size()), [&](int64_t i) {
    const Span& span = spans[static_cast<size_t>(i)];
    kernels().ema(tensors[span.tensor], span.begin, span.end, decay, stochastic);
  });
}

}  // namespace
}  // namespace unisd

STABLE_TORCH_LIBRARY_IMPL(unisd, CPU, m) { m.impl("ema_update_", UNISD_BOX(&unisd::ema_update)); }
