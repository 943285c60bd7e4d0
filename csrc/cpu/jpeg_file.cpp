#include "cpu/jpeg_file.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <optional>
#include <string_view>

namespace rtp_mm {
namespace {

constexpr uint8_t kSof0 = 0xc0, kSof1 = 0xc1, kSof2 = 0xc2, kDht = 0xc4, kRst0 = 0xd0, kRst7 = 0xd7, kSoi = 0xd8;
constexpr uint8_t kEoi = 0xd9, kSos = 0xda, kDqt = 0xdb, kDri = 0xdd, kApp0 = 0xe0, kApp14 = 0xee, kApp15 = 0xef;
constexpr uint8_t kCom = 0xfe;

struct Bytes {
  const uint8_t *begin, *end;

  size_t size() const { return end - begin; }

  uint8_t byte() {
    require(begin < end);
    return *begin++;
  }

  uint16_t word() {
    const uint8_t high = byte();
    return static_cast<uint16_t>(high << 8 | byte());
  }

  Bytes take(size_t count) {
    require(count <= size());
    begin += count;
    return {begin - count, begin};
  }

  bool starts_with(std::string_view text) const {
    return size() >= text.size() && std::memcmp(begin, text.data(), text.size()) == 0;
  }
};

// A table of Huffman's code as a file defines it, and what has been made of it.
class Code {
 public:
  void define(Bytes counts, Bytes symbols) {
    std::copy(counts.begin, counts.end, counts_.begin());
    std::copy(symbols.begin, symbols.end, symbols_.begin());
    is_defined_ = true;
    table_.reset();
  }

  std::shared_ptr<const HuffmanTable> table(HuffmanTable::Kind kind) {
    require(is_defined_);
    if (!table_) {
      auto table = std::make_shared<HuffmanTable>();
      require(table->build(counts_.data(), symbols_.data(), kind));
      table_ = std::move(table);
    }
    return table_;
  }

 private:
  std::array<uint8_t, 16> counts_;
  std::array<uint8_t, 256> symbols_;
  bool is_defined_ = false;
  std::shared_ptr<const HuffmanTable> table_;
};

class Reader {
 public:
  explicit Reader(Bytes data) : data_(data) {}

  JpegFile read() {
    require(data_.byte() == 0xff && data_.byte() == kSoi);
    file_.bits = std::make_unique_for_overwrite<uint8_t[]>(data_.size() + kBitsPadding);
    next_bits_ = file_.bits.get();
    for (;;) {
      require(data_.byte() == 0xff);
      const uint8_t marker = data_.byte();
      if (marker == kEoi) break;
      const uint16_t length = data_.word();
      require(length >= 2);
      const Bytes segment = data_.take(length - 2);
      if (marker == kSos) {
        scan(segment);
      } else {
        read_segment(marker, segment);
      }
    }
    check_completeness();
    std::fill_n(next_bits_, kBitsPadding, uint8_t{0});
    return std::move(file_);
  }

 private:
  void read_segment(uint8_t marker, Bytes segment) {
    switch (marker) {
      case kSof0:
      case kSof1:
      case kSof2:
        file_.is_progressive = marker == kSof2;
        return frame(segment);
      case kDht:
        return huffman(segment);
      case kDqt:
        return quantisation(segment);
      case kDri:
        require(segment.size() == 2);
        restart_interval_ = segment.word();
        return;
      case kApp0:
        is_jfif_ |= segment.size() >= 14 && segment.starts_with({"JFIF", 5});
        return;
      case kApp14:
        if (segment.size() >= 12 && segment.starts_with("Adobe")) adobe_transform_ = segment.begin[11];
        return;
      default:
        require((marker > kApp0 && marker <= kApp15) || marker == kCom);
    }
  }

