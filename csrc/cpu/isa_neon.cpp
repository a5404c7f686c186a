// The kernels for the instruction set "neon", which every aarch64 processor has; never timed, checked under emulation.
#if defined(__aarch64__)

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>

#include <arm_neon.h>

#define UNISD_ISA_NEON
#define UNISD_ISA neon
#define UNISD_ISA_NAME "neon"
#include "isa_table.h"

#endif  // __aarch64__
