// unisd::ema_update_ for CUDA: the tensors checked, grouped by their types, and packed into launches. Schema:
// csrc/ops.cpp.
#include <torch/csrc/stable/library.h>

#include <climits>
#include <map>
#include <utility>
#include <vector>

#include "../ema_arguments.h"
#include "../storage_of.h"
#include "ema.h"
#include "stream.h"

namespace unisd::cuda {
namespace {

using torch::stable::Tensor;

void check_device(const Tensor& tensor, const char* name, const Tensor& first) {
  STD_TORCH_CHECK(tensor.is_cuda(), name, " must be on a CUDA device");
  STD_TORCH_CHECK(tensor.get_device_index() == first.get_device_index(), name, " is on CUDA device ",
                  tensor.get_device_index(), ", the first argument on ", first.get_device_index());
}

void check_same_shape(const Tensor& tensor, const char* name, const Tensor& teacher, size_t position) {
  const auto ours = tensor.sizes(), theirs = teacher.sizes();
  bool same = ours.size() == theirs.size();
  for (size_t d = 0; same && d < ours.size(); ++d) same = ours[d] == theirs[d];
  STD_TORCH_CHECK(same, "tensor ", position, ": teacher and ", name, " must have the same shape, got ",
                  teacher.numel(), " elements in ", teacher.dim(), " dimensions and ", tensor.numel(), " in ",
                  tensor.dim());
  STD_TORCH_CHECK(tensor.is_contiguous(), "tensor ", position, ": ", name, " must be contiguous");
}

// Tensors of equal types waiting for a launch.
class Batch {
 public:
  Batch(Storage teacher, Storage student, EmaRounding rounding, double decay, uint64_t seed, cudaStream_t stream)
      : teacher_(teacher), student_(student), rounding_(rounding), decay_(decay), seed_(seed), stream_(stream) {}

  void add(void* teacher, const void* student, void* compensation, int64_t numel, size_t position) {
    const int64_t blocks = (numel + kEmaBlockElements - 1) / kEmaBlockElements;
    STD_TORCH_CHECK(blocks <= INT_MAX, "tensor ", position, " is too large: ", numel, " elements");
    if (tensors_.count == kEmaTensors || tensors_.first_block[tensors_.count] > INT_MAX - blocks) launch();
    const int32_t i = tensors_.count++;
    tensors_.teacher[i] = teacher;
    tensors_.student[i] = student;
    tensors_.compensation[i] = compensation;
    tensors_.numel[i] = numel;
    tensors_.position[i] = static_cast<int32_t>(position);
    tensors_.first_block[i + 1] = tensors_.first_block[i] + static_cast<int32_t>(blocks);
  }

  void launch() {
    if (tensors_.count == 0) return;
    StreamScope::check(launch_ema(tensors_, teacher_, student_, rounding_, decay_, seed_, stream_), "ema_update_");
    tensors_ = {};
  }

 private:
  Storage teacher_, student_;
  EmaRounding rounding_;
  double decay_;
  uint64_t seed_;
  cudaStream_t stream_;
  EmaTensors tensors_{};
};

void ema_update_(std::vector<Tensor> teacher, std::vector<Tensor> student, double decay,
                 std::vector<Tensor> compensation, bool stochastic, int64_t seed) {
  check_ema_arguments(teacher, student, decay, compensation, stochastic);

  // Everything is checked before the first launch, so that a refused call has changed nothing.
  for (size_t i = 0; i < teacher.size(); ++i) {
    check_device(teacher[i], "teacher", teacher[0]);
    check_device(student[i], "student", teacher[0]);
    const Storage type = storage_of(teacher[i], "teacher");
    storage_of(student[i], "student");
    check_same_shape(teacher[i], "teacher", teacher[i], i);
    check_same_shape(student[i], "student", teacher[i], i);
    STD_TORCH_CHECK(!is_16_bit(type) || stochastic || !compensation.empty(), "tensor ", i,
                    ": a 16-bit teacher needs compensation or stochastic rounding, got neither");
    if (!compensation.empty() && is_16_bit(type)) {
      check_device(compensation[i], "compensation", teacher[0]);
      check_same_shape(compensation[i], "compensation", teacher[i], i);
      STD_TORCH_CHECK(compensation[i].scalar_type() == teacher[i].scalar_type(), "tensor ", i,
                      ": compensation must have the teacher's dtype, got scalar types ",
                      static_cast<int>(compensation[i].scalar_type()), " and ",
                      static_cast<int>(teacher[i].scalar_type()));
    }
  }

  if (decay == 1.0) return;
  const StreamScope scope(teacher[0]);
  std::map<std::pair<Storage, Storage>, Batch> batches;
  for (size_t i = 0; i < teacher.size(); ++i) {
    if (teacher[i].numel() == 0) continue;
    const Storage type = storage_of(teacher[i], "teacher"), source = storage_of(student[i], "student");
    const bool compensated = is_16_bit(type) && !compensation.empty();
    const EmaRounding rounding = !is_16_bit(type) ? EmaRounding::kPlain
                                 : compensated    ? EmaRounding::kCompensated
                                                  : EmaRounding::kStochastic;
    auto& batch = batches
                      .try_emplace({type, source}, type, source, rounding, decay, static_cast<uint64_t>(seed),
                                   scope.stream())
                      .first->second;
    batch.add(teacher[i].mutable_data_ptr(), student[i].const_data_ptr(),
              compensated ? compensation[i].mutable_data_ptr() : nullptr, teacher[i].numel(), i);
  }
  for (auto& batch : batches) batch.second.launch();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(unisd, CUDA, m) { m.impl("ema_update_", TORCH_BOX(&ema_update_)); }

}  // namespace unisd::cuda
