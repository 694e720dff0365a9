// int4 weights and bf16 activations as int8 tiles, and their products on AMX. wide_bytes.h says what for.
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
#include "wide_unpack.h"

namespace pio::amx {
namespace {

using namespace pio::avx512;

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

// Columns of a row as int8: 64 of every kTileBytes.
struct Coarse {
  float scale, inverse;
  bool fine;  // whether a second part is worth it
};
Coarse pack_coarse(const uint16_t* row, int64_t n, int64_t chunks, char* out) {
  const float m = largest_of(row, n);
  const bool usable = fits_bytes(m);
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
    units[p] = unpack_block<0>(w, panels[p], block, x.chunks_of(block), unpacked + p * kPanelBytes);
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
