#include "cpu/packed_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/multiply.h"
#include "cpu/simd.h"

namespace rtp_mm {
namespace {

constexpr int64_t kQueries = 112;       // of a block: eight AVX-512 strips; their scores (36 KB) stay in L2
constexpr int64_t kKeys = kStripDepth;  // of a block: its probabilities are strips
constexpr int64_t kPanel = 32;          // columns multiplied at a time: 10 KB of keys or values stay in L1
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// dst[dim] = scale * the rotated src[dim].
struct Rotate {
  template <class Arch>
  RTP_MM_INLINE static void run(const float* src, const float* cos, const float* sin, int64_t dim, float scale,
                                float* dst) {
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; ++i) {
      dst[i] = scale * (src[i] * cos[i] - src[half + i] * sin[i]);
      dst[half + i] = scale * (src[half + i] * cos[i] + src[i] * sin[i]);
    }
  }
};

// The state of a block's queries between blocks of keys.
struct Softmax {
  float largest[kQueries], sum[kQueries];

  // scores[rows][kKeys] -> e^(score - largest so far), for the first `keys` of each row; sums and weighted values that
  // were taken relative to a smaller score are scaled down.
  struct Step {
    template <class Arch>
    RTP_MM_INLINE static void run(Softmax* state, float* scores, int64_t rows, int64_t keys, float* values,
                                  int64_t columns) {
      const int64_t end = (keys + Arch::kLanes - 1) / Arch::kLanes * Arch::kLanes;
      for (int64_t r = 0; r < rows; ++r, scores += kKeys, values += columns) {
        for (int64_t i = keys; i < end; ++i) scores[i] = kMinusInfinity;
        Vector<Arch> top = at<Arch>(scores);
        for (int64_t i = Arch::kLanes; i < end; i += Arch::kLanes) {
          top = top < at<Arch>(scores + i) ? at<Arch>(scores + i) : top;
        }
        const float before = state->largest[r], block = rtp_mm::largest<Arch>(top);
        const float now = before < block ? block : before;
        Vector<Arch> total = {};
        for (int64_t i = 0; i < end; i += Arch::kLanes) {
          at<Arch>(scores + i) = exp<Arch>(at<Arch>(scores + i) - now);
          total += at<Arch>(scores + i);
        }
        state->largest[r] = now;
        if (before == now) {
          state->sum[r] += rtp_mm::sum<Arch>(total);
        } else {
          const float shrink = exp<Arch>(Vector<Arch>{} + (before - now))[0];
          state->sum[r] = state->sum[r] * shrink + rtp_mm::sum<Arch>(total);
          for (int64_t i = 0; i < columns; i += Arch::kLanes) at<Arch>(values + i) *= shrink;
        }
      }
    }
  };
};

// weighted / sum, for `rows` of [rows][columns], to dim columns of rows out_stride apart.
struct Finish {
  template <class Arch>
  RTP_MM_INLINE static void run(const Softmax* state, const float* weighted, int64_t rows, int64_t columns, int64_t dim,
                                float* out, int64_t out_stride) {
    for (int64_t r = 0; r < rows; ++r, weighted += columns, out += out_stride) {
      for (int64_t i = 0; i < dim; ++i) out[i] = weighted[i] / state->sum[r];
    }
  }
};

// What one thread holds, in the layouts of `multiply`.
class Workspace {
 public:
  explicit Workspace(const PackedAttention& job) : job_(job), columns_(round_up(job.dim, kColumnUnit)) {}

  // Takes over keys and values of rows [first, first + length).
  void load_segment(int64_t head, int64_t first, int64_t length) {
    const int64_t dim = job_.dim;
    keys_.assign(round_up(length, kKeys) * dim, 0);
    values_.assign(length * columns_, 0);
    for (int64_t j = 0; j < length; ++j) {
      float key[kMaxHeadDim];
      rotate(1, head, first + j, 1, key);
      float* column = keys_.data() + j / kKeys * dim * kKeys + j % kKeys;
      for (int64_t i = 0; i < dim; ++i) column[i * kKeys] = key[i];
      std::copy_n(row(2, head, first + j), dim, values_.data() + j * columns_);
    }
    head_ = head, length_ = length;
  }

