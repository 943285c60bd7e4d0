// rtp_mm._core: what a preprocess worker calls. Knows numpy, not torch; calls release the GIL.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "arrow_pixels.h"
#include "cpu/isa.h"
#include "cpu/jpeg_source.h"
#include "cpu/over_white.h"
#include "cpu/png_rows.h"
#include "cpu/probe.h"
#include "cpu/resize.h"
#include "resize_names.h"

namespace py = pybind11;

namespace rtp_mm {
namespace {

constexpr std::array kLevels = {std::pair{"portable", ResizeLevel::kPortable},
#ifdef __aarch64__
                                std::pair{"neon_i8mm", ResizeLevel::kNeonI8mm}};
#else
                                std::pair{"avx2", ResizeLevel::kAvx2},
                                std::pair{"avx512_vnni", ResizeLevel::kAvx512Vnni},
                                std::pair{"avx512_vbmi", ResizeLevel::kAvx512Vbmi}};
#endif

// `message()` is called where the condition does not hold: it takes longer than a small image.
template <class Message>
void check(bool condition, Message message) {
  if (!condition) throw py::value_error("resize_patchify: " + std::string(message()));
}

std::string text(const py::handle& value) { return py::str(value).cast<std::string>(); }

std::string describe(const py::array& array) {
  std::string description = text(py::tuple(array.attr("shape"))) + " " + text(array.dtype());
  if (!(array.flags() & py::array::c_style)) description += " with strides " + text(py::tuple(array.attr("strides")));
  return description;
}

std::vector<std::string> resize_levels() {
  std::vector<std::string> names;
  for (const auto& [name, level] : kLevels) {
    if (level <= best_resize_level()) names.emplace_back(name);
  }
  return names;
}

ResizeLevel level_of(const std::optional<std::string>& name) {
  if (!name) return best_resize_level();
  const ResizeLevel level = lookup(kLevels, "level", *name);
  check(level <= best_resize_level(), [&] { return "this CPU lacks level " + *name; });
  return level;
}

PixelView view_of(const py::array& image) {
  check(py::isinstance<py::array_t<uint8_t>>(image) && image.ndim() == 3 && image.shape(2) == 3 && image.size() > 0,
        [&] { return "image must be [H, W, 3] uint8 and not empty, got " + describe(image); });
  PixelView view{static_cast<const uint8_t*>(image.data()), image.shape(0), image.shape(1), image.strides(0),
                 image.strides(1)};
  if (view.width == 1) view.pixel_stride = 3;  // the stride of a single element says nothing
  const int64_t row_bytes = (view.width - 1) * view.pixel_stride + 3;
  if (view.height == 1) view.row_stride = row_bytes;
  check(image.strides(2) == 1 && (view.pixel_stride == 3 || view.pixel_stride == 4) && view.row_stride >= row_bytes,
        [&] { return "image must have strides (>= row, 3 or 4, 1), got " + describe(image); });
  return view;
}

py::buffer_info bytes_of(const py::buffer& data, const char* function) {
  py::buffer_info file = data.request();
  if (file.ndim != 1 || file.itemsize != 1 || file.strides[0] != 1) {
    throw py::value_error(std::string(function) + ": data must be bytes");
  }
  return file;
}

// The decoder's own levels are fewer.
Isa isa_of(ResizeLevel level) {
#ifdef __aarch64__
  const Isa isa = level == ResizeLevel::kPortable ? Isa::kPortable : Isa::kNeonI8mm;
#else
  const Isa isa = level == ResizeLevel::kPortable ? Isa::kPortable
                  : level == ResizeLevel::kAvx2   ? Isa::kAvx2
                                                  : Isa::kAvx512;
#endif
  return std::min(isa, best_isa());
}

// A file that has been read as far as its pixels, or a part of its image.
class Jpeg {
 public:
  static std::optional<Jpeg> read(const py::buffer& data) {
    const py::buffer_info bytes = bytes_of(data, "Jpeg.read");
    py::gil_scoped_release release;
    try {
      auto file = std::make_shared<const JpegFile>(read_jpeg(static_cast<const uint8_t*>(bytes.ptr), bytes.size));
      const JpegWindow window{0, 0, file->height, file->width};
      return Jpeg(std::move(file), window);
    } catch (const UncertainJpeg&) {
      return {};
    }
  }

