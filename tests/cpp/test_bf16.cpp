// The kernels of bfloat16s, and products of bytes by AMX, on every instruction set, under AddressSanitizer and
// UndefinedBehaviorSanitizer: against naive loops, and against each other to the bit, AMX's against its emulation.
// Prints how AVX-512 BF16 and AMX were run.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "check.h"
#include "check_attention.h"
#include "check_int8.h"
#include "check_pointwise.h"
#include "cpu/packed_linear.h"
#include "missing_instructions.h"
#include "random_data.h"

namespace rtp_mm {
namespace {

constexpr double kHalfUnit = 0x1p-8;               // of a bfloat16's last place, relative to it
constexpr double kAttentionError = 6 * kHalfUnit;  // q, k and probabilities are rounded, scores are a few units wide

std::vector<BFloat16> pack(const std::vector<BFloat16>& weight, const PanelLayout& layout, int64_t k) {
  const int64_t rows = layout.parts * layout.width, depth = packed_depth<BFloat16Pair>(k);
  std::vector<BFloat16> padded(rows * depth * 2);
  for (int64_t row = 0; row < rows; ++row) std::copy_n(weight.data() + row * k, k, padded.data() + row * depth * 2);
  std::vector<BFloat16> panels(layout.panels() * depth * layout.panel() * 2);
  for (int64_t panel = 0; panel < layout.panels(); ++panel) {
    pack_linear_panel(reinterpret_cast<const BFloat16Pair*>(padded.data()), layout, depth, panel,
                      reinterpret_cast<BFloat16Pair*>(panels.data()) + panel * depth * layout.panel());
  }
  return panels;
}

struct Layer {
  int64_t m, k, width;
  Activation activation;
  bool is_apart = false;  // rows of x and of the output, with something between
};

// The same layer on every instruction set: added to a residual, and rounded to bfloat16. Returns the sums of the last.
std::vector<float> test_linear(const std::vector<Isa>& isas, const Layer& layer) {
  const auto& [m, k, width, activation, is_apart] = layer;
  const PanelLayout layout{width, activation == Activation::kSiluGate ? 2 : 1};
  constexpr BFloat16 kBetween{0x7fc0};  // NaN
  const int64_t x_stride = is_apart ? linear_row_stride(Isa::kAmx, k) : k, out_stride = width + 5 * is_apart;
  std::vector<BFloat16> x = random_floats<BFloat16>(m * x_stride);
  for (int64_t i = 0; i < m * x_stride; ++i) {
    if (i % x_stride >= k) x[i] = kBetween;
  }
  const std::vector<BFloat16> weight = random_floats<BFloat16>(layout.parts * width * k);
  const std::vector<float> bias = random_floats<float>(layout.parts * width),
                           residual = random_floats<float>(m * width);
  const std::vector<BFloat16> panels = pack(weight, layout, k);
  std::vector<float> sums_before;
  for (const Isa isa : isas) {
    const auto run = [&]<class Out>(const BFloat16* rows, int64_t count, Out* out, int threads) {
      constexpr bool kIsAdded = std::is_same_v<Out, float>;
      const PackedLinear<BFloat16Pair, const BFloat16*, Out> job{
          rows,        reinterpret_cast<const BFloat16Pair*>(panels.data()),
          nullptr,     nullptr,
          bias.data(), out,
          width,       count,
          k,           layout,
          activation,  kIsAdded,
          isa,         1,
          x_stride,    kIsAdded ? width : out_stride};
      std::atomic<int64_t> next_tile = 0;
      std::vector<std::thread> pool;
      for (int i = 0; i < threads; ++i) pool.emplace_back([&] { job.run(next_tile); });
      for (std::thread& thread : pool) thread.join();
    };
    std::vector<float> sums = residual;
    std::vector<BFloat16> rounded(m * out_stride, kBetween);
    run(x.data(), m, sums.data(), 2);
    run(x.data(), m, rounded.data(), 2);

    // The last row alone has the same bits.
    std::vector<BFloat16> last(width);
    run(x.data() + (m - 1) * x_stride, 1, last.data(), 1);
    CHECK(std::memcmp(last.data(), rounded.data() + (m - 1) * out_stride, width * sizeof(BFloat16)) == 0);

    // Products are exact and added in one order: without an activation, every instruction set has the same bits.
    if (activation == Activation::kNone && !sums_before.empty()) CHECK(sums == sums_before);
    sums_before = sums;

    for (int64_t i = 0; i < m * width; ++i) {
      double y[2] = {}, magnitude = 1;
      for (int64_t part = 0; part < layout.parts; ++part) {
        const int64_t row = part * width + i % width;
        y[part] = bias[row];
        for (int64_t l = 0; l < k; ++l) {
          const double term = double{to_float(x[i / width * x_stride + l])} * to_float(weight[row * k + l]);
          y[part] += term, magnitude += std::abs(term);
        }
      }
      const double exact = activation == Activation::kSiluGate ? y[0] / (1 + std::exp(-y[0])) * y[1]
                           : activation == Activation::kGelu   ? y[0] / 2 * std::erfc(-y[0] / std::sqrt(2.0))
                                                               : y[0];
      const double allowed = 1e-6 * magnitude * (1 + std::abs(y[1]));
      CHECK(std::abs(sums[i] - residual[i] - exact) <= allowed);
      const BFloat16 found = rounded[i / width * out_stride + i % width];
      CHECK(std::abs(to_float(found) - exact) <= allowed + kHalfUnit * std::abs(exact));
    }
    for (int64_t i = 0; i < m * out_stride; ++i) CHECK(i % out_stride < width || rounded[i].bits == kBetween.bits);
  }
  return sums_before;
}

void test_attention(Isa isa) {
  test_packed_attention<BFloat16>(isa, {0, 1, 1, 130, 160}, 2, 10, kAttentionError);
  test_packed_attention<BFloat16>(isa, {0, 161}, 1, 80, kAttentionError);
  test_packed_attention<BFloat16>(isa, {0, 40}, 1, 128, kAttentionError);
  // Scores of 50 are off by 0.1; answers would be off by their own size.
  test_packed_attention<BFloat16>(isa, {0, 272}, 1, 10, 0.3, 8);
}

#ifdef __x86_64__
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// What AMX multiplies, and the sums, which have an order of their own.
std::vector<std::vector<float>> test_amx() {
  generator.seed(1);
  test_attention(Isa::kAmx);
  test_int8_linear(Isa::kAmx, 1, 1, 1);
  test_int8_linear(Isa::kAmx, 50, 1030, 70);
  test_int8_linear(Isa::kAmx, 20, 2600, 260);  // in two steps of k, two panels a tile
  test_int8_linear(Isa::kAmx, 40, 100, 520);   // two panels a tile
  return {test_linear({Isa::kAmx}, {1, 1, 1, Activation::kNone}),
          test_linear({Isa::kAmx}, {29, 257, 33, Activation::kGelu}),
          test_linear({Isa::kAmx}, {48, 96, 37, Activation::kSiluGate}),     // whose rows are read where they are
          test_linear({Isa::kAmx}, {40, 40, 260, Activation::kSiluGate}),    // two panels a tile
          test_linear({Isa::kAmx}, {500, 40, 70, Activation::kNone}),        // in two blocks
          test_linear({Isa::kAmx}, {50, 128, 70, Activation::kGelu, true}),  // read where they are, but for the last 18
          test_linear({Isa::kAmx}, {400, 64, 70, Activation::kNone, true}),  // in two blocks
          test_linear({Isa::kAmx}, {70, 2624, 260, Activation::kNone, true}),  // in three steps of k
          test_linear({Isa::kAmx}, {33, 40, 70, Activation::kNone, true}),     // whose columns are not whole tiles
          test_linear({Isa::kAmx}, {70, 2600, 260, Activation::kNone})};       // in three steps of k, two panels a tile
}
#endif

}  // namespace
}  // namespace rtp_mm

