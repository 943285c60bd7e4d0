#include "cpu/patch_embed.h"

#include <algorithm>
#include <memory>

#include "cpu/float_formats.h"

namespace rtp_mm {
namespace {

// Rows of a tile: its 64 * 588 centred floats (150 KB) stay in L2 while the panels pass by.
constexpr int64_t kTileRows = 64;

// Steps of k summed apart before they join the sum: sums of partial sums round less (half the error at k = 588).
constexpr int64_t kPartialSum = 128;

// Adds a strip, which is the rows that one call holds in registers, times a panel to the sums.
using MicroKernel = void (*)(const float* strip, const float* panel, int64_t k, float* sums);

// strip [k][kRows], panel [k][kPanelWidth], sums [kRows][kPanelWidth]. kLanes floats make one vector.
template <int kRows, int kVectors, int kLanes>
[[gnu::always_inline]] inline void multiply(const float* strip, const float* panel, int64_t k, float* sums) {
  typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
  static_assert(kPanelWidth % (kVectors * kLanes) == 0);
  for (int64_t column = 0; column < kPanelWidth; column += kVectors * kLanes) {
    for (int64_t begin = 0; begin < k; begin += kPartialSum) {
      Vector acc[kRows][kVectors] = {};
      for (int64_t i = begin; i < std::min(begin + kPartialSum, k); ++i) {
        Vector w[kVectors];
        for (int v = 0; v < kVectors; ++v) {
          w[v] = *reinterpret_cast<const Vector*>(panel + i * kPanelWidth + column + v * kLanes);
        }
        for (int r = 0; r < kRows; ++r) {
          for (int v = 0; v < kVectors; ++v) acc[r][v] += strip[i * kRows + r] * w[v];
        }
      }
      for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kVectors; ++v) {
          *reinterpret_cast<Vector*>(sums + r * kPanelWidth + column + v * kLanes) += acc[r][v];
        }
      }
    }
  }
}

struct Kernel {
  MicroKernel multiply;
  int64_t rows;  // of a strip
};

// Accumulators fill the registers of each instruction set: 8 x 2 of 32, 6 x 2 of 16, 4 x 2 of 16.
#ifdef __x86_64__
__attribute__((target("avx512f"))) void multiply_avx512(const float* strip, const float* panel, int64_t k,
                                                        float* sums) {
  multiply<8, 2, 16>(strip, panel, k, sums);
}

__attribute__((target("avx2,fma"))) void multiply_avx2(const float* strip, const float* panel, int64_t k, float* sums) {
  multiply<6, 2, 8>(strip, panel, k, sums);
}
#endif

void multiply_portable(const float* strip, const float* panel, int64_t k, float* sums) {
  multiply<4, 2, 4>(strip, panel, k, sums);
}

Kernel kernel_for(Isa isa) {
#ifdef __x86_64__
  if (isa == Isa::kAvx512) return {multiply_avx512, 8};
  if (isa == Isa::kAvx2) return {multiply_avx2, 6};
#endif
  return {multiply_portable, 4};
}

constexpr int64_t kMaxStripRows = 8;

int64_t input_row(const PatchEmbed& job, int64_t i) {
  return job.order ? job.order[i / job.group] * job.group + i % job.group : i;
}

// Rows [begin, end) of the output's order as centred floats, in strips [k][strip_rows]; rows that fill up the last
// strip are zero, so that every row goes through the same kernel.
void centre_rows(const PatchEmbed& job, int64_t begin, int64_t end, int64_t strip_rows, float* strips) {
  for (int64_t first = begin; first < end; first += strip_rows, strips += strip_rows * job.k) {
    for (int64_t r = 0; r < strip_rows; ++r) {
      if (first + r < end) {
        const uint8_t* row = job.rows + input_row(job, first + r) * job.k;
        for (int64_t i = 0; i < job.k; ++i) strips[i * strip_rows + r] = static_cast<float>(row[i] - 128);
      } else {
        for (int64_t i = 0; i < job.k; ++i) strips[i * strip_rows + r] = 0;
      }
    }
  }
}

}  // namespace

Isa best_isa() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f")) return Isa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

template <class Weight>
void pack_panel(const Weight* weight, int64_t terms, int64_t d, int64_t k, int64_t panel, float* dst) {
  constexpr int64_t kBlock = 16;  // steps of k: the 2 KB of dst that they touch stay in L1
  const int64_t first = panel * kPanelWidth, width = std::min(kPanelWidth, d - first);
  std::fill(dst, dst + k * kPanelWidth, 0.0f);
  for (int64_t begin = 0; begin < k; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, k);
    for (int64_t term = 0; term < terms; ++term) {
      for (int64_t j = 0; j < width; ++j) {
        const Weight* column = weight + (term * d + first + j) * k;
        for (int64_t i = begin; i < end; ++i) dst[i * kPanelWidth + j] += to_float(column[i]);
      }
    }
  }
}

int64_t tile_count(const PatchEmbed& job) { return (job.n + kTileRows - 1) / kTileRows * panel_count(job.d); }

template <class Out>
void patch_embed_tiles(const PatchEmbed& job, int64_t begin, int64_t end, Out* out) {
  const Kernel kernel = kernel_for(job.isa);
  const int64_t panels = panel_count(job.d);
  const std::unique_ptr<float[]> strips(new float[(kTileRows + kMaxStripRows) * job.k]);
  int64_t block = -1;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first_row = tile / panels * kTileRows, last_row = std::min(first_row + kTileRows, job.n);
    const int64_t panel = tile % panels, column = panel * kPanelWidth, width = std::min(kPanelWidth, job.d - column);
    if (block != tile / panels) {
      block = tile / panels;
      centre_rows(job, first_row, last_row, kernel.rows, strips.get());
    }
    for (int64_t row = first_row; row < last_row; row += kernel.rows) {
      float sums[kMaxStripRows * kPanelWidth] = {};
      const float* strip = strips.get() + (row - first_row) * job.k;
      kernel.multiply(strip, job.panels + panel * job.k * kPanelWidth, job.k, sums);
      for (int64_t r = 0; r < std::min(kernel.rows, last_row - row); ++r) {
        Out* dst = out + (row + r) * job.d + column;
        for (int64_t j = 0; j < width; ++j) {
          dst[j] = round_to<Out>(job.scale * sums[r * kPanelWidth + j] + job.bias[column + j]);
        }
      }
    }
  }
}

template void pack_panel(const float*, int64_t, int64_t, int64_t, int64_t, float*);
template void pack_panel(const BFloat16*, int64_t, int64_t, int64_t, int64_t, float*);
template void pack_panel(const Float16*, int64_t, int64_t, int64_t, int64_t, float*);
template void patch_embed_tiles(const PatchEmbed&, int64_t, int64_t, float*);
template void patch_embed_tiles(const PatchEmbed&, int64_t, int64_t, BFloat16*);
template void patch_embed_tiles(const PatchEmbed&, int64_t, int64_t, Float16*);

}  // namespace rtp_mm
