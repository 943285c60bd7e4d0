// What every *_op file needs: checks at the door that say what came.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace rtp_mm {

using torch::headeronly::ScalarType;
using IntArrayRef = torch::headeronly::IntHeaderOnlyArrayRef;
using torch::stable::Tensor;

// Raises RuntimeError in Python with the parts put together.
template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline bool is_float(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    default:
      return torch::headeronly::toString(dtype);
  }
}

// "[1768, 588]"
inline std::string list(IntArrayRef values) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < values.size(); ++i) text << (i ? ", " : "") << values[i];
  text << ']';
  return text.str();
}

// "[1768, 588] uint8", with the strides where they are not those of a contiguous tensor.
inline std::string describe(const Tensor& tensor) {
  std::string text = list(tensor.sizes()) + " " + dtype_name(tensor.scalar_type());
  if (!tensor.is_contiguous()) text += " with strides " + list(tensor.strides());
  return text;
}

// `name` is the operator's, and the argument's.
inline void check_is(const char* name, const Tensor& tensor, IntArrayRef shape, ScalarType dtype) {
  check(tensor.sizes().equals(shape) && tensor.scalar_type() == dtype && tensor.is_contiguous(), name,
        " must be contiguous ", list(shape), " ", dtype_name(dtype), ", got ", describe(tensor));
}

}  // namespace rtp_mm
