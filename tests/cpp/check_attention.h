// Attention against a naive loop in float64, and against itself cut into tasks.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "check.h"
#include "cpu/packed_attention.h"
#include "cpu/simd.h"
#include "random_data.h"

namespace rtp_mm {

// Values are of size 1; `error` is how far an answer may be off. Keys grow up to `growth` times as large, and scores
// with them, so that the largest so far is left far behind.
template <class Element>
void test_packed_attention(Isa isa, const std::vector<int32_t>& cu_seqlens, int64_t heads, int64_t dim, double error,
                           float growth = 1) {
  const int64_t n = cu_seqlens.back(), half = dim / 2;
  std::vector<Element> qkv = random_floats<Element>(n * 3 * heads * dim);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < heads * dim; ++j) {
      Element& key = qkv[(i * 3 + 1) * heads * dim + j];
      narrow(static_cast<float>(to_float(key)) * (1 + (growth - 1) * i / n), &key);
    }
  }
  const std::vector<float> angles = random_floats<float>(n * half);
  std::vector<float> cos, sin;
  for (float angle : angles) cos.push_back(std::cos(angle)), sin.push_back(std::sin(angle));
  const int64_t out_stride = heads * dim + 3;
  std::vector<Element> out(n * out_stride), at_once(out);
  PackedAttention<Element> job{.qkv = qkv.data(),
                               .row_stride = 3 * heads * dim,
                               .part_stride = heads * dim,
                               .head_stride = dim,
                               .cos = cos.data(),
                               .sin = sin.data(),
                               .cu_seqlens = cu_seqlens.data(),
                               .out = out.data(),
                               .segments = static_cast<int64_t>(cu_seqlens.size()) - 1,
                               .heads = heads,
                               .dim = dim,
                               .isa = isa,
                               .out_stride = out_stride};
  for (int64_t task = job.tasks(); task-- > 0;) job.run(task, task + 1);
  job.out = at_once.data();
  job.run(0, job.tasks());
  CHECK(std::memcmp(at_once.data(), out.data(), out.size() * sizeof(Element)) == 0);

  for (int64_t i = 0; i < n * out_stride; ++i) CHECK(i % out_stride < heads * dim || to_float(out[i]) == 0);

  const auto element = [&](int64_t part, int64_t head, int64_t i, int64_t j) -> double {
    return to_float(qkv[((i * 3 + part) * heads + head) * dim + j]);
  };
  const auto rotated = [&](int64_t part, int64_t head, int64_t i) {
    std::vector<double> result(dim);
    for (int64_t j = 0; j < half; ++j) {
      const double c = cos[i * half + j], s = sin[i * half + j];
      const double x = element(part, head, i, j), y = element(part, head, i, half + j);
      result[j] = x * c - y * s;
      result[half + j] = y * c + x * s;
    }
    return result;
  };
  for (size_t s = 0; s + 1 < cu_seqlens.size(); ++s) {
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t i = cu_seqlens[s]; i < cu_seqlens[s + 1]; ++i) {
        const std::vector<double> query = rotated(0, head, i);
        std::vector<double> values(dim);
        double sum = 0;
        for (int64_t j = cu_seqlens[s]; j < cu_seqlens[s + 1]; ++j) {
          const std::vector<double> key = rotated(1, head, j);
          double score = 0;
          for (int64_t l = 0; l < dim; ++l) score += query[l] * key[l];
          const double weight = std::exp(score / std::sqrt(dim));
          sum += weight;
          for (int64_t l = 0; l < dim; ++l) values[l] += weight * element(2, head, j, l);
        }
        for (int64_t l = 0; l < dim; ++l) {
          CHECK(std::abs(to_float(out[i * out_stride + head * dim + l]) - values[l] / sum) <= error);
        }
      }
    }
  }
}

}  // namespace rtp_mm
