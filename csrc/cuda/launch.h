// What every CUDA *_op file needs to launch on torch's current stream.

#pragma once

#include <cuda_runtime_api.h>

#include "common.h"

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace rtp_mm {

// Enters the device of a tensor; leaves it at the end of the scope.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    check(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == 0, "no current CUDA stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

inline void check_launch(const char* op, cudaError_t status) {
  check(status == cudaSuccess, op, ": ", cudaGetErrorString(status));
}

}  // namespace rtp_mm
