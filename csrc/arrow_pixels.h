// An image's pixels where Pillow keeps them, by way of the Arrow C data interface, which Pillow offers for images whose
// rows lie one after the other: https://arrow.apache.org/docs/format/CDataInterface.html

#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string_view>

namespace rtp_mm {

struct ArrowSchema {
  const char *format, *name, *metadata;
  int64_t flags, n_children;
  ArrowSchema **children, *dictionary;
  void (*release)(ArrowSchema*);
  void* private_data;
};

struct ArrowArray {
  int64_t length, null_count, offset, n_buffers, n_children;
  const void** buffers;
  ArrowArray **children, *dictionary;
  void (*release)(ArrowArray*);
  void* private_data;
};

// [height, width, 3] uint8, read-only, over pixels of four bytes. Keeps the capsule, and so the image's memory, alive.
// Raises ValueError for anything but height * width such pixels.
inline pybind11::array arrow_pixels(const pybind11::capsule& schema, const pybind11::capsule& array, int64_t height,
                                    int64_t width) {
  namespace py = pybind11;
  const auto check = [](bool condition) {
    if (!condition) throw py::value_error("arrow_pixels: these are no pixels of four bytes, or not as many");
  };
  check(std::string_view(schema.name()) == "arrow_schema" && std::string_view(array.name()) == "arrow_array");
  const ArrowSchema& type = *schema.get_pointer<ArrowSchema>();
  const ArrowArray& pixels = *array.get_pointer<ArrowArray>();
  check(type.release && type.format == std::string_view("+w:4") && type.n_children == 1);
  check(type.children[0]->format == std::string_view("C"));
  check(pixels.release && height > 0 && width > 0 && pixels.length == height * width && pixels.offset == 0 &&
        pixels.null_count == 0 && pixels.n_children == 1);
  const ArrowArray& bytes = *pixels.children[0];
  check(bytes.length == 4 * height * width && bytes.offset == 0 && bytes.n_buffers == 2);
  py::array view(py::dtype::of<uint8_t>(), {height, width, int64_t{3}}, {4 * width, int64_t{4}, int64_t{1}},
                 bytes.buffers[1], array);
  view.attr("flags").attr("writeable") = false;
  return view;
}

}  // namespace rtp_mm
