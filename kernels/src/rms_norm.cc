// Residual addition and RMSNorm of rows in one pass over memory. Rounds where torch does: the sum, the normalized
// value and its product with the weight are each kept in the element type; the variance is float32.
#ifdef PIO_ISA
#include "simd/kept.inc"
namespace pio::PIO_ISA {

template <class T>
void rms_norm_row(const RmsNorm& a, int64_t row) {
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
  const T* weight = static_cast<const T*>(a.weight);
  T* out = static_cast<T*>(a.out) + row * a.width;
  if (a.residual) {
    const T* residual = static_cast<const T*>(a.residual) + row * a.width;
    T* total = static_cast<T*>(a.sum) + row * a.width;
    for (int64_t i = 0; i < a.width; i += 16) {
      const int n = static_cast<int>(a.width - i < 16 ? a.width - i : 16);
      store_as_n(total + i, add(load_as_n(x + i, n), load_as_n(residual + i, n)), n);
    }
    x = total;
  }
  const F32 inverse = set(inverse_rms(x, a.width, a.eps));
  int64_t i = 0;
  for (; i + 16 <= a.width; i += 16) store_as(out + i, mul(load_as(weight + i), kept(x, mul(load_as(x + i), inverse))));
  if (i < a.width) {
    const int n = static_cast<int>(a.width - i);
    store_as_n(out + i, mul(load_as_n(weight + i, n), kept(x, mul(load_as_n(x + i, n), inverse))), n);
  }
}

void rms_norm_rows(const RmsNorm& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    a.dtype == Dtype::f32 ? rms_norm_row<float>(a, row) : rms_norm_row<uint16_t>(a, row);
}

}  // namespace pio::PIO_ISA
#else
#include "check.h"
#include "piece.h"

namespace pio {
struct RmsNorm {
  const void *x, *residual, *weight;
  void *sum, *out;
  int64_t width, x_stride;  // elements
  float eps;
  Dtype dtype;
};
}  // namespace pio
#define PIO_FILE "src/rms_norm.cc"
#include "foreach_isa.h"

namespace pio {

PIO_TABLE(rms_norm_rows)

// out[r] = weight * h[r] / rms(h[r]) with h = x, or h = x + residual, which is then written to sum.
// x: [rows, width] with x_stride elements between rows; residual, sum, out: [rows, width] dense; weight: [width].
// residual and sum are both there or both 0.
void rms_norm(Address x, Address residual, Address weight, Address sum, Address out, int64_t rows, int64_t width,
              int64_t x_stride, float eps, int dtype, int threads) {
  const Dtype type = require_dtype(dtype, "rms_norm");
  if (rows == 0) return;  // an empty tensor has no address
  const size_t alignment = size_of(type);
  require_address(x, alignment, "rms_norm", "x");
  require_address(weight, alignment, "rms_norm", "weight");
  require_address(out, alignment, "rms_norm", "out");
  require((residual == 0) == (sum == 0), "rms_norm: residual and sum go together");
  require(rows >= 0 && width > 0 && x_stride >= width, "rms_norm: needs rows >= 0, width > 0, x_stride >= width");
  const RmsNorm a{reinterpret_cast<const void*>(x),
                  reinterpret_cast<const void*>(residual),
                  reinterpret_cast<const void*>(weight),
                  reinterpret_cast<void*>(sum),
                  reinterpret_cast<void*>(out),
                  width,
                  x_stride,
                  eps,
                  type};
  const int64_t grain = std::max<int64_t>(1, kPieceBytes / (width * static_cast<int64_t>(alignment)));
  parallel_for(rows, grain, threads, [&](int64_t begin, int64_t end) { PIO_CALL(rms_norm_rows)(a, begin, end); });
}

}  // namespace pio
#endif