  void quantisation(Bytes segment) {
    require(file_.scans.empty());  // else a component's scans might differ in them
    while (segment.size()) {
      const uint8_t id = segment.byte();
      require(id < steps_.size());  // of 8 bits each: others have more in the upper half
      const Bytes steps = segment.take(64);
      require(std::find(steps.begin, steps.end, 0) == steps.end);
      std::copy(steps.begin, steps.end, steps_[id].emplace().begin());
    }
  }

  void huffman(Bytes segment) {
    while (segment.size()) {
      const uint8_t id = segment.byte();
      require((id & 0xec) == 0);  // DC or AC, 0 to 3
      const Bytes counts = segment.take(16);
      const auto symbols = std::accumulate(counts.begin, counts.end, size_t{0});
      require(symbols <= 256);
      (id < 0x10 ? dc_ : ac_)[id & 3].define(counts, segment.take(symbols));
    }
  }

  void frame(Bytes segment) {
    require(file_.steps.empty() && segment.byte() == 8);
    file_.height = segment.word();
    file_.width = segment.word();
    const uint8_t count = segment.byte();
    require(file_.height > 0 && file_.height <= kMostSide && file_.width > 0 && file_.width <= kMostSide);
    require((count == 1 || count == 3) && segment.size() == 3u * count);
    file_.across = file_.down = 1;
    for (uint8_t i = 0; i < count; ++i) {
      ids_[i] = segment.byte();
      const uint8_t sampling = segment.byte(), across = sampling >> 4, down = sampling & 15;
      steps_of_[i] = segment.byte();
      require(steps_of_[i] < steps_.size());
      if (count == 1) {  // nothing to be related to
        require(across >= 1 && across <= 4 && down >= 1 && down <= 4);
      } else if (i == 0) {
        require(across >= 1 && across <= 2 && down >= 1 && down <= 2);
        file_.across = across;
        file_.down = down;
      } else {
        require(sampling == 0x11);
      }
    }
    require(file_.across == 1 || file_.width > 4);  // else libjpeg doubles the two samples of a row
    file_.mcus_across = (file_.width + 8 * file_.across - 1) / (8 * file_.across);
    file_.mcus_down = (file_.height + 8 * file_.down - 1) / (8 * file_.down);
    file_.steps.resize(count);
    for (auto& accuracy : accuracy_) accuracy.fill(kNothing);
  }

  // Of libjpeg's rules, those that are certain.
  bool is_ycc() const {
    if (is_jfif_ || adobe_transform_ >= 0) return is_jfif_ || adobe_transform_ == 1;
    return ids_ == std::array<uint8_t, 3>{1, 2, 3};
  }

  void scan(Bytes header) {
    const int components = file_.components();
    require(components > 0);
    if (file_.scans.empty()) {
      require(components == 1 || is_ycc());
      for (int i = 0; i < components; ++i) {
        require(steps_[steps_of_[i]].has_value());
        file_.steps[i] = *steps_[steps_of_[i]];
      }
    }
    JpegScan scan{};
    scan.count = header.byte();
    require((scan.count == 1 || scan.count == components) && header.size() == 2u * scan.count + 3);
    std::array<uint8_t, 3> tables{};
    for (int i = 0; i < scan.count; ++i) {
      const uint8_t id = header.byte();
      if (i == 0)
        scan.component = static_cast<int>(std::find(ids_.begin(), ids_.begin() + components, id) - ids_.begin());
      require(scan.component + i < components && ids_[scan.component + i] == id);
      tables[scan.component + i] = header.byte();
      require((tables[scan.component + i] & 0xcc) == 0);
    }
    scan.first = header.byte();
    scan.last = header.byte();
    const uint8_t accuracy = header.byte();
    scan.high = accuracy >> 4;
    scan.low = accuracy & 15;
    check_progress(scan);
    for (int i = scan.component; i < scan.component + scan.count; ++i) {
      const auto kind = file_.is_progressive ? HuffmanTable::kProgressiveAc : HuffmanTable::kAc;
      if (scan.first == 0 && scan.high == 0) scan.dc[i] = dc_[tables[i] >> 4].table(HuffmanTable::kDc);
      if (scan.last > 0) scan.ac[i] = ac_[tables[i] & 3].table(kind);
    }
    scan_bits(scan);
    file_.scans.push_back(std::move(scan));
  }

