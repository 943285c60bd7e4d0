// The pointwise kernels against naive loops in double, for elements of any type. A row alone has the same bits.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <type_traits>
#include <vector>

#include "check.h"
#include "cpu/pointwise.h"
#include "random_data.h"

namespace rtp_mm {

template <class Element>
void check_close(Element found, double exact, double magnitude) {
  const double rounding = std::is_same_v<Element, BFloat16> ? 0x1p-8 * std::abs(exact) : 0;
  CHECK(std::abs(to_float(found) - exact) <= 2e-6 * magnitude + rounding);
}

template <class Element>
void check_same(const Element* a, const Element* b, int64_t count) {
  CHECK(std::memcmp(a, b, count * sizeof(Element)) == 0);
}

template <class Delta, class Out>
void test_add_norm(Isa isa, bool is_layer_norm, bool has_delta, int64_t rows, int64_t dim) {
  const std::vector<float> before = random_floats<float>(rows * dim), weight = random_floats<float>(dim),
                           bias = random_floats<float>(dim);
  const std::vector<Delta> delta = random_floats<Delta>(has_delta ? rows * dim : 0);
  std::vector<float> x = before;
  const int64_t out_stride = dim + 3;
  std::vector<Out> out(rows * out_stride), alone(dim);
  const AddNorm<Delta, Out> job{.x = x.data(),
                                .delta = has_delta ? delta.data() : nullptr,
                                .weight = weight.data(),
                                .bias = is_layer_norm ? bias.data() : nullptr,
                                .dim = dim,
                                .eps = 1e-6f,
                                .out = out.data(),
                                .isa = isa,
                                .out_stride = out_stride};
  job.run(0, rows);
  for (int64_t i = 0; i < rows * dim; ++i) CHECK(x[i] == before[i] + (has_delta ? to_float(delta[i]) : 0.0f));

  std::vector<float> last(before.end() - dim, before.end());
  AddNorm<Delta, Out> last_row = job;
  last_row.x = last.data(), last_row.out = alone.data();
  if (has_delta) last_row.delta += (rows - 1) * dim;
  last_row.run(0, 1);
  check_same(alone.data(), out.data() + (rows - 1) * out_stride, dim);

  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = dim; i < out_stride; ++i) CHECK(to_float(out[r * out_stride + i]) == 0);
    double mean = 0, squares = 0;
    for (int64_t i = 0; i < dim && is_layer_norm; ++i) mean += double{x[r * dim + i]} / dim;
    for (int64_t i = 0; i < dim; ++i) squares += std::pow(x[r * dim + i] - mean, 2);
    for (int64_t i = 0; i < dim; ++i) {
      const double scaled = (x[r * dim + i] - mean) / std::sqrt(squares / dim + 1e-6) * weight[i];
      const double shift = is_layer_norm ? bias[i] : 0;
      check_close(out[r * out_stride + i], scaled + shift, std::abs(weight[i]) + std::abs(scaled) + std::abs(shift));
    }
  }
}

// Rows one after another, or heads.
template <class Element>
void test_rotate_qk(Isa isa, bool is_by_head, int64_t rows, int64_t heads, int64_t dim) {
  const int64_t half = dim / 2;
  const std::vector<Element> before = random_floats<Element>(rows * 3 * heads * dim);
  const std::vector<float> cos = random_floats<float>(rows * half), sin = random_floats<float>(rows * half);
  std::vector<Element> qkv = before, in_parts = before;
  RotateQk<Element> job{.qkv = qkv.data(),
                        .row_stride = is_by_head ? dim : 3 * heads * dim,
                        .part_stride = is_by_head ? heads * rows * dim : heads * dim,
                        .head_stride = is_by_head ? rows * dim : dim,
                        .cos = cos.data(),
                        .sin = sin.data(),
                        .heads = heads,
                        .dim = dim,
                        .isa = isa};
  job.run(0, rows);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < 3 * heads; ++i) {
      const int64_t at = r * job.row_stride + i / heads * job.part_stride + i % heads * job.head_stride;
      for (int64_t j = 0; j < half; ++j) {
        const double x = to_float(before[at + j]), y = to_float(before[at + half + j]);
        const bool is_value = i >= 2 * heads;
        const double c = is_value ? 1 : cos[r * half + j], s = is_value ? 0 : sin[r * half + j];
        check_close(qkv[at + j], x * c - y * s, std::abs(x * c) + std::abs(y * s));
        check_close(qkv[at + half + j], y * c + x * s, std::abs(y * c) + std::abs(x * s));
      }
    }
  }
  job.qkv = in_parts.data();
  for (int64_t r = rows; r-- > 0;) job.run(r, r + 1);
  check_same(in_parts.data(), qkv.data(), rows * 3 * heads * dim);
}