  py::tuple shape() const { return py::make_tuple(window_.height, window_.width, kChannels); }

  // [..., rows, columns, :]
  Jpeg part(const py::tuple& index) const {
    const py::object all = py::slice(std::nullopt, std::nullopt, std::nullopt);
    const bool is_part = index.size() == 4 && py::isinstance<py::ellipsis>(index[0]) &&
                         py::isinstance<py::slice>(index[1]) && py::isinstance<py::slice>(index[2]) &&
                         all.equal(index[3]);
    if (!is_part) throw py::value_error("Jpeg: a part is [..., rows, columns, :], got " + text(index));
    const auto [top, height] = range(index[1], window_.height);
    const auto [left, width] = range(index[2], window_.width);
    return Jpeg(file_, {window_.top + top, window_.left + left, height, width});
  }

  py::object pixels(const std::optional<std::string>& level) const {
    py::array_t<uint8_t> pixels({file_->height, file_->width, kChannels});
    uint8_t* pointer = pixels.mutable_data();
    const Isa isa = isa_of(level_of(level));
    try {
      py::gil_scoped_release release;
      decode_jpeg(*file_, pointer, isa);
    } catch (const UncertainJpeg&) {
      return py::none();
    }
    pixels.attr("flags").attr("writeable") = false;
    const py::slice rows(window_.top, window_.top + window_.height, 1);
    return pixels[py::make_tuple(rows, py::slice(window_.left, window_.left + window_.width, 1))];
  }

  // False where the file turns out to be uncertain.
  bool resize_patchify(const ResizePatchify& job, uint8_t* rows) const {
    try {
      JpegSource source(*file_, window_, isa_of(job.level));
      rtp_mm::resize_patchify(source, job, rows);
      source.finish();
    } catch (const UncertainJpeg&) {
      return false;
    }
    return true;
  }

 private:
  static constexpr int64_t kChannels = 3;

  // Where a slice of so many begins, and its length.
  static std::pair<int64_t, int64_t> range(const py::slice& slice, int64_t size) {
    py::ssize_t begin, end, step, count;
    if (!slice.compute(size, &begin, &end, &step, &count) || step != 1 || count < 1) {
      throw py::value_error("Jpeg: rows and columns of a part must be some, one after another, got " + text(slice) +
                            " of " + std::to_string(size));
    }
    return {begin, count};
  }

  Jpeg(std::shared_ptr<const JpegFile> file, const JpegWindow& window) : file_(std::move(file)), window_(window) {}

