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
// 32 of them at once, and its probabilities are the left operand of the second product as they stand.
constexpr int64_t kPanel = 32;
constexpr int64_t kQueries = 4 * kPanel;  // of a block, which reads keys and values from memory once
constexpr int64_t kKeys = 128;            // of a block: with its values 80 KB, read from L2 by each panel
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// dst[r] = scale * the rotated src[r], [rows][dim] both. The row behind each source row comes out of memory meanwhile:
// the same row of the next head.
struct Rotate {
  template <class Arch>
  RTP_MM_INLINE static void run(const float* src, int64_t src_stride, const float* cos, const float* sin, int64_t rows,
                                int64_t dim, float scale, float* __restrict dst, int64_t dst_stride) {
    const int64_t half = dim / 2;
    for (; rows > 0; --rows, src += src_stride, dst += dst_stride, cos += half, sin += half) {
      for (int64_t i = 0; i < dim; i += 16) __builtin_prefetch(src + dim + i);
      for (int64_t i = 0; i < half; ++i) dst[i] = scale * (src[i] * cos[i] - src[half + i] * sin[i]);
      for (int64_t i = 0; i < half; ++i) dst[half + i] = scale * (src[half + i] * cos[i] + src[i] * sin[i]);
    }
  }
};

// dst[columns][kPanel] = src[kPanel][columns], rows of src src_stride apart; both dimensions multiples of kColumnUnit.
struct Transpose {
  template <class Arch>
  RTP_MM_INLINE static void run(const float* src, int64_t src_stride, int64_t columns, float* dst) {
    for (int64_t r = 0; r < kPanel; r += Arch::kLanes) {
      for (int64_t c = 0; c < columns; c += Arch::kLanes) {
        Vector<Arch> block[Arch::kLanes];
        for (int i = 0; i < Arch::kLanes; ++i) block[i] = at<Arch>(src + (r + i) * src_stride + c);
        transpose<Arch>(block);
        for (int i = 0; i < Arch::kLanes; ++i) at<Arch>(dst + (c + i) * kPanel + r) = block[i];
      }
    }
  }
};

// The state of a panel's queries between blocks of keys.
struct Softmax {
  float largest[kPanel], sum[kPanel], shrink[kPanel];

  // scores[keys][kPanel] -> e^(score - largest so far). What was summed relative to a smaller score is to be scaled by
  // `shrink`.
  struct Step {
    template <class Arch>
    RTP_MM_INLINE static void run(Softmax* state, float* scores, int64_t keys) {
      constexpr int kVectors = kPanel / Arch::kLanes;
      Vector<Arch> largest[kVectors], total[kVectors] = {};
      for (int v = 0; v < kVectors; ++v) largest[v] = at<Arch>(state->largest + v * Arch::kLanes);
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
        const int64_t lane = v * Arch::kLanes;
        const Vector<Arch> shrink = exp<Arch>(at<Arch>(state->largest + lane) - largest[v]);
        at<Arch>(state->largest + lane) = largest[v];
        at<Arch>(state->sum + lane) = at<Arch>(state->sum + lane) * shrink + total[v];
        at<Arch>(state->shrink + lane) = shrink;
      }
    }
  };
};

// Rows of [rows][columns], each times a factor of its own.
struct Scale {
  template <class Arch>
  RTP_MM_INLINE static void run(const float* factors, int64_t rows, int64_t columns, float* values) {
    for (int64_t r = 0; r < rows; ++r, values += columns) {
      for (int64_t i = 0; i < columns; i += Arch::kLanes) at<Arch>(values + i) *= factors[r];
    }
  }
};

// What one thread holds, in the layouts of `multiply`.
class Workspace {
 public:
  explicit Workspace(const PackedAttention& job) : job_(job), columns_(round_up(job.dim, kColumnUnit)) {
    for (Panel& panel : panels_) {
      panel.queries.resize(columns_ * kPanel);
      panel.weighted.resize(kPanel * columns_);
    }
  }

  // Takes over keys and values of rows [first, first + length).
  void load_segment(int64_t head, int64_t first, int64_t length) {
    head_ = head, first_ = first, length_ = length;
    keys_.resize(round_up(length, kKeys) * round_up(job_.dim, kStripDepth));
    values_.resize(length * columns_);
    for (int64_t key = 0; key < length; key += kKeys) {
      const int64_t keys = std::min(kKeys, length - key);
      rotate(1, first + key, keys, 1);
      for (int64_t i = 0; i < job_.dim; i += kStripDepth) {
        for (int64_t j = 0; j < keys; ++j) {
          std::copy_n(rotated_ + j * kMaxHeadDim + i, std::min(kStripDepth, job_.dim - i),
                      key_strips(key, i) + j * kStripDepth);
        }
      }
    }
    for (int64_t j = 0; j < length; ++j) {
      const float* value = row(2, first + j);
      for (int64_t i = 0; i < job_.dim; i += 16) __builtin_prefetch(value + job_.dim + i);
      std::copy_n(value, job_.dim, values_.data() + j * columns_);
    }
  }

