#include <array>
#include <optional>
#include <string>

#include "common.h"
#include "cpu/float_types.h"
#include "cpu/linear_rows.h"
#include "cpu/packed_linear.h"
#include "cpu/run_tiles.h"

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

// int32 stands for the int8 of four steps of k.
bool is_weight(ScalarType dtype) { return is_float(dtype) || dtype == ScalarType::Int; }

template <class F>
void with_weight_type(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Int) return f(static_cast<FourBytes*>(nullptr));
  with_float_type(dtype, f);
}

Tensor pack_linear_cpu(const Tensor& weight, int64_t parts) {
  check(weight.dim() == 2 && is_weight(weight.scalar_type()) && weight.is_contiguous(),
        "pack_linear: weight must be contiguous [N, K] float32, bfloat16 or float16, or [N, K / 4] int32, got ",
        describe(weight));
  check((parts == 1 || parts == 2) && weight.size(0) % parts == 0,
        "pack_linear: parts must be 1 or 2 and divide N = ", weight.size(0), ", got ", parts);
  const PanelLayout layout{weight.size(0) / parts, parts};
  const int64_t k = weight.size(1);
  Tensor packed = torch::stable::new_empty(weight, {layout.panels(), k, layout.panel()});
  with_weight_type(weight.scalar_type(), [&]<class Weight>(Weight*) {
    const auto* source = static_cast<const Weight*>(weight.const_data_ptr());
    auto* panels = static_cast<Weight*>(packed.mutable_data_ptr());
    torch::stable::parallel_for(0, layout.panels(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        pack_linear_panel(source, layout, k, panel, panels + panel * k * layout.panel());
      }
    });
  });
  return packed;
}

struct Layer {
  Tensor packed;
  std::optional<Tensor> scales, sums;
  Tensor bias;
  PanelLayout layout;
};

template <class Weight, class Element, class Out>
void packed_linear_into(const Tensor& x, const Layer& layer, Activation activation, bool is_added, Tensor& out,
                        int64_t block_width, int64_t out_stride) {
  run_tiles(PackedLinear<Weight, const Element*, Out>{
      .x = static_cast<const Element*>(x.const_data_ptr()),
      .panels = static_cast<const Weight*>(layer.packed.const_data_ptr()),
      .scales = layer.scales ? layer.scales->const_data_ptr<float>() : nullptr,
      .sums = layer.sums ? layer.sums->const_data_ptr<int32_t>() : nullptr,
      .bias = layer.bias.const_data_ptr<float>(),
      .out = static_cast<Out*>(out.mutable_data_ptr()),
      .block_width = block_width,
      .m = x.size(0),
      .k = x.size(1),
      .layout = layer.layout,
      .activation = activation,
      .is_added = is_added,
      .isa = best_isa(),
      .threads = torch::stable::get_num_threads(),
      .x_stride = x.is_contiguous() ? x.size(1) : x.stride(0),
      .out_stride = out_stride});
}

void packed_linear_into(const Tensor& x, const Layer& layer, Activation activation, bool is_added, Tensor& out,
                        int64_t block_width, int64_t out_stride) {
  if (x.scalar_type() == ScalarType::BFloat16) {
    const auto into = is_added ? packed_linear_into<BFloat16Pair, BFloat16, float>
                               : packed_linear_into<BFloat16Pair, BFloat16, BFloat16>;
    return into(x, layer, activation, is_added, out, block_width, out_stride);
  }
  with_weight_type(layer.packed.scalar_type(), [&]<class Weight>(Weight*) {
    packed_linear_into<Weight, float, float>(x, layer, activation, is_added, out, block_width, out_stride);
  });
}

void check_of_bytes(const std::optional<Tensor>& tensor, const char* name, int64_t n, ScalarType dtype, bool is_bytes) {
  const bool fits = is_bytes ? tensor && tensor->dim() == 1 && tensor->size(0) == n && tensor->scalar_type() == dtype &&
                                   tensor->is_contiguous()
                             : !tensor;
  check(fits, "packed_linear: ", name, " must be ",
        is_bytes ? "contiguous [" + std::to_string(n) + "] " + dtype_name(dtype) : "None for a weight of floats",
        ", got ", tensor ? describe(*tensor) : "None");
}

bool has_contiguous_rows(const Tensor& x) {
  return x.is_contiguous() || (x.stride(1) == 1 && x.stride(0) >= x.size(1));
}

