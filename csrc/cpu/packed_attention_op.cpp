#include <algorithm>

#include "common.h"
#include "cpu/linear_rows.h"
#include "cpu/packed_attention.h"

namespace rtp_mm {
namespace {

// The rows of all segments.
int64_t check_segments(const Tensor& cu_seqlens, int64_t n) {
  check(cu_seqlens.dim() == 1 && cu_seqlens.size(0) > 0 && cu_seqlens.scalar_type() == ScalarType::Int &&
            cu_seqlens.is_contiguous(),
        "packed_attention: cu_seqlens must be contiguous [segments + 1] int32, got ", describe(cu_seqlens));
  const int32_t* cu = cu_seqlens.const_data_ptr<int32_t>();
  const int64_t segments = cu_seqlens.size(0) - 1;
  check(cu[0] == 0 && std::is_sorted(cu, cu + segments + 1) && cu[segments] <= n,
        "packed_attention: cu_seqlens must ascend from 0 to at most ", n);
  return cu[segments];
}

template <class Element>
void packed_attention_into(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& cu_seqlens,
                           int64_t rows, Tensor& out, int64_t out_stride) {
  const int64_t n = qkv.size(0), heads = qkv.size(2), dim = qkv.size(3);
  auto* result = static_cast<Element*>(out.mutable_data_ptr());
  for (int64_t row = rows; row < n; ++row) std::fill_n(result + row * out_stride, heads * dim, Element{});
  const PackedAttention<Element> job{.qkv = static_cast<const Element*>(qkv.const_data_ptr()),
                                     .row_stride = qkv.stride(0),
                                     .part_stride = qkv.stride(1),
                                     .head_stride = qkv.stride(2),
                                     .cos = cos.const_data_ptr<float>(),
                                     .sin = sin.const_data_ptr<float>(),
                                     .cu_seqlens = cu_seqlens.const_data_ptr<int32_t>(),
                                     .out = result,
                                     .segments = cu_seqlens.size(0) - 1,
                                     .heads = heads,
                                     .dim = dim,
                                     .isa = best_isa(),
                                     .out_stride = out_stride};
  torch::stable::parallel_for(0, job.tasks(), 1, [&](int64_t begin, int64_t end) { job.run(begin, end); });
}

Tensor packed_attention_cpu(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& cu_seqlens,
                            bool for_linear) {
  const bool is_bf16 = qkv.scalar_type() == ScalarType::BFloat16;
  check(
      qkv.dim() == 4 && qkv.size(1) == 3 && qkv.size(3) % 2 == 0 && 0 < qkv.size(3) && qkv.size(3) <= kMaxHeadDim &&
          (is_bf16 || qkv.scalar_type() == ScalarType::Float) && qkv.stride(3) == 1,
      "packed_attention: qkv must be [N, 3, heads, dim] float32 or bfloat16 with contiguous heads of an even dim of at "
      "most ",
      kMaxHeadDim, ", got ", describe(qkv));
  const int64_t n = qkv.size(0), heads = qkv.size(2), dim = qkv.size(3);
  check_is("packed_attention: cos", cos, {n, dim / 2}, ScalarType::Float);
  check_is("packed_attention: sin", sin, {n, dim / 2}, ScalarType::Float);
  const int64_t rows = check_segments(cu_seqlens, n);
  const Tensor out_rows = new_rows(qkv, n, heads * dim, qkv.scalar_type(), for_linear);
  Tensor out = torch::stable::view(out_rows, {n, heads, dim});
  (is_bf16 ? packed_attention_into<BFloat16> : packed_attention_into<float>)(qkv, cos, sin, cu_seqlens, rows, out,
                                                                             out_rows.stride(0));
  return out;
}

}  // namespace
}  // namespace rtp_mm

STABLE_TORCH_LIBRARY_IMPL(rtp_mm, CPU, m) { m.impl("packed_attention", TORCH_BOX(&rtp_mm::packed_attention_cpu)); }
