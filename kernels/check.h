// What every kernel checks before it reads a pointer. The Python face has already compared dtypes, shapes and strides
// of tensors (optimizations/native/checks.py); this is the second line, for callers that hand over bare addresses.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace pio {

using Address = uintptr_t;  // of a tensor's first element, as Tensor.data_ptr() gives it; 0 where a tensor is optional

enum class Dtype : int { f32 = 0, bf16 = 1 };

inline void require(bool ok, const std::string& what) {
  if (!ok) throw std::invalid_argument(what);
}

// An address that must be there and be a multiple of `alignment` bytes.
inline void require_address(Address p, size_t alignment, const char* kernel, const char* name) {
  if (p == 0) throw std::invalid_argument(std::string(kernel) + ": " + name + " has no memory (address 0)");
  if (p % alignment != 0)
    throw std::invalid_argument(std::string(kernel) + ": " + name + " must start at a multiple of " +
                                std::to_string(alignment) + " bytes, it starts at " + std::to_string(p % alignment) +
                                " bytes past one");
}

inline Dtype require_dtype(int dtype, const char* kernel) {
  require(dtype == 0 || dtype == 1,
          std::string(kernel) + ": dtype code must be 0 (float32) or 1 (bfloat16), got " + std::to_string(dtype));
  return static_cast<Dtype>(dtype);
}

inline size_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

}  // namespace pio
