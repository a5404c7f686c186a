// Matrix products with a head's weight, float32 accumulation, and what is fused to them.
//
// A library product packs the weight at every call. For a chunk of a hundred rows, all that a memory bound leaves
// room for at a vocabulary of 150k, packing is a large part of the work. Here the weight is read where it lies, once a
// chunk: its elements are broadcast against vectors of hidden states that were transposed beforehand (logits, scores),
// or its rows are the vectors and the gradient's elements are broadcast (backward).
#pragma once

#include "gemm.h"

namespace unisd {
namespace UNISD_ISA {

// Whether rows begin and end with whole cache lines of vectors, which may then be written past the cache: that spares
// reading what is overwritten.
inline bool has_whole_lines(const float* out, int64_t stride) {
  constexpr int64_t line = 16;
  return Vec::width == line && stride % line == 0 && reinterpret_cast<uintptr_t>(out) % (line * sizeof(float)) == 0;
}
inline UNISD_INLINE void put(Vec value, float* target, bool past_the_cache) {
  past_the_cache ? value.stream(target) : value.store(target);
}

// A tile of more floats than this leaves the second-level cache anyway.
constexpr int64_t kStreamedFloats = 1 << 20;

template <class Operand>
inline void logits_of(PackedRows hidden, Matrix weight, const float* bias, float scale, int64_t begin, int64_t end,
                      float* out, int64_t out_stride) {
  const int64_t steps = hidden.width / Operand::elements;
  [[maybe_unused]] const Unit<Operand> unit{};
  Buffer product(kBlock * Operand::panel), wide(widened_size<Operand>(weight, hidden.width));
  const Vec factor = Vec::set(scale);
  // A tile too large for the cache goes to memory past it.
  const bool streamed = hidden.rows * out_stride >= kStreamedFloats && has_whole_lines(out + begin, out_stride);
  for (int64_t v = begin; v < end; v += kBlock) {
    const int64_t columns = at_most(kBlock, end - v);
    const auto block = weight_block<Operand>(weight, hidden.width, v, v + columns, end, &wide);
    const float* panel = hidden.data;
    for (int64_t start = 0; start < hidden.rows; start += Operand::panel) {
      const int vectors = vectors_for<Operand>(hidden.rows - start);
      const int64_t height = vectors * Vec::width;
      block_product(panel, vectors, steps, block, columns, start == 0, product.data(), [] {});
      panel += height * steps;
      // [columns][rows] to [rows][columns], a square of vectors at a time, all columns of a few rows first.
      for (int64_t lane = 0; lane < height && start + lane < hidden.rows; lane += Vec::width) {
        const int64_t row = start + lane;
        const int down = static_cast<int>(at_most(Vec::width, hidden.rows - row));
        for (int64_t i = 0; i < columns; i += Vec::width) {
          const int across = static_cast<int>(at_most(Vec::width, columns - i));
          const Vec offset = bias == nullptr ? Vec::set(0.0f) : factor * Vec::load_part(bias + v + i, across, 0.0f);
          Vec square[Vec::width];
          for (int j = 0; j < Vec::width; ++j)
            square[j] = j < across ? Vec::load(product.data() + (i + j) * height + lane) : Vec::set(0.0f);
          transpose(square);
          float* target = out + row * out_stride + v + i;
          for (int j = 0; j < down; ++j) {
            const Vec value = fma(square[j], factor, offset);
            if (across < Vec::width) {
              value.store_part(target + j * out_stride, across);
            } else {
              put(value, target + j * out_stride, streamed);
            }
          }
        }
      }
    }
  }
  if (streamed) order_streams();
}

// An online log-sum-exp whose lanes are rows: no logit leaves the first-level cache.
template <class Operand>
inline void score_of(PackedRows hidden, Matrix weight, const float* bias, float scale, const float* tanh_scale,
                     const int64_t* target_ids, bool want_entropy, int64_t begin, int64_t end, float* partial) {
  const int64_t steps = hidden.width / Operand::elements;
  [[maybe_unused]] const Unit<Operand> unit{};
  Buffer product(kBlock * Operand::panel), wide(widened_size<Operand>(weight, hidden.width));
  const int64_t padded = packed_size(hidden.rows, 1);
  Buffer state(3 * padded);
  float* highest = state.data();
  float* sums = highest + padded;
  float* moments = sums + padded;
  for (int64_t n = 0; n < padded; ++n) {
    highest[n] = -kInfinity;
    sums[n] = moments[n] = 0.0f;
  }
  float* target_logits = partial + kPartTarget * hidden.rows;
  const Vec lowest = Vec::set(-1e30f), zero = Vec::set(0.0f), minus_infinity = Vec::set(-kInfinity);

  for (int64_t v = begin; v < end; v += kBlock) {
    const int64_t columns = at_most(kBlock, end - v);
    const auto block = weight_block<Operand>(weight, hidden.width, v, v + columns, end, &wide);
    const float* panel = hidden.data;
    for (int64_t start = 0; start < hidden.rows; start += Operand::panel) {
      const int vectors = vectors_for<Operand>(hidden.rows - start);
      const int64_t height = vectors * Vec::width;
      block_product(panel, vectors, steps, block, columns, start == 0, product.data(), [] {});
      panel += height * steps;
      for (int64_t lane = 0; lane < height; lane += Vec::width) {
        float* column = product.data() + lane;
        Vec block_max = minus_infinity, not_finite = zero;
        for (int64_t i = 0; i < columns; ++i) {
          const float b = bias == nullptr ? 0.0f : scale * bias[v + i];
          Vec z = fma(Vec::load(column + i * height), Vec::set(scale), Vec::set(b));
          not_finite = fma(z, zero, not_finite);
          if (tanh_scale != nullptr) z = Vec::set(*tanh_scale) * tanh(z);
          z.store(column + i * height);
          block_max = max(z, block_max);
        }
        const Vec before = Vec::load(highest + start + lane);
        const Vec after = max(block_max, before);
        // Nothing but -inf so far: any shift will do.
        const Vec shift = where_equal(after, minus_infinity, zero, after);
        const Vec moved = max(lowest, before - shift), factor = exp(moved);
        const Vec sum = Vec::load(sums + start + lane);
        Vec fresh = not_finite;  // 0, or NaN where a logit is not finite (rows.h)
        if (want_entropy) {
          Vec moment = zero;
          for (int64_t i = 0; i < columns; ++i) {
            const Vec shifted = Vec::load(column + i * height) - shift, e = exp(shifted);
            fresh = fresh + e;
            moment = fma(e, max(lowest, shifted), moment);
          }
          fma(fma(moved, sum, Vec::load(moments + start + lane)), factor, moment).store(moments + start + lane);
        } else {
          int64_t i = 0;
          for (; kTwoAtATime && i + 2 <= columns; i += 2) {
            const Vec2 z(Vec::load(column + i * height), Vec::load(column + (i + 1) * height));
            fresh = add_to(fresh, exp(z - shift));
          }
          for (; i < columns; ++i) fresh = fresh + exp(Vec::load(column + i * height) - shift);
        }
        (sum * factor + fresh).store(sums + start + lane);
        after.store(highest + start + lane);
      }
      const int64_t rows = at_most(height, hidden.rows - start);
      for (int64_t lane = 0; lane < rows; ++lane) {
        const int64_t position = target_ids[start + lane] - v;
        if (position >= 0 && position < columns)
          target_logits[start + lane] = product[position * height + lane];
      }
    }
  }
  for (int64_t n = 0; n < hidden.rows; ++n) {
    partial[kPartMax * hidden.rows + n] = highest[n];
    partial[kPartSum * hidden.rows + n] = sums[n];
    if (want_entropy) partial[kPartMoment * hidden.rows + n] = moments[n];
  }
}

// `columns` columns of `count` weight rows, as rows of whole vectors; what is missing of the last is zero.
inline void pack_panel(Singles, Matrix weight, int64_t first_row, int64_t count, int64_t first_column, int64_t columns,
                       int vectors, float* packed) {
  const int64_t height = vectors * Vec::width;
  if (weight.storage == Storage::kFloat32 && columns == Singles::panel) {
    const float* row = static_cast<const float*>(weight.data) + first_row * weight.stride + first_column;
    for (int64_t i = 0; i < count; ++i, row += weight.stride, packed += Singles::panel) {
      UNISD_UNROLL
      for (int j = 0; j < kVectors; ++j) Vec::load(row + j * Vec::width).store(packed + j * Vec::width);
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i, packed += height) {
    widen(row_of(weight, first_row + i), weight.storage, first_column, columns, packed);
    for (int64_t h = columns; h < height; ++h) packed[h] = 0.0f;
  }
}

// A block of the gradient as it is broadcast: a copy [rows, count]. In place its rows are a vocabulary apart, and those
// of a register tile fall into the same few sets of the first-level cache.
inline Broadcast<Singles> gradient_block(Singles, const float* gradient, int64_t stride, int64_t rows, int64_t count,
                                         Buffer* buffer) {
  constexpr int64_t copy_stride = Singles::copy_stride;
  for (int64_t n = 0; n < rows; ++n)
    std::memcpy(buffer->data() + n * copy_stride, gradient + n * stride, static_cast<size_t>(count) * sizeof(float));
  return {buffer->data(), copy_stride};
}
// A vector of numbers, at a position in a copy of what is broadcast.
inline void put_down(Singles, Vec x, float* copy, int64_t position) { x.store(copy + position); }

#if defined(UNISD_ISA_BF16)
// The same in pairs of rows; behind the last of an odd number of rows comes zero.
inline void pack_panel(Pairs, Matrix weight, int64_t first_row, int64_t count, int64_t first_column, int64_t columns,
                       int vectors, float* packed) {
  const int64_t height = vectors * Vec::width;
  for (int64_t i = 0; i < count; i += 2, packed += height) {
    const uint16_t* first = static_cast<const uint16_t*>(row_of(weight, first_row + i)) + first_column;
    const uint16_t* second = i + 1 < count ? first + weight.stride : nullptr;
    for (int64_t h = 0; h < height; h += Vec::width) {
      const int64_t left = columns - h;
      const __mmask16 lanes = left >= Vec::width ? 0xffff : static_cast<__mmask16>(left <= 0 ? 0 : (1u << left) - 1);
      const auto load = [&](const uint16_t* row) UNISD_INLINE {
        return row == nullptr ? _mm512_setzero_si512() : _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, row + h));
      };
      const __m512i pairs = _mm512_or_si512(load(first), _mm512_slli_epi32(load(second), 16));
      _mm512_storeu_si512(packed + h, pairs);
    }
  }
}

inline void put_down(Pairs, Vec x, float* copy, int64_t position) {
  const __m256i narrow = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(reinterpret_cast<uint16_t*>(copy) + position), narrow);
}

