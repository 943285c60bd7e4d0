// unfilter_png with sizes and rows from the input: it stays within its memory (both are heap blocks of their exact
// size), and its pixels are those of the specification's formulas in plain integers.

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "cpu/png_rows.h"
#include "input.h"

namespace rtp_mm {
namespace {

int guess(int filter, int left, int above, int corner) {
  const int p = left + above - corner;
  const int from_left = std::abs(p - left), from_above = std::abs(p - above), from_corner = std::abs(p - corner);
  switch (filter) {
    case 1:
      return left;
    case 2:
      return above;
    case 3:
      return (left + above) / 2;
    case 4:
      return from_left <= from_above && from_left <= from_corner ? left : from_above <= from_corner ? above : corner;
    default:
      return 0;
  }
}

}  // namespace
}  // namespace rtp_mm

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  rtp_mm::fuzz::Input input(data, size);
  const int64_t pixel_bytes = input.between(1, 4), row_bytes = pixel_bytes * input.between(1, 70);
  const int64_t height = input.between(1, 20);
  const auto filtered = std::make_unique<uint8_t[]>(height * (row_bytes + 1));
  const auto rows = std::make_unique<uint8_t[]>(height * row_bytes);
  std::generate_n(filtered.get(), height * (row_bytes + 1), [&] { return input.byte(); });
  if (input.byte() % 4) {  // else any byte: most are no filter
    for (int64_t y = 0; y < height; ++y) filtered[y * (row_bytes + 1)] %= 5;
  }
  bool is_valid = true;
  for (int64_t y = 0; y < height; ++y) is_valid &= filtered[y * (row_bytes + 1)] < 5;
  if (rtp_mm::unfilter_png(filtered.get(), height, row_bytes, pixel_bytes, rows.get()) != is_valid) std::abort();
  if (!is_valid) return 0;
  for (int64_t y = 0; y < height; ++y) {
    const uint8_t* row = filtered.get() + y * (row_bytes + 1);
    const auto at = [&](int64_t line, int64_t x) { return line < 0 || x < 0 ? 0 : rows[line * row_bytes + x]; };
    for (int64_t x = 0; x < row_bytes; ++x) {
      const int left = at(y, x - pixel_bytes), above = at(y - 1, x), corner = at(y - 1, x - pixel_bytes);
      const uint8_t expected = row[1 + x] + rtp_mm::guess(row[0], left, above, corner);
      if (rows[y * row_bytes + x] != expected) std::abort();
    }
  }
  return 0;
}
