// Memory from a cache line's beginning on: a vector, or a tile's row, that lies in two lines is loaded as slowly as
// two.

#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace rtp_mm {

// Elements that are given no value have none.
template <class T>
struct LineAllocator {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};

  LineAllocator() = default;
  template <class U>
  LineAllocator(const LineAllocator<U>&) {}

  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kLine)); }
  void deallocate(T* p, size_t) { ::operator delete(p, kLine); }

  template <class U>
  void construct(U* p) {
    ::new (static_cast<void*>(p)) U;
  }

  template <class U>
  bool operator==(const LineAllocator<U>&) const {
    return true;
  }
};

template <class T>
using AlignedVector = std::vector<T, LineAllocator<T>>;

}  // namespace rtp_mm
