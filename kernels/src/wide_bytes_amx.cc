// int4 weights and bf16 activations as int8 tiles, and their products on AMX. wide_bytes.h says what for.
//
// A weight is (n - 8) * scale for the stored n; as a byte it is that in units of the row's largest |scale| * 8 / 127,
// rounded: (n - 8) * 16 as a word, times the ratio of the scales in units of 2^-11, by one rounding multiplication. The
// bytes of a panel's dword are columns of one row, as the second operand wants them.
#include <cstdint>
#include <cstring>

#include "isa.h"
#include "target.h"
#include "wide_bytes.h"

#if PIO_X86
#include <immintrin.h>

PIO_TARGET_BEGIN(PIO_AMX)
#include "amx.h"
#include "simd/avx512.h"

namespace pio::amx {
namespace {

using namespace pio::avx512;

constexpr int64_t kPanelBytes = ByteRows::kBlockTiles * kTileBytes;  // of a block's 512 columns, unpacked

PIO_INLINE __m512i words(int x) { return _mm512_set1_epi16(static_cast<int16_t>(x)); }

// The scales of a panel's sixteen rows in one block of columns.
struct BlockScales {
  F32 up;       // tiny scales are multiplied by this first, or the next would not be finite
  F32 inverse;  // 127 / 8 * 2^11 / the largest
  F32 unit;     // what a byte of one counts

  BlockScales(const uint16_t* scales, int64_t groups) {
    F32 most = set(0.0f);
    for (int64_t g = 0; g < groups; ++g) most = max(most, abs(load_bf16(scales + g * kLanes)));
    unit = mul(most, set(8.0f / 127.0f));
    up = select_greater(set(0x1p-90f), most, set(0x1p60f), set(1.0f));
    const F32 scaled = mul(most, up);
    inverse = select_greater(scaled, set(0.0f), div(set(127.0f / 8.0f * 2048.0f), scaled), set(0.0f));
  }

