// Files made of boxes: JPEG 2000, AVIF and HEIF (ISO 14496-12, 15444-1, 23008-12).

#include <algorithm>
#include <cmath>
#include <optional>
#include <stdexcept>

#include "cpu/probe_formats.h"

namespace rtp_mm::probing {
namespace {

struct Box {
  uint64_t type_at, begin, end;  // its content is [begin, end)

  static Box at(const Bytes& file, uint64_t offset, uint64_t limit) {
    uint64_t size = file.big(offset, 4), begin = offset + 8;
    if (size == 1) {
      size = file.big(offset + 8, 8);
      begin = offset + 16;
    }
    const uint64_t end = size == 0 ? limit : Bytes::end_of(offset, size);
    if (end < begin || end > limit) throw NoImage{};
    return {offset + 4, begin, end};
  }
};

// Calls visit(box) for the boxes in [offset, limit) until it returns true.
template <class Visit>
void walk(const Bytes& file, uint64_t offset, uint64_t limit, Visit visit) {
  while (offset < limit) {
    file.step();
    const Box box = Box::at(file, offset, limit);
    if (visit(box)) return;
    offset = box.end;
  }
}

// The first box of a type; `skip` bytes of the content come before the boxes in it.
std::optional<Box> find(const Bytes& file, const Box& parent, const char* type, uint64_t skip = 0) {
  std::optional<Box> found;
  walk(file, parent.begin + skip, parent.end, [&](const Box& box) {
    if (file.has(box.type_at, type)) found = box;
    return found.has_value();
  });
  return found;
}

constexpr Box kFile{0, 0, kNoEnd};
constexpr uint64_t kVersionAndFlags = 4;  // the bytes of them, at the head of some boxes

Box require(const std::optional<Box>& box) {
  if (!box) throw NoImage{};
  return *box;
}

struct Size {
  uint64_t width, height;
};

bool is_one_of(const Bytes& file, uint64_t at, std::initializer_list<const char*> brands) {
  return std::any_of(brands.begin(), brands.end(), [&](const char* brand) { return file.has(at, brand); });
}

// What the brands say: the format, and whether the images are a track or an item.
struct Brands {
  const char* format = nullptr;
  bool is_track = false;   // AVIF whose pictures Pillow takes from its track
  bool has_track = false;  // there may be one

  static Brands read(const Bytes& file) {
    const Box box = Box::at(file, 0, kNoEnd);
    Brands brands;
    const auto look = [&](uint64_t at) {
      file.step();
      const bool is_sequence = is_one_of(file, at, {"avis", "hevc", "hevx", "msf1"});
      brands.has_track |= is_sequence;
      if (brands.format) return;
      if (is_one_of(file, at, {"avif", "avis"})) brands.format = "AVIF";
      if (is_one_of(file, at, {"heic", "heix", "heim", "heis", "hevc", "hevx"})) brands.format = "HEIF";
    };
    look(box.begin);
    const bool is_container = is_one_of(file, box.begin, {"mif1", "msf1"});
    if (!brands.format && !is_container) throw NoImage{};
    brands.is_track = file.has(box.begin, "avis");
    for (uint64_t at = box.begin + 8; at + 4 <= box.end; at += 4) look(at);
    if (!brands.format) throw NoImage{};
    return brands;
  }
};

// The image items of a `meta` box and their properties.
class Items {
 public:
  Items(const Bytes& file, const Box& meta) : file_(file) {
    const auto primary = find(file, meta, "pitm", kVersionAndFlags);
    if (primary) primary_ = file.big(primary->begin + 4, file[primary->begin] == 0 ? 2 : 4);
    const Box properties = require(find(file, meta, "iprp", kVersionAndFlags));
    container_ = require(find(file, properties, "ipco"));
    walk(file, properties.begin, properties.end, [&](const Box& box) {
      if (file.has(box.type_at, "ipma")) visit_associations(box);
      return false;
    });
  }

  // Of the primary item; where it has none, the largest there is.
  Size size() const { return size_ ? *size_ : largest(); }
  bool is_turned() const { return is_turned_; }

 private:
  void visit_associations(const Box& box) {
    const int id_bytes = file_[box.begin] == 0 ? 2 : 4, index_bytes = file_[box.begin + 3] & 1 ? 2 : 1;
    const uint64_t entries = file_.big(box.begin + 4, 4), index_mask = index_bytes == 1 ? 0x7f : 0x7fff;
    uint64_t at = box.begin + 8;
    for (uint64_t entry = 0; entry < entries; ++entry) {
      file_.step();
      const bool is_primary = file_.big(at, id_bytes) == primary_;
      const uint64_t count = file_[at + id_bytes];
      at += id_bytes + 1;
      for (uint64_t i = 0; is_primary && i < count; ++i) {
        visit_property(file_.big(at + i * index_bytes, index_bytes) & index_mask);
      }
      at += count * index_bytes;
    }
  }

