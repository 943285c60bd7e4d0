// rtp_mm._core: what a preprocess worker calls. Knows numpy, not torch; every call releases the GIL.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cpu/patchify.h"

namespace py = pybind11;

namespace rtp_mm {
namespace {

std::string describe(const py::array& array) {
  std::string text = py::str(py::tuple(array.attr("shape"))).cast<std::string>();
  text += " " + py::str(array.dtype()).cast<std::string>();
  return array.flags() & py::array::c_style ? text : text + " not contiguous";
}

void check(bool condition, const std::string& message) {
  if (!condition) throw py::value_error(message);
}

bool is_contiguous_bytes(const py::array& array) {
  return py::isinstance<py::array_t<uint8_t>>(array) && (array.flags() & py::array::c_style);
}

py::array patchify_array(const py::array& frames, int64_t patch, int64_t merge, int64_t temporal,
                         const std::optional<py::array>& out) {
  check(is_contiguous_bytes(frames) && frames.ndim() == 4 && frames.shape(3) == 3,
        "patchify: frames must be contiguous [F, H, W, 3] uint8, got " + describe(frames));
  check(patch > 0 && merge > 0 && temporal > 0,
        "patchify: patch_size, merge_size and temporal_patch_size must be positive");
  const Patchify job{static_cast<const uint8_t*>(frames.data()),
                     frames.shape(0),
                     frames.shape(1),
                     frames.shape(2),
                     patch,
                     merge,
                     temporal};
  check(job.frames % temporal == 0, "patchify: F must be divisible by temporal_patch_size " + std::to_string(temporal) +
                                        ", got " + describe(frames));
  check(job.height % patch == 0 && job.width % patch == 0 && job.height / patch % merge == 0 &&
            job.width / patch % merge == 0,
        "patchify: H and W must be divisible by patch_size * merge_size = " + std::to_string(patch) + " * " +
            std::to_string(merge) + ", got " + describe(frames));
  const std::vector<py::ssize_t> shape{job.frames / temporal * (job.height / patch) * (job.width / patch),
                                       3 * temporal * patch * patch};
  if (out) {
    check(is_contiguous_bytes(*out) && out->writeable() && out->ndim() == 2 && out->shape(0) == shape[0] &&
              out->shape(1) == shape[1],
          "patchify: out must be writeable contiguous [" + std::to_string(shape[0]) + ", " + std::to_string(shape[1]) +
              "] uint8, got " + describe(*out));
  }
  py::array rows = out ? *out : py::array(py::dtype::of<uint8_t>(), shape);
  uint8_t* pointer = static_cast<uint8_t*>(rows.mutable_data());
  {
    py::gil_scoped_release release;
    patchify(job, pointer);
  }
  return rows;
}

}  // namespace
}  // namespace rtp_mm

PYBIND11_MODULE(_core, m) {
  m.doc() = "Preprocessing on the CPU without torch.";
  m.def("patchify", &rtp_mm::patchify_array, py::arg("frames"), py::arg("patch_size"), py::arg("merge_size"),
        py::arg("temporal_patch_size"), py::arg("out") = py::none(),
        "[F, H, W, 3] uint8 -> [F/T * H/P * W/P, 3 * T * P * P] uint8 in merge-block order, columns (c, t, y, x).");
}
