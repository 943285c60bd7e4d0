#include "cpu/jpeg_rows.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "cpu/jpeg_color.h"
#include "cpu/jpeg_scan.h"

namespace rtp_mm {

// A row of MCUs, four at a time. False where it is broken or uncertain.
struct DecodeMcus {
  template <class Arch>
  RTP_MM_INLINE static void run(JpegRows* rows, bool* is_valid) {
    const JpegFile& file = rows->file_;
    const int count = file.components(), across = static_cast<int>(file.across), down = static_cast<int>(file.down);
    const int luma = across * down;  // blocks in an MCU, and quads in four
    Quad quads[kMostQuads];
    Shorts<Arch> over{};
    bool is_good = true;
    for (int64_t first = 0; first < file.mcus_across && is_good; first += kQuadBlocks) {
      const auto mcus = static_cast<int>(std::min<int64_t>(kQuadBlocks, file.mcus_across - first));
      if (!rows->coefficients_) is_good = read_quads(*rows, mcus, quads);
      for (int i = 0; i < luma + count - 1; ++i) {
        const int c = std::max(0, i - luma + 1), v = c ? 0 : i / across, q = c ? 0 : i % across;
        const int64_t quads_across = c ? 1 : across, quad = first / kQuadBlocks * quads_across + q;
        JpegRows::Plane& plane = rows->planes_[c];
        const int64_t row = rows->mcu_rows_ * (c ? 1 : down) + v;  // of blocks
        const Quad& coefficients = rows->coefficients_ ? rows->coefficients_->quad(c, row, quad) : quads[i];
        over |= idct_quad<Arch>(coefficients, plane.steps, plane.row(8 * v) + 8 * kQuadBlocks * quad, plane.stride);
      }
    }
    int16_t elements[sizeof(over) / 2];
    std::memcpy(elements, &over, sizeof(over));
    for (const int16_t element : elements) is_good &= element >= 0;
    *is_valid = is_good;
  }

 private:
  static constexpr int kMostQuads = 6;

  RTP_MM_INLINE static bool read_quads(JpegRows& rows, int mcus, Quad* quads) {
    const JpegFile& file = rows.file_;
    const JpegScan& scan = file.scans[0];
    const int count = file.components(), across = static_cast<int>(file.across);
    const int luma = across * static_cast<int>(file.down);
    std::memset(quads, 0, (luma + count - 1) * sizeof(quads[0]));
    bool is_good = true;
    for (int mcu = 0; mcu < mcus && is_good; ++mcu) {
      if (rows.reader_.next_mcu()) rows.predictions_ = {};
      JpegBits bits = rows.reader_.bits;  // in registers
      for (int block = 0; block < luma; ++block) {
        const int column = mcu * across + block % across, quad = block / across * across + column / kQuadBlocks;
        is_good &= read_block(bits, *scan.dc[0], *scan.ac[0], rows.predictions_[0],
                              quads[quad].at + 8 * (column % kQuadBlocks));
      }
      for (int c = 1; c < count; ++c) {
        is_good &= read_block(bits, *scan.dc[c], *scan.ac[c], rows.predictions_[c], quads[luma + c - 1].at + 8 * mcu);
      }
      rows.reader_.bits = bits;
      is_good &= rows.reader_.is_within();
    }
    return is_good;
  }
};

// A row of the last row of MCUs, counted from its top, or the one above.
struct WriteRow {
  template <class Arch>
  RTP_MM_INLINE static void run(JpegRows* rows, int64_t y, uint8_t* rgb) {
    const JpegFile& file = rows->file_;
    const uint8_t* luma = rows->planes_[0].row(y);
    if (file.components() == 1) {
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

JpegRows::JpegRows(const JpegFile& file, Isa isa)
    : file_(file),
      isa_(isa),
      planes_(file.components()),
      reader_(file, file.scans[0], file.mcus_across * file.mcus_down) {
  if (file.is_progressive) coefficients_.emplace(file, isa);
  const int64_t mcus = (file.mcus_across + kQuadBlocks - 1) / kQuadBlocks * kQuadBlocks;  // whole quads are written
  for (size_t c = 0; c < planes_.size(); ++c) {
    Plane& plane = planes_[c];
    plane.stride = 8 * mcus * (c == 0 ? file.across : 1) + kVectorMargin;
    plane.height = c == 0 ? mcu_height() : 8;
    plane.samples.resize((plane.height + 2) * plane.stride);
    for (int i = 0; i < 64; ++i) {
      const int16_t step = file.steps[c][i];
      for (int block = 0; block < kQuadBlocks; ++block) {
        plane.steps.steps[quad_place(i) + 8 * block] = step;
        plane.steps.limits[quad_place(i) + 8 * block] = kMostInColumn / step;
      }
    }
  }
  sums_.resize(8 * mcus + 2);
  for (std::vector<uint8_t>& row : upsampled_) row.resize(8 * mcus * file.across + kVectorMargin);
}

void JpegRows::advance() {
  if (mcu_rows_ > 0) {
    for (Plane& plane : planes_) std::copy_n(plane.row(plane.height - 1), plane.stride, plane.row(-1));
  }
  bool is_valid = false;
  run<DecodeMcus>(isa_, this, &is_valid);
  require(is_valid);
  // Above the first row of chroma and below the last stands that row again.
  if (mcu_rows_ == 0) {
    for (Plane& plane : planes_) std::copy_n(plane.row(0), plane.stride, plane.row(-1));
  }
  if (++mcu_rows_ < file_.mcus_down) return;
  if (!coefficients_) reader_.finish();
  const int64_t rows = file_.height - (mcu_rows_ - 1) * mcu_height();
  const int64_t chroma_rows = (rows + file_.down - 1) / file_.down;
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