template <class Element>
void test_activations(Isa isa, int64_t rows, int64_t dim) {
  std::vector<Element> before = random_floats<Element>(rows * 2 * dim);
  constexpr float kFar[] = {-1e30f, -200.0f, -88.0f, -20.0f, -6.0f, -4.0f, 0.0f, 4.0f, 88.0f, 1e30f};
  for (size_t i = 0; i < std::size(kFar) && i < static_cast<size_t>(dim); ++i) narrow(kFar[i], &before[i]);
  for (const Activation activation : {Activation::kGelu, Activation::kQuickGelu}) {
    std::vector<Element> x = before, last(before.end() - 2 * dim, before.end());
    Activate<Element>{x.data(), 2 * dim, activation, isa}.run(0, rows);
    Activate<Element>{last.data(), 2 * dim, activation, isa}.run(0, 1);
    check_same(last.data(), x.data() + (rows - 1) * 2 * dim, 2 * dim);
    for (int64_t i = 0; i < rows * 2 * dim; ++i) {
      const double y = to_float(before[i]);
      const bool is_gelu = activation == Activation::kGelu;
      check_close(x[i], is_gelu ? y / 2 * std::erfc(-y / std::sqrt(2.0)) : y / (1 + std::exp(-1.702 * y)), std::abs(y));
    }
  }
  std::vector<Element> out(rows * dim), alone(dim);
  SiluGate<Element>{before.data(), dim, out.data(), isa}.run(0, rows);
  SiluGate<Element>{before.data() + (rows - 1) * 2 * dim, dim, alone.data(), isa}.run(0, 1);
  check_same(alone.data(), out.data() + (rows - 1) * dim, dim);
  for (int64_t i = 0; i < rows * dim; ++i) {
    const int64_t place = i / dim * 2 * dim + i % dim;
    const double gate = to_float(before[place]), up = to_float(before[place + dim]);
    check_close(out[i], gate / (1 + std::exp(-gate)) * up, std::abs(gate * up));
  }
}

// Delta and out of one type; the other combinations differ in nothing else.
template <class Element>
void test_pointwise(Isa isa) {
  for (const bool is_layer_norm : {false, true}) {
    for (const bool has_delta : {false, true}) {
      test_add_norm<Element, Element>(isa, is_layer_norm, has_delta, 3, 1);
      test_add_norm<Element, Element>(isa, is_layer_norm, has_delta, 5, 83);
      test_add_norm<Element, Element>(isa, is_layer_norm, has_delta, 2, 1280);
    }
  }
  for (const bool is_by_head : {false, true}) {
    test_rotate_qk<Element>(isa, is_by_head, 3, 1, 2);
    test_rotate_qk<Element>(isa, is_by_head, 37, 3, 80);
    test_rotate_qk<Element>(isa, is_by_head, 5, 2, 118);
  }
  test_activations<Element>(isa, 3, 1);
  test_activations<Element>(isa, 5, 83);
  test_activations<Element>(isa, 2, 96);
}

}  // namespace rtp_mm
