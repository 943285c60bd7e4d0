// patch_embed without tensor cores: float32 weights, and shapes that those do not take.

#include <type_traits>

#include "cuda/patch_embed.h"
#include "cuda/patch_embed_device.h"
#include "cuda/patch_embed_mma.h"

namespace rtp_mm {
namespace {

constexpr int kTile = 64;      // rows and columns of a block's tile
constexpr int kDepth = 16;     // steps of k held in shared memory
constexpr int kSide = 16;      // threads on a side of the block
constexpr int kPerThread = 4;  // rows and columns of a thread: kTile / kSide
static_assert(kSide * kPerThread == kTile);

__device__ float to_float(float value) { return value; }
__device__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ float to_float(__half value) { return __half2float(value); }

template <class Weight, class Out>
__global__ void __launch_bounds__(kSide* kSide) multiply(CudaPatchEmbed<Weight> job, Out* out) {
  __shared__ float pixels[kDepth][kTile + 1];
  __shared__ float weights[kDepth][kTile + 1];
  __shared__ int64_t starts[kTile];  // of the tile's rows in job.rows
  const int64_t first_row = int64_t{blockIdx.x} * kTile, first_column = int64_t{blockIdx.y} * kTile;
  const int thread = threadIdx.y * kSide + threadIdx.x;
  float sums[kPerThread][kPerThread] = {};
  if (thread < kTile) starts[thread] = input_row(job, min(first_row + thread, job.n - 1)) * job.k;
  __syncthreads();

  for (int64_t first_k = 0; first_k < job.k; first_k += kDepth) {
    for (int i = thread; i < kTile * kDepth; i += kSide * kSide) {
      const int line = i / kDepth, depth = i % kDepth;
      const int64_t column = first_column + line, k = first_k + depth;
      const bool is_pixel = k < job.k, is_weight = column < job.d && is_pixel;
      pixels[depth][line] = is_pixel ? static_cast<float>(job.rows[starts[line] + k]) - 128.0f : 0.0f;
      float sum = 0;
      for (int64_t term = 0; is_weight && term < job.terms; ++term) {
        sum += to_float(job.weight[term * job.term_stride + column * job.column_stride + k]);
      }
      weights[depth][line] = sum;
    }
    __syncthreads();
    float partial[kPerThread][kPerThread] = {};  // sums of partial sums round less
    for (int depth = 0; depth < kDepth; ++depth) {
      for (int r = 0; r < kPerThread; ++r) {
        for (int c = 0; c < kPerThread; ++c) {
          partial[r][c] =
              fmaf(pixels[depth][threadIdx.y + r * kSide], weights[depth][threadIdx.x + c * kSide], partial[r][c]);
        }
      }
    }
    for (int r = 0; r < kPerThread; ++r) {
      for (int c = 0; c < kPerThread; ++c) sums[r][c] += partial[r][c];
    }
    __syncthreads();
  }

  for (int r = 0; r < kPerThread; ++r) {
    for (int c = 0; c < kPerThread; ++c) {
      const int64_t row = first_row + threadIdx.y + r * kSide, column = first_column + threadIdx.x + c * kSide;
      if (row < job.n && column < job.d) {
        store(out + row * job.d + column, finish(job, row, column, sums[r][c]));
      }
    }
  }
}

}  // namespace

template <class Weight, class Out>
cudaError_t launch_patch_embed(const CudaPatchEmbed<Weight>& job, Out* out, cudaStream_t stream) {
  if constexpr (!std::is_same_v<Weight, float>) {
    if (fits_tensor_cores(job)) return launch_patch_embed_mma(job, out, stream);
  }
  const unsigned across = static_cast<unsigned>((job.n + kTile - 1) / kTile);
  const unsigned down = static_cast<unsigned>((job.d + kTile - 1) / kTile);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(across, down);
  config.blockDim = dim3(kSide, kSide);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, multiply<Weight, Out>, job, out);
}

#define RTP_MM_INSTANTIATE(Weight)                                                                      \
  template cudaError_t launch_patch_embed(const CudaPatchEmbed<Weight>&, float*, cudaStream_t);         \
  template cudaError_t launch_patch_embed(const CudaPatchEmbed<Weight>&, __nv_bfloat16*, cudaStream_t); \
  template cudaError_t launch_patch_embed(const CudaPatchEmbed<Weight>&, __half*, cudaStream_t);
RTP_MM_INSTANTIATE(float)
RTP_MM_INSTANTIATE(__nv_bfloat16)
RTP_MM_INSTANTIATE(__half)

}  // namespace rtp_mm
