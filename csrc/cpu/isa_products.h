// The table of an instruction set that is another one (UNISD_ISA_BASE) but for products of int8 codes, and of bfloat16
// operands where it has UNISD_ISA_BF16. Included once by its isa_*.cpp, after its target pragma.
#pragma once

#include "int8_score.h"
#include "product.h"

namespace unisd {
namespace UNISD_ISA {

namespace {

const Kernels& base() { return UNISD_ISA_BASE::kernels(); }

#if defined(UNISD_ISA_BF16)
void pack_rows_either(Matrix hidden, int64_t rows, int64_t width, bool pairs, float* packed) {
  if (!pairs) return base().pack_rows(hidden, rows, width, false, packed);
  pack_pairs(hidden, rows, width, packed);
}

void logits(PackedRows hidden, Matrix weight, const float* bias, float scale, int64_t begin, int64_t end, float* out,
            int64_t out_stride) {
  if (!hidden.pairs) return base().logits(hidden, weight, bias, scale, begin, end, out, out_stride);
  logits_of<Pairs>(hidden, weight, bias, scale, begin, end, out, out_stride);
}

void score(PackedRows hidden, Matrix weight, const float* bias, float scale, const float* tanh_scale,
           const int64_t* target_ids, bool want_entropy, int64_t begin, int64_t end, float* partial) {
  if (!hidden.pairs)
    return base().score(hidden, weight, bias, scale, tanh_scale, target_ids, want_entropy, begin, end, partial);
  score_of<Pairs>(hidden, weight, bias, scale, tanh_scale, target_ids, want_entropy, begin, end, partial);
}

void backward(const float* gradient, int64_t gradient_stride, int64_t rows, int64_t length, Matrix weight,
              int64_t begin, int64_t end, float* out, int64_t out_stride) {
  if (weight.storage != Storage::kBFloat16)
    return base().backward(gradient, gradient_stride, rows, length, weight, begin, end, out, out_stride);
  backward_of<Pairs>(gradient, gradient_stride, rows, length, weight, begin, end, out, out_stride);
}

void pack_columns_either(Matrix hidden, int64_t rows, int64_t width, float* packed) {
  if (hidden.storage != Storage::kBFloat16) return base().pack_columns(hidden, rows, width, packed);
  pack_columns<Pairs>(hidden, rows, width, packed);
}

void weight_gradient(const float* gradient, int64_t gradient_stride, int64_t rows, const float* packed, Storage storage,
                     int64_t width, float scale, int64_t begin, int64_t end, bool accumulate, float* out,
                     int64_t out_stride) {
  if (storage != Storage::kBFloat16)
    return base().weight_gradient(gradient, gradient_stride, rows, packed, storage, width, scale, begin, end,
                                  accumulate, out, out_stride);
  weight_gradient_of<Pairs>(gradient, gradient_stride, rows, packed, width, scale, begin, end, accumulate, out,
                            out_stride);
}
#endif

}  // namespace

const Kernels& kernels() {
  static const Kernels table = [] {
    Kernels set = base();
    set.name = UNISD_ISA_NAME;
    set.multiplies_int8 = true;
    set.score_codes = score_codes;
#if defined(UNISD_ISA_BF16)
    set.multiplies_pairs = true;
    set.pair_panel_rows = Pairs::panel;
    set.pack_rows = pack_rows_either;
    set.logits = logits;
    set.score = score;
    set.backward = backward;
    set.pack_columns = pack_columns_either;
    set.weight_gradient = weight_gradient;
#endif
    return set;
  }();
  return table;
}

}  // namespace UNISD_ISA
}  // namespace unisd
