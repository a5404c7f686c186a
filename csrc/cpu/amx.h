// Products of pairs of bfloat16 numbers by AMX: tiles of 16 rows of 64 bytes. Included by gemm.h for the sets that have
// them.
//
// A tile holds 16 pairs of 16 rows of what is broadcast, as they lie in memory; or 16 lanes of 16 steps of a packed
// panel, which is the layout that the instruction wants of its other operand; or 16 x 16 sums.
#pragma once

namespace unisd {
namespace UNISD_ISA {

// In assembler: the intrinsics of some compilers take no template argument for a tile's number. With
// UNISD_SOFTWARE_TILES the same by plain loops, so that a processor without AMX can check all that is around them.
struct Tiles {
#if defined(UNISD_SOFTWARE_TILES)
  static inline thread_local uint32_t tiles[8][16][16];
  static inline thread_local bool ready = false;
  static void open() { ready = true; }
  static void close() { ready = false; }
  template <int t>
  static void zero() {
    for (auto& row : tiles[t]) std::memset(row, 0, sizeof row);
  }
  template <int t>
  static void load(const void* data, int64_t stride_bytes) {
    for (int i = 0; i < 16; ++i)
      std::memcpy(tiles[t][i], static_cast<const char*>(data) + i * stride_bytes, sizeof tiles[t][i]);
  }
  template <int t>
  static void store(void* data, int64_t stride_bytes) {
    for (int i = 0; i < 16; ++i)
      std::memcpy(static_cast<char*>(data) + i * stride_bytes, tiles[t][i], sizeof tiles[t][i]);
  }
  template <int c, int a, int b>
  static void add_product() {
    if (!ready) __builtin_trap();
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 16; ++j) {
        float sum = float_of(tiles[c][i][j]);
        for (int k = 0; k < 16; ++k) {
          const uint32_t x = tiles[a][i][k], y = tiles[b][k][j];
          sum += float_of(x << 16) * float_of(y << 16) + float_of(x & 0xffff0000u) * float_of(y & 0xffff0000u);
        }
        tiles[c][i][j] = bits_of(sum);
      }
    }
  }
#else
  // Palette 1, every tile as large as it may be.
  static void open() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {0};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    static_assert(sizeof config == 64, "the layout that ldtilecfg reads");
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
  }
  // What follows on this thread does not pay for saving them.
  static void close() { __asm__ volatile("tilerelease"); }
  template <int t>
  static void zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(t));
  }
  template <int t>
  static void load(const void* data, int64_t stride_bytes) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(data), "r"(stride_bytes), "i"(t) : "memory");
  }
  template <int t>
  static void store(void* data, int64_t stride_bytes) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(data), "r"(stride_bytes), "i"(t) : "memory");
  }
  template <int c, int a, int b>
  static void add_product() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  }
#endif
};

// The tiles are this thread's while it lives.
template <>
struct Unit<Pairs> {
  Unit() { Tiles::open(); }
  ~Unit() { Tiles::close(); }
  Unit(const Unit&) = delete;
  Unit& operator=(const Unit&) = delete;
};

constexpr int kTile = 16;

// Whole steps of 16 pairs for `tall` tiles of rows by `vectors` tiles of lanes, at most two each.
template <int vectors, int tall>
inline void multiply_tile(const float* a, int64_t a_stride, Broadcast<Pairs> b, int64_t steps, Sums c) {
  // Tiles 0 to 3: the sums, 4 and 5: rows of b, 6 and 7: lanes of a.
  const int64_t a_bytes = a_stride * 4, b_bytes = b.stride * 2, c_bytes = c.stride * 4;
  const auto each_sum = [&](const auto& body) UNISD_INLINE {
    body(std::integral_constant<int, 0>(), 0, 0);
    if constexpr (vectors > 1) body(std::integral_constant<int, 1>(), 0, 1);
    if constexpr (tall > 1) body(std::integral_constant<int, 2>(), 1, 0);
    if constexpr (tall > 1 && vectors > 1) body(std::integral_constant<int, 3>(), 1, 1);
  };
  const auto place = [&](int row, int column) { return c.data + row * kTile * c.stride + column * kTile; };
  each_sum([&](auto t, int row, int column) UNISD_INLINE {
    if (c.accumulate)
      Tiles::load<t.value>(place(row, column), c_bytes);
    else
      Tiles::zero<t.value>();
  });
  for (int64_t k = 0; k < steps; k += kTile) {
    Tiles::load<4>(b.from(0, k).data, b_bytes);
    if constexpr (tall > 1) Tiles::load<5>(b.from(kTile, k).data, b_bytes);
    Tiles::load<6>(a + k * a_stride, a_bytes);
    Tiles::add_product<0, 4, 6>();
    if constexpr (tall > 1) Tiles::add_product<2, 5, 6>();
    if constexpr (vectors > 1) {
      Tiles::load<7>(a + k * a_stride + kTile, a_bytes);
      Tiles::add_product<1, 4, 7>();
      if constexpr (tall > 1) Tiles::add_product<3, 5, 7>();
    }
  }
  each_sum([&](auto t, int row, int column) UNISD_INLINE { Tiles::store<t.value>(place(row, column), c_bytes); });
}

// As many rows as whole tiles take; returns their number. Steps that fill no tile are multiplied as vectors.
template <int vectors, class Between>
inline int64_t multiply_tiles(const float* a, int64_t a_stride, Broadcast<Pairs> b, int64_t rows, int64_t steps, Sums c,
                              int64_t ahead, const Between& between) {
  const int64_t whole = steps / kTile * kTile, done = rows / kTile * kTile;
  if (whole == 0) return 0;
  const auto fetch = [&](int64_t first, int64_t count) {
    for (int64_t i = first; ahead != 0 && i < first + count; ++i) {
      for (int64_t k = 0; k < steps; k += kTile) __builtin_prefetch(b.from(i, k).data + ahead, 0, 2);
    }
  };
  const int64_t calls = (steps + kBetween - 1) / kBetween;
  int64_t i = 0;
  for (; i + 2 * kTile <= done; i += 2 * kTile) {
    fetch(i, 2 * kTile);
    multiply_tile<vectors, 2>(a, a_stride, b.from(i, 0), whole, c.from(i));
    for (int64_t n = 0; n < 2 * kTile / kBroadcast * calls; ++n) between();
  }
  if (i < done) {
    fetch(i, kTile);
    multiply_tile<vectors, 1>(a, a_stride, b.from(i, 0), whole, c.from(i));
    for (int64_t n = 0; n < kTile / kBroadcast * calls; ++n) between();
  }
  if (whole < steps) {
    for (i = 0; i < done; i += kBroadcast) {
      const Sums more{c.data + i * c.stride, c.stride, true};
      multiply<Pairs, vectors, kBroadcast>(a + whole * a_stride, a_stride, b.from(i, whole), steps - whole, more, 0,
                                             [] {});
    }
  }
  return done;
}

}  // namespace UNISD_ISA
}  // namespace unisd
