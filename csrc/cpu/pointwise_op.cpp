#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common.h"
#include "cpu/linear_rows.h"
#include "cpu/pointwise.h"

namespace rtp_mm {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements that are worth a thread: some microseconds, as for torch's own

bool is_bf16_or_float(ScalarType dtype) { return dtype == ScalarType::BFloat16 || dtype == ScalarType::Float; }

// Calls f with a null pointer of the element type that stands for `dtype`, one of the two above.
template <class F>
void with_element(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::BFloat16) return f(static_cast<BFloat16*>(nullptr));
  f(static_cast<float*>(nullptr));
}

template <class Job>
void run_rows(const Job& job, int64_t rows, int64_t elements) {
  const int64_t grain = std::max<int64_t>(kGrain / std::max<int64_t>(elements, 1), 1);
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { job.run(begin, end); });
}

Tensor add_norm_cpu(Tensor x, const std::optional<Tensor>& delta, const Tensor& weight,
                    const std::optional<Tensor>& bias, double eps, ScalarType out_dtype, bool for_linear) {
  check(x.dim() == 2 && x.scalar_type() == ScalarType::Float && x.is_contiguous(),
        "add_norm_: x must be contiguous [N, D] float32, got ", describe(x));
  const int64_t rows = x.size(0), dim = x.size(1);
  check(!delta || (delta->dim() == 2 && delta->size(0) == rows && delta->size(1) == dim &&
                   is_bf16_or_float(delta->scalar_type()) && delta->is_contiguous()),
        "add_norm_: delta must be contiguous [", rows, ", ", dim, "] float32 or bfloat16, got ",
        delta ? describe(*delta) : "None");
  check_is("add_norm_: weight", weight, {dim}, ScalarType::Float);
  if (bias) check_is("add_norm_: bias", *bias, {dim}, ScalarType::Float);
  check(is_bf16_or_float(out_dtype), "add_norm_: out_dtype must be float32 or bfloat16, got ", dtype_name(out_dtype));
  Tensor out = new_rows(x, rows, dim, out_dtype, for_linear);
  with_element(delta ? delta->scalar_type() : ScalarType::Float, [&]<class Delta>(Delta*) {
    with_element(out_dtype, [&]<class Out>(Out*) {
      const AddNorm<Delta, Out> job{
          .x = x.mutable_data_ptr<float>(),
          .delta = delta ? static_cast<const Delta*>(delta->const_data_ptr()) : nullptr,
          .weight = weight.const_data_ptr<float>(),
          .bias = bias ? bias->const_data_ptr<float>() : nullptr,
          .dim = dim,
          .eps = static_cast<float>(eps),
          .out = static_cast<Out*>(out.mutable_data_ptr()),
          .isa = best_isa(),
          .out_stride = out.stride(0),
      };
      run_rows(job, rows, dim);
    });
  });
  return out;
}

// Whether no two elements share memory, as far as strides that nest tell.
bool is_apart(const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) > 1) dims.emplace_back(tensor.stride(i), tensor.size(i));
  }
  std::sort(dims.begin(), dims.end());
  int64_t extent = 1;  // elements from the first to the last of the dimensions so far
  for (const auto& [stride, size] : dims) {
    if (stride < extent) return false;
    extent += stride * (size - 1);
  }
  return true;
}

void rotate_qk_cpu(Tensor qkv, const Tensor& cos, const Tensor& sin) {
  check(qkv.dim() == 4 && qkv.size(1) == 3 && qkv.size(3) % 2 == 0 && is_bf16_or_float(qkv.scalar_type()) &&
            qkv.stride(3) == 1,
        "rotate_qk_: qkv must be [N, 3, heads, head_dim] float32 or bfloat16 with contiguous heads of an even "
        "head_dim, got ",
        describe(qkv));
  check(is_apart(qkv), "rotate_qk_: no two elements of qkv may share memory, got ", describe(qkv));
  const int64_t rows = qkv.size(0), heads = qkv.size(2), dim = qkv.size(3);
  check_is("rotate_qk_: cos", cos, {rows, dim / 2}, ScalarType::Float);
  check_is("rotate_qk_: sin", sin, {rows, dim / 2}, ScalarType::Float);
  with_element(qkv.scalar_type(), [&]<class Element>(Element*) {
    const RotateQk<Element> job{.qkv = static_cast<Element*>(qkv.mutable_data_ptr()),
                                .row_stride = qkv.stride(0),
                                .part_stride = qkv.stride(1),
                                .head_stride = qkv.stride(2),
                                .cos = cos.const_data_ptr<float>(),
                                .sin = sin.const_data_ptr<float>(),
                                .heads = heads,
                                .dim = dim,
                                .isa = best_isa()};
    run_rows(job, rows, 2 * heads * dim);
  });
}

void check_rows(const char* name, const Tensor& tensor) {
  check(tensor.dim() == 2 && is_bf16_or_float(tensor.scalar_type()) && tensor.is_contiguous(), name,
        " must be contiguous [M, N] float32 or bfloat16, got ", describe(tensor));
}

void activate_cpu(Tensor x, const std::string& activation) {
  check_rows("activate_: x", x);
  check(activation == "gelu" || activation == "quick_gelu", "activate_: activation must be gelu or quick_gelu, got ",
        activation);
  with_element(x.scalar_type(), [&]<class Element>(Element*) {
    const Activate<Element> job{.x = static_cast<Element*>(x.mutable_data_ptr()),
                                .dim = x.size(1),
                                .activation = activation == "gelu" ? Activation::kGelu : Activation::kQuickGelu,
                                .isa = best_isa()};
    run_rows(job, x.size(0), x.size(1));
  });
}

Tensor silu_gate_cpu(const Tensor& gate_up) {
  check_rows("silu_gate: gate_up", gate_up);
  check(gate_up.size(1) % 2 == 0, "silu_gate: gate_up must have as many gates as ups, got ", describe(gate_up));
  const int64_t rows = gate_up.size(0), dim = gate_up.size(1) / 2;
  Tensor out = torch::stable::new_empty(gate_up, {rows, dim});
  with_element(gate_up.scalar_type(), [&]<class Element>(Element*) {
    const SiluGate<Element> job{.gate_up = static_cast<const Element*>(gate_up.const_data_ptr()),
                                .dim = dim,
                                .out = static_cast<Element*>(out.mutable_data_ptr()),
                                .isa = best_isa()};
    run_rows(job, rows, 2 * dim);
  });
  return out;
}

}  // namespace
}  // namespace rtp_mm

STABLE_TORCH_LIBRARY_IMPL(rtp_mm, CPU, m) {
  m.impl("add_norm_", TORCH_BOX(&rtp_mm::add_norm_cpu));
  m.impl("rotate_qk_", TORCH_BOX(&rtp_mm::rotate_qk_cpu));
  m.impl("activate_", TORCH_BOX(&rtp_mm::activate_cpu));
  m.impl("silu_gate", TORCH_BOX(&rtp_mm::silu_gate_cpu));
}
