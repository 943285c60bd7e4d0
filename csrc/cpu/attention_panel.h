// Queries of one head on their way through the keys: what stands between one block of keys and the next, and the
// softmax.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/aligned.h"
#include "cpu/multiply_amx.h"
#include "cpu/simd.h"

namespace rtp_mm {

// Queries go in panels of two AVX-512 vectors, a query to a lane: what a softmax does with a row of scores it does with
// 32 of them at once, and no key or value is moved but to rotate the keys, and to pair values of bfloat16. Scores are
// [keys][queries], values times weights [dim][queries].
constexpr int64_t kPanel = 32;

// How far a score may exceed what its row's weights are relative to, in powers of two: only beyond that are they scaled
// anew. Sums in float32 have room for it, and are as exact.
constexpr float kMostAbove = 8;

// What AMX's tiles multiply while vectors go on: one product after the other, as the second's sums take the place of
// what the first reads.
struct BesideVectors {
  AmxProduct<BFloat16Pair> first, second;

  RTP_MM_INLINE bool step() { return first.step() || second.step(); }

  RTP_MM_INLINE void finish() {
    while (step()) {
    }
  }
};

// A panel of queries between blocks of keys.
template <class Word>
struct Panel {
  int64_t rows = 0;               // of queries
  AlignedVector<Word> queries;    // [words of dim][kPanel]
  AlignedVector<float> weighted;  // [dim][kPanel], values times weights so far
  // Of a query: what its weights are relative to, a score that is hardly less than its largest; and their sum.
  alignas(64) float reference[kPanel], sum[kPanel];

  // scores[keys][kPanel] -> weights 2^(score - reference), as words in their place. Where a score exceeds the reference
  // by more than kMostAbove, it is the new one, and what was summed relative to the old one is scaled down.
  struct Softmax {
    static constexpr int64_t kValues = std::is_same_v<Word, BFloat16Pair> ? 2 : 1;

    template <class Arch>
    RTP_MM_INLINE static Vector<Arch> power(Vector<Arch> x) {
      return exp2<Arch, kValues == 2>(x);
    }

    // The larger of the scores of two keys.
    template <class Arch>
    RTP_MM_INLINE static Vector<Arch> larger(const float* a, const float* b) {
      return at<Arch>(a) < at<Arch>(b) ? at<Arch>(b) : at<Arch>(a);
    }

    // Each lane's largest of its scores and of what stands there: two in turns, as each waits for itself.
    template <class Arch, int kVectors>
    RTP_MM_INLINE static void take_largest(const float* scores, int64_t keys, Vector<Arch> (&largest)[kVectors]) {
      Vector<Arch> other[kVectors];
      for (int v = 0; v < kVectors; ++v) other[v] = largest[v];
      for (int64_t key = 0; key < keys; key += 4) {
        const float* rows[4];
        for (int i = 0; i < 4; ++i) rows[i] = scores + std::min(key + i, keys - 1) * kPanel;
        for (int64_t v = 0, lane = 0; v < kVectors; ++v, lane += Arch::kLanes) {
          const Vector<Arch> first = larger<Arch>(rows[0] + lane, rows[1] + lane),
                             second = larger<Arch>(rows[2] + lane, rows[3] + lane);
          largest[v] = largest[v] < first ? first : largest[v];
          other[v] = other[v] < second ? second : other[v];
        }
      }
      for (int v = 0; v < kVectors; ++v) largest[v] = largest[v] < other[v] ? other[v] : largest[v];
    }

    template <class Arch, class Beside>
    RTP_MM_INLINE static void run(Panel* panel, float* scores, int64_t keys, bool is_first, Beside* beside) {
      constexpr int kVectors = kPanel / Arch::kLanes;
      Vector<Arch> reference[kVectors], total[kVectors] = {};
      for (int v = 0; v < kVectors; ++v) reference[v] = at<Arch>(panel->reference + v * Arch::kLanes);
      take_largest<Arch>(scores, keys, reference);
      for (int v = 0; v < kVectors; ++v) {
        const Vector<Arch> before = at<Arch>(panel->reference + v * Arch::kLanes);
        reference[v] = before + kMostAbove < reference[v] ? reference[v] : before;
      }
      for (int64_t key = 0; key < keys; key += kValues) {
        if (key % (2 * kValues) == 0) beside->step();
        for (int v = 0; v < kVectors; ++v) {
          const float* score = scores + key * kPanel + v * Arch::kLanes;
          float* word = scores + key / kValues * kPanel + v * Arch::kLanes;
          const Vector<Arch> first = power<Arch>(at<Arch>(score) - reference[v]);
          total[v] += first;
          if constexpr (kValues == 1) {
            at<Arch>(word) = first;
          } else {
            const bool is_last = key + 1 == keys;
            const Vector<Arch> second = is_last ? Vector<Arch>{} : power<Arch>(at<Arch>(score + kPanel) - reference[v]);
            total[v] += second;
            // Ties go up; a NaN, which may be lost here, stays in the total.
            constexpr BFloat16Pair kHalf = 0x8000, kUpper = 0xffff0000;
            const auto lower = reinterpret_cast<PairVector<Arch>>(first) + kHalf,
                       upper = reinterpret_cast<PairVector<Arch>>(second) + kHalf;
            at<Arch>(reinterpret_cast<Word*>(word)) = lower >> 16 | (upper & kUpper);
          }
        }
      }
      beside->finish();
      take_over<Arch>(panel, reference, total, is_first);
    }

    template <class Arch, int kVectors>
    RTP_MM_INLINE static void take_over(Panel* panel, const Vector<Arch> (&reference)[kVectors],
                                        const Vector<Arch> (&total)[kVectors], bool is_first) {
      Vector<Arch> shrink[kVectors];
      IntVector<Arch> has_grown = {};
      for (int v = 0; v < kVectors; ++v) {
        float *before = panel->reference + v * Arch::kLanes, *sum = panel->sum + v * Arch::kLanes;
        has_grown |= at<Arch>(before) < reference[v];
        shrink[v] = power<Arch>(at<Arch>(before) - reference[v]);
        at<Arch>(before) = reference[v];
        at<Arch>(sum) = at<Arch>(sum) * shrink[v] + total[v];
      }
      int32_t lanes_grown = 0;
      for (int lane = 0; lane < Arch::kLanes; ++lane) lanes_grown |= has_grown[lane];
      if (!is_first && lanes_grown) scale<Arch>(panel, shrink);  // else it would be by 1
    }
  };

  struct Divide {
    template <class Arch>
    RTP_MM_INLINE static void run(Panel* panel) {
      Vector<Arch> inverse[kPanel / Arch::kLanes];
      for (int64_t i = 0; i < kPanel; i += Arch::kLanes) inverse[i / Arch::kLanes] = 1.0f / at<Arch>(panel->sum + i);
      scale<Arch>(panel, inverse);
    }
  };

  template <class Arch, int kVectors>
  RTP_MM_INLINE static void scale(Panel* panel, const Vector<Arch> (&factor)[kVectors]) {
    for (float* row = panel->weighted.data(); row < panel->weighted.data() + panel->weighted.size(); row += kPanel) {
      for (int v = 0; v < kVectors; ++v) at<Arch>(row + v * Arch::kLanes) *= factor[v];
    }
  }
};

}  // namespace rtp_mm
