// int4 weights as bytes, bf16 rows as integers, and their products by VPDPBUSD. wide_integers.h says what for.
//
// VPDPBUSD takes one operand without a sign: weights are stored 128 higher, and a row's sums begin with -128 times the
// sum of its integers.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "isa.h"
#include "target.h"
#include "wide_integers.h"

#if PIO_X86
#include <immintrin.h>

PIO_TARGET_BEGIN(PIO_AVX512)
#include "fetcher.h"
#include "simd/avx512.h"
#include "wide_unpack.h"

namespace pio::vectors {
namespace {

using namespace pio::avx512;

constexpr int kRows = IntegerRows::kRows;
constexpr int64_t kChunk = kRows * kByteColumns;  // bytes of eight rows' 64 columns

// Eight rows' integers in a block of columns, and the tile's head and entries they belong to.
struct Eight {
  const char* values;  // [chunks][8][64]
  const IntegerRows::Head* head;
  const IntegerRows::Again* again;
  int row;  // the first
};

// J panels at w times eight rows: exact sums.
template <int J>
PIO_INLINE void multiply_eight(const Eight& x, const char* w, int64_t chunks, I32 (&sums)[kRows][J]) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(w);
  for (int t = 0; t < kRows; ++t)
    for (int j = 0; j < J; ++j) sums[t][j] = shift_left<7>(set_i32(x.head->minus_sum[x.row + t]));
  const char* from = x.values;
  for (int64_t c = 0; c < chunks; ++c, from += kChunk)
    for (int64_t k = 0; k < kByteColumns; k += 4, bytes += 64) {
      Bytes panel[J];
#pragma GCC unroll 2
      for (int j = 0; j < J; ++j) panel[j] = load_bytes(bytes + j * kPanelBytes);
#pragma GCC unroll 8
      for (int t = 0; t < kRows; ++t) {
        const Bytes four = repeat4(from + t * kByteColumns + k);
#pragma GCC unroll 2
        for (int j = 0; j < J; ++j) sums[t][j] = dot_bytes(sums[t][j], panel[j], four);
      }
    }
  // Row beside row: one row's products alone would each wait for the one before.
  const IntegerRows::Again* entry = x.again;
  for (int i = 0; i < x.head->again[x.row / kRows]; ++i, entry += kRows) {
#pragma GCC unroll 8
    for (int t = 0; t < kRows; ++t) {
      const Bytes four = repeat4(entry[t].values);
      const auto* quad = reinterpret_cast<const uint8_t*>(w) + entry[t].quad * 64;
#pragma GCC unroll 2
      for (int j = 0; j < J; ++j) sums[t][j] = dot_bytes(sums[t][j], load_bytes(quad + j * kPanelBytes), four);
    }
  }
}

// sums[J][16][16], from row x.row on (first: =, else +=) the products in their units.
template <int J>
PIO_APART void add_eight(const Eight& x, const char* w, int64_t chunks, const F32* units, bool first, float* sums) {
  for (int t = 0; t < kRows && !first; ++t)
    for (int j = 0; j < J; ++j) prefetch(sums + (j * kWideTile + x.row + t) * kLanes);
  I32 exact[kRows][J];
  multiply_eight<J>(x, w, chunks, exact);
#pragma GCC unroll 8
  for (int t = 0; t < kRows; ++t)
#pragma GCC unroll 2
    for (int j = 0; j < J; ++j) {
      float* to = sums + (j * kWideTile + x.row + t) * kLanes;
      const F32 y = to_f32(exact[t][j]), unit = mul(units[j], set(x.head->scale[x.row + t]));
      store(to, first ? mul(y, unit) : fma(y, unit, load(to)));
    }
}

// What unpack_block will read of up to two panels.
Fetcher fetcher_of(const WideWeights& w) {
  const Packed& p = *w.weight;
  const int64_t from = w.block * kWideColumns / p.group, fit = kWideColumns / p.group;
  const int64_t groups = p.groups() - from < fit ? p.groups() - from : fit;
  Fetcher out;
  for (int j = 0; j < w.n_panels; ++j) {
    out.add(p.data + w.panels[j] * p.panel_bytes() + from * p.group_bytes(), 64, groups * p.group_bytes() / 64, 64);
    out.add(p.scales + (w.panels[j] * p.groups() + from) * kLanes, 64, (groups + 1) / 2, 64);
  }
  return out;
}

template <int J>
void multiply_rows(const IntegerRows& x, int64_t block, int64_t first, int64_t n, const char* w, const F32* units,
                   Fetcher fetcher, float* sums) {
  const int64_t share = fetcher.share(100, n * (kWideTile / kRows));
  for (int64_t i = first; i < first + n; ++i, sums += J * kWideTile * kLanes) {
    const IntegerRows::Head* head = x.head(block, i);
    for (int row = 0; row < head->rows; row += kRows) {
      fetcher.fetch(share);
      add_eight<J>({x.values(block, i, row), head, x.again(block, i, row), row}, w, x.chunks_of(block), units,
                   block == 0, sums);
    }
  }
}

// Enters column `column` once more for all that `rest`, what an int8 left of its integer, needs.
int take_again(int64_t column, int32_t rest, IntegerRows::Again* out) {
  int entries = 0;
  for (; rest != 0; ++entries) {
    const int32_t part = rest > 127 ? 127 : rest < -127 ? -127 : rest;
    IntegerRows::Again& entry = out[entries * kRows];
    entry = {static_cast<int32_t>(column / 4), {}};
    entry.values[column % 4] = static_cast<int8_t>(part);
    rest -= part;
  }
  return entries;
}

// One row's columns of a block: 64 of every kChunk. Returns how many it takes again.
int pack_row(const uint16_t* row, int64_t n, int64_t chunks, int t, IntegerRows::Head& head, IntegerRows::Again* again,
             char* out) {
  const float m = largest_of(row, n);
  const bool usable = fits_bytes(m);
  float inverse = usable ? 127.0f / m : 0.0f;
  head.scale[t] = m / 127.0f;
  F32 squares = set(0.0f);  // of integers: below 2^24 in all, so exact in any order
  for (int64_t i = 0; usable && i < n; i += 16) {
    const F32 q = round(mul(sixteen(row, n, i), set(inverse)));
    squares = fma(q, q, squares);
  }
  const float reach = std::sqrt(kReachSquare * sum(squares) / static_cast<float>(n));  // in 127ths of m
  if (usable && reach < 127.0f) {
    inverse *= 127.0f / reach;
    head.scale[t] *= reach / 127.0f;
  }
  I32 total = set_i32(0);
  int entries = 0;
  for (int64_t c = 0; c < chunks; ++c)
    for (int64_t k = 0; k < kByteColumns; k += 16) {
      const int64_t column = c * kByteColumns + k;
      const F32 y = usable ? mul(sixteen(row, n, column), set(inverse)) : set(0.0f);
      const I32 q = to_i32(y), held = to_i32(max(min(y, set(127.0f)), set(-127.0f)));
      store_i8(reinterpret_cast<int8_t*>(out + c * kChunk + k), held);
      total = add(total, q);
      const __m512i rest = _mm512_sub_epi32(q.v, held.v);
      if (_mm512_test_epi32_mask(rest, rest) == 0) continue;
      alignas(64) int32_t left[16];
      store_i32(left, {rest});
      for (int i = 0; i < 16; ++i) entries += take_again(column + i, left[i], again + entries * kRows);
    }
  head.minus_sum[t] = -sum(total);
  return entries;
}

// One block of columns of up to sixteen rows; those beyond are zeros.
void pack_block(const uint16_t* const* rows, int count, int64_t from, int64_t n, const IntegerRows& out, int64_t block,
                int64_t tile) {
  const int64_t chunks = out.chunks_of(block);
  IntegerRows::Head& head = *out.head(block, tile);
  head = {};
  head.rows = count;
  int entries[kWideTile] = {};
  for (int t = 0; t < kWideTile; ++t) {
    char* values = out.values(block, tile, t);
    if (t < count)
      entries[t] = pack_row(rows[t] + from, n, chunks, t, head, out.again(block, tile, t), values);
    else
      for (int64_t c = 0; c < chunks; ++c) _mm512_storeu_si512(values + c * kChunk, _mm512_setzero_si512());
    int32_t& most = head.again[t / kRows];
    most = entries[t] > most ? entries[t] : most;
  }
  for (int t = 0; t < kWideTile; ++t)
    for (int i = entries[t]; i < head.again[t / kRows]; ++i) out.again(block, tile, t)[i * kRows] = {};
}

}  // namespace

