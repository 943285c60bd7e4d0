// From torch's element types to ours.

#pragma once

#include "common.h"
#include "cpu/float_formats.h"

namespace rtp_mm {

// Calls f with a null pointer of the element type that stands for `dtype`.
template <class F>
void with_float_type(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case ScalarType::Half:
      return f(static_cast<Float16*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}

}  // namespace rtp_mm
