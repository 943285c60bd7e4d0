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
#include <numeric>

#include "cpu/patch_rows.h"
#include "cpu/resize_kernels.h"
#include "cpu/resize_plan.h"

namespace rtp_mm {
namespace {

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

// Pixels where they lie, or, where that would leave the image's memory, copies of their rows.
class PixelSource : public RowSource {
 public:
  PixelSource(const PixelView& image, Buffer& edge)
      : RowSource(image.height, image.width, image.pixel_stride), image_(image), edge_(edge) {}

  Rows rows(int64_t begin, int64_t count, int64_t reach) override {
    const uint8_t* start = image_.pixels + begin * image_.row_stride;
    const int64_t row_bytes = (width - 1) * pixel_stride + kChannels;
    const int64_t memory = (height - 1 - begin) * image_.row_stride + row_bytes;
    if (begin + count <= height && (count - 1) * image_.row_stride + reach <= memory) {
      return {start, image_.row_stride};
    }
    uint8_t* copy = edge_.reserve<uint8_t>(count * reach);
    for (int64_t row = 0; row < count; ++row) {
      const uint8_t* src = start + std::min(row, height - 1 - begin) * image_.row_stride;
      std::memset(std::copy_n(src, row_bytes, copy + row * reach), 0, reach - row_bytes);
    }
    return {copy, reach};
  }

 private:
  const PixelView& image_;
  Buffer& edge_;
};

// Quads of rows, of which the last few are kept.
class Ring {
 public:
  // Keeps `quads` of `dwords` and more, whole bands of them.
  Ring(int64_t quads, int64_t dwords, Buffer& memory, Buffer& pointers)
      : slots_(round_up(quads, kBandQuads)),
        dwords_(dwords),
        quads_(memory.reserve<uint32_t>(slots_ * dwords)),
        pointers_(pointers.reserve<const uint32_t*>(slots_ + 1)) {}

  uint32_t* slot(int64_t quad) const { return quads_ + quad % slots_ * dwords_; }

  // These quads and the one after them, which is read where a mask leaves it out, from dword `offset` of their rows on.
  const uint32_t* const* pointers(QuadRange quads, int64_t offset = 0) const {
    const uint32_t *pointer = slot(quads.begin), *end = quads_ + slots_ * dwords_;
    for (int64_t i = 0; i <= quads.size(); ++i) {
      pointers_[i] = pointer + offset;
      pointer += dwords_;
      if (pointer == end) pointer = quads_;
    }
    return pointers_;
  }

 private:
  int64_t slots_, dwords_;
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

  // Fetches `ahead` meanwhile; without one, what the next run reads: an image's rows lie one band after another. Blocks
  // fetch nothing: the processor follows their rows by itself, and a band of them, fetched by the way, cost 10 % of 4K
  // native.
  void operator()(Rows rows, QuadRows dst, Ahead* ahead = nullptr) const {
    if (pixel_stride_ == kChannels && !axis_.blocks.empty()) {
      kernels_.horizontal_blocks(rows.pixels, rows.stride, axis_.blocks.data(),
                                 static_cast<int64_t>(axis_.blocks.size()), axis_.block_taps.data(), dst);
      return;
    }
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
  const int64_t run = dst.merge * dst.row_bytes(), columns = dst.width / dst.patch;
  return {Ahead::kWrite, PatchWalk(dst, patch_row, 0, columns).patch(0), run, dst.merge * run, columns / dst.merge,
          steps};
}

// The way from whole rows to patches: strip by strip, so that what a strip's rows have in common stays in L1. Whole
// rows took 9 % longer of 4K native.
class Strips {
 public:
  Strips(const PatchRows& dst, int64_t plane, int64_t rows, Buffer& lines)
      : dst_(dst),
        plane_(plane),
        line_(std::min(plane, round_up(kStrip, std::lcm(dst.patch, kBlock)))),
        lines_(lines.reserve<uint8_t>(rows * line_ + kReadAhead)) {}

  // `make_lines(place, blocks, lines, line)` makes a strip's lines and returns the patches' first one; `place`: the
  // strip's within a row of planes.
  template <class MakeLines>
  void cut(const ResizeKernels& kernels, int64_t patch_row, MakeLines make_lines) const {
    for (int64_t x = 0; x < plane_; x += line_) {
      const PatchWalk walk(dst_, patch_row, x / dst_.patch, std::min(x + line_, dst_.width) / dst_.patch);
      for (int64_t channel = 0; channel < kChannels; ++channel) {
        const uint8_t* first = make_lines(channel * plane_ + x, std::min(line_, plane_ - x) / kBlock, lines_, line_);
        kernels.cut(first, line_, channel, walk);
      }
    }
  }

 private:
  static constexpr int64_t kStrip = 448;  // bytes: 6 KB of lines of 14 rows, and 9 KB of quads near 1:1

