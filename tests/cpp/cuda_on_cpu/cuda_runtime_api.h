// As much of CUDA as our kernels use, on the CPU: a block's threads are real threads with a real barrier, blocks run
// one after the other. For machines without a GPU: indices, bounds and arithmetic are tested, not the hardware.

#pragma once

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

constexpr unsigned kLanes = 32;

// What the lanes of a warp show each other: two slots in turn, so that a lane which is ahead disturbs none behind.
struct WarpOnCpu {
  std::barrier<> barrier;
  unsigned char slots[2][kLanes][64];

  explicit WarpOnCpu(unsigned lanes) : barrier(lanes) {}
};

inline dim3 blockIdx, blockDim, gridDim;
inline thread_local dim3 threadIdx;
inline thread_local WarpOnCpu* this_warp;
inline thread_local unsigned this_lane, this_slot;
inline std::barrier<>* block_barrier;

// Every lane of the warp shows a value, and sees those of the others until the next but one Exchange.
template <class Value>
class Exchange {
 public:
  const int lane = static_cast<int>(this_lane);

  explicit Exchange(const Value& value) : slot_(this_warp->slots[this_slot ^= 1]) {
    static_assert(sizeof(Value) <= sizeof(slot_[0]));
    std::memcpy(slot_[lane], &value, sizeof(Value));
    this_warp->barrier.arrive_and_wait();
  }

  Value of(int lane) const {
    Value value;
    std::memcpy(&value, slot_[lane], sizeof(Value));
    return value;
  }

 private:
  unsigned char (*slot_)[64];
};

inline void __syncthreads() { block_barrier->arrive_and_wait(); }
[[noreturn]] inline void __trap() { std::abort(); }

// Each nibble of the selector names one of the eight bytes of y:x.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned out = 0;
  for (unsigned i = 0; i < 4; ++i) out |= (bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return out;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  const dim3 grid = gridDim = config->gridDim;
  blockDim = config->blockDim;
  const unsigned size = blockDim.x * blockDim.y;
  for (unsigned block = 0; block < grid.x * grid.y; ++block) {
    blockIdx = {block % grid.x, block / grid.x};
    std::barrier barrier(size);
    block_barrier = &barrier;
    std::deque<WarpOnCpu> warps;
    for (unsigned first = 0; first < size; first += kLanes) warps.emplace_back(std::min(kLanes, size - first));
    std::vector<std::jthread> threads;
    for (unsigned thread = 0; thread < size; ++thread) {
      threads.emplace_back([=, &warps] {
        threadIdx = {thread % blockDim.x, thread / blockDim.x};
        this_warp = &warps[thread / kLanes];
        this_lane = thread % kLanes;
        kernel(arguments...);
      });
    }
  }
  return cudaSuccess;
}
