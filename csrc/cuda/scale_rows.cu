// scale_rows: out[n] = scale[n] * rows[n] in float32, rounded once to out's type. 1 read, 1 write.
#include "element.cuh"
#include "launch.h"

namespace unisd::cuda {
namespace {

constexpr int kScaleThreads = 256;

template <typename Out>
__global__ void __launch_bounds__(kScaleThreads) scale_rows_kernel(const ScaleRowsArguments a) {
  const int64_t row = blockIdx.x;
  const float* in = a.rows.data + row * a.rows.row_stride;
  Out* out = static_cast<Out*>(a.out) + row * a.out_stride;
  const float scale = a.scale[row];
  const int columns = a.rows.columns;

  constexpr int N = 16 / sizeof(Out);
  const int packs = is_aligned(in) && is_aligned(out) ? columns / N : 0;
  for (int i = threadIdx.x; i < packs; i += kScaleThreads) {
    const auto from = load_pack<float, N>(in + i * N);
    ElementPack<Out, N> to;
#pragma unroll
    for (int k = 0; k < N; ++k) to.v[k] = narrow<Out>(scale * from.v[k]);
    store_pack<Out, N>(out + i * N, to);
  }
  for (int i = packs * N + threadIdx.x; i < columns; i += kScaleThreads) out[i] = narrow<Out>(scale * in[i]);
}

}  // namespace

cudaError_t launch_scale_rows(const ScaleRowsArguments& arguments, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(arguments.rows.rows);
  dispatch(arguments.out_type, [&](auto out) {
    using Out = decltype(out);
    if constexpr (!std::is_same_v<Out, double>) {
      scale_rows_kernel<Out><<<blocks, kScaleThreads, 0, stream>>>(arguments);
    }
  });
  return cudaGetLastError();
}

}  // namespace unisd::cuda