  // Every coefficient has to become known from its highest bits to its lowest.
  void check_progress(const JpegScan& scan) {
    if (!file_.is_progressive) {
      require(file_.scans.empty() && scan.count == file_.components());
      require(scan.first == 0 && scan.last == 63 && scan.high == 0 && scan.low == 0);
    } else {
      require(scan.first == 0 ? scan.last == 0 : scan.count == 1 && scan.first <= scan.last && scan.last <= 63);
      require(scan.low <= kMostLow && (scan.high == 0 || scan.low == scan.high - 1));
    }
    for (int i = scan.component; i < scan.component + scan.count; ++i) {
      require(scan.first == 0 || accuracy_[i][0] != kNothing);
      for (int place = scan.first; place <= scan.last; ++place) {
        require(accuracy_[i][place] == (scan.high ? scan.high : kNothing));
        accuracy_[i][place] = scan.low;
      }
    }
  }

  // What is never told in full, libjpeg makes up from its neighbours.
  void check_completeness() const {
    require(!file_.scans.empty());
    for (int i = 0; i < file_.components(); ++i) {
      for (const int low : accuracy_[i]) require(low == 0);
    }
  }

  void scan_bits(JpegScan& scan) {
    const bool is_luma = scan.component == 0;
    int64_t mcus = file_.mcus_across * file_.mcus_down;
    if (scan.count == 1)
      mcus = blocks(file_.width, is_luma ? 1 : file_.across) * blocks(file_.height, is_luma ? 1 : file_.down);
    scan.segment_mcus = restart_interval_ ? restart_interval_ : mcus;
    const auto count = static_cast<size_t>((mcus + scan.segment_mcus - 1) / scan.segment_mcus);
    const uint8_t* const bits = file_.bits.get();
    for (size_t begin = next_bits_ - bits;;) {
      const auto* marker = static_cast<const uint8_t*>(std::memchr(data_.begin, 0xff, data_.size()));
      require(marker && data_.end - marker >= 2);
      next_bits_ = std::copy(data_.begin, marker, next_bits_);
      data_.begin = marker;
      if (marker[1] == 0) {  // stuffed
        *next_bits_++ = 0xff;
        data_.begin += 2;
        continue;
      }
      const size_t restarts = scan.segments.size(), end = next_bits_ - bits;
      require(restarts < count);
      scan.segments.push_back({begin, end});
      if (marker[1] < kRst0 || marker[1] > kRst7) break;
      require(marker[1] == kRst0 + restarts % 8);
      data_.begin += 2;
      begin = end;
    }
    require(scan.segments.size() == count);
  }

  static int64_t blocks(int64_t samples, int64_t shrink) { return ((samples + shrink - 1) / shrink + 7) / 8; }

  static constexpr int kNothing = -1, kMostLow = 10, kMostSide = 65500;  // libjpeg's

  Bytes data_;
  JpegFile file_{};
  std::array<std::optional<std::array<uint8_t, 64>>, 4> steps_;
  std::array<Code, 4> dc_, ac_;
  std::array<std::array<int, 64>, 3> accuracy_;  // by component: bits of a coefficient that are not told so far
  std::array<uint8_t, 3> ids_{}, steps_of_{};
  uint16_t restart_interval_ = 0;
  bool is_jfif_ = false;
  int adobe_transform_ = -1;
  uint8_t* next_bits_ = nullptr;
};

}  // namespace

JpegFile read_jpeg(const uint8_t* data, size_t size) { return Reader({data, data + size}).read(); }

}  // namespace rtp_mm
