// The kernels for the instruction set "avx2"; chosen at run time (dispatch.cpp).
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
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define UNISD_ISA_AVX2
#define UNISD_ISA avx2
#define UNISD_ISA_NAME "avx2"
#include "isa_table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
