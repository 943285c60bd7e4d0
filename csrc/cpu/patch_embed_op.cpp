#include <memory>

#include "cpu/float_types.h"
#include "cpu/patch_embed.h"
#include "patch_embed_door.h"

namespace rtp_mm {
namespace {

Tensor patch_embed_cpu(const Tensor& rows, const Tensor& weight, const Tensor& bias, double scale,
                       const std::optional<Tensor>& order, const std::optional<Tensor>& pos, ScalarType out_dtype) {
  const int64_t group = check_patch_embed(rows, weight, bias, order, pos, out_dtype);
  PatchEmbed job{};
  job.rows = rows.const_data_ptr<uint8_t>();
  job.bias = bias.const_data_ptr<float>();
  job.pos = pos ? pos->const_data_ptr<float>() : nullptr;
  job.scale = static_cast<float>(scale);
  job.n = rows.size(0), job.k = rows.size(1), job.d = weight.size(1);
  job.group = group;
  job.isa = best_isa();
  if (order) {
    job.order = order->const_data_ptr<int32_t>();
    for (int64_t g = 0; g < order->size(0); ++g) {
      check(0 <= job.order[g] && job.order[g] < order->size(0), "patch_embed: order must be in [0, ", order->size(0),
            "), got ", job.order[g], " at ", g);
    }
  }
  Tensor out = torch::stable::new_empty(rows, {job.n, job.d}, out_dtype);
  if (out.numel() == 0) return out;

  const int64_t panels = panel_count(job.d), panel_size = job.k * kPanelWidth;
  const std::unique_ptr<float[]> packed(new float[panels * panel_size]);
  job.panels = packed.get();
  with_float_type(weight.scalar_type(), [&]<class Weight>(Weight*) {
    const WeightTerms<Weight> source{static_cast<const Weight*>(weight.const_data_ptr()),
                                     weight.size(0),
                                     job.d,
                                     job.k,
                                     weight.stride(0),
                                     weight.stride(1)};
    torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        pack_panel(source, panel, packed.get() + panel * panel_size);
      }
    });
  });
  with_float_type(out_dtype, [&]<class Out>(Out*) {
    auto* result = static_cast<Out*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, tile_count(job), 1,
                                [&](int64_t begin, int64_t end) { patch_embed_tiles(job, begin, end, result); });
  });
  return out;
}

}  // namespace
}  // namespace rtp_mm

STABLE_TORCH_LIBRARY_IMPL(rtp_mm, CPU, m) { m.impl("patch_embed", TORCH_BOX(&rtp_mm::patch_embed_cpu)); }