  const PatchRows& dst_;
  int64_t plane_, line_;
  uint8_t* lines_;
};

void horizontal_first(RowSource& image, const Passes& passes, const PatchRows& dst, int64_t height, Scratch& scratch) {
  const int64_t plane = round_up(dst.width, kBlock), row = kChannels * plane;
  const Ring ring(passes.rows.span(dst.patch) + kBandQuads - 1, row, scratch.ring, scratch.ring_pointers);
  const HorizontalPass horizontal(passes.columns, passes.kernels, image.pixel_stride, scratch);
  const Strips strips(dst, plane, dst.patch, scratch.lines);
  const int64_t reach = image.width * image.pixel_stride + kReadAhead;
  int64_t ready = 0;  // quads in the ring so far
  for (int64_t patch_row = 0; patch_row < height / dst.patch; ++patch_row) {
    const int64_t top = patch_row * dst.patch;
    const QuadRange quads = passes.rows.needed_by(top, top + dst.patch);
    for (; ready < quads.end; ready += kBandQuads) {
      const Rows rows = image.rows(ready * 4, kBandRows, reach);
      horizontal(rows, {ring.slot(ready), row, plane});
    }
    Ahead patches = patches_ahead(dst, std::min(patch_row + 1, height / dst.patch - 1), dst.patch * row / kBlock);
    strips.cut(passes.kernels, patch_row, [&](int64_t place, int64_t blocks, uint8_t* lines, int64_t line) {
      const uint32_t* const* pointers = ring.pointers(quads, place);
      for (int64_t y = 0; y < dst.patch; ++y) {
        const OutputTaps& output = passes.rows.outputs[top + y];
        passes.kernels.vertical(pointers + output.first - quads.begin, output, passes.rows.taps.data(), blocks,
                                lines + y * line, patches);
      }
      return lines;
    });
  }
}

void vertical_first(RowSource& image, const Passes& passes, const PatchRows& dst, int64_t height, Scratch& scratch) {
  const int64_t plane = round_up(dst.width, kBlock), resized_row = kChannels * plane;
  const int64_t row = round_up(image.width * image.pixel_stride, kBlock), band_row = row + kBlock;
  const Ring ring(passes.rows.span(1), row, scratch.ring, scratch.ring_pointers);
  const int64_t patch_quads = (dst.patch + 6) / 4;  // that a row of patches touches
  const Ring resized(patch_quads + kBandQuads, resized_row, scratch.resized, scratch.resized_pointers);
  uint8_t* band = scratch.band.reserve<uint8_t>(kBandRows * band_row);
  const HorizontalPass horizontal(passes.columns, passes.kernels, image.pixel_stride, scratch);
  const Strips strips(dst, plane, 4 * patch_quads, scratch.lines);
  int64_t ready = 0, patch_row = 0;  // quads in the ring so far, rows of patches
  Rows rows{};                       // those that were read last
  for (int64_t top = 0; top < height; top += kBandRows) {
    const int64_t bottom = std::min(top + kBandRows, height);
    Ahead patches = patches_ahead(dst, patch_row, (bottom - top) * row / kBlock);
    for (int64_t y = top; y < bottom; ++y) {
      const OutputTaps& output = passes.rows.outputs[y];
      for (; ready < quads_of(output).end; ++ready) {
        rows = image.rows(ready * 4, 4, row);
        passes.kernels.interleave(rows.pixels, rows.stride, row / kBlock, ring.slot(ready));
      }
      passes.kernels.vertical(ring.pointers(quads_of(output)), output, passes.rows.taps.data(), row / kBlock,
                              band + (y - top) * band_row, patches);
    }
    Ahead next_rows(Ahead::kRead, rows.pixels + 4 * rows.stride, image.width * image.pixel_stride, rows.stride,
                    kBandRows, static_cast<int64_t>(passes.columns.outputs.size()) / 4);
    horizontal({band, band_row}, {resized.slot(top / 4), resized_row, plane}, &next_rows);
    for (; (patch_row + 1) * dst.patch <= bottom; ++patch_row) {
      const int64_t begin = patch_row * dst.patch, first = begin / 4;
      strips.cut(passes.kernels, patch_row, [&](int64_t place, int64_t blocks, uint8_t* lines, int64_t line) {
        for (int64_t quad = first; 4 * quad < begin + dst.patch; ++quad) {
          passes.kernels.separate(resized.slot(quad) + place, blocks, lines + 4 * (quad - first) * line, line);
        }
        return lines + begin % 4 * line;
      });
    }
  }
}

// At the end of a resize, however it ends: a source may throw.
struct Shrinking {
  Scratch& scratch;
  ~Shrinking() { scratch.shrink(); }
};

Scratch& scratch_of_thread() {
  static thread_local Scratch scratch;
  return scratch;
}

}  // namespace

void resize_patchify(RowSource& image, const ResizePatchify& job, uint8_t* rows) {
  Scratch& scratch = scratch_of_thread();
  const Shrinking shrinking{scratch};
  const auto columns_axis = resize_axis(image.width, job.width, true, job.filter, job.level);
  const auto rows_axis = resize_axis(image.height, job.height, false, job.filter, job.level);
  const Passes passes{*columns_axis, *rows_axis, resize_kernels(job.level)};
  const PatchRows dst{rows, job.width, job.patch, job.merge, job.temporal, job.slot};
  (job.is_vertical_first ? vertical_first : horizontal_first)(image, passes, dst, job.height, scratch);
}

void resize_patchify(const PixelView& image, const ResizePatchify& job, uint8_t* rows) {
  PixelSource source(image, scratch_of_thread().edge);
  resize_patchify(source, job, rows);
}

}  // namespace rtp_mm
