// Runs the resize on every level this CPU has, source and destination each between two protected pages, and asks for
// the same bytes: a read or a write of one byte too many ends the program, with a report where sanitizers are on.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/resize.h"

namespace rtp_mm {
namespace {

std::mt19937 generator(0);

int64_t random_below(int64_t end) { return std::uniform_int_distribution<int64_t>(0, end - 1)(generator); }

// `size` bytes that end where a protected page begins, or begin where one ends.
class Guarded {
 public:
  Guarded(int64_t size, bool is_at_end) {
    const int64_t page = sysconf(_SC_PAGESIZE), inner = (size + page - 1) / page * page;
    bytes_ = inner + 2 * page;
    memory_ = static_cast<uint8_t*>(mmap(nullptr, bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    CHECK(memory_ != MAP_FAILED);
    CHECK(mprotect(memory_ + page, inner, PROT_READ | PROT_WRITE) == 0);
    data_ = memory_ + page + (is_at_end ? inner - size : 0);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(memory_, bytes_); }

  uint8_t* data() const { return data_; }

 private:
  uint8_t *memory_, *data_;
  int64_t bytes_;
};

struct Case {
  int64_t height, width, pixel_stride, row_gap;
  ResizePatchify job;
};

Case random_case() {
  constexpr int64_t kPatches[][2] = {{14, 2}, {16, 2}, {14, 1}, {12, 2}, {7, 3}, {1, 1}, {32, 1}, {5, 4}};
  const auto& [patch, merge] = kPatches[random_below(std::size(kPatches))];
  const int64_t block = patch * merge;
  const auto side = [] { return 1 + random_below(int64_t{1} << random_below(9)); };
  const auto blocks = [&] { return block * (1 + random_below(std::max<int64_t>(1, side() / block))); };
  Case c{side(), side(), 3 + random_below(2), random_below(2) * random_below(50), {}};
  c.job = {
      blocks(), blocks(), patch, merge, 1 + random_below(2), 0, ResizeFilter(random_below(6)), random_below(2) == 1,
      {}};
  c.job.slot = random_below(c.job.temporal);
  if (random_below(8) == 0) c.height = c.job.height;
  if (random_below(8) == 0) c.width = c.job.width;
  return c;
}

void run(Case c) {
  const int64_t row = (c.width - 1) * c.pixel_stride + 3, stride = row + c.row_gap;
  const int64_t size = (c.height - 1) * stride + row;
  const int64_t out = c.job.height * c.job.width * 3 * c.job.temporal;
  const bool is_at_end = random_below(2) == 1;
  const Guarded pixels(size, is_at_end);
  std::generate_n(pixels.data(), size, [] { return static_cast<uint8_t>(generator()); });
  std::vector<uint8_t> expected;
  for (int level = 0; level <= static_cast<int>(best_resize_level()); ++level) {
    const Guarded rows(out, is_at_end);
    std::memset(rows.data(), 7, out);
    c.job.level = ResizeLevel(level);
    resize_patchify({pixels.data(), c.height, c.width, stride, c.pixel_stride}, c.job, rows.data());
    if (level == 0) expected.assign(rows.data(), rows.data() + out);
    if (!std::equal(expected.begin(), expected.end(), rows.data())) {
      std::fprintf(stderr, "level %d differs: %ld x %ld -> %ld x %ld, filter %d, vertical first %d\n", level,
                   static_cast<long>(c.height), static_cast<long>(c.width), static_cast<long>(c.job.height),
                   static_cast<long>(c.job.width), static_cast<int>(c.job.filter), c.job.is_vertical_first);
      std::exit(1);
    }
  }
}

}  // namespace
}  // namespace rtp_mm

int main() {
  for (int i = 0; i < 600; ++i) rtp_mm::run(rtp_mm::random_case());
}
