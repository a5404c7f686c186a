// Multiply-adds on registers alone: the rate that no product of matrices can exceed. `fma_peak.py` compiles and times it.

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <thread>
#include <vector>

namespace {

// Sixteen chains that do not wait for each other cover any processor's latency times throughput.
#define CHAINS(DO) \
  DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11) DO(12) DO(13) DO(14) DO(15)
// Twelve leave four of AVX2's sixteen registers.
#define FEWER_CHAINS(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
// Keeps a register's value from being known to the compiler.
#define OPAQUE(x) asm volatile("" : "+v"(x))

__attribute__((target("avx2,fma"))) void avx2(std::int64_t iterations) {
  __m256 a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(1e-3f);
#define BEGIN(n) __m256 c##n = _mm256_set1_ps(n);
  FEWER_CHAINS(BEGIN)
#undef BEGIN
  for (std::int64_t i = 0; i < iterations; ++i) {
#define STEP(n) c##n = _mm256_fmadd_ps(a, b, c##n);
    FEWER_CHAINS(STEP)
#undef STEP
  }
#define END(n) OPAQUE(c##n);
  FEWER_CHAINS(END)
#undef END
}

__attribute__((target("avx512f"))) void avx512(std::int64_t iterations) {
  __m512 a = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(1e-3f);
#define BEGIN(n) __m512 c##n = _mm512_set1_ps(n);
  CHAINS(BEGIN)
#undef BEGIN
  for (std::int64_t i = 0; i < iterations; ++i) {
#define STEP(n) c##n = _mm512_fmadd_ps(a, b, c##n);
    CHAINS(STEP)
#undef STEP
  }
#define END(n) OPAQUE(c##n);
  CHAINS(END)
#undef END
}

__attribute__((target("avx512f,avx512bf16"))) void avx512_bf16(std::int64_t iterations) {
  // Pairs of 16-bit numbers, 0.5 and 1e-3.
  __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f00), b = (__m512bh)_mm512_set1_epi16(0x3a83);
#define BEGIN(n) __m512 c##n = _mm512_set1_ps(n);
  CHAINS(BEGIN)
#undef BEGIN
  for (std::int64_t i = 0; i < iterations; ++i) {
#define STEP(n) c##n = _mm512_dpbf16_ps(c##n, a, b);
    CHAINS(STEP)
#undef STEP
  }
#define END(n) OPAQUE(c##n);
  CHAINS(END)
#undef END
}

// Palette 1: eight tiles of 16 rows of 64 bytes.
struct alignas(64) TileShapes {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

__attribute__((target("amx-tile,amx-bf16"))) void amx_bf16(std::int64_t iterations) {
  TileShapes shapes;
  alignas(64) std::uint16_t numbers[512];
  for (auto& number : numbers) number = 0x3a83;
  _tile_loadconfig(&shapes);
  _tile_loadd(4, numbers, 64);
  _tile_loadd(5, numbers, 64);
  _tile_loadd(6, numbers, 64);
  _tile_loadd(7, numbers, 64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (std::int64_t i = 0; i < iterations; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}

// Linux lends the tiles' state to a process that asks.
bool tiles_granted() {
  constexpr int request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers found;
  __get_cpuid_count(leaf, subleaf, &found.a, &found.b, &found.c, &found.d);
  return found;
}

bool bit(unsigned word, int place) { return (word >> place) & 1; }

// Which states of registers the system saves: bits of XCR0.
std::uint64_t saved_states() {
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
}

struct Loop {
  const char* name;
  void (*run)(std::int64_t);
  std::int64_t flops;  // of one iteration
};

constexpr Loop loops[] = {
    {"vfmadd231ps ymm", avx2, 12 * 8 * 2},
    {"vfmadd231ps zmm", avx512, 16 * 16 * 2},
    {"vdpbf16ps zmm", avx512_bf16, 16 * 32 * 2},
    {"tdpbf16ps", amx_bf16, 4 * 16 * 16 * 32 * 2},
};

}  // namespace

extern "C" {

// The fastest loop that this machine runs, or -1: of bfloat16 operands, or of float32 ones.
int fma_loop(int bfloat16) {
  const Registers first = cpuid(1, 0), wide = cpuid(7, 0), more = cpuid(7, 1);
  if (!bit(first.c, 27)) return -1;  // no xgetbv
  const std::uint64_t saved = saved_states();
  const bool ymm = (saved & 0x6) == 0x6, zmm = ymm && (saved & 0xe0) == 0xe0, tiles = (saved & 0x60000) == 0x60000;
  if (bfloat16) {
    if (tiles && bit(wide.d, 22) && bit(wide.d, 24) && tiles_granted()) return 3;
    return zmm && bit(wide.b, 16) && bit(more.a, 5) ? 2 : -1;
  }
  if (zmm && bit(wide.b, 16)) return 1;
  return ymm && bit(wide.b, 5) && bit(first.c, 12) ? 0 : -1;
}

const char* fma_name(int loop) { return loops[loop].name; }

// Does as many FLOPs on some threads, the last part of a loop rounded up.
void fma_run(int loop, std::int64_t flops, int threads) {
  const std::int64_t each = loops[loop].flops * threads;
  const std::int64_t iterations = (flops + each - 1) / each;
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(loops[loop].run, iterations);
  loops[loop].run(iterations);
  for (auto& other : others) other.join();
}
}