// A block of the gradient as it is broadcast: a copy [rows, count], rounded to the weight's 16 bits.
inline Broadcast<Pairs> gradient_block(Pairs, const float* gradient, int64_t stride, int64_t rows, int64_t count,
                                       Buffer* buffer) {
  constexpr int64_t copy_stride = Pairs::copy_stride;
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t i = 0; i < count; i += Vec::width) {
      const int lanes = static_cast<int>(at_most(Vec::width, count - i));
      put_down(Pairs(), Vec::load_part(gradient + n * stride + i, lanes, 0.0f), buffer->data(), n * copy_stride + i);
    }
  }
  return {reinterpret_cast<const uint16_t*>(buffer->data()), copy_stride};
}
#endif

// Times that a product of one packed block calls `between`: for each panel of `width` columns, register tile of `rows`
// that are broadcast, and stretch of `steps`.
template <class Operand>
inline int64_t pauses(int64_t width, int64_t rows, int64_t steps) {
  return (width + Operand::panel - 1) / Operand::panel * ((rows + kBroadcast - 1) / kBroadcast) *
         ((steps + kBetween - 1) / kBetween);
}

// Cache lines of some rows, fetched one at a time in their order.
class LinesAhead {
 public:
  LinesAhead(const void* first, int64_t stride, int64_t rows, int64_t bytes)
      : first_(static_cast<const char*>(first)), stride_(stride), rows_(rows), bytes_(bytes) {}
  int64_t count() const { return rows_ * ((bytes_ + kLine - 1) / kLine); }
  // Returns whether there was one left.
  bool fetch() {
    if (row_ == rows_) return false;
    __builtin_prefetch(first_ + row_ * stride_ + at_, 0, 2);
    at_ += kLine;
    if (at_ >= bytes_) {
      at_ = 0;
      ++row_;
    }
    return true;
  }

