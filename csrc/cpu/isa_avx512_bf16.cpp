// The kernels for the instruction set "avx512_bf16": "avx512" whose products take bfloat16 operands as they are; chosen at run time (dispatch.cpp).
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
#define UNISD_ISA avx512_bf16
#define UNISD_ISA_NAME "avx512_bf16"
#define UNISD_ISA_BASE avx512
#include "isa_products.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
