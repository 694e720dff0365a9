// int4 weights as bytes, bf16 rows as integers, and their products by VPDPBUSD. wide_integers.h says what for.
//
// VPDPBUSD takes one operand without a sign: weights are stored 128 higher, and -128 times the sum of a row's integers
// is added to its sums. High bytes are multiplied first, and the sums then shifted.
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
  const IntegerRows::High* high;
  int row;  // the first
};

// sums[8][J][16] = J panels at w times the eight rows' high bytes. Row beside row: one row's products alone would each
// wait for the one before.
template <int J>
PIO_APART void multiply_high(const Eight& x, const char* w, int32_t* sums) {
  I32 sum[kRows][J];
  for (int t = 0; t < kRows; ++t)
    for (int j = 0; j < J; ++j) sum[t][j] = set_i32(0);
  const IntegerRows::High* entry = x.high;
  for (int i = 0; i < x.head->high[x.row / kRows]; ++i, entry += kRows) {
#pragma GCC unroll 8
    for (int t = 0; t < kRows; ++t) {
      const Bytes four = repeat4(entry[t].bytes);
      const auto* quad = reinterpret_cast<const uint8_t*>(w) + entry[t].quad * 64;
#pragma GCC unroll 2
      for (int j = 0; j < J; ++j) sum[t][j] = dot_bytes(sum[t][j], load_bytes(quad + j * kPanelBytes), four);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < kRows; ++t)
#pragma GCC unroll 2
    for (int j = 0; j < J; ++j) store_i32(sums + (t * J + j) * kLanes, sum[t][j]);
}

// sums[8][J][16] += J panels at w times the eight rows' low bytes.
template <int J>
PIO_APART void multiply_low(const char* x, const char* w, int64_t chunks, int32_t* sums) {
  I32 sum[kRows][J];
#pragma GCC unroll 8
  for (int t = 0; t < kRows; ++t)
#pragma GCC unroll 2
    for (int j = 0; j < J; ++j) sum[t][j] = load_i32(sums + (t * J + j) * kLanes);
  const auto* bytes = reinterpret_cast<const uint8_t*>(w);
  for (int64_t c = 0; c < chunks; ++c, x += kChunk)
    for (int64_t k = 0; k < kByteColumns; k += 4, bytes += 64) {
      Bytes panel[J];
#pragma GCC unroll 2
      for (int j = 0; j < J; ++j) panel[j] = load_bytes(bytes + j * kPanelBytes);
#pragma GCC unroll 8
      for (int t = 0; t < kRows; ++t) {
        const Bytes four = repeat4(x + t * kByteColumns + k);
#pragma GCC unroll 2
        for (int j = 0; j < J; ++j) sum[t][j] = dot_bytes(sum[t][j], panel[j], four);
      }
    }
#pragma GCC unroll 8
  for (int t = 0; t < kRows; ++t)
#pragma GCC unroll 2
    for (int j = 0; j < J; ++j) store_i32(sums + (t * J + j) * kLanes, sum[t][j]);
}

// sums[J][16][16], from row x.row on (first: =, else +=) J panels at w times eight rows, in their units.
template <int J>
void add_eight(const Eight& x, const char* w, int64_t chunks, const F32* units, bool first, float* sums) {
  for (int t = 0; t < kRows && !first; ++t)
    for (int j = 0; j < J; ++j) prefetch(sums + (j * kWideTile + x.row + t) * kLanes);
  alignas(64) int32_t exact[kRows * J * kLanes];
  const bool high = x.head->high[x.row / kRows] != 0;
  if (high) multiply_high<J>(x, w, exact);
  for (int t = 0; t < kRows; ++t)
    for (int j = 0; j < J; ++j) {
      int32_t* to = exact + (t * J + j) * kLanes;
      const I32 start = shift_left<7>(set_i32(x.head->minus_sum[x.row + t]));
      store_i32(to, high ? add(shift_left<8>(load_i32(to)), start) : start);
    }
  multiply_low<J>(x.values, w, chunks, exact);
  for (int t = 0; t < kRows; ++t)
    for (int j = 0; j < J; ++j) {
      float* to = sums + (j * kWideTile + x.row + t) * kLanes;
      const F32 y = to_f32(load_i32(exact + (t * J + j) * kLanes));
      const F32 unit = mul(units[j], set(x.head->scale[x.row + t]));
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
      add_eight<J>({x.values(block, i, row), head, x.high(block, i, row), row}, w, x.chunks_of(block), units,
                   block == 0, sums);
    }
  }
}

