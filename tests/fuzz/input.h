// A fuzzer's bytes as the numbers and the data that a harness asks for, in order; zeros once they have run out.

#pragma once

#include <cstddef>
#include <cstdint>

namespace rtp_mm::fuzz {

class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), end_(data + size) {}

  uint8_t byte() { return data_ == end_ ? 0 : *data_++; }

  // From first to last, both included, by two bytes of the input.
  int64_t between(int64_t first, int64_t last) {
    const int64_t low = byte();
    return first + (low | byte() << 8) % (last - first + 1);
  }

  bool flag() { return byte() & 1; }

  const uint8_t* rest() const { return data_; }
  size_t rest_bytes() const { return static_cast<size_t>(end_ - data_); }

 private:
  const uint8_t *data_, *end_;
};

}  // namespace rtp_mm::fuzz
