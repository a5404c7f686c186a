// What one instruction set provides: plain functions on pointers, no torch. *_ops.cpp check arguments, split the work
// over threads and call them; tests/build/kernels calls them directly.
#pragma once

#include <cstdint>

#include "../ema_rounding.h"
#include "../storage.h"
#include "statistics.h"

namespace unisd {

// A row-major matrix; rows are contiguous.
struct Matrix {
  const void* data;
  int64_t stride;  // elements between rows
  Storage storage;
};

// Rows [N, H] of hidden states, transposed in panels so that one vector holds the same element of several rows, or the
// same pair of elements of 16 bits.
struct PackedRows {
  const float* data;
  int64_t rows, width;  // N and H
  bool pairs;
};

// The rows of a part's statistics: the largest logit, sum_j e^(z_j - largest), sum_j e^(z_j - largest) (z_j - largest),
// and the target's logit where the target lies in the part.
enum PartialScore { kPartMax = 0, kPartSum = 1, kPartMoment = 2, kPartTarget = 3, kPartialScores = 4 };

// Complete rows of student and teacher, each [rows, columns].
struct DivergenceTile {
  float* student;
  float* teacher;
  int64_t student_stride, teacher_stride, columns;
  const float* student_tanh_scale;  // null: no cap
  const float* teacher_tanh_scale;
  const bool* teacher_is_delta;  // [rows]: does the teacher's row hold z_t - z_s? Null: none does
  const int64_t* target_ids;  // [rows] or null; for the gradient -1 where the target is not in the tile
  double beta;
  bool want_entropy;
  bool has_log_sums;  // are the maxima and log-sums in `statistics` already, and the tiles logits?
  float* statistics;  // [kDivergenceStatistics, rows]
  int64_t rows;
  const float* weight;          // [rows] or null, for the gradient
  const float* logprob_weight;  // [rows] or null, for the gradient
};

// Complete rows [rows, columns], overwritten by their gradient; the other pointers are [rows], weights null for none.
struct LogprobTile {
  float* tile;
  int64_t stride, columns;
  const float* tanh_scale;  // null: no cap
  const float* logsumexp;
  const int64_t* target_ids;
  const float* logprob_weight;
  const float* logsumexp_weight;
  const float* entropy;
  const float* entropy_weight;
};

// A head for scores from int8 codes, [columns] first everywhere (unisd_kernels/certified/int8_head.py).
struct CodedHead {
  const int8_t* codes;     // [columns, 4 * quads]
  const float* scales;     // of the codes
  const int32_t* offsets;  // 128 times the sum of a column's codes: the rows' codes are multiplied with 128 added
  const float* lead;       // [columns, directions], multiplied as floats
  int64_t columns, quads, directions;
  Matrix weight;  // [columns, width], for exact logits
  int64_t width;
  const float* bias;  // or null
  float scale;
  const float* tanh_scale;  // null: no cap
};

struct CodedRows {
  const int8_t* codes;  // [count, 4 * quads]
  const float* scales;
  const float* along;  // [count, directions]
  const float* floor;  // columns whose approximate logit is not above get no exact one
  Matrix hidden;       // [count, width]
  int64_t count;
};

// [count] each. With l the largest approximate logit z of a row: sums of exp(z - l) over all columns (total), those without
// an exact logit (rest), their squares, and that of exact logits over the others (sure). No z of `rest` is above `floor`.
struct CodeSums {
  float *highest, *total, *rest, *squares, *sure, *floor;
};

// One tensor of the moving average.
struct EmaTensor {
  void* teacher;
  const void* student;
  void* compensation;  // null: none
  Storage teacher_storage, student_storage;
  int64_t size;
  RoundingKey key;
};

struct Kernels {
  const char* name;
  // Are bfloat16 operands multiplied as they are? Else they are widened. A product of such a weight with a gradient rounds
  // the gradient to bfloat16 then.
  bool multiplies_pairs;

  // Rows of one panel of PackedRows: panels are this high, the last may be lower by whole vectors.
  int panel_rows;
  int pair_panel_rows;  // the same of rows that are packed in pairs
  int64_t (*packed_size)(int64_t rows, int64_t steps);  // in floats; a step is one number or a pair
  // Packs in pairs: for bfloat16 rows of an even width and a bfloat16 weight, where `multiplies_pairs`.
  void (*pack_rows)(Matrix hidden, int64_t rows, int64_t width, bool pairs, float* packed);

