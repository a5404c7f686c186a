// What the processor has and the operating system keeps, asked of cpuid itself: a compiler's __builtin_cpu_supports
// answers 0 where the runtime library it is linked with is another compiler's.
#pragma once

#if defined(__x86_64__)

#include <cpuid.h>
#include <cstdint>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace unisd {

struct CpuFeatures {
  bool avx2 = false;         // with FMA and F16C
  bool avx512 = false;       // F, BW, DQ and VL, with all of `avx2`
  bool avx512_vnni = false;  // with all of `avx512`
  bool avx512_bf16 = false;  // with all of `avx512_vnni`, which no processor with it lacks
  // Is its vdpbf16ps slower than the float32 products it stands for? Intel's is.
  bool slow_bf16 = false;
  bool amx_bf16 = false;  // tiles and their bf16 product, with all of `avx512`; see request_amx()
};

// Static, as all functions here: no other translation unit's target may stand in for this one's.
static inline CpuFeatures detect_cpu_features() {
  const auto bit = [](uint32_t word, int i) { return ((word >> i) & 1u) != 0; };
  CpuFeatures found;
  uint32_t a = 0, b = 0, c = 0, d = 0;
  // "GenuineIntel"
  if (__get_cpuid(0, &a, &b, &c, &d) == 0) return found;
  found.slow_bf16 = b == 0x756e6547u && d == 0x49656e69u && c == 0x6c65746eu;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0) return found;
  const bool fma = bit(c, 12), osxsave = bit(c, 27), avx = bit(c, 28), f16c = bit(c, 29);
  if (!osxsave || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return found;
  // What xsave would write in this process: XCR0, by xgetbv, which needs no target option as bytes.
  uint32_t kept = 0, high = 0;
  __asm__ volatile(".byte 0x0f, 0x01, 0xd0" : "=a"(kept), "=d"(high) : "c"(0));
  const auto keeps = [&](uint32_t mask) { return (kept & mask) == mask; };
  const bool keeps_ymm = keeps(0x6), keeps_zmm = keeps(0xe6), keeps_tiles = keeps(0x60000);

  found.avx2 = keeps_ymm && avx && fma && f16c && bit(b, 5);
  found.avx512 = found.avx2 && keeps_zmm && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);
  found.avx512_vnni = found.avx512 && bit(c, 11);
  found.amx_bf16 = found.avx512 && keeps_tiles && bit(d, 24) && bit(d, 22);
  uint32_t a1 = 0, b1 = 0, c1 = 0, d1 = 0;
  // `a` of subleaf 0 is the last subleaf.
  if (a >= 1 && __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1) != 0) found.avx512_bf16 = found.avx512_vnni && bit(a1, 5);
  return found;
}

// Linux gives tiles only to a process that has asked for them, once for all its threads. False: it may not use them.
// To be called where kernels with tiles are chosen, before the first of them runs.
static inline bool request_amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace unisd

#endif  // __x86_64__
