// Pillow's resize in its two rounded passes, cut into patches, in one launch and with no intermediate image.
//
// A block makes a tile of whole patches. It walks the source in bands along the axis of the second pass: the first pass
// of a band goes to shared memory, rounded to bytes, and the second pass adds the band to integer sums in registers. So
// shared memory does not grow with the scale, and integers come out the same in any order.
//
// "First" and "second" name the passes' axes: columns and rows where the horizontal pass comes first, else the reverse.

#include <algorithm>
#include <tuple>
#include <utility>

#include "cuda/resize_patchify.h"
#include "merge_order.h"
#include "shared_cache.h"

namespace rtp_mm {
namespace {

constexpr int kThreads = 256;
constexpr int kTileRows = 32, kTileColumns = 64;            // pixels at most; a patch of 14 or 16 fills 28 or 32 rows
constexpr int kTileBytes = 3 * kTileRows * kTileColumns;    // 6 KB, of the tile and of a band in front of it
constexpr int kQuadsPerThread = kTileBytes / 4 / kThreads;  // a thread sums up four neighbours at once
constexpr int kManyTiles = 128;                             // about as many as there are SMs
constexpr int kHalf = 1 << (kFractionBits - 1);
constexpr int64_t kCacheBytes = 16 << 20;
static_assert(kTileRows >= kLargestCudaPatch && kQuadsPerThread * 4 * kThreads == kTileBytes);

struct Window {
  int first, count;
  const int32_t* taps;
  int stride;  // from one to the next

  __device__ int tap(int i) const { return taps[i * stride]; }
};

struct Axis {
  const int32_t *outputs, *taps;
  int size;  // outputs

