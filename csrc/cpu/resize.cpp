// The way of the rows through both passes, in either order, all of it within L2:
//
//   horizontal first   16 source rows -> columns -> quads of rows (ring) -> lines -> patches
//   vertical first     4 source rows -> quads of rows (ring) -> 16 resized rows -> columns -> quads -> lines -> patches

#include "cpu/resize.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#include "cpu/patch_rows.h"
#include "cpu/resize_kernels.h"
#include "cpu/resize_plan.h"

namespace rtp_mm {
namespace {

constexpr int64_t kReadAhead = 16;          // bytes past a row that gather_columns reads
constexpr int64_t kKeptScratch = 32 << 20;  // bytes that a thread keeps between calls

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// A reusable block of memory, aligned to cache lines.
class Buffer {
 public:
  template <class T>
  T* reserve(int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    if (bytes > bytes_) {
      release();
      memory_.reset(static_cast<uint8_t*>(::operator new(bytes, kAlignment)));
      bytes_ = bytes;
    }
    return reinterpret_cast<T*>(memory_.get());
  }

  void release() {
    memory_.reset();
    bytes_ = 0;
  }

  int64_t bytes() const { return bytes_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(uint8_t* memory) const { ::operator delete(memory, kAlignment); }
  };
  std::unique_ptr<uint8_t, Delete> memory_;
  int64_t bytes_ = 0;
};

struct Scratch {
  Buffer ring, ring_pointers, columns, band, quads, lines, line_pointers, edge;

  void shrink() {
    Buffer* const buffers[] = {&ring, &ring_pointers, &columns, &band, &quads, &lines, &line_pointers, &edge};
    int64_t bytes = 0;
    for (const Buffer* buffer : buffers) bytes += buffer->bytes();
    if (bytes > kKeptScratch) {
      for (Buffer* buffer : buffers) buffer->release();
    }
  }
};

// Rows that a kernel may read past their ends.
struct Rows {
  const uint8_t* pixels;
  int64_t stride;
};

// Source rows [begin, begin + count), each readable for `reach` bytes, at least its own: in place, or, where that would
// leave the image's memory, as a copy. Rows below the image repeat its last.
Rows readable_rows(const PixelView& image, int64_t begin, int64_t count, int64_t reach, Buffer& edge) {
  const uint8_t* start = image.pixels + begin * image.row_stride;
  const int64_t row_bytes = (image.width - 1) * image.pixel_stride + kChannels;
  const int64_t memory = (image.height - 1 - begin) * image.row_stride + row_bytes;
  if (begin + count <= image.height && (count - 1) * image.row_stride + reach <= memory) {
    return {start, image.row_stride};
  }
  uint8_t* copy = edge.reserve<uint8_t>(count * reach);
  for (int64_t row = 0; row < count; ++row) {
    const uint8_t* src = start + std::min(row, image.height - 1 - begin) * image.row_stride;
    std::memset(std::copy_n(src, row_bytes, copy + row * reach), 0, reach - row_bytes);
  }
  return {copy, reach};
}

// Quads of rows, of which the last few are kept.
class Ring {
 public:
  Ring(int64_t slots, int64_t dwords, int64_t most_quads, Scratch& scratch)
      : quads_(scratch.ring.reserve<uint32_t>(slots * dwords)),
        pointers_(scratch.ring_pointers.reserve<const uint32_t*>(most_quads)),
        slots_(slots),
        dwords_(dwords) {}

  uint32_t* slot(int64_t quad) const { return quads_ + quad % slots_ * dwords_; }

  // The quads of an output, one after the other.
  const uint32_t* const* quads_of(const OutputTaps& output) const {
    for (int32_t i = 0; i <= output.count; ++i) pointers_[i] = slot(output.first + i);
    return pointers_;
  }

 private:
  uint32_t* quads_;
  const uint32_t** pointers_;
  int64_t slots_, dwords_;
};

// Finished lines, three planes each, until a row of patches is complete.
class Lines {
 public:
  Lines(int64_t capacity, int64_t stride, int64_t plane, const PatchRows& dst, Scratch& scratch)
      : memory_(scratch.lines.reserve<uint8_t>(capacity * stride + kReadAhead)),
        pointers_(scratch.line_pointers.reserve<const uint8_t*>(dst.patch)),
        capacity_(capacity),
        stride_(stride),
        plane_(plane),
        dst_(dst) {}

  uint8_t* line(int64_t y) const { return memory_ + y % capacity_ * stride_; }

  // Lines below `end` are there: cuts the rows of patches that they complete.
  void cut_until(int64_t end) {
    for (; (cut_ + 1) * dst_.patch <= end; ++cut_) {
      for (int64_t y = 0; y < dst_.patch; ++y) pointers_[y] = line(cut_ * dst_.patch + y);
      cut_patches(pointers_, plane_, cut_, dst_);
    }
  }