  std::shared_ptr<const JpegFile> file_;
  JpegWindow window_;
};

py::object resize_patchify_array(const std::variant<py::array, const Jpeg*>& image, int64_t height, int64_t width,
                                 int64_t patch, int64_t merge, const std::string& order, const std::string& filter,
                                 int64_t temporal, int64_t slot, const std::optional<std::string>& level,
                                 const std::optional<py::array>& out) {
  const Jpeg* const* jpeg = std::get_if<const Jpeg*>(&image);
  const PixelView view = jpeg ? PixelView{} : view_of(std::get<py::array>(image));
  check(patch > 0 && merge > 0, [&] {
    return "patch_size and merge_size must be positive, got " + std::to_string(patch) + " and " + std::to_string(merge);
  });
  check(height > 0 && width > 0 && height % patch == 0 && width % patch == 0 && height / patch % merge == 0 &&
            width / patch % merge == 0,
        [&] {
          return "height and width must be multiples of patch_size * merge_size = " + std::to_string(patch) + " * " +
                 std::to_string(merge) + ", got " + std::to_string(height) + " and " + std::to_string(width);
        });
  check(0 <= slot && slot < temporal, [&] {
    return "slot must be within temporal_patch_size " + std::to_string(temporal) + ", got " + std::to_string(slot);
  });
  check(temporal == 1 || out, [] { return "frames of one clip go into one array: out must be given"; });
  const std::vector<py::ssize_t> shape{height / patch * (width / patch), 3 * temporal * patch * patch};
  if (out) {
    check(py::isinstance<py::array_t<uint8_t>>(*out) && (out->flags() & py::array::c_style) && out->writeable() &&
              out->ndim() == 2 && out->shape(0) == shape[0] && out->shape(1) == shape[1],
          [&] {
            return "out must be writeable contiguous [" + std::to_string(shape[0]) + ", " + std::to_string(shape[1]) +
                   "] uint8, got " + describe(*out);
          });
  }
  const ResizePatchify job{height,
                           width,
                           patch,
                           merge,
                           temporal,
                           slot,
                           lookup(kFilters, "filter", filter),
                           lookup(kIsVerticalFirst, "order", order),
                           level_of(level)};
  py::array rows = out ? *out : py::array(py::dtype::of<uint8_t>(), shape);
  uint8_t* pointer = static_cast<uint8_t*>(rows.mutable_data());
  bool is_done = true;
  {
    py::gil_scoped_release release;
    if (jpeg) {
      is_done = (*jpeg)->resize_patchify(job, pointer);
    } else {
      resize_patchify(view, job, pointer);
    }
  }
  return is_done ? py::object(std::move(rows)) : py::none();
}

py::object probe_bytes(const py::buffer& data) {
  const py::buffer_info file = bytes_of(data, "probe");
  const ProbeResult result = [&] {
    py::gil_scoped_release release;
    return probe(static_cast<const uint8_t*>(file.ptr), file.size);
  }();
  if (const auto* more = std::get_if<NeedsMore>(&result)) return py::int_(more->bytes);
  const auto* header = std::get_if<ImageHeader>(&result);
  if (!header) return py::none();
  const py::object frames = header->frames ? py::object(py::int_(header->frames)) : py::none();
  return py::make_tuple(header->format, header->width, header->height, frames);
}

py::tuple animation_of_bytes(const py::buffer& data) {
  const py::buffer_info file = bytes_of(data, "animation");
  const Animation animation = [&] {
    py::gil_scoped_release release;
    return read_animation(static_cast<const uint8_t*>(file.ptr), file.size);
  }();
  const auto frames = static_cast<py::ssize_t>(animation.milliseconds.size());
  return py::make_tuple(animation.width, animation.height, py::array(frames, animation.milliseconds.data()));
}

size_t jpeg_scans(const py::buffer& data) {
  const py::buffer_info file = bytes_of(data, "jpeg_scans");
  py::gil_scoped_release release;
  return count_jpeg_scans(static_cast<const uint8_t*>(file.ptr), file.size);
}

py::object unfilter_png_array(const py::buffer& filtered, int64_t height, int64_t width, int64_t channels) {
  const py::buffer_info data = filtered.request();
  const int64_t row_bytes = width * channels;
  if (data.ndim != 1 || data.itemsize != 1 || data.strides[0] != 1 || height < 1 || width < 1 || channels < 1 ||
      channels > 4 || data.size != height * (row_bytes + 1)) {
    throw py::value_error("unfilter_png: data must be height * (1 + width * channels) bytes, with 1 to 4 channels");
  }
  py::array_t<uint8_t> pixels({height, width, channels});
  uint8_t* rows = pixels.mutable_data();
  const bool is_valid = [&] {
    py::gil_scoped_release release;
    return unfilter_png(static_cast<const uint8_t*>(data.ptr), height, row_bytes, channels, rows);
  }();
  return is_valid ? py::object(std::move(pixels)) : py::none();
}

py::array_t<uint8_t> over_white_array(const py::array_t<uint8_t, py::array::c_style>& rgba) {
  if (rgba.ndim() != 3 || rgba.shape(2) != 4) throw py::value_error("over_white: rgba must be [H, W, 4] uint8");
  py::array_t<uint8_t> rgb({rgba.shape(0), rgba.shape(1), py::ssize_t{3}});
  uint8_t* pixels = rgb.mutable_data();
  py::gil_scoped_release release;
  over_white(rgba.data(), rgba.shape(0) * rgba.shape(1), pixels);
  return rgb;
}

}  // namespace
}  // namespace rtp_mm

