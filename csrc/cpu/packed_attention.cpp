#include "cpu/packed_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/multiply.h"
#include "cpu/simd.h"

namespace rtp_mm {
namespace {

// Queries go in panels of two AVX-512 vectors, a query to a lane: what a softmax does with a row of scores it does with
// 32 of them at once, and no key or value is moved but to rotate the keys. Scores are [keys][queries], values times
// probabilities [dim][queries].
constexpr int64_t kPanel = 32;
constexpr int64_t kQueries = 4 * kPanel;  // of a block, which reads keys and values from memory once
constexpr int64_t kKeys = 128;            // of a block: their scores (16 KB) stay in L1, they and their values in L2
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

static_assert(kMaxHeadDim <= kStripDepth);

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// dst[r] = scale * the rotated src[r], rows of dst kStripDepth apart.
struct Rotate {
  template <class Arch>
  RTP_MM_INLINE static void run(const float* src, int64_t src_stride, const float* cos, const float* sin, int64_t rows,
                                int64_t dim, float scale, float* __restrict dst) {
    const int64_t half = dim / 2;
    for (; rows > 0; --rows, src += src_stride, dst += kStripDepth, cos += half, sin += half) {
      int64_t i = 0;
      for (; i + Arch::kLanes <= half; i += Arch::kLanes) {
        const Vector<Arch> x = at<Arch>(src + i), y = at<Arch>(src + half + i);
        const Vector<Arch> c = scale * at<Arch>(cos + i), s = scale * at<Arch>(sin + i);
        at<Arch>(dst + i) = x * c - y * s;
        at<Arch>(dst + half + i) = y * c + x * s;
      }
      for (; i < half; ++i) {
        const float x = src[i], y = src[half + i], c = scale * cos[i], s = scale * sin[i];
        dst[i] = x * c - y * s;
        dst[half + i] = y * c + x * s;
      }
    }
  }
};

// dst[columns][rows] = src[rows][columns], both multiples of kColumnUnit.
struct Transpose {
  template <class Arch>
  RTP_MM_INLINE static void run(const float* src, int64_t src_stride, int64_t rows, int64_t columns, float* dst,
                                int64_t dst_stride) {
    for (int64_t r = 0; r < rows; r += Arch::kLanes) {
      for (int64_t c = 0; c < columns; c += Arch::kLanes) {
        Vector<Arch> block[Arch::kLanes];
        for (int i = 0; i < Arch::kLanes; ++i) block[i] = at<Arch>(src + (r + i) * src_stride + c);
        transpose<Arch>(block);
        for (int i = 0; i < Arch::kLanes; ++i) at<Arch>(dst + (c + i) * dst_stride + r) = block[i];
      }
    }
  }
};

// A panel of queries between blocks of keys.
struct Panel {
  std::vector<float> queries;   // [dim][kPanel]
  std::vector<float> weighted;  // [dim][kPanel], values times probabilities so far
  float largest[kPanel], sum[kPanel];

  // scores[keys][kPanel] -> e^(score - largest so far). What was summed relative to a smaller score is scaled down.
  struct Softmax {
    template <class Arch>
    RTP_MM_INLINE static void run(Panel* panel, float* scores, int64_t keys) {
      constexpr int kVectors = kPanel / Arch::kLanes;
      Vector<Arch> largest[kVectors], total[kVectors] = {}, shrink[kVectors];
      for (int v = 0; v < kVectors; ++v) largest[v] = at<Arch>(panel->largest + v * Arch::kLanes);
      for (int64_t key = 0; key < keys; ++key) {
        for (int v = 0; v < kVectors; ++v) {
          const Vector<Arch> score = at<Arch>(scores + key * kPanel + v * Arch::kLanes);
          largest[v] = largest[v] < score ? score : largest[v];
        }
      }
      for (int64_t key = 0; key < keys; ++key) {
        for (int v = 0; v < kVectors; ++v) {
          Vector<Arch>& score = at<Arch>(scores + key * kPanel + v * Arch::kLanes);
          score = exp<Arch>(score - largest[v]);
          total[v] += score;
        }
      }
      for (int v = 0; v < kVectors; ++v) {
        float *before = panel->largest + v * Arch::kLanes, *sum = panel->sum + v * Arch::kLanes;
        shrink[v] = exp<Arch>(at<Arch>(before) - largest[v]);
        at<Arch>(before) = largest[v];
        at<Arch>(sum) = at<Arch>(sum) * shrink[v] + total[v];
      }
      for (float* row = panel->weighted.data(); row < panel->weighted.data() + panel->weighted.size(); row += kPanel) {
        for (int v = 0; v < kVectors; ++v) at<Arch>(row + v * Arch::kLanes) *= shrink[v];
      }
    }
  };

  struct Divide {
    template <class Arch>
    RTP_MM_INLINE static void run(Panel* panel) {
      for (float* row = panel->weighted.data(); row < panel->weighted.data() + panel->weighted.size(); row += kPanel) {
        for (int64_t i = 0; i < kPanel; i += Arch::kLanes) at<Arch>(row + i) /= at<Arch>(panel->sum + i);
      }
    }
  };
};

// What one thread holds, in the layouts of `multiply`.
class Workspace {
 public:
  explicit Workspace(const PackedAttention& job) : job_(job), padded_dim_(round_up(job.dim, kColumnUnit)) {
    for (Panel& panel : panels_) {
      panel.queries.resize(padded_dim_ * kPanel);
      panel.weighted.resize(padded_dim_ * kPanel);
    }
  }

