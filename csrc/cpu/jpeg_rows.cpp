#include "cpu/jpeg_rows.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "cpu/jpeg_color.h"

namespace rtp_mm {
namespace {

constexpr uint8_t kZigzag[64] = {0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48,
                                 41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
                                 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63};

constexpr int quad_place(int zigzag) { return kZigzag[zigzag] / 8 * kQuadRow + kZigzag[zigzag] % 8; }

// By zigzag order. Past it is its last place, to which the end of a block writes the 0 that is there.
constexpr auto kQuadPlaces = [] {
  std::array<uint8_t, 256> places{};
  for (int i = 0; i < 256; ++i) places[i] = static_cast<uint8_t>(quad_place(std::min(i, 63)));
  return places;
}();
static_assert(quad_place(63) < 256);

constexpr int kMostPrediction = 2047;

// One block's coefficients into its place in a quad of zeros. False for what is broken.
RTP_MM_INLINE bool read_block(JpegBits& bits, const JpegComponent& component, int& prediction, int16_t* quad) {
  const auto next = [&](const HuffmanTable& table) __attribute__((always_inline)) {
    const JpegSymbol symbol = table.find(bits.peek());
    bits.skip(symbol.bits);
    return symbol;
  };
  bits.refill();
  const JpegSymbol dc = next(component.dc);
  prediction += dc.value;
  bool is_valid = dc.advance == 1 && prediction >= -kMostPrediction && prediction <= kMostPrediction;
  quad[0] = static_cast<int16_t>(prediction);
  unsigned place = 0;
  for (;;) {
    bits.refill();  // of twice 26 bits
    const JpegSymbol first = next(component.ac);
    place += first.advance;
    quad[kQuadPlaces[place]] = first.value;
    if (place >= 63) break;
    const JpegSymbol second = next(component.ac);
    place += second.advance;
    quad[kQuadPlaces[place]] = second.value;
    if (place >= 63) break;
  }
  return is_valid & (place == 63 || (place >= JpegSymbol::kEndOfBlock && place < JpegSymbol::kInvalid));
}

}  // namespace

// A row of MCUs, four at a time. False where it is broken or uncertain.
struct DecodeMcus {
  template <class Arch>
  RTP_MM_INLINE static void run(JpegRows* rows, bool* is_valid) {
    const JpegFile& file = rows->file_;
    const auto count = static_cast<int>(file.components.size());
    const auto across = static_cast<int>(file.across), down = static_cast<int>(file.down), luma = across * down;
    alignas(64) int16_t quads[kMostQuads][kQuadSize];
    Shorts<Arch> over{};
    bool is_good = true;
    for (int64_t first = 0; first < file.mcus_across && is_good; first += kQuadBlocks) {
      std::memset(quads, 0, (luma + count - 1) * sizeof(quads[0]));
      const auto mcus = static_cast<int>(std::min<int64_t>(kQuadBlocks, file.mcus_across - first));
      for (int mcu = 0; mcu < mcus; ++mcu) {
        if (rows->mcus_left_-- == 0) rows->next_segment();
        JpegBits bits = rows->bits_;
        for (int block = 0; block < luma; ++block) {
          const int column = mcu * across + block % across, quad = block / across * across + column / kQuadBlocks;
          is_good &=
              read_block(bits, file.components[0], rows->predictions_[0], quads[quad] + 8 * (column % kQuadBlocks));
        }
        for (int c = 1; c < count; ++c) {
          is_good &= read_block(bits, file.components[c], rows->predictions_[c], quads[luma + c - 1] + 8 * mcu);
        }
        rows->bits_ = bits;
        is_good &= rows->bits_left() >= 0;
        if (!is_good) break;
      }
      for (int quad = 0; quad < luma; ++quad) {
        JpegRows::Plane& plane = rows->planes_[0];
        uint8_t* samples = plane.row(8 * (quad / across)) + 8 * (first * across + quad % across * kQuadBlocks);
        over |= idct_quad<Arch>(quads[quad], plane.steps, samples, plane.stride);
      }
      for (int c = 1; c < count; ++c) {
        JpegRows::Plane& plane = rows->planes_[c];
        over |= idct_quad<Arch>(quads[luma + c - 1], plane.steps, plane.row(0) + 8 * first, plane.stride);
      }
    }
    int16_t elements[sizeof(over) / 2];
    std::memcpy(elements, &over, sizeof(over));
    for (const int16_t element : elements) is_good &= element >= 0;
    *is_valid = is_good;
  }

