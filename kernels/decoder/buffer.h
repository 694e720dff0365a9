// Scratch memory that grows and stays: an allocation per layer and token would cost page faults as long as the work.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

#include "check.h"

namespace pio::decoder {

class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(memory_); }

  // At least `bytes`, at a multiple of 64; what was in it is lost when it has to grow.
  Address take(int64_t bytes) {
    if (bytes > size_) {
      release();
      const auto rounded = static_cast<size_t>((bytes + 63) / 64 * 64);
      memory_ = std::aligned_alloc(64, rounded);
      if (!memory_) throw std::bad_alloc();
      size_ = static_cast<int64_t>(rounded);
    }
    return reinterpret_cast<Address>(memory_);
  }
  int64_t size() const { return size_; }
  void release() {
    std::free(memory_);
    memory_ = nullptr;
    size_ = 0;
  }

 private:
  void* memory_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace pio::decoder