int main() {
  using namespace rtp_mm;
#ifdef __x86_64__
  std::vector<std::vector<float>> amx_sums;
  if (has_avx512()) {  // before `best_isa` asks for AMX
    emulate_missing_instructions();
    amx_sums = test_amx();
  }
#endif
  std::vector<Isa> isas;
  for (int level = 0; level <= static_cast<int>(best_isa()); ++level) isas.push_back(Isa{level});
#ifdef __x86_64__
  const bool has_amx = isas.back() == Isa::kAmx;
  if (has_amx) {
    isas.pop_back();
    CHECK(emulated_amx_instructions > 0);
    CHECK(test_amx() == amx_sums);
  }
  const bool has_bf16 = isas.back() == Isa::kAvx512Bf16;
  if (!has_bf16 && has_avx512()) isas.push_back(Isa::kAvx512Bf16);
  if (has_avx512()) {
    std::printf("AVX-512 BF16: %s, AMX: %s\n", has_bf16 ? "run" : "emulated", has_amx ? "run" : "emulated");
  } else {
    std::puts("no AVX-512");
  }
#endif
  test_linear(isas, {1, 1, 1, Activation::kNone});
  test_linear(isas, {29, 257, 33, Activation::kGelu});
  test_linear(isas, {230, 7, 37, Activation::kSiluGate});
  test_linear(isas, {40, 301, 70, Activation::kNone});
  test_linear(isas, {5, 600, 150, Activation::kNone});
  test_linear(isas, {40, 64, 70, Activation::kGelu, true});
  for (const Isa isa : isas) {
    test_attention(isa);
    test_pointwise<BFloat16>(isa);
  }
}
