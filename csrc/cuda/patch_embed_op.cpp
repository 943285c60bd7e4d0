#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/launch.h"
#include "cuda/patch_embed.h"
#include "patch_embed_door.h"

namespace rtp_mm {
namespace {

// Calls f with a null pointer of the element type that stands for `dtype`.
template <class F>
void with_float_type(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
    case ScalarType::Half:
      return f(static_cast<__half*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}

Tensor patch_embed_cuda(const Tensor& rows, const Tensor& weight, const Tensor& bias, double scale,
                        const std::optional<Tensor>& order, const std::optional<Tensor>& pos, ScalarType out_dtype) {
  check(rows.dim() == 2 && rows.scalar_type() == ScalarType::Byte && rows.is_contiguous(),
        "patch_embed: rows must be contiguous [N, K] uint8, got ", describe(rows));
  check(weight.dim() == 3 && (weight.size(0) == 1 || weight.size(0) == 2) && weight.size(2) == rows.size(1) &&
            is_float(weight.scalar_type()) && (weight.size(2) <= 1 || weight.stride(2) == 1),
        "patch_embed: weight must be [1 or 2, D, ", rows.size(1),
        "] float32, bfloat16 or float16, the last dimension contiguous, got ", describe(weight));
  check(rows.device() == weight.device(), "patch_embed: rows and weight must be on one device");
  check(is_float(out_dtype), "patch_embed: out_dtype must be float32, bfloat16 or float16, got ",
        dtype_name(out_dtype));
  const int64_t group = check_patch_embed("patch_embed", rows.size(0), weight.size(1), weight, bias, order, pos);
  check(reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 4 == 0,
        "patch_embed: rows must start at a multiple of 4 bytes");
  const CudaScope cuda(rows);
  const int64_t n = rows.size(0), k = rows.size(1), d = weight.size(1);
  Tensor out = torch::stable::new_empty(rows, {n, d}, out_dtype);
  if (out.numel() == 0) return out;
  with_float_type(weight.scalar_type(), [&]<class Weight>(Weight*) {
    const CudaPatchEmbed<Weight> job{rows.const_data_ptr<uint8_t>(),
                                     static_cast<const Weight*>(weight.const_data_ptr()),
                                     bias.const_data_ptr<float>(),
                                     pos ? pos->const_data_ptr<float>() : nullptr,
                                     order ? order->const_data_ptr<int32_t>() : nullptr,
                                     static_cast<float>(scale),
                                     n,
                                     k,
                                     d,
                                     group,
                                     weight.size(0),
                                     weight.stride(0),
                                     weight.stride(1)};
    with_float_type(out_dtype, [&]<class Out>(Out*) {
      auto* result = static_cast<Out*>(out.mutable_data_ptr());
      check_launch("patch_embed", launch_patch_embed(job, result, cuda.stream()));
    });
  });
  return out;
}

}  // namespace
}  // namespace rtp_mm

STABLE_TORCH_LIBRARY_IMPL(rtp_mm, CUDA, m) { m.impl("patch_embed", TORCH_BOX(&rtp_mm::patch_embed_cuda)); }