  // Answers queries [first, first + rows) with the segment that was loaded last.
  void attend(int64_t first, int64_t rows) {
    const float scale = 1 / std::sqrt(static_cast<float>(job_.dim));
    for (int64_t r = 0; r < rows; ++r) {
      float query[kMaxHeadDim];
      rotate(0, head_, first + r, scale, query);
      for (int64_t i = 0; i < job_.dim; i += kStripDepth) {
        std::copy_n(query + i, std::min(kStripDepth, job_.dim - i), queries_.data() + i * rows + r * kStripDepth);
      }
    }
    weighted_.assign(rows * columns_, 0);
    std::fill_n(softmax_.largest, rows, kMinusInfinity);
    std::fill_n(softmax_.sum, rows, 0.0f);
    for (int64_t key = 0; key < length_; key += kKeys) {
      const int64_t keys = std::min(kKeys, length_ - key);
      std::fill_n(scores_.data(), rows * kKeys, 0.0f);
      for (int64_t j = 0; j < keys; j += kPanel) {
        for (int64_t i = 0; i < job_.dim; i += kStripDepth) {
          multiply(job_.isa, rows, std::min(kPanel, kKeys - j), std::min(kStripDepth, job_.dim - i),
                   queries_.data() + i * rows, keys_.data() + key * job_.dim + i * kKeys + j, kKeys, scores_.data() + j,
                   kKeys);
        }
      }
      rtp_mm::run<Softmax::Step>(job_.isa, &softmax_, scores_.data(), rows, keys, weighted_.data(), columns_);
      for (int64_t column = 0; column < columns_; column += kPanel) {
        multiply(job_.isa, rows, std::min(kPanel, columns_ - column), keys, scores_.data(),
                 values_.data() + key * columns_ + column, columns_, weighted_.data() + column, columns_);
      }
    }
    rtp_mm::run<Finish>(job_.isa, static_cast<const Softmax*>(&softmax_), static_cast<const float*>(weighted_.data()),
                        rows, columns_, job_.dim, job_.out + (first * job_.heads + head_) * job_.dim,
                        job_.heads * job_.dim);
  }

 private:
  // Part: 0 query, 1 key, 2 value. The same row of the next head comes out of memory meanwhile.
  const float* row(int64_t part, int64_t head, int64_t i) const {
    constexpr int64_t kLine = 16;  // floats
    const float* row = job_.qkv + ((i * 3 + part) * job_.heads + head) * job_.dim;
    for (int64_t j = 0; j < job_.dim; j += kLine) __builtin_prefetch(row + job_.dim + j);
    return row;
  }

  void rotate(int64_t part, int64_t head, int64_t i, float scale, float* dst) const {
    const int64_t half = job_.dim / 2;
    rtp_mm::run<Rotate>(job_.isa, row(part, head, i), job_.cos + i * half, job_.sin + i * half, job_.dim, scale, dst);
  }

  const PackedAttention& job_;
  const int64_t columns_;  // of the values, padded with zeros
  int64_t head_ = 0, length_ = 0;
  std::vector<float> keys_;    // [blocks][dim][kKeys]
  std::vector<float> values_;  // [length][columns]
  std::vector<float> queries_ = std::vector<float>(kQueries * round_up(kMaxHeadDim, kStripDepth));  // as strips
  std::vector<float> scores_ = std::vector<float>(kQueries * kKeys);
  std::vector<float> weighted_;  // [queries][columns], values times probabilities so far
  Softmax softmax_;
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
        workspace.attend(first + block * kQueries, std::min(kQueries, length - block * kQueries));
      }
    }
  }
}

}  // namespace rtp_mm
