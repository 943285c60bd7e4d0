#include "common.h"
#include "cpu/rms_norm.h"

namespace rtp_mm {
namespace {

constexpr int64_t kGrain = 16;  // rows: some microseconds

Tensor rms_norm_cpu(const Tensor& x, const Tensor& weight, double eps, ScalarType out_dtype) {
  check(x.dim() == 2 && x.scalar_type() == ScalarType::Float && x.is_contiguous(),
        "rms_norm: x must be contiguous [N, D] float32, got ", describe(x));
  const int64_t dim = x.size(1);
  check(
      weight.dim() == 1 && weight.size(0) == dim && weight.scalar_type() == ScalarType::Float && weight.is_contiguous(),
      "rms_norm: weight must be contiguous [", dim, "] float32, got ", describe(weight));
  const bool is_bf16 = out_dtype == ScalarType::BFloat16;
  check(is_bf16 || out_dtype == ScalarType::Float, "rms_norm: out_dtype must be float32 or bfloat16, got ",
        dtype_name(out_dtype));
  Tensor out = torch::stable::new_empty(x, {x.size(0), dim}, out_dtype);
  const float* source = x.const_data_ptr<float>();
  const auto run_into = [&]<class Out>(Out* result) {
    torch::stable::parallel_for(0, x.size(0), kGrain, [&](int64_t begin, int64_t end) {
      rms_norm(best_isa(), source + begin * dim, weight.const_data_ptr<float>(), end - begin, dim,
               static_cast<float>(eps), result + begin * dim);
    });
  };
  if (is_bf16) {
    run_into(static_cast<BFloat16*>(out.mutable_data_ptr()));
  } else {
    run_into(out.mutable_data_ptr<float>());
  }
  return out;
}

}  // namespace
}  // namespace rtp_mm

STABLE_TORCH_LIBRARY_IMPL(rtp_mm, CPU, m) { m.impl("rms_norm", TORCH_BOX(&rtp_mm::rms_norm_cpu)); }
