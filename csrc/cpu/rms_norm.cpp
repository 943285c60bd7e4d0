#include "cpu/rms_norm.h"

#include <cmath>

#include "cpu/simd.h"

namespace rtp_mm {
namespace {

struct RmsNorm {
  template <class Arch, class Out>
  RTP_MM_INLINE static void run(const float* x, const float* weight, int64_t rows, int64_t dim, float eps, Out* out) {
    const int64_t vectors_end = dim - dim % Arch::kLanes;
    for (int64_t r = 0; r < rows; ++r, x += dim, out += dim) {
      Vector<Arch> squares = {};
      for (int64_t i = 0; i < vectors_end; i += Arch::kLanes) squares += at<Arch>(x + i) * at<Arch>(x + i);
      float total = sum<Arch>(squares);
      for (int64_t i = vectors_end; i < dim; ++i) total += x[i] * x[i];
      const float scale = 1 / std::sqrt(total / static_cast<float>(dim) + eps);
      for (int64_t i = 0; i < dim; ++i) narrow(x[i] * scale * weight[i], out + i);
    }
  }
};

}  // namespace

template <class Out>
void rms_norm(Isa isa, const float* x, const float* weight, int64_t rows, int64_t dim, float eps, Out* out) {
  run<RmsNorm>(isa, x, weight, rows, dim, eps, out);
}

template void rms_norm(Isa, const float*, const float*, int64_t, int64_t, float, float*);
template void rms_norm(Isa, const float*, const float*, int64_t, int64_t, float, BFloat16*);

}  // namespace rtp_mm
