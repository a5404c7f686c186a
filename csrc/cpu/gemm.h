// The register tile of the matrix products, and its operands as it reads them: packed hidden states, and blocks of the
// weight.
#pragma once

#include <cmath>
#include <new>

#include "kernels.h"
#include "vec_math.h"

#if defined(__clang__)
#define UNISD_UNROLL _Pragma("unroll")
#else
#define UNISD_UNROLL _Pragma("GCC unroll 16")
#endif

namespace unisd {
namespace UNISD_ISA {

// The register tile: kVectors vectors by kBroadcast elements of accumulators.
#if defined(UNISD_ISA_AVX512)
constexpr int kVectors = 3, kBroadcast = 8;
#elif defined(UNISD_ISA_AVX2)
constexpr int kVectors = 2, kBroadcast = 6;
#else
constexpr int kVectors = 4, kBroadcast = 4;
#endif
constexpr int kPanel = kVectors * Vec::width;
// Weight rows of a block: they stay in the second-level cache while all panels pass.
constexpr int kBlock = 64;
// Length of the inner dimension after which accumulators are put down, so that a panel's slice stays in the first-level
// cache.
constexpr int64_t kInner = 128;

// c[i][j] (+)= sum_k a[k][j] b[i][k] for i < count and j in the vectors of a.
template <int vectors, int count>
inline UNISD_INLINE void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t length,
                                  bool accumulate, float* c, int64_t c_stride, const float* prefetch) {
  Vec sum[count][vectors];
  UNISD_UNROLL
  for (int i = 0; i < count; ++i) {
    UNISD_UNROLL
    for (int j = 0; j < vectors; ++j)
      sum[i][j] = accumulate ? Vec::load(c + i * c_stride + j * Vec::width) : Vec::set(0.0f);
  }
  int64_t k = 0;
  while (k < length) {
    const int64_t stop = at_most(length, k + 16);  // a cache line of b
    if (prefetch != nullptr) {
      UNISD_UNROLL
      for (int i = 0; i < count; ++i) __builtin_prefetch(prefetch + i * b_stride + k, 0, 2);
    }
    for (; k < stop; ++k) {
      Vec column[vectors];
      UNISD_UNROLL
      for (int j = 0; j < vectors; ++j) column[j] = Vec::load(a + k * a_stride + j * Vec::width);
      UNISD_UNROLL
      for (int i = 0; i < count; ++i) {
        const Vec element = Vec::set(b[i * b_stride + k]);
        UNISD_UNROLL
        for (int j = 0; j < vectors; ++j) sum[i][j] = fma(column[j], element, sum[i][j]);
      }
    }
  }
  UNISD_UNROLL
  for (int i = 0; i < count; ++i) {
    UNISD_UNROLL
    for (int j = 0; j < vectors; ++j) sum[i][j].store(c + i * c_stride + j * Vec::width);
  }
}

// The same for any number of elements of b, a register tile at a time. `ahead` is how far on lies what b will be next,
// or 0; `between` is called after each tile, to fetch something else meanwhile.
template <int vectors, class Between>
inline void multiply_rows(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows,
                          int64_t length, bool accumulate, float* c, int64_t c_stride, int64_t ahead,
                          const Between& between) {
  int64_t i = 0;
  for (; i + kBroadcast <= rows; i += kBroadcast) {
    multiply<vectors, kBroadcast>(a, a_stride, b + i * b_stride, b_stride, length, accumulate, c + i * c_stride,
                                  c_stride, ahead == 0 ? nullptr : b + i * b_stride + ahead);
    between();
  }
  for (; i + 2 <= rows; i += 2)
    multiply<vectors, 2>(a, a_stride, b + i * b_stride, b_stride, length, accumulate, c + i * c_stride, c_stride,
                         nullptr);
  for (; i < rows; ++i)
    multiply<vectors, 1>(a, a_stride, b + i * b_stride, b_stride, length, accumulate, c + i * c_stride, c_stride,
                         nullptr);
}

// A panel may be lower than kVectors.
template <class Between>
inline void multiply_panel(int vectors, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                           int64_t rows, int64_t length, bool accumulate, float* c, int64_t c_stride, int64_t ahead,
                           const Between& between) {
  switch (vectors) {
    case 1:
      return multiply_rows<1>(a, a_stride, b, b_stride, rows, length, accumulate, c, c_stride, ahead, between);
    case 2:
      return multiply_rows<2>(a, a_stride, b, b_stride, rows, length, accumulate, c, c_stride, ahead, between);
#if !defined(UNISD_ISA_AVX2)
    case 3:
      return multiply_rows<3>(a, a_stride, b, b_stride, rows, length, accumulate, c, c_stride, ahead, between);
#if !defined(UNISD_ISA_AVX512)
    case 4:
      return multiply_rows<4>(a, a_stride, b, b_stride, rows, length, accumulate, c, c_stride, ahead, between);
#endif
#endif
    default:
      __builtin_unreachable();
  }
}

// Working memory on a cache line. Not std::vector: its functions would be shared with translation units for other
// instruction sets, and the linker may keep the one with the widest.
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(size == 0 ? nullptr
                        : static_cast<float*>(
                              ::operator new(static_cast<size_t>(size) * sizeof(float), std::align_val_t(64)))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* data() { return data_; }
  float& operator[](int64_t i) { return data_[i]; }

 private:
  float* data_;
};

inline int vectors_for(int64_t rows) {
  return static_cast<int>(at_most(kVectors, (rows + Vec::width - 1) / Vec::width));
}

// n elements of a row, widened to float32.
inline void widen(const void* row, Storage storage, int64_t offset, int64_t n, float* out) {
  if (storage == Storage::kFloat32) {
    std::memcpy(out, static_cast<const float*>(row) + offset, static_cast<size_t>(n) * sizeof(float));
    return;
  }
  const uint16_t* p = static_cast<const uint16_t*>(row) + offset;
  const bool brain = storage == Storage::kBFloat16;
  for_each_vector(
      n, [&](int64_t i) UNISD_INLINE { (brain ? Vec::load_bf16(p + i) : Vec::load_fp16(p + i)).store(out + i); },
      [&](int64_t i, int lanes) UNISD_INLINE {
        uint16_t tail[16] = {0};
        std::memcpy(tail, p + i, static_cast<size_t>(lanes) * sizeof(uint16_t));
        (brain ? Vec::load_bf16(tail) : Vec::load_fp16(tail)).store_part(out + i, lanes);
      });
}

inline const void* row_of(Matrix m, int64_t row) {
  return static_cast<const char*>(m.data) + row * m.stride * bytes_of(m.storage);
}

// Rows [begin, end) of the weight as float32: in place if they are, else widened into `buffer`.
struct WeightBlock {
  const float* data;
  int64_t stride;
  int64_t ahead;  // to the next block of kBlock rows, for prefetching; 0 where the block is a copy
};

inline int64_t widened_size(Matrix weight, int64_t width) {
  return weight.storage == Storage::kFloat32 ? 0 : kBlock * width;
}

inline WeightBlock weight_block(Matrix weight, int64_t width, int64_t begin, int64_t end, int64_t last,
                                Buffer* buffer) {
  if (weight.storage == Storage::kFloat32) {
    // Not past the task's columns: the rows there are another thread's, or nobody's.
    const bool more = end + kBlock <= last;
    return {static_cast<const float*>(weight.data) + begin * weight.stride, weight.stride,
            more ? kBlock * weight.stride : 0};
  }
  for (int64_t i = begin; i < end; ++i)
    widen(row_of(weight, i), weight.storage, 0, width, buffer->data() + (i - begin) * width);
  return {buffer->data(), width, 0};
}

inline int64_t packed_size(int64_t rows, int64_t width) {
  return (rows + Vec::width - 1) / Vec::width * Vec::width * width;
}

// Panels of [width][vectors * Vec::width]; missing rows are zero.
inline void pack_rows(Matrix hidden, int64_t rows, int64_t width, float* packed) {
  Buffer wide(width);
  for (int64_t start = 0; start < rows; start += kPanel) {
    const int64_t height = vectors_for(rows - start) * Vec::width;
    for (int64_t lane = 0; lane < height; ++lane) {
      float* out = packed + lane;
      if (start + lane >= rows) {
        for (int64_t k = 0; k < width; ++k) out[k * height] = 0.0f;
        continue;
      }
      widen(row_of(hidden, start + lane), hidden.storage, 0, width, wide.data());
      for (int64_t k = 0; k < width; ++k) out[k * height] = wide[k];
    }
    packed += height * width;
  }
}

// Products of a block of weight rows with one panel: c[i][lane], i < rows of the block.
inline void block_product(const float* panel, int vectors, int64_t width, const WeightBlock& weight, int64_t rows,
                          bool first_panel, float* c) {
  const int64_t height = vectors * Vec::width;
  for (int64_t k = 0; k < width; k += kInner) {
    const int64_t length = at_most(kInner, width - k);
    multiply_panel(vectors, panel + k * height, height, weight.data + k, weight.stride, rows, length, k != 0, c, height,
                   first_panel ? weight.ahead : 0, [] {});
  }
}

}  // namespace UNISD_ISA
}  // namespace unisd
