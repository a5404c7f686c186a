// ema_update_: decay teacher + (1 - decay) student, many tensors per launch, moved in packs of 16 bytes.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "../ema_average.h"
#include "../ema_rounding.h"
#include "ema.h"

namespace unisd::cuda {
namespace {

// To the type of the arithmetic: float, or double where float64 takes part.
template <typename Math, typename T>
__device__ __forceinline__ Math widen(T value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return static_cast<Math>(__bfloat162float(value));
  } else if constexpr (std::is_same_v<T, __half>) {
    return static_cast<Math>(__half2float(value));
  } else {
    return static_cast<Math>(value);
  }
}

// Round to nearest even; to 16 bits from float.
template <typename T, typename Math>
__device__ __forceinline__ T narrow(Math value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else {
    return static_cast<T>(value);
  }
}

template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) ElementPack {
  T v[N];
};

template <typename T, int N>
__device__ __forceinline__ ElementPack<T, N> load_pack(const T* from) {
  return *reinterpret_cast<const ElementPack<T, N>*>(from);
}

template <typename T, int N>
__device__ __forceinline__ void store_pack(T* to, const ElementPack<T, N>& pack) {
  *reinterpret_cast<ElementPack<T, N>*>(to) = pack;
}

__device__ __forceinline__ bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Calls function(value of the C++ type).
template <typename Function>
void dispatch(Storage storage, Function&& function) {
  switch (storage) {
    case Storage::kFloat32:
      return function(float{});
    case Storage::kFloat64:
      return function(double{});
    case Storage::kBFloat16:
      return function(__nv_bfloat16{});
    case Storage::kFloat16:
      return function(__half{});
  }
}

constexpr int kEmaThreads = 256;