 private:
  static constexpr int64_t kLine = 64;
  const char* first_;
  int64_t stride_, rows_, bytes_;
  int64_t row_ = 0, at_ = 0;
};

template <class Operand>
inline void backward_of(const float* gradient, int64_t gradient_stride, int64_t rows, int64_t length, Matrix weight,
                        int64_t begin, int64_t end, float* out, int64_t out_stride) {
  [[maybe_unused]] const Unit<Operand> unit{};
  // The weight's columns go through a packed copy of one block, a panel at a time: whatever its stride, it then
  // misses neither the cache nor the page table, and narrow storage is widened once.
  const int64_t width = end - begin, padded = (width + Vec::width - 1) / Vec::width * Vec::width;
  const bool in_place = padded == width;  // else the last vector of a row would write past the columns
  constexpr int64_t block = Operand::gradient_block * Operand::elements;
  Buffer packed(Operand::gradient_block * Operand::panel), sums(in_place ? 0 : rows * padded);
  Buffer copy(rows * Operand::copy_stride / Operand::elements);
  float* total = in_place ? out + begin : sums.data();
  const int64_t total_stride = in_place ? out_stride : padded;
  const int64_t row_bytes = bytes_of(weight.storage);
  // The next block of weight and gradient comes from memory while this one is multiplied, some lines at a time.
  const int64_t calls = pauses<Operand>(padded, rows, Operand::gradient_block);
  for (int64_t v = 0; v < length; v += block) {
    const int64_t count = at_most(block, length - v), next = at_most(block, length - v - count);
    LinesAhead weight_lines(static_cast<const char*>(row_of(weight, v + count)) + begin * row_bytes,
                            weight.stride * row_bytes, next, width * row_bytes);
    LinesAhead gradient_lines(gradient + v + count, gradient_stride * sizeof(float), next == 0 ? 0 : rows,
                              next * sizeof(float));
    const int64_t lines = calls == 0 ? 0 : (weight_lines.count() + gradient_lines.count() + calls - 1) / calls;
    const auto fetch = [&]() UNISD_INLINE {
      for (int64_t i = 0; i < lines && (weight_lines.fetch() || gradient_lines.fetch()); ++i) {
      }
    };
    const auto g = gradient_block(Operand(), gradient + v, gradient_stride, rows, count, &copy);
    const int64_t steps = (count + Operand::elements - 1) / Operand::elements;
    for (int64_t h = 0; h < padded; h += Operand::panel) {
      const int vectors = vectors_for<Operand>(padded - h);
      pack_panel(Operand(), weight, v, count, begin + h, at_most(Operand::panel, width - h), vectors, packed.data());
      multiply_panel(vectors, packed.data(), vectors * Vec::width, g, rows, steps, Sums{total + h, total_stride, v != 0},
                     0, fetch);
    }
  }
  for (int64_t n = 0; n < rows && (!in_place || length == 0); ++n) {
    for (int64_t h = 0; h < width; ++h) out[n * out_stride + begin + h] = length == 0 ? 0.0f : total[n * padded + h];
  }
}

