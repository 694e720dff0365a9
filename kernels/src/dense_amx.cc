// The dense tile for bf16 on AMX (Sapphire Rapids and later): 16 weight rows by 16 activation rows by 32 columns in one
// instruction of 16 cycles, sixteen times what AVX-512 multiplies.
//
// Weights are the first operand, read as they lie; activations are the second, which wants pairs of columns beside each
// other, so they are packed once per call. All row counts go through here: the sums are not added in the order that the
// other sets use. A chunk of 32 columns is summed as its even and its odd ones, then added to the chunks before.
#include <cstdint>
#include <cstring>

#include "dense.h"
#include "isa.h"
#include "target.h"

#if PIO_X86
#include <immintrin.h>

PIO_TARGET_BEGIN(PIO_AMX)
#include "amx.h"
#include "simd/avx512.h"

namespace pio::amx {
namespace {

using namespace pio::avx512;

constexpr int64_t kChunk = 64;  // bytes of a row in a tile: 32 columns
// A single row of activations waits for memory, which gives most to sixteen streams: Sapphire Rapids, 9,728 x 2,560,
// two cores: 32 weight rows and 1,024 bytes ahead 18.4 GB/s, 16 rows 21.0, and 21.5 and 22.2 at 512 and 256 bytes, 8
// rows 20.7.
constexpr int64_t kAhead = 256;  // bytes of a row between what is multiplied and what is prefetched

// Tiles 0-3 are sums [weights, activations], 4 and 5 weights, 6 and 7 activations.
void configure(int weights, int activations) {
  TileShapes c;
  for (int t = 0; t < 8; ++t) {
    const bool is_weight = t == 4 || t == 5;
    c.rows[t] = static_cast<uint8_t>(t < 6 ? weights : kSide);
    c.row_bytes[t] = static_cast<uint16_t>(is_weight ? kChunk : 4 * activations);
  }
  load_shapes(c);
}

int64_t chunks_of(int64_t cols) { return (2 * cols + kChunk - 1) / kChunk; }
int width_of(int n_x) { return n_x == 1 ? 1 : kSide; }  // activation columns of a packed tile

// P panels of 16 weight rows by T tiles of activations, left in tiles 0, 1 (first panel), 2, 3.
template <int P, int T>
void multiply_chunk(const char* w, const char* next, int64_t stride, const char* x, const char* other,
                    int64_t x_stride) {
  _tile_loadd(4, w, stride);
  _tile_loadd(6, x, x_stride);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (T == 2) {
    _tile_loadd(7, other, x_stride);
    _tile_dpbf16ps(1, 4, 7);
  }
  if constexpr (P == 2) {
    _tile_loadd(5, next, stride);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (T == 2) _tile_dpbf16ps(3, 5, 7);
  }
}

// Weights of the last, incomplete chunk of `rows` rows, zeros beyond the columns.
void copy_rest(const char* w, int64_t stride, int rows, int64_t bytes, char* out) {
  std::memset(out, 0, static_cast<size_t>(rows * kChunk));
  for (int i = 0; i < rows; ++i) std::memcpy(out + i * kChunk, w + i * stride, static_cast<size_t>(bytes));
}

template <int P, int T>
void multiply_chunks(const char* w, int64_t stride, int rows, const char* x, int width, int64_t cols) {
  const int64_t whole = 2 * cols / kChunk, chunks = chunks_of(cols), x_chunk = kSide * 4 * width;
  const char* next = w + kSide * stride;
  const char* other = x + chunks * x_chunk;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t c = 0; c < whole; ++c) {
    // Few activations: the weights come from memory. At the end of the rows, the beginnings of those that follow.
    if constexpr (T == 1) {
      const int count = P == 2 ? P * kSide : rows;
      const char* ahead = w + c * kChunk + kAhead;
      if (c * kChunk + kAhead >= stride) ahead += (count - 1) * stride;
      for (int i = 0; i < count; ++i) prefetch(ahead + i * stride);
    }
    multiply_chunk<P, T>(w + c * kChunk, next + c * kChunk, stride, x + c * x_chunk, other + c * x_chunk, 4 * width);
  }
  if (whole == chunks) return;
  alignas(64) char rest[2][kSide * kChunk];
  copy_rest(w + whole * kChunk, stride, rows, 2 * cols - whole * kChunk, rest[0]);
  if (P == 2) copy_rest(next + whole * kChunk, stride, kSide, 2 * cols - whole * kChunk, rest[1]);
  memory_is_used(rest);
  multiply_chunk<P, T>(rest[0], rest[1], kChunk, x + whole * x_chunk, other + whole * x_chunk, 4 * width);
}

// Sums [weights, activations] to out[t][16 weights].
void store_sums(const float (*sums)[kSide], float* out, int count) {
  F32 lanes[kSide];
  for (int i = 0; i < kSide; ++i) lanes[i] = load(sums[i]);
  transpose_lanes(lanes);
  for (int t = 0; t < count; ++t) store(out + t * kSide, lanes[t]);
}

// Tiles 0 to 3 to memory, and from it.
void store_tiles(float* sums) {
  _tile_stored(0, sums, kChunk);
  _tile_stored(1, sums + 256, kChunk);
  _tile_stored(2, sums + 512, kChunk);
  _tile_stored(3, sums + 768, kChunk);
  memory_is_used(sums);
}
void load_tiles(const float* sums) {
  memory_is_used(sums);
  _tile_loadd(0, sums, kChunk);
  _tile_loadd(1, sums + 256, kChunk);
  _tile_loadd(2, sums + 512, kChunk);
  _tile_loadd(3, sums + 768, kChunk);
}

// What store_tiles() left: [first and second sixteen weights][first and second sixteen rows][weights][rows].
void results(const float* sums, int n_w, int n_x, float* out) {
  const int first = n_x < kSide ? n_x : kSide, second = n_x - first;
  for (int p = 0; p * kSide < n_w; ++p, sums += 512, out += n_x * kSide) {
    store_sums(reinterpret_cast<const float (*)[kSide]>(sums), out, first);
    store_sums(reinterpret_cast<const float (*)[kSide]>(sums + 256), out + kSide * kSide, second);
  }
}

template <int P>
void multiply_panels(const char* w, int64_t stride, int rows, const char* x, int n_x, int64_t cols, float* out) {
  const int width = width_of(n_x);
  if (n_x > kSide)
    multiply_chunks<P, 2>(w, stride, rows, x, width, cols);
  else
    multiply_chunks<P, 1>(w, stride, rows, x, width, cols);
  float* next = out + n_x * kSide;
  if (n_x == 1) {
    _tile_stored(0, out, 4);
    if (P == 2) _tile_stored(2, next, 4);
    return memory_is_used(out);
  }
  alignas(64) float sums[kDenseSums];
  store_tiles(sums);
  results(sums, P * kSide, n_x, out);
}

void multiply(const void* weights, int64_t stride, int n_w, const void* const* x, int n_x, int64_t cols, Dtype,
              float* out) {
  const char* w = static_cast<const char*>(weights);
  const char* block = static_cast<const char*>(x[0]);
  memory_is_used(block);
  if (n_w == 2 * kSide && n_x > 1) {
    configure(kSide, width_of(n_x));
    multiply_panels<2>(w, stride, kSide, block, n_x, cols, out);
  } else {
    for (int i = 0; i < n_w; i += kSide) {
      const int rows = n_w - i < kSide ? n_w - i : kSide;
      configure(rows, width_of(n_x));
      multiply_panels<1>(w + i * stride, stride, rows, block, n_x, cols, out + i * n_x);
    }
  }
  _tile_release();
}

// Weights of a part as tiles side by side, zeros beyond rows and columns: weight rows a power of two apart would share
// their places in the first-level cache, and the copy costs as much as eight rows of x.
void copy_part(const char* w, int64_t stride, int n_w, int64_t cols, int64_t from, int64_t chunks, char* out) {
  for (int i = 0; i < 2 * kSide; ++i) {
    const auto* row = reinterpret_cast<const uint16_t*>(w + i * stride) + from;
    char* to = out + (i / kSide * kPartColumns * 2 + i % kSide * 4) * kSide;
    for (int64_t c = 0; c < chunks; ++c, to += kSide * kChunk) {
      const int64_t left = i < n_w ? cols - from - c * 32 : 0;
      _mm512_storeu_si512(to, load_pairs_n(row + c * 32, static_cast<int>(left < 32 ? left : 32)).v);
    }
  }
}

// The rows pass through once per part and must not push the weights out of the first-level cache: a stream load took
// 30 ns for four products with their loads where a plain one took 40.
template <int T>
void multiply_copied(const char* w, const char* x, int64_t x_tile, int64_t chunks) {
  for (int64_t c = 0; c < chunks; ++c) {
    _tile_stream_loadd(6, x + c * kSide * kChunk, kChunk);
    _tile_loadd(4, w + c * kSide * kChunk, kChunk);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, w + (c + kPartColumns / 32) * kSide * kChunk, kChunk);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (T == 2) {
      _tile_stream_loadd(7, x + x_tile + c * kSide * kChunk, kChunk);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
}

void multiply_part(const void* weights, int64_t stride, int n_w, const void* const* blocks, const int* n_x,
                   int64_t count, int64_t cols, int64_t part, float* sums) {
  const int64_t from = part * kPartColumns, left = chunks_of(cols) - from / 32;
  const int64_t chunks = left < kPartColumns / 32 ? left : kPartColumns / 32, x_tile = chunks_of(cols) * kSide * kChunk;
  alignas(64) char copied[2 * kSide * kPartColumns * 2];
  copy_part(static_cast<const char*>(weights), stride, n_w, cols, from, chunks, copied);
  memory_is_used(copied);
  configure(kSide, kSide);
  for (int64_t i = 0; i < count; ++i, sums += kDenseSums) {
    if (n_x[i] == 1) continue;  // packed as one column
    const char* x = static_cast<const char*>(blocks[i]) + from / 32 * kSide * kChunk;
    if (part > 0) {
      load_tiles(sums);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    n_x[i] > kSide ? multiply_copied<2>(copied, x, x_tile, chunks) : multiply_copied<1>(copied, x, x_tile, chunks);
    store_tiles(sums);
  }
  _tile_release();
}

int64_t block_bytes(int n_x, int64_t cols) { return (n_x > kSide ? 2 : 1) * chunks_of(cols) * kChunk * width_of(n_x); }

// Up to 16 rows: for each chunk, pairs of columns by rows.
void pack_sixteen(const void* const* x, int n_x, int64_t cols, char* out) {
  for (int64_t c = 0; c < cols; c += 32) {
    const int n = static_cast<int>(cols - c < 32 ? cols - c : 32);
    F32 lanes[kSide];
    for (int t = 0; t < kSide; ++t)
      lanes[t] = t < n_x ? as_lanes(load_pairs_n(static_cast<const uint16_t*>(x[t]) + c, n)) : set(0.0f);
    transpose_lanes(lanes);
    for (int i = 0; i < kSide; ++i) store(reinterpret_cast<float*>(out + i * kChunk), lanes[i]);
    out += kSide * kChunk;
  }
}

void pack(const void* const* x, int n_x, int64_t cols, void* block) {
  char* out = static_cast<char*>(block);
  if (n_x == 1) {
    std::memcpy(out, x[0], static_cast<size_t>(2 * cols));
    std::memset(out + 2 * cols, 0, static_cast<size_t>(chunks_of(cols) * kChunk - 2 * cols));
    return;
  }
  pack_sixteen(x, n_x < kSide ? n_x : kSide, cols, out);
  if (n_x > kSide) pack_sixteen(x + kSide, n_x - kSide, cols, out + chunks_of(cols) * kSide * kChunk);
}

}  // namespace
}  // namespace pio::amx

PIO_TARGET_END

namespace pio {
DenseTile amx_dense_tile() {
  return {2 * amx::kSide,   2 * amx::kSide, 2 * amx::kSide,     1,           amx::multiply,
          amx::block_bytes, amx::pack,      amx::multiply_part, amx::results};
}
}  // namespace pio
#else
namespace pio {
DenseTile amx_dense_tile() { return {}; }  // never called: amx_in_use() is false
}  // namespace pio
#endif