  // Takes over the keys of rows [first, first + length); values are read where they are.
  void load_segment(int64_t head, int64_t first, int64_t length) {
    head_ = head, first_ = first, length_ = length;
    keys_.resize(length * kStripDepth);
    rotate(1, first, length, 1, keys_.data());
  }

  // Answers queries [first, first + count) of the segment that was loaded last.
  void attend(int64_t first, int64_t count) {
    const int64_t panels = (count + kPanel - 1) / kPanel;
    const auto rows_of = [&](int64_t p) { return std::min(kPanel, count - p * kPanel); };
    for (int64_t p = 0; p < panels; ++p) begin(panels_[p], first_ + first + p * kPanel, rows_of(p));
    for (int64_t key = 0; key < length_; key += kKeys) {
      for (int64_t p = 0; p < panels; ++p) step(panels_[p], rows_of(p), key, std::min(kKeys, length_ - key));
    }
    for (int64_t p = 0; p < panels; ++p) finish(panels_[p], first_ + first + p * kPanel, rows_of(p));
  }

 private:
  void begin(Panel& panel, int64_t first, int64_t rows) {
    rotate(0, first, rows, 1 / std::sqrt(static_cast<float>(job_.dim)), rotated_);
    rtp_mm::run<Transpose>(job_.isa, static_cast<const float*>(rotated_), kStripDepth, kPanel, padded_dim_,
                           panel.queries.data(), kPanel);
    std::fill(panel.weighted.begin(), panel.weighted.end(), 0.0f);
    std::fill_n(panel.largest, kPanel, kMinusInfinity);
    std::fill_n(panel.sum, kPanel, 0.0f);
  }

  void step(Panel& panel, int64_t rows, int64_t key, int64_t keys) {
    const int64_t columns = round_up(rows, kColumnUnit);
    multiply(job_.isa, keys_.data() + key * kStripDepth,
             {.rows = keys,
              .columns = columns,
              .depth = job_.dim,
              .panel = panel.queries.data(),
              .panel_stride = kPanel,
              .sums = scores_,
              .sums_stride = kPanel,
              .is_added = false});
    rtp_mm::run<Panel::Softmax>(job_.isa, &panel, static_cast<float*>(scores_), keys);
    multiply_transposed(job_.isa, row(2, first_ + key), job_.row_stride,
                        {.rows = job_.dim,
                         .columns = columns,
                         .depth = keys,
                         .panel = scores_,
                         .panel_stride = kPanel,
                         .sums = panel.weighted.data(),
                         .sums_stride = kPanel,
                         .is_added = true});
  }

  void finish(Panel& panel, int64_t first, int64_t rows) {
    rtp_mm::run<Panel::Divide>(job_.isa, &panel);
    rtp_mm::run<Transpose>(job_.isa, static_cast<const float*>(panel.weighted.data()), kPanel, padded_dim_, kPanel,
                           static_cast<float*>(rotated_), kStripDepth);
    for (int64_t r = 0; r < rows; ++r) {
      std::copy_n(rotated_ + r * kStripDepth, job_.dim, job_.out + ((first + r) * job_.heads + head_) * job_.dim);
    }
  }

  // Part: 0 query, 1 key, 2 value.
  const float* row(int64_t part, int64_t i) const {
    return job_.qkv + i * job_.row_stride + part * job_.part_stride + head_ * job_.head_stride;
  }

  // Rows [first, first + rows), rotated and scaled.
  void rotate(int64_t part, int64_t first, int64_t rows, float scale, float* dst) {
    const int64_t half = job_.dim / 2;
    rtp_mm::run<Rotate>(job_.isa, row(part, first), job_.row_stride, job_.cos + first * half, job_.sin + first * half,
                        rows, job_.dim, scale, dst);
  }

  const PackedAttention& job_;
  const int64_t padded_dim_;  // to whole vectors
  int64_t head_ = 0, first_ = 0, length_ = 0;
  std::vector<float> keys_;  // [length][kStripDepth]
  Panel panels_[kQueries / kPanel];
  alignas(64) float rotated_[kPanel * kStripDepth] = {};
  alignas(64) float scores_[kKeys * kPanel] = {};
};

int64_t blocks(int64_t length) { return (length + kQueries - 1) / kQueries; }

}  // namespace

int64_t PackedAttention::tasks() const {
  int64_t count = 0;
  for (int64_t s = 0; s < segments; ++s) count += heads * blocks(cu_seqlens[s + 1] - cu_seqlens[s]);
  return count;
}

void PackedAttention::run(int64_t begin, int64_t end) const {
  Workspace workspace(*this);
  int64_t task = 0;
  for (int64_t s = 0; s < segments && task < end; ++s) {
    const int64_t first = cu_seqlens[s], length = cu_seqlens[s + 1] - first;
    for (int64_t head = 0; head < heads; ++head, task += blocks(length)) {
      const int64_t first_block = std::max<int64_t>(begin - task, 0), end_block = std::min(end - task, blocks(length));
      if (first_block >= end_block) continue;
      workspace.load_segment(head, first, length);
      for (int64_t block = first_block; block < end_block; ++block) {
        workspace.attend(block * kQueries, std::min(kQueries, length - block * kQueries));
      }
    }
  }
}

}  // namespace rtp_mm
