// int8 weights as bf16 tiles, and their products with tiles of activations on AMX. wide_bf16.h says what for.
//
// A weight is (n - 128) * scale for the stored n. 32 of them at a time: n goes into the mantissa of a float16 between
// 1 and 2, one multiply-add with the scale's significand makes (n - 128) * significand, rounded to 11 bits, and integer
// operations on the bits round that to bf16 and give it the scale's exponent. Widening to float32 instead took 1.5
// times as long. A panel's dword holds columns of one row, so its words are pairs as the second operand wants them.
#include <cstdint>
#include <cstring>

#include "isa.h"
#include "target.h"
#include "wide_bf16.h"

#if PIO_X86
#include <immintrin.h>

PIO_TARGET_BEGIN(PIO_AMX)
#include "amx.h"
#include "simd/avx512.h"

namespace pio::amx {
namespace {

using namespace pio::avx512;

// By assembly, as compilers older than the instructions build this file too.
PIO_INLINE __m512i multiply_add_f16(__m512i a, __m512i b, __m512i c) {
  __asm__("vfmadd213ph %2, %1, %0" : "+v"(a) : "v"(b), "v"(c));
  return a;
}
PIO_INLINE __m512i multiply_f16(__m512i a, __m512i b) {
  __m512i out;
  __asm__("vmulph %2, %1, %0" : "=v"(out) : "v"(a), "v"(b));
  return out;
}
PIO_INLINE __m512i words(int x) { return _mm512_set1_epi16(static_cast<int16_t>(x)); }

// The scales of sixteen rows, in both words of their lanes. Subnormal scales count as zero, those of 2^120 and more as
// 2^120 to 2^124: weights that size have no bf16.
struct Scales {
  __m512i factor;    // float16, the significand times 256
  __m512i minus;     // what makes n = 128 zero
  __m512i exponent;  // to add to a bf16 that has float16's exponent

  explicit Scales(const uint16_t* scales) {
    const __m512i dwords = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales)));
    const __m512i s = _mm512_or_si512(dwords, _mm512_slli_epi32(dwords, 16));
    const __m512i biased = _mm512_and_si512(_mm512_srli_epi16(s, 7), words(0xFF));
    const __m512i significand = _mm512_slli_epi16(_mm512_and_si512(s, words(0x7F)), 3);
    const __m512i normal = _mm512_or_si512(significand, words(0x5C00));
    factor = _mm512_maskz_mov_epi16(_mm512_test_epi16_mask(biased, biased),
                                    _mm512_or_si512(normal, _mm512_and_si512(s, words(0x8000))));
    minus = multiply_f16(factor, words(0xBE00));  // -1.5: (1 + n / 256 - 1.5) * 256 = n - 128
    exponent = _mm512_slli_epi16(_mm512_sub_epi16(_mm512_min_epu16(biased, words(247)), words(15)), 7);
  }

  // fields: n in the mantissa, anything elsewhere. 32 bf16, to nearest, ties away from zero.
  __attribute__((always_inline)) static inline void put(const Scales& s, __m512i fields, char* out) {
    const __m512i f = _mm512_ternarylogic_epi32(fields, words(0x3FC), words(0x3C00), 0xEA);
    const __m512i product = multiply_add_f16(f, s.factor, s.minus);
    const __m512i short_one = _mm512_mulhrs_epi16(product, words(4096));  // / 8, rounded: seven bits of mantissa left
    const __m512i kept = _mm512_and_si512(short_one, words(0x8FFF));      // the sign was copied into three bits
    const __m512i bf16 = _mm512_maskz_add_epi16(_mm512_test_epi16_mask(product, product), kept, s.exponent);
    _mm512_storeu_si512(out, bf16);
  }
};

// 32 columns of a panel as a tile.
PIO_INLINE void unpack_tile(const uint8_t* from, const Scales& s, char* out) {
  for (int i = 0; i < 4; ++i, out += 256) {
    const __m512i v = _mm512_loadu_si512(from + i * 128), w = _mm512_loadu_si512(from + i * 128 + 64);
    Scales::put(s, _mm512_slli_epi16(v, 2), out);
    Scales::put(s, _mm512_slli_epi16(w, 2), out + 64);
    Scales::put(s, _mm512_srli_epi16(v, 6), out + 128);
    Scales::put(s, _mm512_srli_epi16(w, 6), out + 192);
  }
}

void unpack_block(const Packed& w, int64_t panel, int64_t block, int64_t chunks, char* out) {
  const int64_t per_group = w.group / Bf16Rows::kColumns, first = block * Bf16Rows::kBlockTiles, bytes = 512;
  const uint8_t* from = w.data + panel * w.panel_bytes() + first * bytes;
  const uint16_t* scales = w.scales + (panel * w.groups() + first / per_group) * kLanes;
  for (int64_t c = 0; c < chunks; scales += kLanes) {
    const Scales s(scales);
    for (const int64_t end = c + per_group; c < end; ++c) unpack_tile(from + c * bytes, s, out + c * kTileBytes);
  }
}