// Of pairs, x may have the columns of zeros that may spare AMX a copy of its rows; see pack_bf16_linear.
Layer checked_layer(const Tensor& x, const Tensor& packed, int64_t k, const std::optional<Tensor>& scales,
                    const std::optional<Tensor>& sums, const Tensor& bias, int64_t parts) {
  const bool is_pairs = x.scalar_type() == ScalarType::BFloat16;
  const bool is_bytes = packed.scalar_type() == ScalarType::Int;
  const int64_t depth = is_pairs   ? packed_depth<BFloat16Pair>(k)
                        : is_bytes ? packed_depth<FourBytes>(k)
                                   : packed_depth<float>(k);
  const bool has_k = x.dim() == 2 && x.size(1) > 0 && (x.size(1) == k || (is_pairs && x.size(1) == 2 * depth));
  check(has_k && (is_pairs ? has_contiguous_rows(x) : x.scalar_type() == ScalarType::Float && x.is_contiguous()),
        "packed_linear: x must be [M, K] float32, contiguous, or bfloat16, each row contiguous, with K = ", k,
        is_pairs ? ", with or without zeros up to a multiple of 32" : "", ", got ", describe(x));
  check(bias.dim() == 1 && bias.size(0) % parts == 0 && bias.scalar_type() == ScalarType::Float && bias.is_contiguous(),
        "packed_linear: bias must be contiguous [N] float32, N divisible by ", parts, ", got ", describe(bias));
  const PanelLayout layout{bias.size(0) / parts, parts};
  const bool has_dtype = is_pairs ? packed.scalar_type() == ScalarType::BFloat16 : is_weight(packed.scalar_type());
  check(packed.dim() == 3 && packed.size(0) == layout.panels() && packed.size(1) == depth &&
            packed.size(2) == (is_pairs ? 2 : 1) * layout.panel() && has_dtype && packed.is_contiguous(),
        "packed_linear: packed must be what ", is_pairs ? "pack_bf16_linear" : "pack_linear", " made of [",
        bias.size(0), ", ", k, "], got ", describe(packed));
  check_of_bytes(scales, "scales", bias.size(0), ScalarType::Float, is_bytes);
  check_of_bytes(sums, "sums", bias.size(0), ScalarType::Int, is_bytes);
  // 2^16 products of at most 255 * 127 fit into an int32.
  check(!is_bytes || k <= 1 << 16, "packed_linear: bytes are summed over K of 65536 at most, got ", k);
  return {packed, scales, sums, bias, layout};
}

Tensor packed_linear_cpu(const Tensor& x, const Tensor& packed, int64_t k, const std::optional<Tensor>& scales,
                         const std::optional<Tensor>& sums, const Tensor& bias, const std::string& activation,
                         int64_t blocks, bool for_linear) {
  const Activation act = activation_named(activation);
  const Layer layer = checked_layer(x, packed, k, scales, sums, bias, act == Activation::kSiluGate ? 2 : 1);
  const int64_t width = layer.layout.width;
  check(blocks > 0 && width % blocks == 0, "packed_linear: blocks must divide the ", width,
        " columns of the output, got ", blocks);
  const Tensor rows = new_rows(x, blocks * x.size(0), width / blocks, x.scalar_type(), for_linear);
  Tensor out = torch::stable::view(rows, {blocks, x.size(0), width / blocks});
  packed_linear_into(x, layer, act, false, out, width / blocks, rows.stride(0));
  return out;
}

void packed_linear_add_cpu(Tensor out, const Tensor& x, const Tensor& packed, int64_t k,
                           const std::optional<Tensor>& scales, const std::optional<Tensor>& sums, const Tensor& bias) {
  const Layer layer = checked_layer(x, packed, k, scales, sums, bias, 1);
  const int64_t width = layer.layout.width;
  check(out.dim() == 2 && out.size(0) == x.size(0) && out.size(1) == width && out.scalar_type() == ScalarType::Float &&
            out.is_contiguous(),
        "packed_linear_add_: out must be contiguous [", x.size(0), ", ", width, "] float32, got ", describe(out));
  packed_linear_into(x, layer, Activation::kNone, true, out, width, width);
}

}  // namespace
}  // namespace rtp_mm

STABLE_TORCH_LIBRARY_IMPL(rtp_mm, CPU, m) {
  m.impl("pack_linear", TORCH_BOX(&rtp_mm::pack_linear_cpu));
  m.impl("packed_linear", TORCH_BOX(&rtp_mm::packed_linear_cpu));
  m.impl("packed_linear_add_", TORCH_BOX(&rtp_mm::packed_linear_add_cpu));
}
