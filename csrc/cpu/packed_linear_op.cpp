#include <algorithm>
#include <array>
#include <atomic>
#include <string>

#include "common.h"
#include "cpu/float_types.h"
#include "cpu/packed_linear.h"

namespace rtp_mm {
namespace {

constexpr std::array<const char*, 4> kActivations = {"none", "gelu", "quick_gelu", "silu_gate"};

Activation activation_named(const std::string& name) {
  for (size_t i = 0; i < kActivations.size(); ++i) {
    if (name == kActivations[i]) return static_cast<Activation>(i);
  }
  check(false, "packed_linear: activation must be none, gelu, quick_gelu or silu_gate, got ", name);
  return {};
}

Tensor pack_linear_cpu(const Tensor& weight, int64_t parts) {
  check(weight.dim() == 2 && is_float(weight.scalar_type()) && weight.is_contiguous(),
        "pack_linear: weight must be contiguous [N, K] float32, bfloat16 or float16, got ", describe(weight));
  check((parts == 1 || parts == 2) && weight.size(0) % parts == 0,
        "pack_linear: parts must be 1 or 2 and divide N = ", weight.size(0), ", got ", parts);
  const PanelLayout layout{weight.size(0) / parts, parts};
  const int64_t k = weight.size(1);
  Tensor packed = torch::stable::new_empty(weight, {layout.panels(), k, kLinearPanel});
  with_float_type(weight.scalar_type(), [&]<class Weight>(Weight*) {
    const auto* source = static_cast<const Weight*>(weight.const_data_ptr());
    auto* panels = static_cast<Weight*>(packed.mutable_data_ptr());
    torch::stable::parallel_for(0, layout.panels(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        pack_linear_panel(source, layout, k, panel, panels + panel * k * kLinearPanel);
      }
    });
  });
  return packed;
}

void packed_linear_into(const Tensor& x, const Tensor& packed, const Tensor& bias, Activation activation, bool is_added,
                        Tensor& out, int64_t block_width, const PanelLayout& layout) {
  with_float_type(packed.scalar_type(), [&]<class Weight>(Weight*) {
    const PackedLinear<Weight> job{x.const_data_ptr<float>(),
                                   static_cast<const Weight*>(packed.const_data_ptr()),
                                   bias.const_data_ptr<float>(),
                                   out.mutable_data_ptr<float>(),
                                   block_width,
                                   x.size(0),
                                   x.size(1),
                                   layout,
                                   activation,
                                   is_added,
                                   best_isa()};
    std::atomic<int64_t> next_tile = 0;
    const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), job.tiles());
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { job.run(next_tile); });
  });
}

PanelLayout check_packed_linear(const Tensor& x, const Tensor& packed, const Tensor& bias, int64_t parts) {
  check(x.dim() == 2 && x.size(1) > 0 && x.scalar_type() == ScalarType::Float && x.is_contiguous(),
        "packed_linear: x must be contiguous [M, K] float32, got ", describe(x));
  check(bias.dim() == 1 && bias.size(0) % parts == 0 && bias.scalar_type() == ScalarType::Float && bias.is_contiguous(),
        "packed_linear: bias must be contiguous [N] float32, N divisible by ", parts, ", got ", describe(bias));
  const PanelLayout layout{bias.size(0) / parts, parts};
  check(packed.dim() == 3 && packed.size(0) == layout.panels() && packed.size(1) == x.size(1) &&
            packed.size(2) == kLinearPanel && is_float(packed.scalar_type()) && packed.is_contiguous(),
        "packed_linear: packed must be what pack_linear made of [", bias.size(0), ", ", x.size(1), "], got ",
        describe(packed));
  return layout;
}

Tensor packed_linear_cpu(const Tensor& x, const Tensor& packed, const Tensor& bias, const std::string& activation,
                         int64_t blocks) {
  const Activation act = activation_named(activation);
  const PanelLayout layout = check_packed_linear(x, packed, bias, act == Activation::kSiluGate ? 2 : 1);
  check(blocks > 0 && layout.width % blocks == 0, "packed_linear: blocks must divide the ", layout.width,
        " columns of the output, got ", blocks);
  Tensor out = torch::stable::new_empty(x, {blocks, x.size(0), layout.width / blocks});
  packed_linear_into(x, packed, bias, act, false, out, layout.width / blocks, layout);
  return out;
}

void packed_linear_add_cpu(Tensor out, const Tensor& x, const Tensor& packed, const Tensor& bias) {
  const PanelLayout layout = check_packed_linear(x, packed, bias, 1);
  check(out.dim() == 2 && out.size(0) == x.size(0) && out.size(1) == layout.width &&
            out.scalar_type() == ScalarType::Float && out.is_contiguous(),
        "packed_linear_add_: out must be contiguous [", x.size(0), ", ", layout.width, "] float32, got ",
        describe(out));
  packed_linear_into(x, packed, bias, Activation::kNone, true, out, layout.width, layout);
}

}  // namespace
}  // namespace rtp_mm

STABLE_TORCH_LIBRARY_IMPL(rtp_mm, CPU, m) {
  m.impl("pack_linear", TORCH_BOX(&rtp_mm::pack_linear_cpu));
  m.impl("packed_linear", TORCH_BOX(&rtp_mm::packed_linear_cpu));
  m.impl("packed_linear_add_", TORCH_BOX(&rtp_mm::packed_linear_add_cpu));
}
