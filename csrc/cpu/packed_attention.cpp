#include "cpu/packed_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/multiply.h"
#include "cpu/multiply_amx.h"
#include "cpu/rotate.h"
#include "cpu/simd.h"

namespace rtp_mm {
namespace {

// Queries go in panels of two AVX-512 vectors, a query to a lane: what a softmax does with a row of scores it does with
// 32 of them at once, and no key or value is moved but to rotate the keys, and to pair values of bfloat16. Scores are
// [keys][queries], values times probabilities [dim][queries].
constexpr int64_t kPanel = 32;
constexpr int64_t kQueries = 4 * kPanel;  // of a block, which reads keys and values from memory once
constexpr int64_t kKeys = 128;            // of a block: their scores (16 KB) stay in L1, they and their values in L2
constexpr int64_t kPairs = kKeys / 2;     // of their values
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

static_assert(kMaxHeadDim <= kStripDepth && kPairs % kAmxSide == 0 && kColumnUnit == kAmxSide);

// What elements are multiplied as: the dimensions of a query or a key in pairs, and values and probabilities of two
// keys.
template <class Element>
using WordOf = std::conditional_t<std::is_same_v<Element, BFloat16>, BFloat16Pair, float>;

// Rows of values, two to a row of dst; the last of an odd number has zeros beside it.
struct PairRows {
  template <class Arch>
  RTP_MM_INLINE static void run(const BFloat16* src, int64_t src_stride, int64_t rows, int64_t dim, BFloat16Pair* dst,
                                int64_t dst_stride) {
    for (int64_t r = 0; r < rows; r += 2, src += 2 * src_stride, dst += dst_stride) {
      const BFloat16* next = r + 1 < rows ? src + src_stride : nullptr;
      for (int64_t i = 0; i < dim; ++i) dst[i] = src[i].bits | (next ? BFloat16Pair{next[i].bits} << 16 : 0);
    }
  }
};

// dst[columns][rows] = src[rows][columns], both multiples of kColumnUnit; of any words.
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

// rows of dim floats, kStripDepth apart, to rows of elements.
struct Narrow {
  template <class Arch, class Element>
  RTP_MM_INLINE static void run(const float* src, int64_t rows, int64_t dim, Element* dst, int64_t dst_stride) {
    using Lanes = Wide<Arch, Element>;
    for (; rows > 0; --rows, src += kStripDepth, dst += dst_stride) {
      int64_t i = 0;
      for (; i + Lanes::kLanes <= dim; i += Lanes::kLanes) narrow<Lanes>(at<Lanes>(src + i), dst + i);
      for (; i < dim; ++i) narrow(src[i], dst + i);
    }
  }
};

// A panel of queries between blocks of keys.
template <class Word>
struct Panel {
  std::vector<Word> queries;    // [words of dim][kPanel]
  std::vector<float> weighted;  // [dim][kPanel], values times probabilities so far
  float largest[kPanel], sum[kPanel];

  // scores[keys][kPanel] -> 2^(score - largest so far), as words in their place. What was summed relative to a smaller
  // score, if anything was, is scaled down.
  struct Softmax {
    template <class Arch>
    RTP_MM_INLINE static Vector<Arch> power(Vector<Arch> x) {
      return exp2_of_negative<Arch, std::is_same_v<Word, BFloat16Pair>>(x);
    }