 private:
  uint8_t* memory_;
  const uint8_t** pointers_;
  int64_t capacity_, stride_, plane_;
  PatchRows dst_;
  int64_t cut_ = 0;  // rows of patches
};

// The horizontal pass over a band of 16 rows.
class HorizontalPass {
 public:
  HorizontalPass(const ResizeAxis& axis, const ResizeKernels& kernels, int64_t pixel_stride, Scratch& scratch)
      : axis_(axis), kernels_(kernels), pixel_stride_(pixel_stride) {
    int64_t most = 0;
    for (const OutputRun& run : axis.runs) most = std::max(most, run.end_quad - run.first_quad);
    columns_ = scratch.columns.reserve<uint32_t>((most + 1) * kChannels * kBandRows);  // + 1: read, never counted
  }

  void operator()(Rows rows, QuadRows dst) const {
    for (const OutputRun& run : axis_.runs) {
      kernels_.gather_columns(rows.pixels + run.first_quad * 4 * pixel_stride_, rows.stride, pixel_stride_,
                              run.end_quad - run.first_quad, columns_);
      kernels_.horizontal(columns_, run.first_quad, axis_.outputs.data(), axis_.taps.data(), run.begin, run.end, dst);
    }
  }

 private:
  const ResizeAxis& axis_;
  const ResizeKernels& kernels_;
  int64_t pixel_stride_;
  uint32_t* columns_;
};

struct Passes {
  const ResizeAxis &columns, &rows;
  const ResizeKernels& kernels;
};

void horizontal_first(const PixelView& image, const Passes& passes, const PatchRows& dst, int64_t height,
                      Scratch& scratch) {
  const int64_t plane = round_up(dst.width, 4), line = round_up(kChannels * plane, kBlock);
  const Ring ring(round_up(passes.rows.span + kBandQuads - 1, kBandQuads), line, passes.rows.most_quads, scratch);
  const HorizontalPass horizontal(passes.columns, passes.kernels, image.pixel_stride, scratch);
  const int64_t reach = image.width * image.pixel_stride + kReadAhead;
  Lines lines(dst.patch, line, plane, dst, scratch);
  int64_t quads = 0;  // in the ring so far
  for (int64_t y = 0; y < height; ++y) {
    const OutputTaps& output = passes.rows.outputs[y];
    for (; quads <= last_quad(output); quads += kBandQuads) {
      const Rows rows = readable_rows(image, quads * 4, kBandRows, reach, scratch.edge);
      horizontal(rows, {ring.slot(quads), line, plane});
    }
    passes.kernels.vertical(ring.quads_of(output), output, passes.rows.taps.data(), line / kBlock, lines.line(y));
    lines.cut_until(y + 1);
  }
}

void vertical_first(const PixelView& image, const Passes& passes, const PatchRows& dst, int64_t height,
                    Scratch& scratch) {
  const int64_t plane = round_up(dst.width, 4), line = round_up(kChannels * plane, kBlock);
  const int64_t row = round_up(image.width * image.pixel_stride, kBlock), band_row = row + kBlock;
  const Ring ring(passes.rows.span, row, passes.rows.most_quads, scratch);
  uint8_t* band = scratch.band.reserve<uint8_t>(kBandRows * band_row);
  uint32_t* quads = scratch.quads.reserve<uint32_t>(kBandQuads * line);
  const HorizontalPass horizontal(passes.columns, passes.kernels, image.pixel_stride, scratch);
  Lines lines(round_up(dst.patch + kBandRows, kBandRows), line, plane, dst, scratch);
  int64_t ready = 0;  // quads in the ring so far
  for (int64_t top = 0; top < height; top += kBandRows) {
    const int64_t bottom = std::min(top + kBandRows, height);
    for (int64_t y = top; y < bottom; ++y) {
      const OutputTaps& output = passes.rows.outputs[y];
      for (; ready <= last_quad(output); ++ready) {
        const Rows rows = readable_rows(image, ready * 4, 4, row, scratch.edge);
        passes.kernels.interleave(rows.pixels, rows.stride, row / kBlock, ring.slot(ready));
      }
      passes.kernels.vertical(ring.quads_of(output), output, passes.rows.taps.data(), row / kBlock,
                              band + (y - top) * band_row);
    }
    horizontal({band, band_row}, {quads, line, plane});
    for (int64_t quad = 0; quad < kBandQuads; ++quad) {
      passes.kernels.separate(quads + quad * line, line / kBlock, lines.line(top + 4 * quad), line);
    }
    lines.cut_until(bottom);
  }
}

}  // namespace

void resize_patchify(const PixelView& image, const ResizePatchify& job, uint8_t* rows) {
  static thread_local Scratch scratch;
  const auto columns_axis = resize_axis(image.width, job.width, job.filter, job.level);
  const auto rows_axis = resize_axis(image.height, job.height, job.filter, job.level);
  const Passes passes{*columns_axis, *rows_axis, resize_kernels(job.level)};
  const PatchRows dst{rows, job.width, job.patch, job.merge, job.temporal, job.slot};
  (job.is_vertical_first ? vertical_first : horizontal_first)(image, passes, dst, job.height, scratch);
  scratch.shrink();
}

}  // namespace rtp_mm
