// The table of kernels (kernels.h) of one instruction set. Included once by each isa_*.cpp, after its target pragma.
#pragma once

#include "divergence.h"
#include "ema.h"
#include "int8_score.h"
#include "product.h"
#include "rows.h"

namespace unisd {
namespace UNISD_ISA {

namespace {

template <Vec (*function)(Vec)>
void map(const float* x, int64_t n, float* out) {
  for_each_vector(
      n, [&](int64_t i) UNISD_INLINE { function(Vec::load(x + i)).store(out + i); },
      [&](int64_t i, int lanes) UNISD_INLINE {
        function(Vec::load_part(x + i, lanes, 1.0f)).store_part(out + i, lanes);
      });
}

}  // namespace

const Kernels& kernels() {
  static const Kernels table = {
      UNISD_ISA_NAME,
      false,
      Singles::panel,
      Singles::panel,
      packed_size,
      [](Matrix hidden, int64_t rows, int64_t width, bool, float* packed) { pack_rows(hidden, rows, width, packed); },
      logits_of<Singles>,
      score_of<Singles>,
      false,
      score_codes,
      backward_of<Singles>,
      pack_columns<Singles>,
      [](const float* gradient, int64_t gradient_stride, int64_t rows, const float* packed, Storage, int64_t width,
         float scale, int64_t begin, int64_t end, bool accumulate, float* out, int64_t out_stride) {
        weight_gradient_of<Singles>(gradient, gradient_stride, rows, packed, width, scale, begin, end, accumulate, out,
                                    out_stride);
      },
      sum_rows,
      tile_softmax,
      tile_logprob_gradient,
      tile_divergence,
      tile_divergence_gradient,
      tile_divergence_and_gradient,
      scale_row,
      ema,
      map<exp<Vec>>,
      map<log<Vec>>,
      map<expm1<Vec>>,
      map<tanh<Vec>>,
  };
  return table;
}

}  // namespace UNISD_ISA
}  // namespace unisd
