// A cache of the process, bounded in bytes; the least recently used goes first.

#pragma once

#include <algorithm>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <utility>

namespace rtp_mm {

template <class Key, class Value>
class SharedCache {
 public:
  explicit SharedCache(int64_t most_bytes) : most_bytes_(most_bytes) {}

  // What `make()` returns, a value and its bytes, is kept for the next call.
  template <class Make>
  std::shared_ptr<const Value> get(const Key& key, const Make& make) {
    if (auto value = find(key)) return value;
    auto [made, bytes] = make();  // unlocked: others go on
    auto value = std::make_shared<const Value>(std::move(made));
    const std::lock_guard lock(mutex_);
    entries_.push_front({key, value, bytes});
    bytes_ += bytes;
    for (; bytes_ > most_bytes_; entries_.pop_back()) bytes_ -= entries_.back().bytes;
    return value;
  }

 private:
  struct Entry {
    Key key;
    std::shared_ptr<const Value> value;
    int64_t bytes;
  };

  std::shared_ptr<const Value> find(const Key& key) {
    const std::lock_guard lock(mutex_);
    const auto entry = std::find_if(entries_.begin(), entries_.end(), [&](const Entry& e) { return e.key == key; });
    if (entry == entries_.end()) return nullptr;
    entries_.splice(entries_.begin(), entries_, entry);
    return entry->value;
  }

  const int64_t most_bytes_;
  std::mutex mutex_;
  std::list<Entry> entries_;  // most recently used first
  int64_t bytes_ = 0;
};

}  // namespace rtp_mm
