// The lists and settings of ema_update_ checked, for both devices.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

namespace unisd {

inline void check_ema_arguments(const std::vector<torch::stable::Tensor>& teacher,
                                const std::vector<torch::stable::Tensor>& student, double decay,
                                const std::vector<torch::stable::Tensor>& compensation, bool stochastic) {
  STD_TORCH_CHECK(teacher.size() == student.size(), "teacher has ", teacher.size(), " tensors but student has ",
                  student.size());
  STD_TORCH_CHECK(compensation.empty() || compensation.size() == teacher.size(), "compensation has ",
                  compensation.size(), " tensors but teacher has ", teacher.size());
  STD_TORCH_CHECK(compensation.empty() || !stochastic, "give either stochastic rounding or compensation, not both");
  STD_TORCH_CHECK(decay >= 0.0 && decay <= 1.0, "decay must be in [0, 1], got ", decay);
}

}  // namespace unisd