PYBIND11_MODULE(_core, m) {
  m.doc() = "Preprocessing on the CPU without torch.";
  py::class_<rtp_mm::Jpeg>(m, "Jpeg", "A JPEG file of the plainer kinds, whose pixels are libjpeg-turbo's.")
      .def_static("read", &rtp_mm::Jpeg::read, py::arg("data"), "Its headers and bits, or None for any other file.")
      .def_property_readonly("shape", &rtp_mm::Jpeg::shape, "(H, W, 3)")
      .def("__getitem__", &rtp_mm::Jpeg::part, py::arg("index"), "A part of the image: [..., rows, columns, :].")
      .def("pixels", &rtp_mm::Jpeg::pixels, py::kw_only(), py::arg("level") = py::none(),
           "[H, W, 3] uint8, or None where the file turns out to be of another kind, or broken.");
  m.def(
      "resize_patchify", &rtp_mm::resize_patchify_array, py::arg("image").none(false), py::arg("height"),
      py::arg("width"), py::arg("patch_size"), py::arg("merge_size"), py::kw_only(), py::arg("order") = "horizontal",
      py::arg("filter") = "bicubic", py::arg("temporal_patch_size") = 1, py::arg("slot") = 0,
      py::arg("level") = py::none(), py::arg("out") = py::none(),
      "[H, W, 3] uint8, or a Jpeg -> [height/P * width/P, 3 * T * P * P] uint8: Pillow's resize, cut into patch rows; "
      "None for a Jpeg without pixels().");
  m.def("arrow_pixels", &rtp_mm::arrow_pixels, py::arg("schema"), py::arg("array"), py::arg("height"), py::arg("width"),
        "Arrow capsules of an image with pixels of four bytes -> [H, W, 3] uint8, a view.");
  m.def("probe", &rtp_mm::probe_bytes, py::arg("data"),
        "An image file's first bytes -> (format, width, height, frames), bytes needed to tell, or None.");
  m.def("animation", &rtp_mm::animation_of_bytes, py::arg("data"),
        "A GIF, WebP, PNG or AVIF file -> width and height of its canvas, [frames] milliseconds.");
  m.def("jpeg_scans", &rtp_mm::jpeg_scans, py::arg("data"), "Scans of a whole JPEG file, its thumbnails' included.");
  m.def("over_white", &rtp_mm::over_white_array, py::arg("rgba"),
        "[H, W, 4] -> [H, W, 3] uint8: RGBA over opaque white, rounded as Pillow does.");
  m.def("unfilter_png", &rtp_mm::unfilter_png_array, py::arg("filtered"), py::arg("height"), py::arg("width"),
        py::arg("channels"), "An inflated PNG image's rows -> [H, W, C] uint8, or None for an unknown filter.");
  m.def(
      "multiplies_bytes", [] { return rtp_mm::multiplies_bytes(rtp_mm::best_isa()); },
      "Whether this CPU multiplies words of four bytes (AVX-512 VNNI, ARM's i8mm).");
  m.def(
      "bf16_instructions", [] { return rtp_mm::bf16_instructions(rtp_mm::best_isa()); },
      "What this CPU multiplies bfloat16s by, faster than float32: amx, avx512_bf16 or nothing.");
  m.def("resize_levels", &rtp_mm::resize_levels, "Instruction sets that this CPU can run, slowest first.");
}
