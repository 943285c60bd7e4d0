#include <vector>

#include "cpu/packed_linear.h"
#include "cpu/run_tiles.h"
#include "patch_embed_door.h"

namespace rtp_mm {
namespace {

constexpr const char* kName = "packed_patch_embed";

// Where each row of the output comes from.
std::vector<const uint8_t*> input_rows(const std::vector<Tensor>& items, int64_t k, const std::optional<Tensor>& order,
                                       int64_t group) {
  std::vector<const uint8_t*> rows;
  for (const Tensor& item : items) {
    for (int64_t i = 0; i < item.size(0); ++i) rows.push_back(item.const_data_ptr<uint8_t>() + i * k);
  }
  if (!order) return rows;
  const int64_t groups = order->size(0);
  const int32_t* from = order->const_data_ptr<int32_t>();
  std::vector<const uint8_t*> ordered;
  ordered.reserve(rows.size());
  for (int64_t g = 0; g < groups; ++g) {
    check(0 <= from[g] && from[g] < groups, kName, ": order must be in [0, ", groups, "), got ", from[g], " at ", g);
    ordered.insert(ordered.end(), rows.begin() + from[g] * group, rows.begin() + (from[g] + 1) * group);
  }
  return ordered;
}

Tensor packed_patch_embed_cpu(const std::vector<Tensor>& rows, const Tensor& packed, const Tensor& bias,
                              const std::optional<Tensor>& order, const std::optional<Tensor>& pos) {
  const PanelLayout layout{bias.numel(), 1};
  check(packed.dim() == 3 && packed.size(0) == layout.panels() && packed.size(1) > 0 &&
            packed.size(2) == layout.panel() && packed.scalar_type() == ScalarType::Float && packed.is_contiguous(),
        kName, ": packed must be what pack_linear made of a float32 [", bias.numel(), ", K], got ", describe(packed));
  const int64_t k = packed.size(1), d = bias.numel();
  int64_t n = 0;
  for (const Tensor& item : rows) {
    check(item.dim() == 2 && item.size(1) == k && item.scalar_type() == ScalarType::Byte && item.is_contiguous(), kName,
          ": rows must be contiguous [N, ", k, "] uint8, got ", describe(item));
    n += item.size(0);
  }
  const int64_t group = check_patch_embed(kName, n, d, packed, bias, order, pos);
  const std::vector<const uint8_t*> inputs = input_rows(rows, k, order, group);
  Tensor out = pos ? torch::stable::clone(*pos) : torch::stable::new_empty(packed, {n, d});
  run_tiles(PackedLinear<float, ByteRows>{.x = inputs.data(),
                                          .panels = packed.const_data_ptr<float>(),
                                          .scales = nullptr,
                                          .sums = nullptr,
                                          .bias = bias.const_data_ptr<float>(),
                                          .out = out.mutable_data_ptr<float>(),
                                          .block_width = d,
                                          .m = n,
                                          .k = k,
                                          .layout = layout,
                                          .activation = Activation::kNone,
                                          .is_added = pos.has_value(),
                                          .isa = best_isa()});
  return out;
}

}  // namespace
}  // namespace rtp_mm

STABLE_TORCH_LIBRARY_IMPL(rtp_mm, CPU, m) { m.impl("packed_patch_embed", TORCH_BOX(&rtp_mm::packed_patch_embed_cpu)); }
