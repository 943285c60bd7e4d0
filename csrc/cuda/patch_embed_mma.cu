// patch_embed on the tensor cores: mma.sync, bytes widened in registers.
//
// A block takes 128 rows by 64 columns, a warp 32 rows of them, so that each byte is widened once in a block. Tiles of
// 32 steps of k are copied ahead by cp.async. Hopper's wgmma would reach higher, but this GEMM is 0.2 % of a tower.
//
// Which k goes where is ours to choose, as long as rows and weight agree: lane 4 g + t takes k = 8t to 8t + 7 of a
// tile, one 8-byte load of a row and one 16-byte load of a column, and makes two instructions' operands of them. So is
// which column goes where: lane t ends up with columns 4t to 4t + 3 of every 16, which it stores at once.

#include <initializer_list>
#include <type_traits>

#include "cuda/patch_embed_device.h"
#include "cuda/patch_embed_mma.h"
#include "cuda/ptx.h"

namespace rtp_mm {
namespace {

constexpr int kWarp = 32, kWarps = 4, kThreads = kWarp * kWarps;
constexpr int kRows = 128, kColumns = 64, kDepth = 32;                         // of a block's tile
constexpr int kRowBlocks = kRows / kWarps / 16, kColumnBlocks = kColumns / 8;  // of a warp: mma's 16 x 8
constexpr int kStages = 3;  // two tiles on their way while one is used: 36 KB, three blocks on an SM
constexpr int kMaxTerms = 2;

struct alignas(16) Stage {
  uint8_t rows[kRows][kDepth];
  uint16_t weight[kMaxTerms][kColumns][kDepth];
};

// Of a copy of kBytes from byte `begin` of a line of `end` bytes: those that there are.
template <int kBytes>
__device__ int bytes_there(int begin, int end) {
  return min(max(end - begin, 0), kBytes);
}

// lines: where the tile's rows begin.
template <int kBytes>
__device__ void copy_rows(const uint8_t* const* lines, int first_k, int k, Stage& stage) {
  constexpr int kCopies = kDepth / kBytes, kAtOnce = kThreads / kCopies;  // copies of a row, rows
  const int row = threadIdx.x / kCopies, byte = threadIdx.x % kCopies * kBytes;
  const int there = bytes_there<kBytes>(first_k + byte, k), offset = there ? first_k + byte : 0;
#pragma unroll
  for (int j = 0; j < kRows; j += kAtOnce) {
    copy_async<kBytes>(&stage.rows[row + j][byte], lines[row + j] + offset, there);
  }
}

// lines: where the tile's columns begin in the first term.
template <int kTerms, int kBytes, class Weight>
__device__ void copy_weight(const Weight* const* lines, int64_t term_stride, int first_k, int k, Stage& stage) {
  constexpr int kElements = kBytes / sizeof(Weight), kCopies = kDepth / kElements, kAtOnce = kThreads / kCopies;
  const int column = threadIdx.x / kCopies, element = threadIdx.x % kCopies * kElements;
  const int size = sizeof(Weight), there = bytes_there<kBytes>((first_k + element) * size, k * size);
  const int offset = there ? first_k + element : 0;
#pragma unroll
  for (int j = 0; j < kColumns; j += kAtOnce) {
#pragma unroll
    for (int term = 0; term < kTerms; ++term) {
      const Weight* from = lines[column + j] + offset + term * term_stride;
      copy_async<kBytes>(&stage.weight[term][column + j][element], from, there);
    }
  }
}

// Four bytes x to x - 128, in two pairs: exact.
template <class Element>
__device__ void centre(uint32_t bytes, uint32_t& first, uint32_t& second);

// 128 + x of 7 bits has bfloat16's 8 significant bits: 0x4300 | x. The eighth decides whether 128 or 256 is taken off.
__device__ uint32_t centre_bfloat16(uint32_t pair) {
  constexpr uint32_t k128 = 0x43004300, kLowBits = 0x007f007f, kHighBit = 0x00800080;
  return subtract<__nv_bfloat16>((pair & kLowBits) | k128, (~pair & kHighBit) | k128);
}

template <>
__device__ void centre<__nv_bfloat16>(uint32_t bytes, uint32_t& first, uint32_t& second) {
  first = centre_bfloat16(__byte_perm(bytes, 0, 0x4140));
  second = centre_bfloat16(__byte_perm(bytes, 0, 0x4342));
}

// 1024 + x is 0x6400 | x.
template <>
__device__ void centre<__half>(uint32_t bytes, uint32_t& first, uint32_t& second) {
  constexpr uint32_t k1024 = 0x64646464, k1152 = 0x64806480;
  first = subtract<__half>(__byte_perm(bytes, k1024, 0x4140), k1152);
  second = subtract<__half>(__byte_perm(bytes, k1024, 0x4342), k1152);
}

// A warp's rows by all columns, over one tile of k.
template <int kTerms, class Weight>
__device__ void multiply_tile(const Stage& stage, float (&sums)[kRowBlocks][kColumnBlocks][4]) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int first_row = threadIdx.x / kWarp * 16 * kRowBlocks;
  uint32_t pixels[2][kRowBlocks][4];  // the operands of both halves of the lane's k
#pragma unroll
  for (int block = 0; block < kRowBlocks; ++block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint8_t* row = stage.rows[first_row + 16 * block + 8 * half + g];
      const uint2 bytes = *reinterpret_cast<const uint2*>(row + 8 * t);
      centre<Weight>(bytes.x, pixels[0][block][half], pixels[0][block][half + 2]);
      centre<Weight>(bytes.y, pixels[1][block][half], pixels[1][block][half + 2]);
    }
  }
#pragma unroll
  for (int j = 0; j < kColumnBlocks; ++j) {
    const int column = 16 * (j / 2) + 4 * (g / 2) + 2 * (j % 2) + g % 2;
#pragma unroll
    for (int term = 0; term < kTerms; ++term) {
      const uint4 weight = *reinterpret_cast<const uint4*>(stage.weight[term][column] + 8 * t);
#pragma unroll
      for (int block = 0; block < kRowBlocks; ++block) {
        multiply_add<Weight>(sums[block][j], pixels[0][block], weight.x, weight.y);
        multiply_add<Weight>(sums[block][j], pixels[1][block], weight.z, weight.w);
      }
    }
  }
}

