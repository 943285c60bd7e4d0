#include "cpu/pointwise.h"

#include <algorithm>
#include <cmath>

#include "cpu/rotate.h"
#include "cpu/simd.h"

namespace rtp_mm {
namespace {

// A row is read from memory once; the later loops find it in L1.
struct AddNormRows {
  template <class Arch, class Delta>
  RTP_MM_INLINE static void add(const Delta* delta, int64_t dim, float* x) {
    using Lanes = Wide<Arch, Delta>;
    int64_t i = 0;
    for (; i + Lanes::kLanes <= dim; i += Lanes::kLanes) at<Lanes>(x + i) += widened<Lanes>(delta + i);
    for (; i < dim; ++i) x[i] += widened(delta[i]);
  }

  struct Itself {
    template <class Value>
    RTP_MM_INLINE Value operator()(const Value& value) const {
      return value;
    }
  };

  struct SquaredFrom {
    float centre;

    template <class Value>
    RTP_MM_INLINE Value operator()(const Value& value) const {
      return (value - centre) * (value - centre);
    }
  };

  // The mean of what `term` makes of each x, a vector of them or one. Several sums at once: an addition takes four
  // cycles, and would have to wait for the one before it.
  template <class Arch, class Term>
  RTP_MM_INLINE static float mean(const float* x, int64_t dim, const Term& term) {
    constexpr int kSums = 4;
    Vector<Arch> sums[kSums] = {};
    int64_t i = 0;
    for (; i + kSums * Arch::kLanes <= dim; i += kSums * Arch::kLanes) {
      for (int s = 0; s < kSums; ++s) sums[s] += term(at<Arch>(x + i + s * Arch::kLanes));
    }
    for (; i + Arch::kLanes <= dim; i += Arch::kLanes) sums[0] += term(at<Arch>(x + i));
    float total = sum<Arch>(sums[0] + sums[1] + (sums[2] + sums[3]));
    for (; i < dim; ++i) total += term(x[i]);
    return total / static_cast<float>(dim);
  }

  template <class Arch, class Out>
  RTP_MM_INLINE static void scale(const float* x, float centre, float factor, const float* weight, const float* bias,
                                  int64_t dim, Out* out) {
    using Lanes = Wide<Arch, Out>;
    int64_t i = 0;
    for (; i + Lanes::kLanes <= dim; i += Lanes::kLanes) {
      const Vector<Lanes> scaled = (at<Lanes>(x + i) - centre) * factor * at<Lanes>(weight + i);
      narrow<Lanes>(bias ? scaled + at<Lanes>(bias + i) : scaled, out + i);
    }
    for (; i < dim; ++i) {
      const float scaled = (x[i] - centre) * factor * weight[i];
      narrow(bias ? scaled + bias[i] : scaled, out + i);
    }
  }

  template <class Arch, class Delta, class Out>
  RTP_MM_INLINE static void run(const AddNorm<Delta, Out>& job, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float* x = job.x + r * job.dim;
      if (job.delta) add<Arch>(job.delta + r * job.dim, job.dim, x);
      const float centre = job.bias ? mean<Arch>(x, job.dim, Itself{}) : 0.0f;
      const float factor = 1 / std::sqrt(mean<Arch>(x, job.dim, SquaredFrom{centre}) + job.eps);
      scale<Arch>(x, centre, factor, job.weight, job.bias, job.dim, job.out + r * job.out_stride);
    }
  }
};

struct RotateRows {
  static constexpr int64_t kBlock = 16;  // rows of a head at a time, whichever of rows and heads are closer in memory

  template <class Arch, class Element>
  RTP_MM_INLINE static void run(const RotateQk<Element>& job, int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kBlock) {
      const float *cos = job.cos + first * (job.dim / 2), *sin = job.sin + first * (job.dim / 2);
      for (int64_t i = 0; i < 2 * job.heads; ++i) {
        Element* head =
            job.qkv + first * job.row_stride + i / job.heads * job.part_stride + i % job.heads * job.head_stride;
        Rotate::run<Arch, Element>(head, job.row_stride, cos, sin, std::min(kBlock, end - first), job.dim, 1.0f, head,
                                   job.row_stride);
      }
    }
  }
};

// 2 * kLanes consecutive elements, for work that does not ask where an element stands: of bfloat16s one vector has
// those in the lower halves of their words, the other those in the upper halves, which takes no shuffles.
template <class Arch>
struct Two {
  static constexpr int64_t kCount = 2 * Arch::kLanes;

  Vector<Arch> first, second;

  RTP_MM_INLINE static Two load(const float* p) { return {at<Arch>(p), at<Arch>(p + Arch::kLanes)}; }

