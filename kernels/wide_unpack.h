// int4 weights as bytes, and what packing rows of bf16 as int8 needs: what tiles (src/wide_bytes_amx.cc) and vectors
// (src/wide_integers.cc) share. Include inside a target region, after simd/avx512.h.
//
// A weight is (n - 8) * scale for the stored n; as a byte it is that in units of the row's largest |scale| * 8 / 127,
// rounded: (n - 8) * 16 as a word, times the ratio of the scales in units of 2^-11, by one rounding multiplication. The
// bytes of a panel's dword are columns of one row, as tiles and dot products want them.
#pragma once
#include <cstring>

#include "wide_tiles.h"

namespace pio::avx512 {
namespace {

constexpr int64_t kByteColumns = 64;
constexpr int64_t kPanelBytes = kWideColumns * kLanes;  // of a block's 512 columns, unpacked

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

// zero + (n - 8) * factor / 2^11 of the bytes whose n are bits 4 to 7 of the words of `even`, and of `odd`.
template <int zero>
PIO_INLINE __m512i level_bytes(__m512i even, __m512i odd, __m512i factor) {
  const __m512i e = _mm512_sub_epi16(_mm512_and_si512(even, words(0xF0)), words(128));
  const __m512i o = _mm512_sub_epi16(_mm512_and_si512(odd, words(0xF0)), words(128));
  const __m512i low = _mm512_mulhrs_epi16(e, factor), high = _mm512_slli_epi16(_mm512_mulhrs_epi16(o, factor), 8);
  const __m512i both = _mm512_ternarylogic_epi32(words(0xFF), low, high, 0xCA);
  return zero == 0 ? both : _mm512_add_epi8(both, _mm512_set1_epi8(static_cast<char>(zero)));
}

// 32 columns of a panel.
template <int zero>
PIO_INLINE void unpack_half(const uint8_t* from, __m512i factor, char* out) {
  for (int i = 0; i < 4; ++i, out += 128) {
    const __m512i v = _mm512_loadu_si512(from + i * 64);
    _mm512_storeu_si512(out, level_bytes<zero>(_mm512_slli_epi16(v, 4), _mm512_srli_epi16(v, 4), factor));
    _mm512_storeu_si512(out + 64, level_bytes<zero>(v, _mm512_srli_epi16(v, 8), factor));
  }
}

// A block of a panel's columns, `zero` added to each byte; what is beyond them becomes 0 in up to `chunks` of 64.
// Returns what a byte of one counts in each row.
template <int zero>
F32 unpack_block(const Packed& w, int64_t panel, int64_t block, int64_t chunks, char* out) {
  constexpr int64_t kHalf = 32 * kLanes;  // bytes of 32 columns
  const int64_t per_group = w.group / 32, first = block * kWideColumns / w.group;
  const int64_t fit = chunks * kByteColumns / w.group, left = w.groups() - first, groups = left < fit ? left : fit;
  const uint8_t* from = w.data + panel * w.panel_bytes() + first * w.group_bytes();
  const uint16_t* scales = w.scales + (panel * w.groups() + first) * kLanes;
  const BlockScales s(scales, groups);
  int64_t half = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const __m512i factor = s.factors(scales + g * kLanes);
    for (const int64_t end = half + per_group; half < end; ++half)
      unpack_half<zero>(from + half * 256, factor, out + half * kHalf);
  }
  for (; half < 2 * chunks; ++half)
    for (int64_t i = 0; i < kHalf; i += 64) _mm512_storeu_si512(out + half * kHalf + i, _mm512_setzero_si512());
  return s.unit;
}

// The largest magnitude of n <= 512 bf16, a NaN being larger than all.
PIO_INLINE float largest_of(const uint16_t* row, int64_t n) {
  __m512i most = _mm512_setzero_si512();  // as bits
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) most = _mm512_max_epu16(most, _mm512_and_si512(load_pairs(row + i).v, words(0x7FFF)));
  most = _mm512_max_epu16(most, _mm512_and_si512(load_pairs_n(row + i, static_cast<int>(n - i)).v, words(0x7FFF)));
  const I32 wide = max(I32{_mm512_slli_epi32(most, 16)}, I32{_mm512_andnot_si512(_mm512_set1_epi32(0xFFFF), most)});
  const int32_t bits = largest(wide);
  float m;
  std::memcpy(&m, &bits, 4);
  return m;
}
// Whether values up to m can be taken as bytes; others become zeros, times a scale that is as small or not finite.
PIO_INLINE bool fits_bytes(float m) { return m > 1e-36f && m < 3e38f; }

// Sixteen of n values of a row, zeros beyond.
PIO_INLINE F32 sixteen(const uint16_t* row, int64_t n, int64_t from) {
  if (from + 16 <= n) return load_bf16(row + from);
  return from < n ? load_bf16_n(row + from, static_cast<int>(n - from)) : set(0.0f);
}

}  // namespace
}  // namespace pio::avx512