  static constexpr int kMostQuads = 6;
};

// A row of the last row of MCUs, counted from its top, or the one above.
struct WriteRow {
  template <class Arch>
  RTP_MM_INLINE static void run(JpegRows* rows, int64_t y, uint8_t* rgb) {
    const JpegFile& file = rows->file_;
    const uint8_t* luma = rows->planes_[0].row(y);
    if (file.components.size() == 1) {
      grey_to_rgb(luma, file.width, rgb);
      return;
    }
    const int64_t near = file.down == 2 ? (y + 2) / 2 - 1 : y;  // rounded down; y is -1 or more
    const bool is_lower = y & 1;
    const int64_t far = file.down == 1 ? near : is_lower ? near + 1 : near - 1;
    const uint8_t* chroma[2];
    for (int c = 0; c < 2; ++c) {
      JpegRows::Plane& plane = rows->planes_[c + 1];
      const ChromaRows source{plane.row(near), plane.row(far), (file.width + file.across - 1) / file.across, is_lower};
      uint8_t* upsampled = rows->upsampled_[c].data();
      chroma[c] = upsampled;
      if (file.across == 2 && file.down == 2) {
        upsample_across<true>(source, rows->sums_.data(), upsampled);
      } else if (file.across == 2) {
        upsample_across<false>(source, rows->sums_.data(), upsampled);
      } else if (file.down == 2) {
        upsample_down(source, upsampled);
      } else {
        chroma[c] = source.near;
      }
    }
    ycc_to_rgb<Arch>(luma, chroma[0], chroma[1], file.width, rgb);
  }
};

JpegRows::JpegRows(const JpegFile& file, Isa isa) : file_(file), isa_(isa), planes_(file.components.size()) {
  const int64_t mcus = (file.mcus_across + kQuadBlocks - 1) / kQuadBlocks * kQuadBlocks;  // whole quads are written
  for (size_t c = 0; c < planes_.size(); ++c) {
    Plane& plane = planes_[c];
    plane.stride = 8 * mcus * (c == 0 ? file.across : 1) + kVectorMargin;
    plane.height = c == 0 ? mcu_height() : 8;
    plane.samples.resize((plane.height + 2) * plane.stride);
    for (int i = 0; i < 64; ++i) {
      const int16_t step = file.components[c].steps[i];
      for (int block = 0; block < kQuadBlocks; ++block) {
        plane.steps.steps[quad_place(i) + 8 * block] = step;
        plane.steps.limits[quad_place(i) + 8 * block] = kMostInColumn / step;
      }
    }
  }
  sums_.resize(8 * mcus + 2);
  for (std::vector<uint8_t>& row : upsampled_) row.resize(8 * mcus * file.across + kVectorMargin);
}

int64_t JpegRows::bits_left() const {
  return 8 * static_cast<int64_t>(file_.segments[segments_ - 1].end) - bits_.place(file_.bits.get());
}

void JpegRows::next_segment() {
  require(segments_ == 0 || bits_left() < 8);  // no byte that nobody asks for
  const int64_t done = static_cast<int64_t>(segments_) * file_.segment_mcus;
  mcus_left_ = std::min(file_.segment_mcus, file_.mcus_across * file_.mcus_down - done) - 1;
  bits_ = JpegBits(file_.bits.get() + file_.segments[segments_++].begin);
  predictions_ = {};
}

void JpegRows::advance() {
  if (mcu_rows_ > 0) {
    for (Plane& plane : planes_) std::copy_n(plane.row(plane.height - 1), plane.stride, plane.row(-1));
  }
  bool is_valid = false;
  run<DecodeMcus>(isa_, this, &is_valid);
  require(is_valid);
  // Above the first row of chroma and below the last stands that row again.
  for (Plane& plane : planes_) {
    if (mcu_rows_ == 0) std::copy_n(plane.row(0), plane.stride, plane.row(-1));
  }
  if (++mcu_rows_ < file_.mcus_down) return;
  require(bits_left() < 8);
  const int64_t rows = file_.height - (mcu_rows_ - 1) * mcu_height(),
                chroma_rows = (rows + file_.down - 1) / file_.down;
  for (size_t c = 1; c < planes_.size(); ++c) {
    std::copy_n(planes_[c].row(chroma_rows - 1), planes_[c].stride, planes_[c].row(chroma_rows));
  }
}

int64_t JpegRows::ready() const {
  if (mcu_rows_ == file_.mcus_down) return file_.height;
  const int64_t lag = file_.down - 1;
  return std::max<int64_t>(0, mcu_rows_ * mcu_height() - lag);
}

void JpegRows::write(int64_t y, uint8_t* rgb) { run<WriteRow>(isa_, this, y - (mcu_rows_ - 1) * mcu_height(), rgb); }

}  // namespace rtp_mm