  __device__ Window operator[](int output) const {
    const int32_t* entry = outputs + 3 * output;
    return {entry[0], entry[1], taps + entry[2], size};
  }
};

__device__ uint8_t to_byte(int sum) {
  const int value = sum >> kFractionBits;
  return static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
}

// One pass's part in a tile.
struct Side {
  Axis axis;
  int begin, length;  // of the tile, in output pixels
  int64_t stride;     // bytes from one source pixel to the next
};

// The first pass over source positions [begin, begin + count) of the second axis: lines[position][first axis, channel].
// Neighbouring threads read neighbouring pixels of a row.
template <bool kIsVerticalFirst, int kPitch>
__device__ void first_pass(const uint8_t* frame, const Side& first, const Side& second, int begin, int count,
                           uint8_t* lines) {
  for (int i = threadIdx.x; i < count * first.length; i += kThreads) {
    const int position = kIsVerticalFirst ? i % count : i / first.length;
    const int output = kIsVerticalFirst ? i / count : i % first.length;
    const Window window = first.axis[first.begin + output];
    const uint8_t* pixel = frame + window.first * first.stride + (begin + position) * second.stride;
    int sums[3] = {kHalf, kHalf, kHalf};
    for (int tap = 0; tap < window.count; ++tap, pixel += first.stride) {
      const int weight = window.tap(tap);
#pragma unroll
      for (int channel = 0; channel < 3; ++channel) sums[channel] += weight * pixel[channel];
    }
#pragma unroll
    for (int channel = 0; channel < 3; ++channel)
      lines[position * kPitch + 3 * output + channel] = to_byte(sums[channel]);
  }
}

// Adds the band's part of the second pass to the sums of this thread's quads.
template <int kPitch>
__device__ void second_pass(const Side& second, int quads, int begin, int count, const uint8_t* lines,
                            int (&sums)[kQuadsPerThread][4]) {
#pragma unroll
  for (int j = 0; j < kQuadsPerThread; ++j) {
    const int i = threadIdx.x + j * kThreads;
    if (i >= second.length * quads) break;
    const Window window = second.axis[second.begin + i / quads];
    const int from = max(window.first, begin), to = min(window.first + window.count, begin + count);
    for (int position = from; position < to; ++position) {
      const int weight = window.tap(position - window.first);
      const uint32_t bytes = *reinterpret_cast<const uint32_t*>(lines + (position - begin) * kPitch + i % quads * 4);
#pragma unroll
      for (int byte = 0; byte < 4; ++byte) sums[j][byte] += weight * static_cast<int>(bytes >> 8 * byte & 255);
    }
  }
}

struct Tile {
  int frame, top, left, height, width;  // pixels
};

// Writes a tile [second axis][first axis, channel] as patches, kBytes at a time.
template <bool kIsVerticalFirst, int kPitch, int kBytes>
__device__ void write_patches(const CudaResizePatchify& job, const Tile& tile, const uint8_t* bytes, uint8_t* rows) {
  const int patch = job.patch, area = patch * patch, pieces = area / kBytes;
  const int across = tile.width / patch, patches = tile.height / patch * across;
  const int columns = job.width / patch, clip = tile.frame / job.temporal, slot = tile.frame % job.temporal;
  uint8_t* first = rows + int64_t{clip} * (job.height / patch) * columns * 3 * job.temporal * area;
  for (int i = threadIdx.x; i < patches * 3 * pieces; i += kThreads) {
    const int cut = i / pieces / 3, channel = i / pieces % 3, begin = i % pieces * kBytes;
    const int top = cut / across * patch, left = cut % across * patch;
    uint8_t piece[kBytes];
#pragma unroll
    for (int byte = 0; byte < kBytes; ++byte) {
      const int y = top + (begin + byte) / patch, x = left + (begin + byte) % patch;
      piece[byte] = bytes[(kIsVerticalFirst ? x : y) * kPitch + 3 * (kIsVerticalFirst ? y : x) + channel];
    }
    const int row = merge_order((tile.top + top) / patch, (tile.left + left) / patch, columns, job.merge);
    uint8_t* to = first + ((int64_t{row} * 3 + channel) * job.temporal + slot) * area + begin;
    if constexpr (kBytes == 4) {
      const uint32_t word = piece[0] | piece[1] << 8 | piece[2] << 16 | static_cast<uint32_t>(piece[3]) << 24;
      *reinterpret_cast<uint32_t*>(to) = word;
    } else {
      *to = piece[0];
    }
  }
}

template <bool kIsVerticalFirst>
__global__ void __launch_bounds__(kThreads)
    resize(CudaResizePatchify job, int tile_rows, int tile_columns, uint8_t* rows) {
  constexpr int kPitch = 3 * (kIsVerticalFirst ? kTileRows : kTileColumns), kBand = kTileBytes / kPitch;
  alignas(4) __shared__ uint8_t lines[kTileBytes];
  const int across = (job.width + tile_columns - 1) / tile_columns;
  const int down = (job.height + tile_rows - 1) / tile_rows;
  const int block = static_cast<int>(blockIdx.x), place = block % (across * down);
  Tile tile{block / (across * down), place / across * tile_rows, place % across * tile_columns, 0, 0};
  tile.height = min(tile_rows, job.height - tile.top);
  tile.width = min(tile_columns, job.width - tile.left);

  const int32_t* taps = job.table + 3 * (job.width + job.height);
  const Side columns{{job.table, taps, job.width}, tile.left, tile.width, job.pixel_stride};
  const Side lines_down{{job.table + 3 * job.width, taps, job.height}, tile.top, tile.height, job.row_stride};
  const Side& first = kIsVerticalFirst ? lines_down : columns;
  const Side& second = kIsVerticalFirst ? columns : lines_down;
  const int quads = (3 * first.length + 3) / 4;
  const uint8_t* frame = job.frames + tile.frame * job.frame_stride;

  Window whole = second.axis[second.begin];  // source positions that the tile needs
  int end = whole.first + whole.count;
  for (int i = 1; i < second.length; ++i) {
    const Window window = second.axis[second.begin + i];
    whole.first = min(whole.first, window.first);
    end = max(end, window.first + window.count);
  }

  int sums[kQuadsPerThread][4];
#pragma unroll
  for (int j = 0; j < kQuadsPerThread; ++j) {
#pragma unroll
    for (int byte = 0; byte < 4; ++byte) sums[j][byte] = kHalf;
  }
  for (int begin = whole.first; begin < end; begin += kBand) {
    const int count = min(kBand, end - begin);
    first_pass<kIsVerticalFirst, kPitch>(frame, first, second, begin, count, lines);
    __syncthreads();
    second_pass<kPitch>(second, quads, begin, count, lines, sums);
    __syncthreads();
  }

#pragma unroll
  for (int j = 0; j < kQuadsPerThread; ++j) {
    const int i = threadIdx.x + j * kThreads;
    if (i >= second.length * quads) break;
    uint32_t word = 0;
#pragma unroll
    for (int byte = 0; byte < 4; ++byte) word |= static_cast<uint32_t>(to_byte(sums[j][byte])) << 8 * byte;
    *reinterpret_cast<uint32_t*>(lines + i / quads * kPitch + i % quads * 4) = word;
  }
  __syncthreads();
  if (job.patch * job.patch % 4 == 0) {
    write_patches<kIsVerticalFirst, kPitch, 4>(job, tile, lines, rows);
  } else {
    write_patches<kIsVerticalFirst, kPitch, 1>(job, tile, lines, rows);
  }
}

// The most pixels up to `most` that are whole patches, and whole merge blocks where one fits.
int tile_side(int most, int patch, int merge) {
  const int patches = most / patch;
  return (patches < merge ? patches : patches - patches % merge) * patch;
}

}  // namespace

std::shared_ptr<const std::vector<int32_t>> resize_table(int64_t height, int64_t width, int64_t out_height,
                                                         int64_t out_width, ResizeFilter filter) {
  using Table = std::vector<int32_t>;
  static SharedCache<std::tuple<int64_t, int64_t, int64_t, int64_t, ResizeFilter>, Table> cache(kCacheBytes);
  return cache.get({height, width, out_height, out_width, filter}, [&] {
    Table outputs, taps;
    for (const auto& [size, out_size] : {std::pair{width, out_width}, std::pair{height, out_height}}) {
      const std::vector<ResizeWindow> windows = resize_windows(size, out_size, filter);
      const auto first_tap = static_cast<int64_t>(taps.size());
      size_t most = 0;
      for (const ResizeWindow& window : windows) most = std::max(most, window.coefficients.size());
      taps.resize(first_tap + most * out_size);
      for (int64_t output = 0; output < out_size; ++output) {
        const std::vector<int32_t>& coefficients = windows[output].coefficients;
        outputs.insert(outputs.end(),
                       {static_cast<int32_t>(windows[output].first), static_cast<int32_t>(coefficients.size()),
                        static_cast<int32_t>(first_tap + output)});
        for (size_t i = 0; i < coefficients.size(); ++i) taps[first_tap + i * out_size + output] = coefficients[i];
      }
    }
    outputs.insert(outputs.end(), taps.begin(), taps.end());
    const int64_t bytes = static_cast<int64_t>(outputs.capacity() * sizeof(int32_t));
    return std::pair(std::move(outputs), bytes);
  });
}

cudaError_t launch_resize_patchify(const CudaResizePatchify& job, uint8_t* rows, cudaStream_t stream) {
  int tile_rows = tile_side(kTileRows, job.patch, job.merge);
  int tile_columns = tile_side(kTileColumns, job.patch, job.merge);
  const auto tiles = [&] {
    const int down = (job.height + tile_rows - 1) / tile_rows, across = (job.width + tile_columns - 1) / tile_columns;
    return job.count * down * across;
  };
  if (tiles() < kManyTiles) tile_rows = tile_columns = job.patch;  // a patch each, for more SMs to have some
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(tiles()));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, job.is_vertical_first ? resize<true> : resize<false>, job, tile_rows, tile_columns,
                            rows);
}

}  // namespace rtp_mm
