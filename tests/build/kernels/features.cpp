// Prints the names of what cpu_features.h finds, for test_cpu_features.py; with an argument, whether tiles are granted.
#include "../../../csrc/cpu/cpu_features.h"

#include <cstdio>

int main(int arguments, char**) {
#if defined(__x86_64__)
  if (arguments > 1) {
    std::puts(unisd::request_amx() ? "granted" : "refused");
    return 0;
  }
  const unisd::CpuFeatures has = unisd::detect_cpu_features();
  if (has.avx2) std::puts("avx2");
  if (has.avx512) std::puts("avx512");
  if (has.avx512_bf16) std::puts("avx512_bf16");
  if (has.avx512_vnni) std::puts("avx512_vnni");
  if (has.amx_bf16) std::puts("amx_bf16");
#endif
  return 0;
}
