// As much of CUDA as our kernels use, on the CPU: a block's threads are real threads with a real barrier, blocks run
// one after the other. For machines without a GPU: indices, bounds and arithmetic are tested, not the hardware.

#pragma once

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline dim3 blockIdx, blockDim, gridDim;
inline thread_local dim3 threadIdx;
inline std::barrier<>* block_barrier;

inline void __syncthreads() { block_barrier->arrive_and_wait(); }
[[noreturn]] inline void __trap() { std::abort(); }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  const dim3 grid = gridDim = config->gridDim;
  blockDim = config->blockDim;
  for (unsigned block = 0; block < grid.x * grid.y; ++block) {
    blockIdx = {block % grid.x, block / grid.x};
    std::barrier barrier(blockDim.x * blockDim.y);
    block_barrier = &barrier;
    std::vector<std::jthread> threads;
    for (unsigned thread = 0; thread < blockDim.x * blockDim.y; ++thread) {
      threads.emplace_back([=] {
        threadIdx = {thread % blockDim.x, thread / blockDim.x};
        kernel(arguments...);
      });
    }
  }
  return cudaSuccess;
}
