#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "common.h"

namespace rtp_mm {

// Runs a product's tiles on torch's threads, each taking the next one that is left.
template <class Product>
void run_tiles(const Product& product) {
  std::atomic<int64_t> next_tile = 0;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), product.tiles());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { product.run(next_tile); });
}

}  // namespace rtp_mm
