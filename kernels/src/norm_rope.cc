// Per-head RMSNorm and rotary position embedding in one pass, written head-major as attention wants it.
// Two rotations: halves (x[i], x[i + d/2]) of Qwen3, and neighbours (x[2i], x[2i+1]) of GLM, whose result torch leaves
// de-interleaved. cos and sin arrive mixed (M-RoPE has happened before): one row of `rope` values per token.
// Every product is kept in the angles' type before the sum, as in the separate torch ops: text decoders have them in
// the element type, Qwen3-VL's vision tower in float32, where nothing is rounded before the result.
#ifdef PIO_ISA
#include "simd/kept.inc"
namespace pio::PIO_ISA {

template <class T, class Angle>
PIO_INLINE void rotate(T* out, const float* first, const float* second, const Angle* cos, const Angle* sin,
                       int64_t half, int64_t second_angle) {
  for (int64_t i = 0; i < half; i += 16) {
    const int n = static_cast<int>(half - i < 16 ? half - i : 16);
    const F32 x = load_n(first + i, n), y = load_n(second + i, n);
    const F32 c = load_as_n(cos + i, n), s = load_as_n(sin + i, n);
    store_as_n(out + i, sub(kept(cos, mul(x, c)), kept(cos, mul(y, s))), n);
    const F32 c2 = load_as_n(cos + second_angle + i, n), s2 = load_as_n(sin + second_angle + i, n);
    store_as_n(out + half + i, add(kept(cos, mul(y, c2)), kept(cos, mul(x, s2))), n);
  }
}

// A head of a.dim values: normalized when there is a weight, the last a.rope of them rotated.
template <class T, class Angle>
void norm_rope_head(const NormRope& a, int64_t batch, int64_t token, int64_t head) {
  const T* x = static_cast<const T*>(a.x) + batch * a.x_batch + token * a.x_token + head * a.dim;
  T* out = static_cast<T*>(a.out) + ((batch * a.heads + head) * a.tokens + token) * a.dim;
  const int64_t angle = batch * a.angle_batch + token * a.rope, plain = a.dim - a.rope, half = a.rope / 2;
  const Angle* cos = static_cast<const Angle*>(a.cos) + angle;
  const Angle* sin = static_cast<const Angle*>(a.sin) + angle;
  alignas(64) float row[kWidest + 16];
  const T* weight = static_cast<const T*>(a.weight);
  const F32 inverse = set(weight ? inverse_rms(x, a.dim, a.eps) : 1.0f);
  for (int64_t i = 0; i < a.dim; i += 16) {
    const int n = static_cast<int>(a.dim - i < 16 ? a.dim - i : 16);
    F32 v = load_as_n(x + i, n);
    if (weight) v = kept(x, mul(load_as_n(weight + i, n), kept(x, mul(v, inverse))));
    store(row + i, v);
  }
  for (int64_t i = 0; i < plain; i += 16) {
    const int n = static_cast<int>(plain - i < 16 ? plain - i : 16);
    store_as_n(out + i, load_n(row + i, n), n);
  }
  if (!a.neighbours) return rotate(out + plain, row + plain, row + plain + half, cos, sin, half, half);
  alignas(64) float even[kWidest / 2 + 16], odd[kWidest / 2 + 16];
  for (int64_t i = 0; i < half; ++i) {
    even[i] = row[plain + 2 * i];
    odd[i] = row[plain + 2 * i + 1];
  }
  rotate(out + plain, even, odd, cos, sin, half, int64_t{0});
}

void norm_rope_heads(const NormRope& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t head = i % a.heads, token = i / a.heads % a.tokens, batch = i / a.heads / a.tokens;
    if (a.dtype == Dtype::f32)
      norm_rope_head<float, float>(a, batch, token, head);
    else if (a.angles == Dtype::f32)
      norm_rope_head<uint16_t, float>(a, batch, token, head);
    else
      norm_rope_head<uint16_t, uint16_t>(a, batch, token, head);
  }
}

}  // namespace pio::PIO_ISA
#else
#include "check.h"
#include "piece.h"

namespace pio {
constexpr int64_t kWidest = 1024;  // values of a head
struct NormRope {
  const void *x, *weight, *cos, *sin;
  void* out;
  int64_t tokens, heads, dim, rope;
  int64_t x_batch, x_token;  // elements between them
  int64_t angle_batch;       // elements between batches of cos and sin; 0 when they share positions
  bool neighbours;
  float eps;
  Dtype dtype, angles;
};
}  // namespace pio
#define PIO_FILE "src/norm_rope.cc"
#include "foreach_isa.h"

namespace pio {

PIO_TABLE(norm_rope_heads)

// out[b, h, t] = rope(weight * x[b, t, h] / rms) over heads of `dim` values, the last `rope` of which are rotated.
// x: heads dense, x_token and x_batch elements between tokens and batches; weight: [dim] or 0 for no norm;
// cos, sin: [1 or batch, tokens, rope] of `angle_dtype`, x's or float32; out: [batch, heads, tokens, dim] dense.
void norm_rope(Address x, Address weight, Address cos, Address sin, Address out, int64_t batch, int64_t tokens,
               int64_t heads, int64_t dim, int64_t rope, int64_t x_batch, int64_t x_token, int64_t angle_batch,
               bool neighbours, float eps, int dtype, int angle_dtype, int threads) {
  const Dtype type = require_dtype(dtype, "norm_rope"), angles = require_dtype(angle_dtype, "norm_rope");
  require(angles == type || angles == Dtype::f32, "norm_rope: angles of bfloat16 need values of bfloat16");
  if (batch * tokens * heads == 0) return;  // an empty tensor has no address
  const size_t alignment = size_of(type);
  require_address(x, alignment, "norm_rope", "x");
  require_address(cos, size_of(angles), "norm_rope", "cos");
  require_address(sin, size_of(angles), "norm_rope", "sin");
  require_address(out, alignment, "norm_rope", "out");
  require(dim > 0 && dim <= kWidest, "norm_rope: a head must have 1 to 1024 values, got " + std::to_string(dim));
  require(rope >= 0 && rope % 2 == 0 && rope <= dim,
          "norm_rope: the rotated part must be even and within the head, got " + std::to_string(rope));
  const NormRope a{reinterpret_cast<const void*>(x),
                   reinterpret_cast<const void*>(weight),
                   reinterpret_cast<const void*>(cos),
                   reinterpret_cast<const void*>(sin),
                   reinterpret_cast<void*>(out),
                   tokens,
                   heads,
                   dim,
                   rope,
                   x_batch,
                   x_token,
                   angle_batch,
                   neighbours,
                   eps,
                   type,
                   angles};
  const int64_t grain = std::max<int64_t>(1, kPieceBytes / (dim * static_cast<int64_t>(alignment)));
  parallel_for(batch * tokens * heads, grain, threads,
               [&](int64_t begin, int64_t end) { PIO_CALL(norm_rope_heads)(a, begin, end); });
}

}  // namespace pio
#endif