  // Columns [begin, end) of scale * (hidden weight^T + bias) into out [N, V]; weight [V, H], bias [V] or null.
  void (*logits)(PackedRows hidden, Matrix weight, const float* bias, float scale, int64_t begin, int64_t end,
                 float* out, int64_t out_stride);
  // Statistics of the columns [begin, end) of all rows into `partial` [kPartialScores, N], with target_ids [N]; the
  // moment's row is left unwritten unless asked for.
  void (*score)(PackedRows hidden, Matrix weight, const float* bias, float scale, const float* tanh_scale,
                const int64_t* target_ids, bool want_entropy, int64_t begin, int64_t end, float* partial);
  // Are int8 codes multiplied by an instruction of their own? Else score_codes is slow.
  bool multiplies_int8;
  // Columns whose share of the sum so far is above the threshold get exact logits; rows do not depend on each other.
  void (*score_codes)(const CodedRows& rows, const CodedHead& head, float log_threshold, const CodeSums& out);
  // Columns [begin, end) of gradient weight into out [rows, H]; gradient [rows, length] and weight [length, H], summed
  // over `length` in its order.
  void (*backward)(const float* gradient, int64_t gradient_stride, int64_t rows, int64_t length, Matrix weight,
                   int64_t begin, int64_t end, float* out, int64_t out_stride);
  // The hidden states' columns in panels, for weight_gradient: packed_size(width, steps) floats, of the
  // rows in steps.
  void (*pack_columns)(Matrix hidden, int64_t rows, int64_t width, float* packed);
  // Rows [begin, end) of scale * gradient^T hidden into `out` [V, H], or onto it, with gradient [rows, V]; `storage` is
  // that of the hidden states that were packed.
  void (*weight_gradient)(const float* gradient, int64_t gradient_stride, int64_t rows, const float* packed,
                          Storage storage, int64_t width, float scale, int64_t begin, int64_t end, bool accumulate,
                          float* out, int64_t out_stride);
  // out [width] = scale * (part + (part + stride) + ...), in this order.
  void (*sum_rows)(const float* part, int64_t stride, int64_t parts, int64_t width, float scale, float* out);

  // Row n of a tile: statistics, and the gradient in its place.
  void (*tile_softmax)(float* row, int64_t columns, const float* tanh_scale, int64_t target_id, float* logsumexp,
                       float* target_logit);
  void (*tile_logprob_gradient)(const LogprobTile& tile, int64_t n);
  void (*tile_divergence)(const DivergenceTile& tile, int64_t n);
  void (*tile_divergence_gradient)(const DivergenceTile& tile, int64_t n);
  // Both with weights of one, while the row is near: `scratch` has room for 2 * columns.
  void (*tile_divergence_and_gradient)(const DivergenceTile& tile, int64_t n, float* scratch);

  // out [width] = scale * row, rounded to `storage`, which is not float64.
  void (*scale_row)(const float* row, float scale, int64_t width, void* out, Storage storage);
  // Elements [begin, end) of the tensor.
  void (*ema)(const EmaTensor& tensor, int64_t begin, int64_t end, double decay, bool stochastic);

  // out [n] of x [n]; for the tests of vec_math.h.
  void (*exp)(const float* x, int64_t n, float* out);
  void (*log)(const float* x, int64_t n, float* out);
  void (*expm1)(const float* x, int64_t n, float* out);
  void (*tanh)(const float* x, int64_t n, float* out);
};

namespace scalar {
const Kernels& kernels();
}
#if defined(__x86_64__)
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}
namespace avx512_vnni {
const Kernels& kernels();
}
namespace avx512_bf16 {
const Kernels& kernels();
}
namespace amx_bf16 {
const Kernels& kernels();
}
#elif defined(__aarch64__)
namespace neon {
const Kernels& kernels();
}
#endif

// Chosen at first use: the widest set this processor has, or what UNISD_CPU_ISA names. Throws std::runtime_error if
// that is unknown or the processor lacks it.
const Kernels& kernels();

}  // namespace unisd