  // The factors of one group, each in both words of its lane.
  __attribute__((always_inline)) __m512i factors(const uint16_t* scales) const {
    const __m512i f = to_i32(mul(mul(load_bf16(scales), up), inverse)).v;
    return _mm512_mask_blend_epi16(0xAAAAAAAA, f, _mm512_slli_epi32(f, 16));
  }
};

// (n - 8) * factor / 2^11 of the bytes whose n are bits 4 to 7 of the words of `even`, and of `odd`.
PIO_INLINE __m512i level_bytes(__m512i even, __m512i odd, __m512i factor) {
  const __m512i e = _mm512_sub_epi16(_mm512_and_si512(even, words(0xF0)), words(128));
  const __m512i o = _mm512_sub_epi16(_mm512_and_si512(odd, words(0xF0)), words(128));
  const __m512i low = _mm512_mulhrs_epi16(e, factor), high = _mm512_slli_epi16(_mm512_mulhrs_epi16(o, factor), 8);
  return _mm512_ternarylogic_epi32(words(0xFF), low, high, 0xCA);
}

// 32 columns of a panel: half a tile.
PIO_INLINE void unpack_half(const uint8_t* from, __m512i factor, char* out) {
  for (int i = 0; i < 4; ++i, out += 128) {
    const __m512i v = _mm512_loadu_si512(from + i * 64);
    _mm512_storeu_si512(out, level_bytes(_mm512_slli_epi16(v, 4), _mm512_srli_epi16(v, 4), factor));
    _mm512_storeu_si512(out + 64, level_bytes(v, _mm512_srli_epi16(v, 8), factor));
  }
}

// A block of a panel's columns; what is beyond them becomes zero. Returns what a byte of one counts in each row.
F32 unpack_block(const Packed& w, int64_t panel, int64_t block, int64_t chunks, char* out) {
  const int64_t per_group = w.group / 32, first = block * kWideColumns / w.group;
  const int64_t fit = chunks * ByteRows::kColumns / w.group, left = w.groups() - first,
                groups = left < fit ? left : fit;
  const uint8_t* from = w.data + panel * w.panel_bytes() + first * w.group_bytes();
  const uint16_t* scales = w.scales + (panel * w.groups() + first) * kLanes;
  const BlockScales s(scales, groups);
  int64_t half = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const __m512i factor = s.factors(scales + g * kLanes);
    for (const int64_t end = half + per_group; half < end; ++half)
      unpack_half(from + half * 256, factor, out + half * (kTileBytes / 2));
  }
  for (; half < 2 * chunks; ++half)
    for (int64_t i = 0; i < kTileBytes / 2; i += 64)
      _mm512_storeu_si512(out + half * (kTileBytes / 2) + i, _mm512_setzero_si512());
  return s.unit;
}

// Sums of I tiles of activations by J panels, [I][J][16 rows][16]. The activations pass through once per block and must
// not push the weights out of the first-level cache: stream loads, as in wide_bf16_amx.cc.
template <int I, int J>
void multiply_chunks(const char* x, const char* x1, const char* w, int64_t chunks, int32_t* sums) {
  constexpr int kTile = 256;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t c = 0; c < chunks; ++c) {
    _tile_stream_loadd(4, x + c * kTileBytes, 64);
    _tile_loadd(6, w + c * kTileBytes, 64);
    _tile_dpbssd(0, 4, 6);
    if constexpr (J == 2) {
      _tile_loadd(7, w + kPanelBytes + c * kTileBytes, 64);
      _tile_dpbssd(1, 4, 7);
    }
    if constexpr (I == 2) {
      _tile_stream_loadd(5, x1 + c * kTileBytes, 64);
      _tile_dpbssd(2, 5, 6);
      if constexpr (J == 2) _tile_dpbssd(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 64);
  if constexpr (J == 2) _tile_stored(1, sums + kTile, 64);
  if constexpr (I == 2) _tile_stored(2, sums + J * kTile, 64);
  if constexpr (I == 2 && J == 2) _tile_stored(3, sums + 3 * kTile, 64);
  memory_is_used(sums);
}

// sums[J][16][16] (first: =, else +=) the integers in their units. Fine: with those of what was left over.
template <int J, bool fine>
void add_block(const int32_t* coarse, const int32_t* rest, const float* scales, const F32* units, bool first,
               float* sums) {
  F32 own[J];
  for (int j = 0; j < J; ++j) own[j] = units[j];
  for (int t = 0; t < kWideTile; ++t)
    for (int j = 0; j < J; ++j) {
      const int at = (j * kWideTile + t) * kLanes;
      F32 y = to_f32(load_i32(coarse + at));
      if constexpr (fine) y = fma(to_f32(load_i32(rest + at)), set(1.0f / kFineUnits), y);
      const F32 unit = mul(own[j], set(scales[t]));
      store(sums + at, first ? mul(y, unit) : fma(y, unit, load(sums + at)));
    }
}

template <int J>
void multiply_rows(const ByteRows& x, int64_t block, int64_t first, int64_t n, const char* w, const F32* units,
                   float* sums) {
  alignas(64) int32_t coarse[2 * J * 256], rest[J * 256];
  const int64_t chunks = x.chunks_of(block);
  for (int64_t i = 0; i < n; i += 2) {
    const int both = i + 1 < n ? 2 : 1;
    if (both == 2)
      multiply_chunks<2, J>(x.coarse(block, first + i), x.coarse(block, first + i + 1), w, chunks, coarse);
    else
      multiply_chunks<1, J>(x.coarse(block, first + i), nullptr, w, chunks, coarse);
    for (int k = 0; k < both; ++k) {
      const ByteRows::Head& head = *x.head(block, first + i + k);
      const int32_t* own = coarse + k * J * 256;
      float* to = sums + (i + k) * J * 256;
      if (head.fine != 0) {
        multiply_chunks<1, J>(x.fine(block, first + i + k), nullptr, w, chunks, rest);
        add_block<J, true>(own, rest, head.scale, units, block == 0, to);
      } else {
        add_block<J, false>(own, nullptr, head.scale, units, block == 0, to);
      }
    }
  }
}

// Sixteen of n values of a row, zeros beyond.
PIO_INLINE F32 sixteen(const uint16_t* row, int64_t n, int64_t from) {
  if (from + 16 <= n) return load_bf16(row + from);
  return from < n ? load_bf16_n(row + from, static_cast<int>(n - from)) : set(0.0f);
}

// Columns of a row as int8: 64 of every kTileBytes.
struct Coarse {
  float scale, inverse;
  bool fine;  // whether a second part is worth it
};
Coarse pack_coarse(const uint16_t* row, int64_t n, int64_t chunks, char* out) {
  __m512i most = _mm512_setzero_si512();  // as bits, so that a NaN is the largest of all
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) most = _mm512_max_epu16(most, _mm512_and_si512(load_pairs(row + i).v, words(0x7FFF)));
  most = _mm512_max_epu16(most, _mm512_and_si512(load_pairs_n(row + i, static_cast<int>(n - i)).v, words(0x7FFF)));
  const I32 wide = max(I32{_mm512_slli_epi32(most, 16)}, I32{_mm512_andnot_si512(_mm512_set1_epi32(0xFFFF), most)});
  const int32_t bits = largest(wide);
  float m;
  std::memcpy(&m, &bits, 4);
  const bool usable = m > 1e-36f && m < 3e38f;
  const float inverse = usable ? 127.0f / m : 0.0f;
  if (!usable) {
    for (int64_t c = 0; c < chunks; ++c) _mm512_storeu_si512(out + c * kTileBytes, _mm512_setzero_si512());
    return {m / 127.0f, inverse, false};
  }
  F32 squares = set(0.0f);
  for (int64_t c = 0; c < chunks; ++c)
    for (int64_t k = 0; k < ByteRows::kColumns; k += 16) {
      const F32 y = mul(sixteen(row, n, c * ByteRows::kColumns + k), set(inverse));
      squares = fma(y, y, squares);
      store_i8(reinterpret_cast<int8_t*>(out + c * kTileBytes + k), to_i32(y));
    }
  return {m / 127.0f, inverse, 127.0f * 127.0f * static_cast<float>(n) > kCoarseSquare * sum(squares)};
}

// What the int8 at `coarse` left over of a row.
void pack_fine(const uint16_t* row, int64_t n, float inverse, const char* coarse, int64_t chunks, char* out) {
  for (int64_t c = 0; c < chunks; ++c)
    for (int64_t k = 0; k < ByteRows::kColumns; k += 16) {
      const int64_t at = c * kTileBytes + k;
      const F32 y = mul(sixteen(row, n, c * ByteRows::kColumns + k), set(inverse));
      const F32 rest = sub(y, to_f32(load_i8(reinterpret_cast<const int8_t*>(coarse + at))));
      store_i8(reinterpret_cast<int8_t*>(out + at), to_i32(mul(rest, set(kFineUnits))));
    }
}

void clear_row(int64_t chunks, char* out) {
  for (int64_t c = 0; c < chunks; ++c) _mm512_storeu_si512(out + c * kTileBytes, _mm512_setzero_si512());
}

// One block of columns of up to sixteen rows.
void pack_block(const uint16_t* const* rows, int count, int64_t from, int64_t n, const ByteRows& out, int64_t block,
                int64_t tile) {
  const int64_t chunks = out.chunks_of(block);
  ByteRows::Head& head = *out.head(block, tile);
  head = {};
  char *coarse = out.coarse(block, tile), *fine = out.fine(block, tile);
  float inverse[kWideTile];
  for (int t = 0; t < kWideTile; ++t) {
    if (t >= count) {
      clear_row(chunks, coarse + t * 64);
      continue;
    }
    const Coarse row = pack_coarse(rows[t] + from, n, chunks, coarse + t * 64);
    head.scale[t] = row.scale;
    inverse[t] = row.inverse;
    if (row.fine) head.fine |= 1u << t;
  }
  if (head.fine == 0) return;
  for (int t = 0; t < kWideTile; ++t)
    if (head.fine >> t & 1)
      pack_fine(rows[t] + from, n, inverse[t], coarse + t * 64, chunks, fine + t * 64);
    else
      clear_row(chunks, fine + t * 64);
}

}  // namespace

