// GELU in its tanh form, x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), written as x / (1 + e^-2u): one
// exponential, and no cancellation where the tanh is near -1. float32 inside, rounded once, as torch does.
#ifdef PIO_ISA
namespace pio::PIO_ISA {

PIO_INLINE F32 gelu_of(F32 x) {
  // -2 sqrt(2 / pi) x (1 + 0.044715 x^2)
  const F32 cubic = fma(mul(x, x), set(0.044715f), set(1.0f));
  return div(x, add(set(1.0f), exp(mul(mul(x, set(-1.59576912f)), cubic))));
}

template <class T>
void gelu_row(const Gelu& a, int64_t row) {
  const T* x = static_cast<const T*>(a.x) + row * a.stride;
  T* out = static_cast<T*>(a.out) + row * a.width;
  int64_t i = 0;
  for (; i + 16 <= a.width; i += 16) store_as(out + i, gelu_of(load_as(x + i)));
  if (i < a.width) {
    const int n = static_cast<int>(a.width - i);
    store_as_n(out + i, gelu_of(load_as_n(x + i, n)), n);
  }
}

void gelu_rows(const Gelu& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    a.dtype == Dtype::f32 ? gelu_row<float>(a, row) : gelu_row<uint16_t>(a, row);
}

}  // namespace pio::PIO_ISA
#else
#include "check.h"
#include "piece.h"

namespace pio {
struct Gelu {
  const void* x;
  void* out;
  int64_t width, stride;  // elements
  Dtype dtype;
};
}  // namespace pio
#define PIO_FILE "src/gelu.cc"
#include "foreach_isa.h"

namespace pio {

PIO_TABLE(gelu_rows)

// out = gelu(x); x: [rows, width] with `stride` elements between rows; out: dense, may be x itself when x is dense.
void gelu(Address x, Address out, int64_t rows, int64_t width, int64_t stride, int dtype, int threads) {
  const Dtype type = require_dtype(dtype, "gelu");
  if (rows == 0) return;  // an empty tensor has no address
  require_address(x, size_of(type), "gelu", "x");
  require_address(out, size_of(type), "gelu", "out");
  require(rows >= 0 && width > 0 && stride >= width, "gelu: needs rows >= 0, width > 0, stride >= width");
  const Gelu a{reinterpret_cast<const void*>(x), reinterpret_cast<void*>(out), width, stride, type};
  const int64_t grain = std::max<int64_t>(1, kPieceBytes / (width * static_cast<int64_t>(size_of(type))));
  parallel_for(rows, grain, threads, [&](int64_t begin, int64_t end) { PIO_CALL(gelu_rows)(a, begin, end); });
}

}  // namespace pio
#endif