void pack_integer_rows(const uint16_t* const* rows, int count, int64_t cols, const IntegerRows& out, int64_t tile) {
  for (int64_t block = 0; block < out.blocks(); ++block) {
    const int64_t from = block * kWideColumns, left = cols - from, most = out.chunks_of(block) * kByteColumns;
    pack_block(rows, count, from, left < most ? left : most, out, block, tile);
  }
}

void multiply_integer_rows(const WideWeights& w, const WideWeights* next, const IntegerRows& x, int64_t first,
                           int64_t n, float* sums) {
  alignas(64) char unpacked[2 * kPanelBytes];
  F32 units[2];
  for (int p = 0; p < w.n_panels; ++p)
    units[p] = unpack_block<128>(*w.weight, w.panels[p], w.block, x.chunks_of(w.block), unpacked + p * kPanelBytes);
  const Fetcher fetcher = next ? fetcher_of(*next) : Fetcher{};
  w.n_panels == 2 ? multiply_rows<2>(x, w.block, first, n, unpacked, units, fetcher, sums)
                  : multiply_rows<1>(x, w.block, first, n, unpacked, units, fetcher, sums);
}

}  // namespace pio::vectors

PIO_TARGET_END
#else
namespace pio::vectors {  // never called: wide_in_use() is false
void pack_integer_rows(const uint16_t* const*, int, int64_t, const IntegerRows&, int64_t) {}
void multiply_integer_rows(const WideWeights&, const WideWeights*, const IntegerRows&, int64_t, int64_t, float*) {}
}  // namespace pio::vectors
#endif