// Numbers from one column of a transposed gradient to the next: a cache line more than it needs, so that those of a
// register tile do not fall into the same few sets of the first-level cache.
inline int64_t transposed_stride(int64_t rows) { return packed_size(rows, 1) + 16; }

// Columns of the gradient [rows, V] as rows of what is broadcast, times `scale`: [count, rows], the rows rounded up to
// whole steps with zeros.
template <class Operand>
inline Broadcast<Operand> transposed_gradient(const float* gradient, int64_t stride, int64_t rows, int64_t count,
                                              float scale, Buffer* buffer) {
  const int64_t padded = transposed_stride(rows);
  const Vec factor = Vec::set(scale);
  for (int64_t n = 0; n < rows; n += Vec::width) {
    const int64_t down = at_most(Vec::width, rows - n);
    for (int64_t v = 0; v < count; v += Vec::width) {
      const int across = static_cast<int>(at_most(Vec::width, count - v));
      Vec square[Vec::width];
      for (int64_t j = 0; j < Vec::width; ++j)
        square[j] = j < down ? factor * Vec::load_part(gradient + (n + j) * stride + v, across, 0.0f) : Vec::set(0.0f);
      transpose(square);
      for (int i = 0; i < across; ++i) put_down(Operand(), square[i], buffer->data(), (v + i) * padded + n);
    }
  }
  return {reinterpret_cast<typename Operand::Element*>(buffer->data()), padded};
}

