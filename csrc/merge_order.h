// The order of patch rows: merge block by merge block, each in raster order.

#pragma once

#ifdef __CUDACC__
#define RTP_MM_HOST_DEVICE __host__ __device__
#else
#define RTP_MM_HOST_DEVICE
#endif

namespace rtp_mm {

// Where patch (row, column) of a frame `across` patches wide comes.
template <class Int>
RTP_MM_HOST_DEVICE Int merge_order(Int row, Int column, Int across, Int merge) {
  const Int block = row / merge * (across / merge) + column / merge;
  return (block * merge + row % merge) * merge + column % merge;
}

}  // namespace rtp_mm
