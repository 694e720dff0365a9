// Quantizes new keys or values and appends them to an int8 cache.
//
// Layout of a cache of `dim` values per token and head, dim a multiple of 4, capacity a multiple of 16:
//   codes  uint8   [batch, heads, capacity / 16, dim / 4, 16 tokens, 4 values], code + 128
//   scales float32 [batch, heads, capacity]
// Four neighbouring values of one token are four neighbouring bytes and sixteen tokens follow each other, so one
// 64-byte load feeds sixteen dot products (VPDPBUSD) and nothing has to be summed across lanes. The same bytes with
// each quarter transposed serve as values, four tokens to a lane.
#ifdef PIO_ISA
namespace pio::PIO_ISA {

template <class T>
PIO_INLINE F32 equalized(const Int8Append& a, const T* x, int64_t i, int n) {
  const F32 v = load_as_n(x + i, n);
  // Lanes past the head hold 0 / 1, not 0 / 0.
  return a.channel ? div(v, add(load_n(a.channel + i, n), load(kOneBeyond + 16 - n))) : v;
}

// One token of one head: symmetric, scale = largest / 127.
template <class T>
void append_token(const Int8Append& a, const T* x, uint8_t* block, float* scale) {
  alignas(64) int8_t codes[kWidestHead + 16];
  F32 top = set(0);
  for (int64_t i = 0; i < a.dim; i += 16)
    top = max(top, abs(equalized(a, x, i, static_cast<int>(a.dim - i < 16 ? a.dim - i : 16))));
  *scale = largest(top) / 127.0f;
  const F32 inverse = set(*scale > 0 ? 1.0f / *scale : 0.0f);
  const F32 low = set(-127.0f), high = set(127.0f);
  for (int64_t i = 0; i < a.dim; i += 16) {
    const F32 v = mul(equalized(a, x, i, static_cast<int>(a.dim - i < 16 ? a.dim - i : 16)), inverse);
    store_i8(codes + i, to_i32(min(max(v, low), high)));
  }
  for (int64_t i = 0; i < a.dim; i += 4) {
    uint32_t four;
    std::memcpy(&four, codes + i, 4);
    four ^= 0x80808080u;  // + 128 in every byte
    std::memcpy(block + 16 * i, &four, 4);
  }
}

// Items are blocks of 16 tokens: a cache line holds bytes of all of them, so two threads must not share a block.
void append_blocks(const Int8Append& a, int64_t begin, int64_t end) {
  const int64_t first = a.start / 16, blocks = (a.start + a.tokens + 15) / 16 - first;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t block = first + item % blocks, head = item / blocks % a.heads, batch = item / blocks / a.heads;
    const int64_t row = (batch * a.heads + head) * a.capacity;
    const int64_t from = block * 16 > a.start ? block * 16 : a.start;
    const int64_t past = a.start + a.tokens, to = block * 16 + 16 < past ? block * 16 + 16 : past;
    for (int64_t t = from; t < to; ++t) {
      const int64_t x = batch * a.x_batch + head * a.x_head + (t - a.start) * a.x_token;
      uint8_t* codes = a.codes + (row + block * 16) * a.dim + t % 16 * 4;
      if (a.dtype == Dtype::f32)
        append_token(a, static_cast<const float*>(a.x) + x, codes, a.scales + row + t);
      else
        append_token(a, static_cast<const uint16_t*>(a.x) + x, codes, a.scales + row + t);
    }
  }
}

}  // namespace pio::PIO_ISA
#else
#include "check.h"
#include "piece.h"

namespace pio {
constexpr int64_t kWidestHead = 1024;
// load(kOneBeyond + 16 - n) is n zeros, then ones.
alignas(64) constexpr float kOneBeyond[32] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                                              1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
struct Int8Append {
  const void* x;
  const float* channel;  // [dim]: x / channel is what is quantized; or none
  uint8_t* codes;
  float* scales;
  int64_t heads, tokens, dim, capacity, start;
  int64_t x_batch, x_head, x_token;  // elements
  Dtype dtype;
};
}  // namespace pio
#define PIO_FILE "src/int8_kv_append.cc"
#include "foreach_isa.h"

namespace pio {

PIO_TABLE(append_blocks)

// Appends x [batch, heads, tokens, dim] (values of a head dense, the other strides in elements) at token `start`.
void int8_kv_append(Address x, Address channel, Address codes, Address scales, int64_t batch, int64_t heads,
                    int64_t tokens, int64_t dim, int64_t capacity, int64_t start, int64_t x_batch, int64_t x_head,
                    int64_t x_token, int dtype, int threads) {
  const Dtype type = require_dtype(dtype, "int8_kv_append");
  require_address(x, size_of(type), "int8_kv_append", "x");
  require_address(codes, 1, "int8_kv_append", "codes");
  require_address(scales, 4, "int8_kv_append", "scales");
  require(dim > 0 && dim % 4 == 0 && dim <= kWidestHead,
          "int8_kv_append: a head must have a multiple of 4 values, at most 1024, got " + std::to_string(dim));
  require(capacity % 16 == 0 && start >= 0 && tokens >= 0 && start + tokens <= capacity,
          "int8_kv_append: " + std::to_string(tokens) + " tokens at " + std::to_string(start) +
              " do not fit into a capacity of " + std::to_string(capacity) + " (a multiple of 16)");
  if (tokens == 0) return;
  const Int8Append a{reinterpret_cast<const void*>(x),
                     reinterpret_cast<const float*>(channel),
                     reinterpret_cast<uint8_t*>(codes),
                     reinterpret_cast<float*>(scales),
                     heads,
                     tokens,
                     dim,
                     capacity,
                     start,
                     x_batch,
                     x_head,
                     x_token,
                     type};
  const int64_t blocks = (start + tokens + 15) / 16 - start / 16;
  const int64_t per_block = std::min<int64_t>(tokens, 16) * dim * static_cast<int64_t>(size_of(type));
  parallel_for(batch * heads * blocks, std::max<int64_t>(1, kPieceBytes / per_block), threads,
               [&](int64_t begin, int64_t end) { PIO_CALL(append_blocks)(a, begin, end); });
}

}  // namespace pio
#endif