void pack_byte_rows(const uint16_t* const* rows, int count, int64_t cols, const ByteRows& out, int64_t tile) {
  for (int64_t block = 0; block < out.blocks(); ++block) {
    const int64_t from = block * kWideColumns, left = cols - from;
    const int64_t most = out.chunks_of(block) * ByteRows::kColumns;
    pack_block(rows, count, from, left < most ? left : most, out, block, tile);
  }
}

void multiply_byte_rows(const Packed& w, const int64_t* panels, int n_panels, int64_t block, const ByteRows& x,
                        int64_t first, int64_t n, float* sums) {
  alignas(64) char unpacked[2 * kPanelBytes];
  F32 units[2];
  for (int p = 0; p < n_panels; ++p)
    units[p] = unpack_block(w, panels[p], block, x.chunks_of(block), unpacked + p * kPanelBytes);
  memory_is_used(unpacked);
  load_shapes({});  // 0 to 3 sums [activations, weights], 4 and 5 activations, 6 and 7 weights
  n_panels == 2 ? multiply_rows<2>(x, block, first, n, unpacked, units, sums)
                : multiply_rows<1>(x, block, first, n, unpacked, units, sums);
  _tile_release();
}

}  // namespace pio::amx

PIO_TARGET_END
#else
namespace pio::amx {  // never called: amx_in_use() is false
void pack_byte_rows(const uint16_t* const*, int, int64_t, const ByteRows&, int64_t) {}
void multiply_byte_rows(const Packed&, const int64_t*, int, int64_t, const ByteRows&, int64_t, int64_t, float*) {}
}  // namespace pio::amx
#endif