// I tiles of activations by J panels. The activations pass through once per block and must not push the weights out of
// the first-level cache: stream loads took 30 ns for four products with their loads where plain ones took 40.
template <int I, int J>
void multiply_chunks(const char* x, const char* x1, const char* w, const char* w1, int64_t chunks) {
  for (int64_t c = 0; c < chunks; ++c) {
    _tile_stream_loadd(4, x + c * kTileBytes, 64);
    _tile_loadd(6, w + c * kTileBytes, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (J == 2) {
      _tile_loadd(7, w1 + c * kTileBytes, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (I == 2) {
      _tile_stream_loadd(5, x1 + c * kTileBytes, 64);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (J == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
}

template <int I, int J>
void multiply_block(const char* x, const char* w, int64_t chunks, bool first, float* sums) {
  constexpr int kTile = 256;
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, 64);
    if constexpr (J == 2) _tile_loadd(1, sums + kTile, 64);
    if constexpr (I == 2) _tile_loadd(2, sums + J * kTile, 64);
    if constexpr (I == 2 && J == 2) _tile_loadd(3, sums + 3 * kTile, 64);
  }
  multiply_chunks<I, J>(x, x + chunks * kTileBytes, w, w + Bf16Rows::kBlockTiles * kTileBytes, chunks);
  _tile_stored(0, sums, 64);
  if constexpr (J == 2) _tile_stored(1, sums + kTile, 64);
  if constexpr (I == 2) _tile_stored(2, sums + J * kTile, 64);
  if constexpr (I == 2 && J == 2) _tile_stored(3, sums + 3 * kTile, 64);
}

template <int J>
void multiply_rows(const Bf16Rows& x, int64_t block, int64_t first, int64_t n, const char* w, float* sums) {
  const int64_t chunks = x.chunks_of(block);
  int64_t i = 0;
  for (; i + 2 <= n; i += 2) multiply_block<2, J>(x.at(block, first + i), w, chunks, block == 0, sums + i * J * 256);
  if (i < n) multiply_block<1, J>(x.at(block, first + i), w, chunks, block == 0, sums + i * J * 256);
  memory_is_used(sums);
}

__m512i in_order(__m512i a) {  // 0 2 4 6 1 3 5 7 of every eight words
  const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  return _mm512_shuffle_epi8(a, _mm512_broadcast_i32x4(order));
}

}  // namespace

void pack_bf16_rows(const uint16_t* const* rows, int count, int64_t cols, const Bf16Rows& out, int64_t tile) {
  for (int64_t block = 0; block < out.blocks(); ++block) {
    char* to = out.at(block, tile);
    for (int64_t c = 0; c < out.chunks_of(block); ++c, to += kTileBytes) {
      const int64_t from = (block * Bf16Rows::kBlockTiles + c) * Bf16Rows::kColumns, left = cols - from;
      const int n = static_cast<int>(left < 0 ? 0 : left < Bf16Rows::kColumns ? left : Bf16Rows::kColumns);
      for (int t = 0; t < kWideTile; ++t)
        _mm512_storeu_si512(to + t * 64,
                            t < count ? in_order(load_pairs_n(rows[t] + from, n).v) : _mm512_setzero_si512());
    }
  }
}

void multiply_bf16_rows(const Packed& w, const int64_t* panels, int n_panels, int64_t block, const Bf16Rows& x,
                        int64_t first, int64_t n, float* sums) {
  alignas(64) char unpacked[2 * Bf16Rows::kBlockTiles * kTileBytes];
  for (int p = 0; p < n_panels; ++p) {
    char* to = unpacked + p * Bf16Rows::kBlockTiles * kTileBytes;
    unpack_block(w, panels[p], block, x.chunks_of(block), to);
  }
  memory_is_used(unpacked);
  load_shapes({});  // 0 to 3 sums [activations, weights], 4 and 5 activations, 6 and 7 weights
  n_panels == 2 ? multiply_rows<2>(x, block, first, n, unpacked, sums)
                : multiply_rows<1>(x, block, first, n, unpacked, sums);
  _tile_release();
}

}  // namespace pio::amx

PIO_TARGET_END
#else
namespace pio::amx {  // never called: amx_in_use() is false
void pack_bf16_rows(const uint16_t* const*, int, int64_t, const Bf16Rows&, int64_t) {}
void multiply_bf16_rows(const Packed&, const int64_t*, int, int64_t, const Bf16Rows&, int64_t, int64_t, float*) {}
}  // namespace pio::amx
#endif
