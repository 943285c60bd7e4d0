#include "cpu/jpeg_file.h"

#include <algorithm>
#include <cstring>
#include <string_view>

namespace rtp_mm {
namespace {

constexpr uint8_t kSof0 = 0xc0, kSof1 = 0xc1, kDht = 0xc4, kRst0 = 0xd0, kSoi = 0xd8, kEoi = 0xd9, kSos = 0xda;
constexpr uint8_t kDqt = 0xdb, kDri = 0xdd, kApp0 = 0xe0, kApp14 = 0xee, kApp15 = 0xef, kCom = 0xfe;
constexpr uint8_t kBaseline = 63;  // the last coefficient of a scan that has all of them

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

template <class Table>
struct Slot {
  Table table;
  bool is_defined = false;
};

class Reader {
 public:
  explicit Reader(Bytes data) : data_(data) {}

  JpegFile read() {
    require(data_.byte() == 0xff && data_.byte() == kSoi);
    for (;;) {
      require(data_.byte() == 0xff);
      const uint8_t marker = data_.byte();
      const uint16_t length = data_.word();
      require(length >= 2);
      const Bytes segment = data_.take(length - 2);
      if (marker == kSos) {
        scan_header(segment);
        scan();
        return std::move(file_);
      }
      read_segment(marker, segment);
    }
  }

 private:
  void read_segment(uint8_t marker, Bytes segment) {
    switch (marker) {
      case kSof0:
      case kSof1:
        return frame(segment);
      case kDht:
        return huffman(segment);
      case kDqt:
        return quantisation(segment);
      case kDri:
        require(segment.size() == 2);
        file_.segment_mcus = segment.word();
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
    while (segment.size()) {
      const uint8_t id = segment.byte();
      require(id < steps_.size());  // of 8 bits each: others have more in the upper half
      const Bytes steps = segment.take(64);
      require(std::find(steps.begin, steps.end, 0) == steps.end);
      std::copy(steps.begin, steps.end, steps_[id].table.begin());
      steps_[id].is_defined = true;
    }
  }

  void huffman(Bytes segment) {
    while (segment.size()) {
      const uint8_t id = segment.byte();
      require((id & 0xee) == 0);  // DC or AC, 0 or 1
      const bool is_dc = id < 0x10;
      const Bytes counts = segment.take(16);
      size_t symbols = 0;
      for (const uint8_t* count = counts.begin; count < counts.end; ++count) symbols += *count;
      require(symbols <= 256);
      Slot<HuffmanTable>& code = (is_dc ? dc_ : ac_)[id & 1];
      code.is_defined = code.table.build(counts.begin, segment.take(symbols).begin, is_dc);
      require(code.is_defined);
    }
  }

  void frame(Bytes segment) {
    require(file_.components.empty() && segment.byte() == 8);
    file_.height = segment.word();
    file_.width = segment.word();
    const uint8_t count = segment.byte();
    require(file_.height > 0 && file_.width > 0 && (count == 1 || count == 3) && segment.size() == 3u * count);
    file_.components.resize(count);
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
  }

  // Of libjpeg's rules, those that are certain.
  bool is_ycc() const {
    if (is_jfif_ || adobe_transform_ >= 0) return is_jfif_ || adobe_transform_ == 1;
    return ids_ == std::array<uint8_t, 3>{1, 2, 3};
  }

  void scan_header(Bytes segment) {
    const size_t count = file_.components.size();
    require(count > 0 && segment.byte() == count && segment.size() == 2 * count + 3 && (count == 1 || is_ycc()));
    for (size_t i = 0; i < count; ++i) {
      require(segment.byte() == ids_[i]);
      const uint8_t tables = segment.byte();
      require((tables & 0xee) == 0);
      const auto& steps = steps_[steps_of_[i]];
      const auto &dc = dc_[tables >> 4], &ac = ac_[tables & 1];
      require(steps.is_defined && dc.is_defined && ac.is_defined);
      file_.components[i] = {steps.table, dc.table, ac.table};
    }
    require(segment.byte() == 0 && segment.byte() == kBaseline && segment.byte() == 0);
  }

  // Whatever follows the end of the image is not looked at.
  void scan() {
    const int64_t mcus = file_.mcus_across * file_.mcus_down;
    if (file_.segment_mcus == 0) file_.segment_mcus = mcus;
    const auto count = static_cast<size_t>((mcus + file_.segment_mcus - 1) / file_.segment_mcus);
    file_.bits = std::make_unique_for_overwrite<uint8_t[]>(data_.size() + kBitsPadding);
    uint8_t *const bits = file_.bits.get(), *next = bits;
    for (size_t begin = 0;;) {
      const auto* marker = static_cast<const uint8_t*>(std::memchr(data_.begin, 0xff, data_.size()));
      require(marker && data_.end - marker >= 2);
      next = std::copy(static_cast<const uint8_t*>(data_.begin), marker, next);
      data_.begin = marker + 2;
      if (marker[1] == 0) {  // stuffed
        *next++ = 0xff;
        continue;
      }
      const size_t restarts = file_.segments.size(), end = next - bits;
      file_.segments.push_back({begin, end});
      if (marker[1] == kEoi) break;
      require(marker[1] == kRst0 + restarts % 8);
      begin = end;
    }
    require(file_.segments.size() == count);
    std::fill_n(next, kBitsPadding, uint8_t{0});
  }

  Bytes data_;
  JpegFile file_{};
  std::array<Slot<std::array<uint8_t, 64>>, 4> steps_;
  std::array<Slot<HuffmanTable>, 2> dc_, ac_;
  std::array<uint8_t, 3> ids_{}, steps_of_{};
  bool is_jfif_ = false;
  int adobe_transform_ = -1;
};

}  // namespace

JpegFile read_jpeg(const uint8_t* data, size_t size) { return Reader({data, data + size}).read(); }

}  // namespace rtp_mm
