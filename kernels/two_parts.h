// Floats as integers of 15 bits in two int8 parts: v = scale (128 hi + lo), |hi| <= 127, |lo| <= 64.
#pragma once

namespace pio {

constexpr float kIntegers = 127.0f * 128.0f;  // the largest of them

}  // namespace pio
