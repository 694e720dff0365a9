// linear over many bf16 rows (wide.h).
#pragma once
#include <cstdint>
#include <vector>

#include "wide.h"

namespace pio {

struct WideTarget {
  Packed weight;
  const void* bias;  // or null
  void* out;         // [m, weight.rows]
};

// x [m, cols] times every target, all bf16; only where wide_in_use().
void wide_linear(const uint16_t* x, int64_t m, int64_t cols, const std::vector<WideTarget>& targets, int threads);

}  // namespace pio
