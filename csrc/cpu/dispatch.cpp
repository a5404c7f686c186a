// Which instruction set runs: the widest this processor has.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu_features.h"
#include "kernels.h"

namespace unisd {

namespace {

const Kernels* find(const std::string& name) {
#if defined(__x86_64__)
  const CpuFeatures has = detect_cpu_features();
  const bool widest = name.empty();
  if ((widest || name == "amx_bf16") && has.amx_bf16 && has.avx512_bf16 && request_amx()) return &amx_bf16::kernels();
  if (((widest && !has.slow_bf16) || name == "avx512_bf16") && has.avx512_bf16) return &avx512_bf16::kernels();
  if ((widest || name == "avx512_vnni") && has.avx512_vnni) return &avx512_vnni::kernels();
  if ((widest || name == "avx512") && has.avx512) return &avx512::kernels();
  if ((widest || name == "avx2") && has.avx2) return &avx2::kernels();
#elif defined(__aarch64__)
  if (name.empty() || name == "neon") return &neon::kernels();
#endif
  if (name.empty() || name == "scalar") return &scalar::kernels();
  return nullptr;
}

const Kernels& choose() {
  const char* wanted = std::getenv("UNISD_CPU_ISA");
  const std::string name = wanted == nullptr ? "" : wanted;
  const Kernels* found = find(name);
  if (found == nullptr)
    throw std::runtime_error("UNISD_CPU_ISA=" + name +
                             ": not an instruction set this processor has; it takes scalar, avx2, avx512, "
                             "avx512_vnni, avx512_bf16 or amx_bf16 on x86-64, scalar or neon on aarch64");
  return *found;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace unisd

// For Python (unisd_kernels/backends/extension.py): the name of the instruction set, or null if UNISD_CPU_ISA cannot be
// had.
extern "C" __attribute__((visibility("default"))) const char* unisd_cpu_isa() {
  try {
    return unisd::kernels().name;
  } catch (const std::runtime_error&) {
    return nullptr;
  }
}
