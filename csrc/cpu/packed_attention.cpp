#include "cpu/packed_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>

#include "cpu/aligned.h"
#include "cpu/attention_panel.h"
#include "cpu/multiply.h"
#include "cpu/multiply_amx.h"
#include "cpu/rotate.h"
#include "cpu/simd.h"

namespace rtp_mm {
namespace {

constexpr int64_t kQueries = 4 * kPanel;  // of a block, which reads keys and values from memory once
constexpr int64_t kKeys = 128;            // of a block: their scores (16 KB) stay in L1, they and their values in L2
constexpr int64_t kAmxKeys = 96;          // of AMX, which works at three blocks at once: 64 and 128 are slower
constexpr int64_t kAmxPairs = kAmxKeys / 2;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

static_assert(kMaxHeadDim <= kStripDepth && kAmxPairs % kAmxSide == 0 && kAmxKeys <= kKeys && kColumnUnit == kAmxSide);

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
      for (int64_t i = r + kRowsReadAhead; i < std::min(r + kRowsReadAhead + 2, rows); ++i) {
        prefetch(src + (i - r) * src_stride, dim);
      }
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
      panel.queries.resize(padded_depth_ * kPanel, Word{});
      panel.weighted.resize(padded_dim_ * kPanel, 0.0f);
    }
  }

  // Takes over the keys of rows [first, first + length), and pairs of their values; floats are read where they are.
  void load_segment(int64_t head, int64_t first, int64_t length) {
    head_ = head, first_ = first, length_ = length;
    keys_.resize(up_to_multiple(length, kAmxSide) * key_stride_, Word{});
    rotate(1, first, length, 1, keys_.data(), key_stride_);
    if constexpr (kValues == 2) {
      values_.resize(up_to_multiple(length, kAmxKeys) / 2 * padded_dim_, Word{});
      if (by_amx_) {
        for (int64_t key = 0; key < length; key += kAmxKeys) load_values(key, std::min(kAmxKeys, length - key));
      } else {
        rtp_mm::run<PairRows>(job_.isa, row(2, first), job_.row_stride, length, job_.dim, values_.data(), job_.dim);
      }
    }
  }

  // Answers queries [first, first + count) of the segment that was loaded last.
  void attend(int64_t first, int64_t count) {
    panels_in_use_ = (count + kPanel - 1) / kPanel;
    for (int64_t p = 0; p < panels_in_use_; ++p) {
      panels_[p].rows = std::min(kPanel, count - p * kPanel);
      begin(panels_[p], first_ + first + p * kPanel);
    }
    if constexpr (kValues == 2) {
      if (by_amx_) attend_by_tiles();
    }
    if (!by_amx_) {
      for (int64_t key = 0; key < length_; key += kKeys) {
        for (int64_t p = 0; p < panels_in_use_; ++p) attend_by_strips(panels_[p], key, std::min(kKeys, length_ - key));
      }
    }
    for (int64_t p = 0; p < panels_in_use_; ++p) finish(panels_[p], first_ + first + p * kPanel);
  }

 private:
  // For AMX: pairs of values of a block of keys, [padded_dim_][kAmxPairs], with zeros up to a multiple of kAmxSide.
  void load_values(int64_t key, int64_t keys) {
    const int64_t pairs = (keys + 1) / 2, padded = up_to_multiple(pairs, kAmxSide);
    auto* paired = reinterpret_cast<Word*>(paired_);
    rtp_mm::run<PairRows>(job_.isa, row(2, first_ + key), job_.row_stride, keys, job_.dim, paired, padded_dim_);
    std::fill_n(paired + pairs * padded_dim_, (padded - pairs) * padded_dim_, Word{});
    rtp_mm::run<Transpose>(job_.isa, static_cast<const float*>(paired_), padded_dim_, padded, padded_dim_,
                           reinterpret_cast<float*>(values_.data()) + key / 2 * padded_dim_, kAmxPairs);
  }

  void begin(Panel<Word>& panel, int64_t first) {
    auto* words = reinterpret_cast<Word*>(queries_);
    constexpr float kLog2OfE = 1.44269504f;  // so that scores are powers of two
    rotate(0, first, panel.rows, kLog2OfE / std::sqrt(static_cast<float>(job_.dim)), words, kStripDepth);
    rtp_mm::run<Transpose>(job_.isa, static_cast<const float*>(queries_), kStripDepth, kPanel, padded_depth_,
                           reinterpret_cast<float*>(panel.queries.data()), kPanel);
    std::fill_n(panel.reference, kPanel, kMinusInfinity);
    std::fill_n(panel.sum, kPanel, 0.0f);
  }

  // The products of a panel and a block of keys, but for what they read of keys and values.
  Product<Word> scores_of(const Panel<Word>& panel, int64_t keys, int64_t depth, float* scores) const {
    return {.rows = keys,
            .columns = up_to_multiple(panel.rows, kColumnUnit),
            .depth = depth,
            .panel = panel.queries.data(),
            .panel_stride = kPanel,
            .sums = scores,
            .sums_stride = kPanel,
            .is_added = false};
  }

  Product<Word> weighted_of(Panel<Word>& panel, int64_t key, int64_t depth, const float* weights) const {
    return {.rows = job_.dim,
            .columns = up_to_multiple(panel.rows, kColumnUnit),
            .depth = depth,
            .panel = reinterpret_cast<const Word*>(weights),
            .panel_stride = kPanel,
            .sums = panel.weighted.data(),
            .sums_stride = kPanel,
            .is_added = key > 0};
  }

  void attend_by_strips(Panel<Word>& panel, int64_t key, int64_t keys) {
    float* scores = scores_[0];
    multiply(job_.isa, keys_.data() + key * key_stride_, scores_of(panel, keys, depth_, scores));
    NoProduct nothing;
    rtp_mm::run<typename Panel<Word>::Softmax>(job_.isa, &panel, scores, keys, key == 0, &nothing);
    const auto [values, stride] = values_from(key);
    multiply_transposed(job_.isa, values, stride, weighted_of(panel, key, (keys + kValues - 1) / kValues, scores));
  }

  // Blocks of keys times panels, a step each: while its scores become weights, tiles weigh values for the step before
  // and make the scores of the next.
  void attend_by_tiles() {
    const int64_t steps = (length_ + kAmxKeys - 1) / kAmxKeys * panels_in_use_;
    const auto key_of = [&](int64_t step) { return step / panels_in_use_ * kAmxKeys; };
    const auto keys_of = [&](int64_t step) { return std::min(kAmxKeys, length_ - key_of(step)); };
    const auto panel_of = [&](int64_t step) -> Panel<Word>& { return panels_[step % panels_in_use_]; };
    const auto scores = [&](int64_t step) -> AmxProduct<Word> {
      return {keys_.data() + key_of(step) * key_stride_, key_stride_,
              scores_of(panel_of(step), keys_of(step), padded_depth_, scores_[step % 2])};
    };
    const auto weighted = [&](int64_t step) -> AmxProduct<Word> {
      const int64_t key = key_of(step), pairs = (keys_of(step) + 1) / 2, padded = up_to_multiple(pairs, kAmxSide);
      float* weights = scores_[step % 2];
      std::fill(weights + pairs * kPanel, weights + padded * kPanel, 0.0f);
      return {values_.data() + key / 2 * padded_dim_, kAmxPairs, weighted_of(panel_of(step), key, padded, weights)};
    };
    BesideVectors beside{.first = {}, .second = scores(0)};
    beside.finish();
    for (int64_t step = 0; step < steps; ++step) {
      beside = {.first = step > 0 ? weighted(step - 1) : AmxProduct<Word>(),
                .second = step + 1 < steps ? scores(step + 1) : AmxProduct<Word>()};
      rtp_mm::run<typename Panel<Word>::Softmax>(job_.isa, &panel_of(step), static_cast<float*>(scores_[step % 2]),
                                                 keys_of(step), key_of(step) == 0, &beside);
    }
    beside = {.first = weighted(steps - 1), .second = {}};
    beside.finish();
  }

  void finish(Panel<Word>& panel, int64_t first) {
    rtp_mm::run<typename Panel<Word>::Divide>(job_.isa, &panel);
    rtp_mm::run<Transpose>(job_.isa, static_cast<const float*>(panel.weighted.data()), kPanel, padded_dim_, kPanel,
                           static_cast<float*>(answers_), kStripDepth);
    rtp_mm::run<Narrow>(job_.isa, static_cast<const float*>(answers_), panel.rows, job_.dim,
                        job_.out + first * job_.out_stride + head_ * job_.dim, job_.out_stride);
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
  // Words past a dim stay zero, and so does what AMX multiplies them by: see `AmxProduct`.
  AlignedVector<Word> keys_;    // [length][key_stride_]
  AlignedVector<Word> values_;  // of pairs: [length / 2][dim], or as `load_values` has them
  Panel<Word> panels_[kQueries / kPanel];
  int64_t panels_in_use_ = 0;
  const AmxTiles amx_tiles_{by_amx_};
  alignas(64) float queries_[kPanel * kStripDepth] = {};  // of words, whose bits floats hold
  alignas(64) float answers_[kPanel * kStripDepth] = {};
  alignas(64) float paired_[kAmxPairs * kStripDepth] = {};
  alignas(64) float scores_[2][kKeys * kPanel] = {};
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