  void visit_property(uint64_t number) {  // counted from 1; 0 is none
    uint64_t current = 0;
    walk(file_, container_.begin, container_.end, [&](const Box& box) {
      if (++current != number) return false;
      if (file_.has(box.type_at, "ispe")) size_ = extents(box);
      if (file_.has(box.type_at, "irot")) is_turned_ = file_[box.begin] & 1;
      return true;
    });
  }

  Size largest() const {
    Size largest{};
    walk(file_, container_.begin, container_.end, [&](const Box& box) {
      if (file_.has(box.type_at, "ispe")) {
        const Size size = extents(box);
        if (size.width * size.height > largest.width * largest.height) largest = size;
      }
      return false;
    });
    return largest;
  }

  Size extents(const Box& ispe) const { return {file_.big(ispe.begin + 4, 4), file_.big(ispe.begin + 8, 4)}; }

  const Bytes& file_;
  Box container_;
  std::optional<uint64_t> primary_;
  std::optional<Size> size_;
  bool is_turned_ = false;
};

// The first track of a `moov` box.
Box first_track(const Bytes& file) { return require(find(file, require(find(file, kFile, "moov")), "trak")); }

Size track_size(const Bytes& file, const Box& track) {
  const Box header = require(find(file, track, "tkhd"));
  const uint64_t at = header.begin + (file[header.begin] == 0 ? 76 : 88);
  return {file.big(at, 4) >> 16, file.big(at + 4, 4) >> 16};
}

Box descend(const Bytes& file, Box box, std::initializer_list<const char*> types) {
  for (const char* type : types) box = require(find(file, box, type));
  return box;
}

uint64_t track_frames(const Bytes& file, const Box& track) {
  return file.big(descend(file, track, {"mdia", "minf", "stbl", "stsz"}).begin + 8, 4);
}

// Of each frame, rounded as Pillow does; the last entry counts for all frames that are left.
std::vector<double> track_milliseconds(const Bytes& file, const Box& track) {
  const uint64_t frames = track_frames(file, track);
  check_frames(frames);  // nothing but their number takes room for them in the file
  const Box header = descend(file, track, {"mdia", "mdhd"});
  const uint64_t time_scale = file.big(header.begin + (file[header.begin] == 0 ? 12 : 20), 4);
  if (time_scale == 0) throw std::invalid_argument("its clock stands still");
  const Box runs = descend(file, track, {"mdia", "minf", "stbl", "stts"});
  const uint64_t count = file.big(runs.begin + 4, 4);
  std::vector<double> milliseconds;
  for (uint64_t run = 0; run < count && milliseconds.size() < frames; ++run) {
    const uint64_t at = runs.begin + 8 + 8 * run, left = frames - milliseconds.size();
    const uint64_t length = run + 1 < count ? std::min(file.big(at, 4), left) : left;
    const double ticks = static_cast<double>(file.big(at + 4, 4)) / static_cast<double>(time_scale);
    milliseconds.resize(milliseconds.size() + length, std::nearbyint(1000 * ticks));
  }
  if (milliseconds.size() < frames) throw std::invalid_argument("its frames have no times");
  return milliseconds;
}

}  // namespace

ImageHeader jpeg2000_boxes(const Bytes& file) {
  const Box header = require(find(file, require(find(file, kFile, "jp2h")), "ihdr"));
  return {"JPEG2000", file.big(header.begin + 4, 4), file.big(header.begin, 4), 1};
}

ImageHeader jpeg2000_codestream(const Bytes& file) {
  const auto extent = [&](uint64_t at) {  // of the reference grid, less what lies before the image
    const uint64_t end = file.big(at, 4), begin = file.big(at + 8, 4);
    return end > begin ? end - begin : 0;
  };
  return {"JPEG2000", extent(8), extent(12), 1};
}

ImageHeader heif(const Bytes& file) {
  const Brands brands = Brands::read(file);
  if (brands.is_track) {
    const Box track = first_track(file);
    const Size size = track_size(file, track);
    return {brands.format, size.width, size.height, frames_or_unknown([&] { return track_frames(file, track); })};
  }
  const Items items(file, require(find(file, kFile, "meta")));
  Size size = items.size();
  if (brands.format[0] == 'H' && items.is_turned()) std::swap(size.width, size.height);  // Pillow leaves AVIF unturned
  const auto frames = [&] { return track_frames(file, first_track(file)); };
  return {brands.format, size.width, size.height, brands.has_track ? frames_or_unknown(frames) : 1};
}

// A still image is shown for a second, as in Pillow.
Animation avif_animation(const Bytes& file, const ImageHeader& header) {
  Animation animation{header.width, header.height, {1000}};
  if (Brands::read(file).is_track) animation.milliseconds = track_milliseconds(file, first_track(file));
  return animation;
}

}  // namespace rtp_mm::probing
