// The register tile of the matrix products, and its operands as it reads them: packed hidden states, and blocks of the
// weight.
#pragma once

#include <cmath>
#include <new>
#include <type_traits>

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
#if defined(UNISD_ISA_BF16)
constexpr int kVectors = 3, kBroadcast = 8;  // a whole number of times into the rows of an AMX tile
#elif defined(UNISD_ISA_AVX512)
constexpr int kVectors = 4, kBroadcast = 6;
#elif defined(UNISD_ISA_AVX2)
constexpr int kVectors = 2, kBroadcast = 6;
#elif defined(UNISD_ISA_NEON)
constexpr int kVectors = 4, kBroadcast = 6;
#else
constexpr int kVectors = 4, kBroadcast = 4;
#endif
// Weight rows of a block: they stay in the second-level cache while all panels pass.
constexpr int kBlock = 64;

// Steps from one call of `between` to the next.
constexpr int64_t kBetween = 16;

// What a product multiplies at a time: single float32 numbers, or pairs of bfloat16 numbers, which lie in the lanes of a
// float vector. `a` are vectors of them, `b` is what is broadcast, read where it lies.
struct Singles {
  using Element = float;
  static constexpr int64_t elements = 1;
  // Vectors of a panel.
  static constexpr int vectors = kVectors;
  static constexpr int panel = vectors * Vec::width;
  // Steps after which accumulators are put down, so that a panel's slice stays in the first-level cache.
  static constexpr int64_t inner = 128;
  // Steps of the gradient's product for which a panel of the weight is packed at a time.
  static constexpr int64_t gradient_block = 96;
  // Numbers from one row of its copy of the gradient to the next.
  static constexpr int64_t copy_stride = gradient_block + 16;
  static Vec broadcast(const float* p) { return Vec::set(*p); }
  static Vec add_product(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
};
#if defined(UNISD_ISA_BF16)
// vdpbf16ps: two products, added in float32 and rounded as two additions would be; subnormal numbers count as zero.
struct Pairs {
  using Element = uint16_t;
  static constexpr int64_t elements = 2;
#if defined(UNISD_ISA_AMX)
  // Two tiles of lanes by two of rows: four tiles of sums, as many loads as products. Sums are dear to put down.
  static constexpr int vectors = 2;
  static constexpr int64_t inner = 320, gradient_block = 256;
#else
  static constexpr int vectors = kVectors;
  static constexpr int64_t inner = 128, gradient_block = 96;
#endif
  static constexpr int64_t copy_stride = elements * gradient_block;
  static constexpr int panel = vectors * Vec::width;
  static Vec broadcast(const uint16_t* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return {_mm512_castsi512_ps(_mm512_set1_epi32(pair))};
  }
  static Vec add_product(Vec a, Vec b, Vec sum) {
    return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
  }
};
#endif

// Four numbers of 8 bits: of `a` unsigned, of what is broadcast signed. Their sums are int32, whose bits lie in the lanes.
struct Quads {
  using Element = int8_t;
  static constexpr int64_t elements = 4;
  static constexpr int vectors = kVectors;
  static constexpr int panel = vectors * Vec::width;
  static Vec broadcast(const int8_t* p) {
    uint32_t quad;
    std::memcpy(&quad, p, sizeof quad);
    return Vec::set(float_of(quad));
  }
#if defined(UNISD_ISA_VNNI)
  static Vec add_product(Vec a, Vec b, Vec sum) {
    return {_mm512_castsi512_ps(
        _mm512_dpbusd_epi32(_mm512_castps_si512(sum.v), _mm512_castps_si512(a.v), _mm512_castps_si512(b.v)))};
  }
  // The float of sum - offset.
  static Vec value(Vec sum, int32_t offset) {
    return {_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_castps_si512(sum.v), _mm512_set1_epi32(offset)))};
  }
#else
  static Vec add_product(Vec a, Vec b, Vec sum) {
    uint8_t left[4 * Vec::width];
    int8_t right[4 * Vec::width];
    int32_t sums[Vec::width];
    std::memcpy(left, &a, sizeof left);
    std::memcpy(right, &b, sizeof right);
    std::memcpy(sums, &sum, sizeof sums);
    for (int i = 0; i < Vec::width; ++i) {
      for (int k = 4 * i; k < 4 * i + 4; ++k) sums[i] += left[k] * right[k];
    }
    std::memcpy(&sum, sums, sizeof sums);
    return sum;
  }
  static Vec value(Vec sum, int32_t offset) {
    int32_t sums[Vec::width];
    float values[Vec::width];
    std::memcpy(sums, &sum, sizeof sums);
    for (int i = 0; i < Vec::width; ++i) values[i] = static_cast<float>(sums[i] - offset);
    return Vec::load(values);
  }
#endif
};

// What a thread needs while it multiplies such operands: nothing, but for AMX.
template <class Operand>
struct Unit {};

