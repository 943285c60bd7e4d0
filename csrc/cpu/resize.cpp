// The way of the rows through both passes, in either order, all of it within L2:
//
//   horizontal first   16 source rows -> columns -> quads of rows (ring) -> lines -> patches
//   vertical first     4 source rows -> quads of rows (ring) -> 16 resized rows -> columns -> quads -> lines -> patches

#include "cpu/resize.h"

#include <algorithm>
#include <bit>
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
  Buffer ring, ring_pointers, columns, band, resized, resized_pointers, lines, edge;

  void shrink() {
    Buffer* const buffers[] = {&ring, &ring_pointers, &columns, &band, &resized, &resized_pointers, &lines, &edge};
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
  // Keeps `slots` quads of `dwords` or more; the outputs that come from them touch up to `most_quads` at once.
  Ring(int64_t slots, int64_t dwords, int64_t most_quads, Buffer& quads, Buffer& pointers)
      : slots_(static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(slots)))),
        dwords_(dwords),
        quads_(quads.reserve<uint32_t>(slots_ * dwords)),
        pointers_(pointers.reserve<const uint32_t*>(most_quads)) {}

  uint32_t* slot(int64_t quad) const { return quads_ + (quad & (slots_ - 1)) * dwords_; }

  // The quads of an output, one after the other.
  const uint32_t* const* quads_of(const OutputTaps& output) const {
    for (int32_t i = 0; i <= output.count; ++i) pointers_[i] = slot(output.first + i);
    return pointers_;
  }

 private:
  int64_t slots_, dwords_;  // slots: a power of 2, because a division per row showed
  uint32_t* quads_;
  const uint32_t** pointers_;
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

  // Fetches `ahead` meanwhile; without one, what the next run reads: the rows are an image's own, one band after
  // another.
  void operator()(Rows rows, QuadRows dst, Ahead* ahead = nullptr) const {
    const uint8_t* next_pixels = rows.pixels;
    for (size_t i = 0; i < axis_.runs.size(); ++i) {
      const OutputRun& run = axis_.runs[i];
      if (i + 1 == axis_.runs.size()) next_pixels += kBandRows * rows.stride;
      const OutputRun& next = axis_.runs[(i + 1) % axis_.runs.size()];
      Ahead next_run(Ahead::kRead, next_pixels + next.first_quad * 4 * pixel_stride_,
                     (next.end_quad - next.first_quad) * 4 * pixel_stride_, rows.stride, kBandRows,
                     (run.end - run.begin) / 4);
      kernels_.gather_columns(rows.pixels + run.first_quad * 4 * pixel_stride_, rows.stride, pixel_stride_,
                              run.end_quad - run.first_quad, columns_);
      kernels_.horizontal(columns_, run.first_quad, axis_.outputs.data(), axis_.taps.data(), run.begin, run.end, dst,
                          ahead ? *ahead : next_run);
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

// What row `patch_row` of patches is written to.
Ahead patches_ahead(const PatchRows& dst, int64_t patch_row, int64_t steps) {
  const int64_t run = dst.merge * dst.row_bytes(), blocks = dst.width / dst.patch / dst.merge;
  return {Ahead::kWrite, PatchWalk(dst, patch_row).patch(0), run, dst.merge * run, blocks, steps};
}

void horizontal_first(const PixelView& image, const Passes& passes, const PatchRows& dst, int64_t height,
                      Scratch& scratch) {
  const int64_t plane = round_up(dst.width, 4), line = round_up(kChannels * plane, kBlock);
  const Ring ring(passes.rows.span + kBandQuads - 1, line, passes.rows.most_quads, scratch.ring, scratch.ring_pointers);
  const HorizontalPass horizontal(passes.columns, passes.kernels, image.pixel_stride, scratch);
  const int64_t reach = image.width * image.pixel_stride + kReadAhead;
  uint8_t* lines = scratch.lines.reserve<uint8_t>(dst.patch * line + kReadAhead);
  int64_t ready = 0;  // quads in the ring so far
  for (int64_t patch_row = 0; patch_row < height / dst.patch; ++patch_row) {
    Ahead patches = patches_ahead(dst, patch_row, dst.patch * line / kBlock);
    for (int64_t y = 0; y < dst.patch; ++y) {
      const OutputTaps& output = passes.rows.outputs[patch_row * dst.patch + y];
      for (; ready <= last_quad(output); ready += kBandQuads) {
        const Rows rows = readable_rows(image, ready * 4, kBandRows, reach, scratch.edge);
        horizontal(rows, {ring.slot(ready), line, plane});
      }
      passes.kernels.vertical(ring.quads_of(output), output, passes.rows.taps.data(), line / kBlock, lines + y * line,
                              patches);
    }
    passes.kernels.cut(lines, line, plane, patch_row, dst);
  }
}

void vertical_first(const PixelView& image, const Passes& passes, const PatchRows& dst, int64_t height,
                    Scratch& scratch) {
  const int64_t plane = round_up(dst.width, 4), line = round_up(kChannels * plane, kBlock);
  const int64_t row = round_up(image.width * image.pixel_stride, kBlock), band_row = row + kBlock;
  const Ring ring(passes.rows.span, row, passes.rows.most_quads, scratch.ring, scratch.ring_pointers);
  const int64_t patch_quads = (dst.patch + 6) / 4;  // that a row of patches touches
  const Ring resized(patch_quads + kBandQuads, line, 0, scratch.resized, scratch.ring_pointers);
  uint8_t* band = scratch.band.reserve<uint8_t>(kBandRows * band_row);
  uint8_t* lines = scratch.lines.reserve<uint8_t>(4 * patch_quads * line + kReadAhead);
  const HorizontalPass horizontal(passes.columns, passes.kernels, image.pixel_stride, scratch);
  int64_t ready = 0, patch_row = 0;  // quads in the ring so far, rows of patches
  for (int64_t top = 0; top < height; top += kBandRows) {
    const int64_t bottom = std::min(top + kBandRows, height);
    Ahead patches = patches_ahead(dst, patch_row, (bottom - top) * row / kBlock);
    for (int64_t y = top; y < bottom; ++y) {
      const OutputTaps& output = passes.rows.outputs[y];
      for (; ready <= last_quad(output); ++ready) {
        const Rows rows = readable_rows(image, ready * 4, 4, row, scratch.edge);
        passes.kernels.interleave(rows.pixels, rows.stride, row / kBlock, ring.slot(ready));
      }
      passes.kernels.vertical(ring.quads_of(output), output, passes.rows.taps.data(), row / kBlock,
                              band + (y - top) * band_row, patches);
    }
    Ahead next_rows(Ahead::kRead, image.pixels + 4 * ready * image.row_stride, image.width * image.pixel_stride,
                    image.row_stride, kBandRows, static_cast<int64_t>(passes.columns.outputs.size()) / 4);
    horizontal({band, band_row}, {resized.slot(top / 4), line, plane}, &next_rows);
    for (; (patch_row + 1) * dst.patch <= bottom; ++patch_row) {
      const int64_t begin = patch_row * dst.patch, first = begin / 4;
      for (int64_t quad = first; 4 * quad < begin + dst.patch; ++quad) {
        passes.kernels.separate(resized.slot(quad), line / kBlock, lines + 4 * (quad - first) * line, line);
      }
      passes.kernels.cut(lines + begin % 4 * line, line, plane, patch_row, dst);
    }
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