__device__ float4 load4(const float* src) { return *reinterpret_cast<const float4*>(src); }

__device__ void store4(float* dst, const float (&values)[4]) {
  *reinterpret_cast<float4*>(dst) = make_float4(values[0], values[1], values[2], values[3]);
}

template <class Half>
__device__ void store4(Half* dst, const float (&values)[4]) {
  alignas(8) Half rounded[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) store(rounded + i, values[i]);
  *reinterpret_cast<uint2*>(dst) = *reinterpret_cast<const uint2*>(rounded);
}

// Four neighbours of a row.
template <bool kIsWhole, class Weight, class Out>
__device__ void finish4(const CudaPatchEmbed<Weight>& job, int64_t row, int64_t column, const float (&sums)[4],
                        Out* out) {
  if constexpr (kIsWhole) {
    const float4 bias = load4(job.bias + column);
    float values[4] = {fmaf(job.scale, sums[0], bias.x), fmaf(job.scale, sums[1], bias.y),
                       fmaf(job.scale, sums[2], bias.z), fmaf(job.scale, sums[3], bias.w)};
    if (job.pos) {
      const float4 pos = load4(job.pos + row * job.d + column);
      values[0] += pos.x, values[1] += pos.y, values[2] += pos.z, values[3] += pos.w;
    }
    store4(out + row * job.d + column, values);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (column + i < job.d) store(out + row * job.d + column + i, finish(job, row, column + i, sums[i]));
    }
  }
}

template <bool kIsWhole, class Weight, class Out>
__device__ void finish_tile(const CudaPatchEmbed<Weight>& job, int64_t first_row, int64_t first_column,
                            const float (&sums)[kRowBlocks][kColumnBlocks][4], Out* out) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int block = 0; block < kRowBlocks; ++block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first_row + threadIdx.x / kWarp * 16 * kRowBlocks + 16 * block + 8 * half + g;
#pragma unroll
      for (int j = 0; j < kColumnBlocks; j += 2) {
        const float (&a)[4] = sums[block][j], (&b)[4] = sums[block][j + 1];
        const float values[4] = {a[2 * half], a[2 * half + 1], b[2 * half], b[2 * half + 1]};
        const int64_t column = first_column + 8 * j + 4 * t;
        if (row < job.n && column < job.d) finish4<kIsWhole>(job, row, column, values, out);
      }
    }
  }
}