// The tensor that a block belongs to: the last whose first block is not above it.
__device__ __forceinline__ int tensor_of_block(const EmaTensors& tensors, int block) {
  int low = 0, high = tensors.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (tensors.first_block[middle] <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// base + factor (other - base), each operation rounded: never contracted to a fused one, so that the CPU's kernel
// (compiled with -ffp-contract=off) gets the same bits.
__device__ __forceinline__ float towards(float base, float other, float factor) {
  return __fadd_rn(base, __fmul_rn(factor, other - base));
}

__device__ __forceinline__ double towards(double base, double other, double factor) {
  return __dadd_rn(base, __dmul_rn(factor, other - base));
}

// ema_average.h in the arithmetic of Math.
template <typename Math>
struct Average {
  Math factor;
  bool from_student, is_copy;

  __device__ __forceinline__ Math operator()(Math teacher, Math student) const {
    const Math value = towards(from_student ? student : teacher, from_student ? teacher : student, factor);
    return is_copy ? student : value;
  }
};

template <EmaRounding kRounding, typename Teacher, typename Student, typename Math>
struct Update {
  Average<Math> average;
  RoundingKey key;

  __device__ __forceinline__ void operator()(Teacher& teacher, Student student, Teacher& compensation,
                                             int64_t element) const {
    Math value = widen<Math>(teacher);
    if constexpr (kRounding == EmaRounding::kCompensated) value += widen<Math>(compensation);
    value = average(value, widen<Math>(student));
    if constexpr (kRounding == EmaRounding::kStochastic) {
      const uint32_t random = random_bits(key, static_cast<uint64_t>(element));
      const uint32_t bits = std::is_same_v<Teacher, __half> ? stochastic_float16(value, random)
                                                            : stochastic_bfloat16(value, random);
      teacher = narrow<Teacher>(__uint_as_float(bits));  // exact
    } else {
      teacher = narrow<Teacher>(value);
      if constexpr (kRounding == EmaRounding::kCompensated) {
        compensation = narrow<Teacher>(value - widen<Math>(teacher));
      }
    }
  }
};

// Four blocks a multiprocessor leave 64 registers; left to itself the compiler keeps to 32 and spills.
template <EmaRounding kRounding, typename Teacher, typename Student>
__global__ void __launch_bounds__(kEmaThreads, 4)
    ema_kernel(const __grid_constant__ EmaTensors tensors, const EmaAverage form, const uint64_t seed) {
  using Math = std::conditional_t<std::is_same_v<Teacher, double>, double, float>;
  constexpr bool kCompensated = kRounding == EmaRounding::kCompensated;
  constexpr int N = 16 / (sizeof(Teacher) < sizeof(Student) ? sizeof(Teacher) : sizeof(Student));
  static_assert(kEmaBlockElements % N == 0);

  const int block = blockIdx.x, i = tensor_of_block(tensors, block);
  const int64_t start = kEmaBlockElements * (block - tensors.first_block[i]);
  const int64_t length = min(kEmaBlockElements, tensors.numel[i] - start);
  Teacher* teacher = static_cast<Teacher*>(tensors.teacher[i]) + start;
  const Student* student = static_cast<const Student*>(tensors.student[i]) + start;
  Teacher* compensation = kCompensated ? static_cast<Teacher*>(tensors.compensation[i]) + start : nullptr;
  const Update<kRounding, Teacher, Student, Math> update{
      {static_cast<Math>(form.factor), form.from_student, form.is_copy},
      rounding_key(seed, static_cast<uint32_t>(tensors.position[i]))};

  const bool aligned = is_aligned(teacher) && is_aligned(student) && (!kCompensated || is_aligned(compensation));
  const int64_t packs = aligned ? length / N : 0;
  for (int64_t p = threadIdx.x; p < packs; p += kEmaThreads) {
    const int64_t at = p * N;
    auto t = load_pack<Teacher, N>(teacher + at);
    const auto s = load_pack<Student, N>(student + at);
    ElementPack<Teacher, N> c;
    if constexpr (kCompensated) c = load_pack<Teacher, N>(compensation + at);
#pragma unroll
    for (int k = 0; k < N; ++k) update(t.v[k], s.v[k], c.v[k], start + at + k);
    store_pack<Teacher, N>(teacher + at, t);
    if constexpr (kCompensated) store_pack<Teacher, N>(compensation + at, c);
  }
  for (int64_t at = packs * N + threadIdx.x; at < length; at += kEmaThreads) {
    Teacher unused{};
    update(teacher[at], student[at], kCompensated ? compensation[at] : unused, start + at);
  }
}

template <EmaRounding kRounding, typename Teacher, typename Student>
void launch(const EmaTensors& tensors, double decay, uint64_t seed, cudaStream_t stream) {
  static_assert(sizeof(EmaTensors) + sizeof(EmaAverage) + sizeof(uint64_t) <= 4096, "the arguments of a launch");
  const auto blocks = static_cast<unsigned>(tensors.first_block[tensors.count]);
  ema_kernel<kRounding, Teacher, Student><<<blocks, kEmaThreads, 0, stream>>>(tensors, ema_average(decay), seed);
}

}  // namespace

cudaError_t launch_ema(const EmaTensors& tensors, Storage teacher, Storage student, EmaRounding rounding, double decay,
                       uint64_t seed, cudaStream_t stream) {
  dispatch(teacher, [&](auto t) {
    dispatch(student, [&](auto s) {
      using Teacher = decltype(t);
      using Student = decltype(s);
      if constexpr (sizeof(Teacher) > 2) {
        launch<EmaRounding::kPlain, Teacher, Student>(tensors, decay, seed, stream);
      } else if (rounding == EmaRounding::kCompensated) {
        launch<EmaRounding::kCompensated, Teacher, Student>(tensors, decay, seed, stream);
      } else {
        launch<EmaRounding::kStochastic, Teacher, Student>(tensors, decay, seed, stream);
      }
    });
  });
  return cudaGetLastError();
}

}  // namespace unisd::cuda