// Rows of what is broadcast: `elements` numbers a step, `stride` numbers to the next row.
template <class Operand>
struct Broadcast {
  const typename Operand::Element* data;
  int64_t stride;
  Broadcast from(int64_t row, int64_t step) const {
    return {data + row * stride + step * Operand::elements, stride};
  }
};

// Sums of products where they are put down: c[i * stride + j].
struct Sums {
  float* data;
  int64_t stride;
  bool accumulate;
  Sums from(int64_t row) const { return {data + row * stride, stride, accumulate}; }
};

// c[i][j] (+)= sum_k a[k][j] b[i][k] for i < count and j in the vectors of a. `ahead` is how many numbers further lies
// what b will be next, or 0. `between` is called every few steps, to fetch something else meanwhile: a few cache lines at
// a time, for a burst of them holds up the loads of the product.
template <class Operand, int vectors, int count, class Between>
inline UNISD_INLINE void multiply(const float* a, int64_t a_stride, Broadcast<Operand> b, int64_t steps, Sums c,
                                  int64_t ahead, const Between& between) {
  Vec sum[count][vectors];
  UNISD_UNROLL
  for (int i = 0; i < count; ++i) {
    UNISD_UNROLL
    for (int j = 0; j < vectors; ++j)
      sum[i][j] = c.accumulate ? Vec::load(c.data + i * c.stride + j * Vec::width) : Vec::set(0.0f);
  }
  int64_t k = 0;
  while (k < steps) {
    const int64_t stop = at_most(steps, k + kBetween);  // a cache line of b
    if (ahead != 0) {
      UNISD_UNROLL
      for (int i = 0; i < count; ++i) __builtin_prefetch(b.from(i, k).data + ahead, 0, 2);
    }
    between();
    for (; k < stop; ++k) {
      Vec column[vectors];
      UNISD_UNROLL
      for (int j = 0; j < vectors; ++j) column[j] = Vec::load(a + k * a_stride + j * Vec::width);
      UNISD_UNROLL
      for (int i = 0; i < count; ++i) {
        const Vec element = Operand::broadcast(b.from(i, k).data);
        UNISD_UNROLL
        for (int j = 0; j < vectors; ++j) sum[i][j] = Operand::add_product(column[j], element, sum[i][j]);
      }
    }
  }
  UNISD_UNROLL
  for (int i = 0; i < count; ++i) {
    UNISD_UNROLL
    for (int j = 0; j < vectors; ++j) sum[i][j].store(c.data + i * c.stride + j * Vec::width);
  }
}

}  // namespace UNISD_ISA
}  // namespace unisd

#if defined(UNISD_ISA_AMX)
#include "amx.h"
#endif