// Rows [begin, end) of scale * gradient^T hidden into, or onto, out [V, H]; `packed` holds all panels of the hidden states'
// columns (pack_columns).
template <class Operand>
inline void weight_gradient_of(const float* gradient, int64_t gradient_stride, int64_t rows, const float* packed,
                               int64_t width, float scale, int64_t begin, int64_t end, bool accumulate, float* out,
                               int64_t out_stride) {
  [[maybe_unused]] const Unit<Operand> unit{};
  const int64_t steps = (rows + Operand::elements - 1) / Operand::elements;
  Buffer product(kBlock * Operand::panel), narrow(transposed_stride(rows) * kBlock);
  // What is written for the first time goes to memory past the cache.
  const bool streamed = !accumulate && has_whole_lines(out, out_stride);
  // The next block of the gradient comes from memory while this one is multiplied, some lines at a time.
  const int64_t calls = pauses<Operand>(width, kBlock, steps);
  for (int64_t v = begin; v < end; v += kBlock) {
    const int64_t count = at_most(kBlock, end - v), next = at_most(kBlock, end - v - count);
    LinesAhead ahead(gradient + v + count, gradient_stride * sizeof(float), next == 0 ? 0 : rows, next * sizeof(float));
    const int64_t lines = (ahead.count() + calls - 1) / calls;
    const auto fetch = [&]() UNISD_INLINE {
      for (int64_t i = 0; i < lines && ahead.fetch(); ++i) {
      }
    };
    const auto block = transposed_gradient<Operand>(gradient + v, gradient_stride, rows, count, scale, &narrow);
    const float* panel = packed;
    for (int64_t h = 0; h < width; h += Operand::panel) {
      const int vectors = vectors_for<Operand>(width - h);
      const int64_t height = vectors * Vec::width;
      block_product(panel, vectors, steps, WeightBlock<Operand>{block, 0}, count, false, product.data(), fetch);
      panel += height * steps;
      const int64_t columns = at_most(height, width - h);
      for (int64_t i = 0; i < count; ++i) {
        float* target = out + (v + i) * out_stride + h;
        const float* sums = product.data() + i * height;
        for_each_vector(
            columns,
            [&](int64_t j) UNISD_INLINE {
              const Vec sum = Vec::load(sums + j);
              put(accumulate ? Vec::load(target + j) + sum : sum, target + j, streamed);
            },
            [&](int64_t j, int lanes) UNISD_INLINE {
              const Vec sum = Vec::load(sums + j);
              (accumulate ? Vec::load_part(target + j, lanes, 0.0f) + sum : sum).store_part(target + j, lanes);
            });
      }
    }
  }
  if (streamed) order_streams();
}

// All panels of the columns of hidden states [rows, width], for weight_gradient_of.
template <class Operand>
inline void pack_columns(Matrix hidden, int64_t rows, int64_t width, float* packed) {
  const int64_t steps = (rows + Operand::elements - 1) / Operand::elements;
  for (int64_t h = 0; h < width; h += Operand::panel) {
    const int vectors = vectors_for<Operand>(width - h);
    pack_panel(Operand(), hidden, 0, rows, h, at_most(Operand::panel, width - h), vectors, packed);
    packed += vectors * Vec::width * steps;
  }
}

inline void sum_rows(const float* part, int64_t stride, int64_t parts, int64_t width, float scale, float* out) {
  for (int64_t h = 0; h < width; ++h) {
    float sum = 0.0f;
    for (int64_t i = 0; i < parts; ++i) sum += part[i * stride + h];
    out[h] = sum * scale;
  }
}

}  // namespace UNISD_ISA
}  // namespace unisd
