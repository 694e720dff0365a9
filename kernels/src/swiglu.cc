// SiLU(gate) * up, rounded where torch rounds: SiLU is kept in the element type, then multiplied.
#ifdef PIO_ISA
#include "simd/kept.inc"
namespace pio::PIO_ISA {

template <class T>
void swiglu_row(const Swiglu& a, int64_t row) {
  const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride;
  const T* up = static_cast<const T*>(a.up) + row * a.up_stride;
  T* out = static_cast<T*>(a.out) + row * a.width;
  int64_t i = 0;
  for (; i + 16 <= a.width; i += 16) store_as(out + i, mul(kept(gate, silu(load_as(gate + i))), load_as(up + i)));
  if (i < a.width) {
    const int n = static_cast<int>(a.width - i);
    store_as_n(out + i, mul(kept(gate, silu(load_as_n(gate + i, n))), load_as_n(up + i, n)), n);
  }
}

void swiglu_rows(const Swiglu& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    a.dtype == Dtype::f32 ? swiglu_row<float>(a, row) : swiglu_row<uint16_t>(a, row);
}

}  // namespace pio::PIO_ISA
#else
#include "check.h"
#include "piece.h"

namespace pio {
struct Swiglu {
  const void *gate, *up;
  void* out;
  int64_t width, gate_stride, up_stride;  // elements
  Dtype dtype;
};
}  // namespace pio
#define PIO_FILE "src/swiglu.cc"
#include "foreach_isa.h"

namespace pio {

PIO_TABLE(swiglu_rows)

// out = silu(gate) * up. gate, up: [rows, width] with their strides in elements between rows; out: dense.
void swiglu(Address gate, Address up, Address out, int64_t rows, int64_t width, int64_t gate_stride, int64_t up_stride,
            int dtype, int threads) {
  const Dtype type = require_dtype(dtype, "swiglu");
  if (rows == 0) return;  // an empty tensor has no address
  require_address(gate, size_of(type), "swiglu", "gate");
  require_address(up, size_of(type), "swiglu", "up");
  require_address(out, size_of(type), "swiglu", "out");
  require(rows >= 0 && width > 0 && gate_stride >= width && up_stride >= width,
          "swiglu: needs rows >= 0, width > 0, strides >= width");
  const Swiglu a{reinterpret_cast<const void*>(gate),
                 reinterpret_cast<const void*>(up),
                 reinterpret_cast<void*>(out),
                 width,
                 gate_stride,
                 up_stride,
                 type};
  const int64_t grain = std::max<int64_t>(1, kPieceBytes / (width * static_cast<int64_t>(size_of(type))));
  parallel_for(rows, grain, threads, [&](int64_t begin, int64_t end) { PIO_CALL(swiglu_rows)(a, begin, end); });
}

}  // namespace pio
#endif