  RTP_MM_INLINE static Two load(const BFloat16* p) {
    const PairVector<Arch> words = *reinterpret_cast<const Words*>(p);
    return {reinterpret_cast<Vector<Arch>>(words << 16), reinterpret_cast<Vector<Arch>>(words & 0xffff0000)};
  }

  // Fewer, and zeros.
  template <class Element>
  RTP_MM_INLINE static Two load(const Element* p, int64_t count) {
    Element elements[kCount] = {};
    for (int64_t i = 0; i < count; ++i) elements[i] = p[i];
    return load(elements);
  }

  RTP_MM_INLINE void store(float* p) const {
    at<Arch>(p) = first;
    at<Arch>(p + Arch::kLanes) = second;
  }

  RTP_MM_INLINE void store(BFloat16* p) const {
    *reinterpret_cast<Words*>(p) = rounded<Arch>(first) >> 16 | (rounded<Arch>(second) & 0xffff0000);
  }

  // Fewer.
  template <class Element>
  RTP_MM_INLINE void store(Element* p, int64_t count) const {
    Element elements[kCount];
    store(elements);
    for (int64_t i = 0; i < count; ++i) p[i] = elements[i];
  }

 private:
  typedef BFloat16Pair Words __attribute__((vector_size(Arch::kLanes * sizeof(BFloat16Pair)), aligned(2), may_alias));
};

template <class Arch, class F, class... Inputs>
RTP_MM_INLINE Two<Arch> both(const Inputs&... x) {
  return {F::template of<Arch>(x.first...), F::template of<Arch>(x.second...)};
}

// out = F::of(inputs...), element by element. out may be an input.
template <class Arch, class F, class Element, class... Inputs>
RTP_MM_INLINE void map(int64_t count, Element* out, const Inputs*... inputs) {
  using Vectors = Two<Arch>;
  int64_t i = 0;
  for (; i + Vectors::kCount <= count; i += Vectors::kCount) both<Arch, F>(Vectors::load(inputs + i)...).store(out + i);
  const int64_t rest = count - i;
  if (rest) both<Arch, F>(Vectors::load(inputs + i, rest)...).store(out + i, rest);
}

template <Activation kActivation, class Element>
struct ActivateRows {
  template <class Arch>
  RTP_MM_INLINE static Vector<Arch> of(Vector<Arch> x) {
    return activated<Arch, Element>(x, kActivation);
  }

  template <class Arch>
  RTP_MM_INLINE static void run(const Activate<Element>& job, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      Element* x = job.x + r * job.dim;
      map<Arch, ActivateRows>(job.dim, x, x);
    }
  }
};

template <class Element>
struct SiluGateRows {
  template <class Arch>
  RTP_MM_INLINE static Vector<Arch> of(Vector<Arch> gate, Vector<Arch> up) {
    return silu_gate<Arch, Element>(gate, up);
  }

  template <class Arch>
  RTP_MM_INLINE static void run(const SiluGate<Element>& job, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const Element* gate = job.gate_up + 2 * r * job.dim;
      map<Arch, SiluGateRows>(job.dim, job.out + r * job.dim, gate, gate + job.dim);
    }
  }
};

}  // namespace

template <class Delta, class Out>
void AddNorm<Delta, Out>::run(int64_t begin, int64_t end) const {
  rtp_mm::run<AddNormRows>(isa, *this, begin, end);
}

template <class Element>
void RotateQk<Element>::run(int64_t begin, int64_t end) const {
  rtp_mm::run<RotateRows>(isa, *this, begin, end);
}

template <class Element>
void Activate<Element>::run(int64_t begin, int64_t end) const {
  if (activation == Activation::kGelu) {
    rtp_mm::run<ActivateRows<Activation::kGelu, Element>>(isa, *this, begin, end);
  } else {
    rtp_mm::run<ActivateRows<Activation::kQuickGelu, Element>>(isa, *this, begin, end);
  }
}

template <class Element>
void SiluGate<Element>::run(int64_t begin, int64_t end) const {
  rtp_mm::run<SiluGateRows<Element>>(isa, *this, begin, end);
}

template struct AddNorm<float, float>;
template struct AddNorm<float, BFloat16>;
template struct AddNorm<BFloat16, float>;
template struct AddNorm<BFloat16, BFloat16>;
template struct RotateQk<float>;
template struct RotateQk<BFloat16>;
template struct Activate<float>;
template struct Activate<BFloat16>;
template struct SiluGate<float>;
template struct SiluGate<BFloat16>;

}  // namespace rtp_mm