// Magnitudes of n <= 512 bf16 as bits, which are ordered as the values are.
struct Magnitudes {
  __m512i bits[kWideColumns / 32];
  int64_t vectors;

  Magnitudes(const uint16_t* row, int64_t n) : vectors((n + 31) / 32) {
    for (int64_t i = 0; i < vectors; ++i) {
      const int64_t left = n - 32 * i;
      const Pairs all = left < 32 ? load_pairs_n(row + 32 * i, static_cast<int>(left)) : load_pairs(row + 32 * i);
      bits[i] = _mm512_and_si512(all.v, words(0x7FFF));
    }
  }
  int64_t above(int limit) const {
    int64_t count = 0;
    for (int64_t i = 0; i < vectors; ++i) count += __builtin_popcount(_mm512_cmpgt_epu16_mask(bits[i], words(limit)));
    return count;
  }
};

// What an int8 is to reach: the largest value of the row, m; or, where that is more than twice what few are above, the
// least of kStepLevels values from m downwards that at most kMostHigh of the row are above.
float reach_of(const uint16_t* row, int64_t n, float m) {
  if (m < 1e-30f) return m;  // a 127th of the least would have no inverse
  const Magnitudes all(row, n);
  int32_t top;
  std::memcpy(&top, &m, 4);
  const auto few_above = [&](int level) { return all.above((top >> 16) - 16 * level) <= kMostHigh; };
  if (!few_above(kLeastLevel)) return m;
  int level = kLeastLevel;
  for (int step = kStepLevels / 2; step > 0; step /= 2)
    if (level + step < kStepLevels && few_above(level + step)) level += step;
  top -= level * (16 << 16);
  std::memcpy(&m, &top, 4);
  return m;
}

// One row's columns of a block: 64 of every kChunk. Returns how many have a high byte.
int pack_row(const uint16_t* row, int64_t n, int64_t chunks, int t, IntegerRows::Head& head, IntegerRows::High* high,
             char* out) {
  const float m = largest_of(row, n);
  const bool usable = fits_bytes(m);
  const float reach = usable ? reach_of(row, n, m) : m;
  const float inverse = usable ? 127.0f / reach : 0.0f;
  head.scale[t] = reach / 127.0f;
  I32 total = set_i32(0);
  int entries = 0;
  for (int64_t c = 0; c < chunks; ++c)
    for (int64_t k = 0; k < kByteColumns; k += 16) {
      const int64_t column = c * kByteColumns + k;
      const I32 q = usable ? to_i32(mul(sixteen(row, n, column), set(inverse))) : set_i32(0);
      store_i8(reinterpret_cast<int8_t*>(out + c * kChunk + k), q);  // the low bytes
      total = add(total, q);
      const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(q.v, _mm512_set1_epi32(128)), 8);
      unsigned beyond = _mm512_test_epi32_mask(upper, upper);
      if (beyond == 0) continue;
      alignas(16) int8_t bytes[16];
      store_i8(bytes, {upper});
      for (; beyond != 0; beyond &= beyond - 1, ++entries) {
        const int i = __builtin_ctz(beyond);
        IntegerRows::High& entry = high[entries * kRows];
        entry = {static_cast<int32_t>((column + i) / 4), {}};
        entry.bytes[i % 4] = bytes[i];
      }
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
      entries[t] = pack_row(rows[t] + from, n, chunks, t, head, out.high(block, tile, t), values);
    else
      for (int64_t c = 0; c < chunks; ++c) _mm512_storeu_si512(values + c * kChunk, _mm512_setzero_si512());
    int32_t& most = head.high[t / kRows];
    most = entries[t] > most ? entries[t] : most;
  }
  for (int t = 0; t < kWideTile; ++t)
    for (int i = entries[t]; i < head.high[t / kRows]; ++i) out.high(block, tile, t)[i * kRows] = {};
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
