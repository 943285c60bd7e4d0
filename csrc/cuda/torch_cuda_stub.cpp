// Link-time stand-in for libtorch_cuda.so, as CUDA's own stubs are for libcuda.so; never installed, never run.

#include <cstdint>

extern "C" __attribute__((visibility("default"))) int32_t aoti_torch_get_current_cuda_stream(int32_t, void**) {
  return 1;
}
