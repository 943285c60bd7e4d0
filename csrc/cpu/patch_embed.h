#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace rtp_mm {

// out[i] = scale * sum_k (rows[r(i), k] - 128) * weight[:, k] + bias + pos[i], in float32, rounded once.
struct PatchEmbed {
  const uint8_t* rows;   // [n, k]
  const float* panels;   // the packed weight, see pack_panel
  const float* bias;     // [d]
  const float* pos;      // [n, d] or null
  const int32_t* order;  // [n / group]: output group g is input group order[g]; null: r(i) = i
  float scale;
  int64_t n, k, d;
  int64_t group;  // rows
  Isa isa;
};

constexpr int64_t kPanelWidth = 32;  // columns: two AVX-512 vectors, four AVX2 vectors

inline int64_t panel_count(int64_t d) { return (d + kPanelWidth - 1) / kPanelWidth; }

// [terms, d, k], k contiguous; strides in elements. Weight: float, BFloat16 or Float16.
template <class Weight>
struct WeightTerms {
  const Weight* data;
  int64_t terms, d, k;
  int64_t term_stride, column_stride;
};

// Sums the weight's terms for the columns of one panel into dst[k][kPanelWidth], absent columns zero.
template <class Weight>
void pack_panel(const WeightTerms<Weight>& weight, int64_t panel, float* dst);

// The work is cut into tiles, blocks of rows by panels of columns, panels running faster.
int64_t tile_count(const PatchEmbed& job);

// Computes tiles [begin, end) of out[n, d]. Every sum runs over k in the same order and partial sums by the same
// instructions, so a row's bits depend neither on n nor on its place. Out: float, BFloat16 or Float16.
template <class Out>
void patch_embed_tiles(const PatchEmbed& job, int64_t begin, int64_t end, Out* out);

}  // namespace rtp_mm
