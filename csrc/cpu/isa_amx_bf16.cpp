// The kernels for the instruction set "amx_bf16": "avx512_bf16" with tiles for its products; chosen at run time (dispatch.cpp).
#if defined(__x86_64__)

// Everything from the standard library first: what comes after the pragma may not run on other processors.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")
#endif
#define UNISD_ISA_AVX512
#define UNISD_ISA_VNNI
#define UNISD_ISA_BF16
#define UNISD_ISA_AMX
#define UNISD_ISA amx_bf16
#define UNISD_ISA_NAME "amx_bf16"
#define UNISD_ISA_BASE avx512
#include "isa_products.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
