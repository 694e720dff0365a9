// The first of the largest values of a row, as torch.argmax finds it: a NaN is larger than everything, -0 equals 0.
//
// The largest value of each block in vectors, then the first place in the first block that has the largest of all.
#ifdef PIO_ISA
namespace pio::PIO_ISA {

PIO_INLINE float value_at(const float* x) { return *x; }
PIO_INLINE float value_at(const uint16_t* x) {
  const uint32_t bits = static_cast<uint32_t>(*x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

struct Largest {
  float value;
  bool nan;
};

// count >= 16; the last vector overlaps the one before it.
template <class T>
PIO_INLINE Largest largest_of(const T* x, int64_t count) {
  constexpr int32_t kInfinity = 0x7F800000;
  F32 most = load_as(x);
  I32 bits = magnitude_bits(most);
  for (int64_t i = 16; i < count; i += 16) {
    const F32 v = load_as(x + std::min(i, count - 16));
    most = max(most, v);
    bits = max(bits, magnitude_bits(v));
  }
  return {largest(most), largest(bits) > kInfinity};
}

template <class T>
PIO_INLINE Largest largest_of_few(const T* x, int64_t count) {
  Largest out{value_at(x), false};
  for (int64_t i = 0; i < count; ++i) {
    const float v = value_at(x + i);
    out.nan |= v != v;
    if (v > out.value) out.value = v;
  }
  return out;
}

template <class T>
int64_t first_largest(const T* x, int64_t width) {
  constexpr int64_t kBlock = 1024;
  int64_t where = 0;
  float most = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < width; i += kBlock) {
    const int64_t count = std::min(kBlock, width - i);
    const Largest found = count < 16 ? largest_of_few(x + i, count) : largest_of(x + i, count);
    if (found.nan) {
      while (value_at(x + i) == value_at(x + i)) ++i;
      return i;
    }
    if (found.value > most) most = found.value, where = i;
  }
  while (value_at(x + where) != most) ++where;
  return where;
}

void argmax_rows(const Argmax& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    a.out[row] = a.dtype == Dtype::f32 ? first_largest(static_cast<const float*>(a.x) + row * a.stride, a.width)
                                       : first_largest(static_cast<const uint16_t*>(a.x) + row * a.stride, a.width);
}

}  // namespace pio::PIO_ISA
#else
#include <limits>

#include "check.h"

namespace pio {
struct Argmax {
  const void* x;
  int64_t* out;
  int64_t width, stride;  // elements
  Dtype dtype;
};
}  // namespace pio
#define PIO_FILE "src/argmax.cc"
#include "foreach_isa.h"

namespace pio {

PIO_TABLE(argmax_rows)

// out [rows] = index of the first largest value of each row; x: [rows, width] with `stride` elements between rows.
void argmax(Address x, Address out, int64_t rows, int64_t width, int64_t stride, int dtype, int threads) {
  const Dtype type = require_dtype(dtype, "argmax");
  if (rows == 0) return;  // an empty tensor has no address
  require_address(x, size_of(type), "argmax", "x");
  require_address(out, sizeof(int64_t), "argmax", "out");
  require(rows >= 0 && width > 0 && stride >= width, "argmax: needs rows >= 0, width > 0, stride >= width");
  const Argmax a{reinterpret_cast<const void*>(x), reinterpret_cast<int64_t*>(out), width, stride, type};
  parallel_for(rows, 1, threads, [&](int64_t begin, int64_t end) { PIO_CALL(argmax_rows)(a, begin, end); });
}

}  // namespace pio
#endif