    template <class Arch>
    RTP_MM_INLINE static void run(Panel* panel, float* scores, int64_t keys, bool is_first) {
      constexpr int kVectors = kPanel / Arch::kLanes;
      constexpr int64_t kValues = std::is_same_v<Word, BFloat16Pair> ? 2 : 1;
      Vector<Arch> largest[kVectors], total[kVectors] = {}, shrink[kVectors];
      for (int v = 0; v < kVectors; ++v) largest[v] = at<Arch>(panel->largest + v * Arch::kLanes);
      for (int64_t key = 0; key < keys; ++key) {
        for (int v = 0; v < kVectors; ++v) {
          const Vector<Arch> score = at<Arch>(scores + key * kPanel + v * Arch::kLanes);
          largest[v] = largest[v] < score ? score : largest[v];
        }
      }
      for (int64_t key = 0; key < keys; key += kValues) {
        for (int v = 0; v < kVectors; ++v) {
          const float* score = scores + key * kPanel + v * Arch::kLanes;
          float* word = scores + key / kValues * kPanel + v * Arch::kLanes;
          const Vector<Arch> first = power<Arch>(at<Arch>(score) - largest[v]);
          total[v] += first;
          if constexpr (kValues == 1) {
            at<Arch>(word) = first;
          } else {
            const bool is_last = key + 1 == keys;
            const Vector<Arch> second = is_last ? Vector<Arch>{} : power<Arch>(at<Arch>(score + kPanel) - largest[v]);
            total[v] += second;
            // Ties go up; a NaN, which may be lost here, stays in the total.
            constexpr BFloat16Pair kHalf = 0x8000, kUpper = 0xffff0000;
            const auto lower = reinterpret_cast<PairVector<Arch>>(first) + kHalf,
                       upper = reinterpret_cast<PairVector<Arch>>(second) + kHalf;
            at<Arch>(reinterpret_cast<Word*>(word)) = lower >> 16 | (upper & kUpper);
          }
        }
      }
      IntVector<Arch> has_grown = {};
      for (int v = 0; v < kVectors; ++v) {
        float *before = panel->largest + v * Arch::kLanes, *sum = panel->sum + v * Arch::kLanes;
        has_grown |= at<Arch>(before) < largest[v];
        shrink[v] = power<Arch>(at<Arch>(before) - largest[v]);
        at<Arch>(before) = largest[v];
        at<Arch>(sum) = at<Arch>(sum) * shrink[v] + total[v];
      }
      int32_t lanes_grown = 0;
      for (int lane = 0; lane < Arch::kLanes; ++lane) lanes_grown |= has_grown[lane];
      if (is_first || !lanes_grown) return;  // they would be multiplied by 1
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
template <class Element>
class Workspace {
  using Word = WordOf<Element>;
  static constexpr int64_t kValues = sizeof(Word) / sizeof(Element);  // in a word

 public:
  explicit Workspace(const PackedAttention<Element>& job)
      : job_(job),
        by_amx_(kValues == 2 && has_amx(job.isa)),
        depth_(job.dim / kValues),
        padded_depth_(up_to_multiple(depth_, kColumnUnit)),
        padded_dim_(up_to_multiple(job.dim, kColumnUnit)),
        key_stride_(by_amx_ ? padded_depth_ : kStripDepth) {
    for (Panel<Word>& panel : panels_) {
      panel.queries.resize(padded_depth_ * kPanel);
      panel.weighted.resize(padded_dim_ * kPanel);
    }
  }

  // Takes over the keys of rows [first, first + length), and pairs of their values; floats are read where they are.
  void load_segment(int64_t head, int64_t first, int64_t length) {
    head_ = head, first_ = first, length_ = length;
    keys_.resize(up_to_multiple(length, kAmxSide) * key_stride_);
    rotate(1, first, length, 1, keys_.data(), key_stride_);
    if constexpr (kValues == 2) {
      values_.resize(up_to_multiple(length, kKeys) / 2 * padded_dim_);
      if (by_amx_) {
        for (int64_t key = 0; key < length; key += kKeys) load_values(key, std::min(kKeys, length - key));
      } else {
        rtp_mm::run<PairRows>(job_.isa, row(2, first), job_.row_stride, length, job_.dim, values_.data(), job_.dim);
      }
    }
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
  // For AMX: pairs of values of a block of keys, [padded_dim_][kPairs], with zeros up to a multiple of kAmxSide.
  void load_values(int64_t key, int64_t keys) {
    const int64_t pairs = (keys + 1) / 2, padded = up_to_multiple(pairs, kAmxSide);
    auto* paired = reinterpret_cast<Word*>(paired_);
    rtp_mm::run<PairRows>(job_.isa, row(2, first_ + key), job_.row_stride, keys, job_.dim, paired, padded_dim_);
    std::fill_n(paired + pairs * padded_dim_, (padded - pairs) * padded_dim_, Word{});
    rtp_mm::run<Transpose>(job_.isa, static_cast<const float*>(paired_), padded_dim_, padded, padded_dim_,
                           reinterpret_cast<float*>(values_.data()) + key / 2 * padded_dim_, kPairs);
  }

  void begin(Panel<Word>& panel, int64_t first, int64_t rows) {
    auto* words = reinterpret_cast<Word*>(queries_);
    constexpr float kLog2OfE = 1.44269504f;  // so that scores are powers of two
    rotate(0, first, rows, kLog2OfE / std::sqrt(static_cast<float>(job_.dim)), words, kStripDepth);
    rtp_mm::run<Transpose>(job_.isa, static_cast<const float*>(queries_), kStripDepth, kPanel, padded_depth_,
                           reinterpret_cast<float*>(panel.queries.data()), kPanel);
    std::fill_n(panel.largest, kPanel, kMinusInfinity);
    std::fill_n(panel.sum, kPanel, 0.0f);
  }

  void step(Panel<Word>& panel, int64_t rows, int64_t key, int64_t keys) {
    const int64_t columns = up_to_multiple(rows, kColumnUnit);
    const Product<Word> scores{.rows = keys,
                               .columns = columns,
                               .depth = by_amx_ ? padded_depth_ : depth_,
                               .panel = panel.queries.data(),
                               .panel_stride = kPanel,
                               .sums = scores_,
                               .sums_stride = kPanel,
                               .is_added = false};
    const Word* key_words = keys_.data() + key * key_stride_;
    if constexpr (kValues == 2) {
      if (by_amx_) multiply_amx(key_words, key_stride_, scores, Ahead{});
    }
    if (!by_amx_) multiply(job_.isa, key_words, scores);
    rtp_mm::run<typename Panel<Word>::Softmax>(job_.isa, &panel, static_cast<float*>(scores_), keys, key == 0);
    auto* weights = reinterpret_cast<Word*>(scores_);
    Product<Word> product{.rows = job_.dim,
                          .columns = columns,
                          .depth = (keys + kValues - 1) / kValues,
                          .panel = weights,
                          .panel_stride = kPanel,
                          .sums = panel.weighted.data(),
                          .sums_stride = kPanel,
                          .is_added = key > 0};
    if constexpr (kValues == 2) {
      if (by_amx_) {
        const int64_t padded = up_to_multiple(product.depth, kAmxSide);
        std::fill(weights + product.depth * kPanel, weights + padded * kPanel, Word{});
        product.depth = padded;
        return multiply_amx(values_.data() + key / 2 * padded_dim_, kPairs, product, Ahead{});
      }
    }
    const auto [values, stride] = values_from(key);
    multiply_transposed(job_.isa, values, stride, product);
  }

  void finish(Panel<Word>& panel, int64_t first, int64_t rows) {
    rtp_mm::run<typename Panel<Word>::Divide>(job_.isa, &panel);
    rtp_mm::run<Transpose>(job_.isa, static_cast<const float*>(panel.weighted.data()), kPanel, padded_dim_, kPanel,
                           static_cast<float*>(answers_), kStripDepth);
    rtp_mm::run<Narrow>(job_.isa, static_cast<const float*>(answers_), rows, job_.dim,
                        job_.out + (first * job_.heads + head_) * job_.dim, job_.heads * job_.dim);
  }

  // Part: 0 query, 1 key, 2 value.
  const Element* row(int64_t part, int64_t i) const {
    return job_.qkv + i * job_.row_stride + part * job_.part_stride + head_ * job_.head_stride;
  }

  // The words of values from that key of the segment on, an even one, and how far apart their rows are.
  std::pair<const Word*, int64_t> values_from(int64_t key) const {
    if constexpr (kValues == 2) {
      return {values_.data() + key / 2 * job_.dim, job_.dim};
    } else {
      return {row(2, first_ + key), job_.row_stride};
    }
  }

  // Rows [first, first + rows), rotated and scaled, that many words apart.
  void rotate(int64_t part, int64_t first, int64_t rows, float scale, Word* dst, int64_t dst_stride) {
    const int64_t half = job_.dim / 2;
    rtp_mm::run<Rotate>(job_.isa, row(part, first), job_.row_stride, job_.cos + first * half, job_.sin + first * half,
                        rows, job_.dim, scale, reinterpret_cast<Element*>(dst), dst_stride * kValues);
  }

  const PackedAttention<Element>& job_;
  const bool by_amx_;
  const int64_t depth_, padded_depth_, padded_dim_;  // words of a dim; padded to whole vectors
  const int64_t key_stride_;                         // in words
  int64_t head_ = 0, first_ = 0, length_ = 0;
  // Words past a dim stay zero, and so does what AMX multiplies them by: see `multiply_amx`.
  std::vector<Word> keys_;    // [length][key_stride_]
  std::vector<Word> values_;  // of pairs: [length / 2][dim], or as `load_values` has them
  Panel<Word> panels_[kQueries / kPanel];
  const AmxTiles amx_tiles_{by_amx_};
  alignas(64) float queries_[kPanel * kStripDepth] = {};  // of words, whose bits floats hold
  alignas(64) float answers_[kPanel * kStripDepth] = {};
  alignas(64) float paired_[kPairs * kStripDepth] = {};
  alignas(64) float scores_[kKeys * kPanel] = {};
};

int64_t blocks(int64_t length) { return (length + kQueries - 1) / kQueries; }

}  // namespace

template <class Element>
int64_t PackedAttention<Element>::tasks() const {
  int64_t count = 0;
  for (int64_t s = 0; s < segments; ++s) count += heads * blocks(cu_seqlens[s + 1] - cu_seqlens[s]);
  return count;
}

template <class Element>
void PackedAttention<Element>::run(int64_t begin, int64_t end) const {
  Workspace<Element> workspace(*this);
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

template struct PackedAttention<float>;
template struct PackedAttention<BFloat16>;

}  // namespace rtp_mm