namespace unisd {
namespace UNISD_ISA {

// The same for any number of rows of b, a register tile at a time.
template <class Operand, int vectors, class Between>
inline void multiply_rows(const float* a, int64_t a_stride, Broadcast<Operand> b, int64_t rows, int64_t steps, Sums c,
                          int64_t ahead, const Between& between) {
  int64_t i = 0;
#if defined(UNISD_ISA_AMX)
  if constexpr (Operand::elements == 2) i = multiply_tiles<vectors>(a, a_stride, b, rows, steps, c, ahead, between);
#endif
  for (; i + kBroadcast <= rows; i += kBroadcast) {
    multiply<Operand, vectors, kBroadcast>(a, a_stride, b.from(i, 0), steps, c.from(i), ahead, between);
  }
  for (; i + 2 <= rows; i += 2) multiply<Operand, vectors, 2>(a, a_stride, b.from(i, 0), steps, c.from(i), 0, between);
  for (; i < rows; ++i) multiply<Operand, vectors, 1>(a, a_stride, b.from(i, 0), steps, c.from(i), 0, between);
}

// function(number of a panel's vectors, as a constant): a panel may be lower than Operand::vectors.
template <class Operand, class Function>
inline UNISD_INLINE void with_vectors(int vectors, const Function& function) {
  const auto call = [&](auto count) UNISD_INLINE {
    if constexpr (count.value <= Operand::vectors) function(count);
  };
  switch (vectors) {
    case 1:
      return call(std::integral_constant<int, 1>());
    case 2:
      return call(std::integral_constant<int, 2>());
    case 3:
      return call(std::integral_constant<int, 3>());
    case 4:
      return call(std::integral_constant<int, 4>());
    default:
      __builtin_unreachable();
  }
}

template <class Operand, class Between>
inline void multiply_panel(int vectors, const float* a, int64_t a_stride, Broadcast<Operand> b, int64_t rows,
                           int64_t steps, Sums c, int64_t ahead, const Between& between) {
  with_vectors<Operand>(vectors, [&](auto count) UNISD_INLINE {
    multiply_rows<Operand, count.value>(a, a_stride, b, rows, steps, c, ahead, between);
  });
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

template <class Operand>
inline int vectors_for(int64_t rows) {
  return static_cast<int>(at_most(Operand::vectors, (rows + Vec::width - 1) / Vec::width));
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

// Rows of the weight as a product broadcasts them.
template <class Operand>
struct WeightBlock {
  Broadcast<Operand> rows;
  int64_t ahead;  // to the next block of kBlock rows, for prefetching; 0 where the block is a copy
};

// Numbers of the buffer that weight_block wants.
template <class Operand>
inline int64_t widened_size(Matrix weight, int64_t width) {
  return Operand::elements > 1 || weight.storage == Storage::kFloat32 ? 0 : kBlock * width;
}

template <class Operand>
inline WeightBlock<Operand> block_in_place(Matrix weight, int64_t begin, int64_t end, int64_t last) {
  // Not past the task's columns: the rows there are another thread's, or nobody's.
  const bool more = end + kBlock <= last;
  return {{static_cast<const typename Operand::Element*>(row_of(weight, begin)), weight.stride},
          more ? kBlock * weight.stride : 0};
}

// Rows [begin, end) of the weight: in place if they are what is broadcast, else widened into `buffer`.
template <class Operand>
inline WeightBlock<Operand> weight_block(Matrix weight, int64_t width, int64_t begin, int64_t end, int64_t last,
                                         Buffer* buffer);

template <>
inline WeightBlock<Singles> weight_block(Matrix weight, int64_t width, int64_t begin, int64_t end, int64_t last,
                                         Buffer* buffer) {
  if (weight.storage == Storage::kFloat32) return block_in_place<Singles>(weight, begin, end, last);
  for (int64_t i = begin; i < end; ++i)
    widen(row_of(weight, i), weight.storage, 0, width, buffer->data() + (i - begin) * width);
  return {{buffer->data(), width}, 0};
}

#if defined(UNISD_ISA_BF16)
template <>
inline WeightBlock<Pairs> weight_block(Matrix weight, int64_t, int64_t begin, int64_t end, int64_t last, Buffer*) {
  return block_in_place<Pairs>(weight, begin, end, last);
}
#endif

inline int64_t packed_size(int64_t rows, int64_t steps) {
  return (rows + Vec::width - 1) / Vec::width * Vec::width * steps;
}

// Panels of [steps][vectors * Vec::width]; missing rows are zero. read(row, k) is the number of a row at a step.
template <class Operand, class Prepare, class Read>
inline void pack_panels(int64_t rows, int64_t steps, float* packed, const Prepare& prepare, const Read& read) {
  for (int64_t start = 0; start < rows; start += Operand::panel) {
    const int64_t height = vectors_for<Operand>(rows - start) * Vec::width;
    for (int64_t lane = 0; lane < height; ++lane) {
      float* out = packed + lane;
      const int64_t row = start + lane;
      if (row < rows) prepare(row);
      for (int64_t k = 0; k < steps; ++k) out[k * height] = row < rows ? read(row, k) : 0.0f;
    }
    packed += height * steps;
  }
}

inline void pack_rows(Matrix hidden, int64_t rows, int64_t width, float* packed) {
  Buffer wide(width);
  pack_panels<Singles>(
      rows, width, packed,
      [&](int64_t row) { widen(row_of(hidden, row), hidden.storage, 0, width, wide.data()); },
      [&](int64_t, int64_t k) { return wide[k]; });
}

// Codes [rows, 4 * quads], 128 added to each.
inline void pack_quads(const int8_t* codes, int64_t rows, int64_t quads, float* packed) {
  pack_panels<Quads>(
      rows, quads, packed, [](int64_t) {},
      [&](int64_t row, int64_t k) {
        uint32_t quad;
        std::memcpy(&quad, codes + (row * quads + k) * Quads::elements, sizeof quad);
        return float_of(quad ^ 0x80808080u);
      });
}

#if defined(UNISD_ISA_BF16)
inline void pack_pairs(Matrix hidden, int64_t rows, int64_t width, float* packed) {
  Buffer wide(width / 2);
  pack_panels<Pairs>(
      rows, width / 2, packed,
      [&](int64_t row) { std::memcpy(wide.data(), row_of(hidden, row), static_cast<size_t>(width) * 2); },
      [&](int64_t, int64_t k) { return wide[k]; });
}
#endif

// Products of a block of weight rows with one panel: c[i][lane], i < rows of the block.
template <class Operand, class Between>
inline void block_product(const float* panel, int vectors, int64_t steps, const WeightBlock<Operand>& weight,
                          int64_t rows, bool first_panel, float* c, const Between& between) {
  const int64_t height = vectors * Vec::width;
  for (int64_t k = 0; k < steps; k += Operand::inner) {
    multiply_panel(vectors, panel + k * height, height, weight.rows.from(0, k), rows, at_most(Operand::inner, steps - k),
                   Sums{c, height, k != 0}, first_panel ? weight.ahead : 0, between);
  }
}

}  // namespace UNISD_ISA
}  // namespace unisd
