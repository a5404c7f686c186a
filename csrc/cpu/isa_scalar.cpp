// The kernels for the instruction set "scalar"; chosen at run time (dispatch.cpp).
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>

#define UNISD_ISA scalar
#define UNISD_ISA_NAME "scalar"
#include "isa_table.h"