  // Answers queries [first, first + count) of the segment that was loaded last.
  void attend(int64_t first, int64_t count) {
    const int64_t panels = (count + kPanel - 1) / kPanel;
    const auto rows_of = [&](int64_t panel) { return std::min(kPanel, count - panel * kPanel); };
    for (int64_t p = 0; p < panels; ++p) begin(panels_[p], first_ + first + p * kPanel, rows_of(p));
    for (int64_t key = 0; key < length_; key += kKeys) {
      for (int64_t p = 0; p < panels; ++p) step(panels_[p], rows_of(p), key, std::min(kKeys, length_ - key));
    }
    for (int64_t p = 0; p < panels; ++p) finish(panels_[p], first_ + first + p * kPanel, rows_of(p));
  }

 private:
  struct Panel {
    std::vector<float> queries;   // [dim][kPanel]
    std::vector<float> weighted;  // [kPanel][columns], values times probabilities so far
    Softmax softmax;
  };

  void begin(Panel& panel, int64_t first, int64_t rows) {
    rotate(0, first, rows, 1 / std::sqrt(static_cast<float>(job_.dim)));
    rtp_mm::run<Transpose>(job_.isa, static_cast<const float*>(rotated_), kMaxHeadDim, columns_, panel.queries.data());
    std::fill(panel.weighted.begin(), panel.weighted.end(), 0.0f);
    std::fill_n(panel.softmax.largest, kPanel, kMinusInfinity);
    std::fill_n(panel.softmax.sum, kPanel, 0.0f);
  }

  void step(Panel& panel, int64_t rows, int64_t key, int64_t keys) {
    for (int64_t i = 0; i < job_.dim; i += kStripDepth) {
      multiply(job_.isa, key_strips(key, i),
               {.rows = keys,
                .columns = round_up(rows, kColumnUnit),
                .depth = std::min(kStripDepth, job_.dim - i),
                .panel = panel.queries.data() + i * kPanel,
                .panel_stride = kPanel,
                .sums = scores_,
                .sums_stride = kPanel,
                .is_added = i > 0});
    }
    rtp_mm::run<Softmax::Step>(job_.isa, &panel.softmax, static_cast<float*>(scores_), keys);
    rtp_mm::run<Scale>(job_.isa, static_cast<const float*>(panel.softmax.shrink), rows, columns_,
                       panel.weighted.data());
    multiply_transposed(job_.isa, scores_, kPanel,
                        {.rows = rows,
                         .columns = columns_,
                         .depth = keys,
                         .panel = values_.data() + key * columns_,
                         .panel_stride = columns_,
                         .sums = panel.weighted.data(),
                         .sums_stride = columns_,
                         .is_added = true});
  }

  void finish(const Panel& panel, int64_t first, int64_t rows) {
    float* out = job_.out + (first * job_.heads + head_) * job_.dim;
    const float* weighted = panel.weighted.data();
    for (int64_t r = 0; r < rows; ++r, weighted += columns_, out += job_.heads * job_.dim) {
      for (int64_t i = 0; i < job_.dim; ++i) out[i] = weighted[i] / panel.softmax.sum[r];
    }
  }

  // Part: 0 query, 1 key, 2 value.
  const float* row(int64_t part, int64_t i) const {
    return job_.qkv + ((i * 3 + part) * job_.heads + head_) * job_.dim;
  }

  // Rows [first, first + rows), rotated and scaled.
  void rotate(int64_t part, int64_t first, int64_t rows, float scale) {
    const int64_t half = job_.dim / 2;
    rtp_mm::run<Rotate>(job_.isa, row(part, first), 3 * job_.heads * job_.dim, job_.cos + first * half,
                        job_.sin + first * half, rows, job_.dim, scale, static_cast<float*>(rotated_), kMaxHeadDim);
  }

  // Dimensions [i, i + kStripDepth) of keys from `key` on, a multiple of kKeys.
  float* key_strips(int64_t key, int64_t i) {
    return keys_.data() + key * round_up(job_.dim, kStripDepth) + i * kKeys;
  }

  const PackedAttention& job_;
  const int64_t columns_;  // of the values, padded to whole vectors
  int64_t head_ = 0, first_ = 0, length_ = 0;
  std::vector<float> keys_;    // [blocks][steps of dim][kKeys][kStripDepth]
  std::vector<float> values_;  // [length][columns]
  Panel panels_[kQueries / kPanel];
  alignas(64) float rotated_[kKeys * kMaxHeadDim] = {};
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