// Straight code for a step: what a job is like stands in the type. kRowBytes: that a copy of the rows takes;
// kIsAligned: the weight's copies take 16 bytes, and stores four elements. Rows and columns past the last are read as
// the last, and not stored.
template <int kTerms, int kRowBytes, bool kIsAligned, class Weight, class Out>
__global__ void __launch_bounds__(kThreads, 3) multiply_mma(CudaPatchEmbed<Weight> job, Out* out) {
  __shared__ Stage stages[kStages];
  __shared__ const uint8_t* rows[kRows];
  __shared__ const Weight* columns[kColumns];
  const int64_t first_row = int64_t{blockIdx.x} * kRows, first_column = int64_t{blockIdx.y} * kColumns;
  const int thread = threadIdx.x;
  static_assert(kRows == kThreads && kColumns <= kThreads);
  rows[thread] = job.rows + input_row(job, min(first_row + thread, job.n - 1)) * job.k;
  if (thread < kColumns) columns[thread] = job.weight + min(first_column + thread, job.d - 1) * job.column_stride;
  __syncthreads();

  const int k = static_cast<int>(job.k), steps = (k + kDepth - 1) / kDepth;
  const auto copy_step = [&](int step) {
    if (step < steps) {
      Stage& stage = stages[step % kStages];
      copy_rows<kRowBytes>(rows, step * kDepth, k, stage);
      copy_weight<kTerms, kIsAligned ? 16 : 4>(columns, job.term_stride, step * kDepth, k, stage);
    }
    close_copies();  // past the last step too, so that the count of groups stays
  };
  float sums[kRowBlocks][kColumnBlocks][4] = {};
  for (int step = 0; step < kStages - 1; ++step) copy_step(step);
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();  // this step's tile is there, and the one before is used up
    copy_step(step + kStages - 1);
    multiply_tile<kTerms, Weight>(stages[step % kStages], sums);
  }
  finish_tile<kIsAligned>(job, first_row, first_column, sums, out);
}

bool divides(uintptr_t bytes, std::initializer_list<uintptr_t> values) {
  for (const uintptr_t value : values) {
    if (value % bytes) return false;
  }
  return true;
}

template <class Weight>
bool is_weight_aligned(const CudaPatchEmbed<Weight>& job, uintptr_t bytes) {
  const auto stride = [](int64_t elements) { return static_cast<uintptr_t>(elements) * sizeof(Weight); };
  return divides(bytes, {reinterpret_cast<uintptr_t>(job.weight), stride(job.term_stride), stride(job.column_stride)});
}

template <class Weight>
bool are_rows_aligned(const CudaPatchEmbed<Weight>& job, uintptr_t bytes) {
  return divides(bytes, {reinterpret_cast<uintptr_t>(job.rows), static_cast<uintptr_t>(job.k)});
}

}  // namespace

template <class Weight>
bool fits_tensor_cores(const CudaPatchEmbed<Weight>& job) {
  return job.k % 4 == 0 && job.k < (1 << 30) && is_weight_aligned(job, 4);
}

template <class Weight, class Out>
cudaError_t launch_patch_embed_mma(const CudaPatchEmbed<Weight>& job, Out* out, cudaStream_t stream) {
  const auto address = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
  const bool is_aligned =
      is_weight_aligned(job, 16) && job.d % 4 == 0 && divides(16, {address(job.bias), address(job.pos), address(out)});
  const auto kernel = [&]<int kTerms>(std::integral_constant<int, kTerms>) {
    if (!is_aligned) return multiply_mma<kTerms, 4, false, Weight, Out>;
    return are_rows_aligned(job, 8) ? multiply_mma<kTerms, 8, true, Weight, Out>
                                    : multiply_mma<kTerms, 4, true, Weight, Out>;
  };
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((job.n + kRows - 1) / kRows),
                        static_cast<unsigned>((job.d + kColumns - 1) / kColumns));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(
      &config,
      job.terms == 1 ? kernel(std::integral_constant<int, 1>{}) : kernel(std::integral_constant<int, kMaxTerms>{}), job,
      out);
}

#define RTP_MM_INSTANTIATE(Weight)                                                                          \
  template bool fits_tensor_cores(const CudaPatchEmbed<Weight>&);                                           \
  template cudaError_t launch_patch_embed_mma(const CudaPatchEmbed<Weight>&, float*, cudaStream_t);         \
  template cudaError_t launch_patch_embed_mma(const CudaPatchEmbed<Weight>&, __nv_bfloat16*, cudaStream_t); \
  template cudaError_t launch_patch_embed_mma(const CudaPatchEmbed<Weight>&, __half*, cudaStream_t);
RTP_MM_INSTANTIATE(__nv_bfloat16)
RTP_MM_INSTANTIATE(__half)

}  // namespace rtp_mm
