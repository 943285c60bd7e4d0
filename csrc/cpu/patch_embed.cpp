#include "cpu/patch_embed.h"

#include <algorithm>
#include <memory>

#include "cpu/float_formats.h"
#include "cpu/multiply.h"

namespace rtp_mm {
namespace {

// Rows of a tile: its 64 * 588 centred floats (150 KB) stay in L2 while the panels pass by.
constexpr int64_t kTileRows = 64;

int64_t input_row(const PatchEmbed& job, int64_t i) {
  return job.order ? job.order[i / job.group] * job.group + i % job.group : i;
}

// Rows [begin, end) of the output's order as centred floats, [steps of k][rows][kStripDepth].
void centre_rows(const PatchEmbed& job, int64_t begin, int64_t end, float* strips) {
  for (int64_t first = 0; first < job.k; first += kStripDepth) {
    const int64_t depth = std::min(kStripDepth, job.k - first);
    for (int64_t i = begin; i < end; ++i, strips += kStripDepth) {
      const uint8_t* row = job.rows + input_row(job, i) * job.k + first;
      for (int64_t j = 0; j < depth; ++j) strips[j] = static_cast<float>(row[j] - 128);
    }
  }
}

}  // namespace

template <class Weight>
void pack_panel(const WeightTerms<Weight>& weight, int64_t panel, float* dst) {
  constexpr int64_t kBlock = 16;  // steps of k: the 2 KB of dst that they touch stay in L1
  const int64_t k = weight.k, first = panel * kPanelWidth, width = std::min(kPanelWidth, weight.d - first);
  std::fill(dst, dst + k * kPanelWidth, 0.0f);
  for (int64_t begin = 0; begin < k; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, k);
    for (int64_t term = 0; term < weight.terms; ++term) {
      for (int64_t j = 0; j < width; ++j) {
        const Weight* column = weight.data + term * weight.term_stride + (first + j) * weight.column_stride;
        for (int64_t i = begin; i < end; ++i) dst[i * kPanelWidth + j] += to_float(column[i]);
      }
    }
  }
}

int64_t tile_count(const PatchEmbed& job) { return (job.n + kTileRows - 1) / kTileRows * panel_count(job.d); }

template <class Out>
void patch_embed_tiles(const PatchEmbed& job, int64_t begin, int64_t end, Out* out) {
  const int64_t panels = panel_count(job.d), steps = (job.k + kStripDepth - 1) / kStripDepth;
  const std::unique_ptr<float[]> strips(new float[kTileRows * steps * kStripDepth]);
  int64_t block = -1;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first_row = tile / panels * kTileRows, rows = std::min(kTileRows, job.n - first_row);
    const int64_t panel = tile % panels, column = panel * kPanelWidth, width = std::min(kPanelWidth, job.d - column);
    if (block != tile / panels) {
      block = tile / panels;
      centre_rows(job, first_row, first_row + rows, strips.get());
    }
    float sums[kTileRows * kPanelWidth];
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t first = step * kStripDepth;
      multiply(job.isa, strips.get() + first * rows,
               {.rows = rows,
                .columns = kPanelWidth,
                .depth = std::min(kStripDepth, job.k - first),
                .panel = job.panels + (panel * job.k + first) * kPanelWidth,
                .panel_stride = kPanelWidth,
                .sums = sums,
                .sums_stride = kPanelWidth,
                .is_added = step > 0});
    }
    for (int64_t r = 0; r < rows; ++r) {
      Out* dst = out + (first_row + r) * job.d + column;
      for (int64_t j = 0; j < width; ++j) {
        float value = job.scale * sums[r * kPanelWidth + j] + job.bias[column + j];
        if (job.pos) value += job.pos[(first_row + r) * job.d + column + j];
        dst[j] = round_to<Out>(value);
      }
    }
  }
}

template void pack_panel(const WeightTerms<float>&, int64_t, float*);
template void pack_panel(const WeightTerms<BFloat16>&, int64_t, float*);
template void pack_panel(const WeightTerms<Float16>&, int64_t, float*);
template void patch_embed_tiles(const PatchEmbed&, int64_t, int64_t, float*);
template void patch_embed_tiles(const PatchEmbed&, int64_t, int64_t, BFloat16*);
template void patch_embed_tiles(const PatchEmbed&, int64_t, int64_t, Float16*);

}  // namespace rtp_mm
