// The vocabulary on AVX-512: sixteen lanes in one register.
#pragma once

// Activation rows and weight panels of one tile (src/tile.cc): 12 integer and 12 float sums in 32 registers.
#undef PIO_TILE_ROWS
#undef PIO_TILE_PANELS
#define PIO_TILE_ROWS 6
#define PIO_TILE_PANELS 2

// Weight rows and activation rows of one dense tile (src/dense_tile.cc); sums that fit in the registers.
#undef PIO_DENSE_WEIGHTS
#undef PIO_DENSE_ROWS
#undef PIO_SUMS
#define PIO_DENSE_WEIGHTS 4
#define PIO_DENSE_ROWS 6
#define PIO_SUMS 16

namespace pio::avx512 {

struct F32 {
  __m512 v;
};
struct I32 {
  __m512i v;
};
struct Bytes {  // 64 bytes: 16 lanes of 4
  __m512i v;
};
struct Pairs {  // 16 lanes of two bf16, the first in the low half
  __m512i v;
};

PIO_INLINE F32 set(float x) { return {_mm512_set1_ps(x)}; }
PIO_INLINE F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
PIO_INLINE void store(float* p, F32 a) { _mm512_storeu_ps(p, a.v); }
PIO_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
PIO_INLINE F32 load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
PIO_INLINE void store_n(float* p, F32 a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
PIO_INLINE F32 widen(__m256i h) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))}; }
PIO_INLINE F32 load_bf16(const uint16_t* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
PIO_INLINE F32 load_bf16_n(const uint16_t* p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
// VCVTNEPS2BF16 flushes subnormals; torch does not. Bits below 2^-126 differ, nothing else does.
PIO_INLINE __m256i narrow(F32 a) { return (__m256i)_mm512_cvtneps_pbh(a.v); }
PIO_INLINE void store_bf16(uint16_t* p, F32 a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a)); }
PIO_INLINE void store_bf16_n(uint16_t* p, F32 a, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow(a)); }

PIO_INLINE F32 add(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
PIO_INLINE F32 sub(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
PIO_INLINE F32 mul(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
PIO_INLINE F32 div(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
PIO_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
PIO_INLINE F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
PIO_INLINE F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
PIO_INLINE F32 select_greater(F32 a, F32 b, F32 yes, F32 no) {  // a > b ? yes : no
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), no.v, yes.v)};
}
PIO_INLINE F32 abs(F32 a) { return {_mm512_abs_ps(a.v)}; }
PIO_INLINE F32 sqrt(F32 a) { return {_mm512_sqrt_ps(a.v)}; }
PIO_INLINE F32 round(F32 a) { return {_mm512_roundscale_ps(a.v, 8)}; }  // to nearest, ties to even
PIO_INLINE float sum(F32 a) { return _mm512_reduce_add_ps(a.v); }
PIO_INLINE float largest(F32 a) { return _mm512_reduce_max_ps(a.v); }

PIO_INLINE I32 set_i32(int32_t x) { return {_mm512_set1_epi32(x)}; }
PIO_INLINE I32 load_i32(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
PIO_INLINE void store_i32(int32_t* p, I32 a) { _mm512_storeu_si512(p, a.v); }
PIO_INLINE I32 add(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
// Modulo 2^32. GCC's _mm512_reduce_add_epi32 adds signed integers, whose overflow is undefined.
PIO_INLINE int32_t sum(I32 a) {
  const __m256i eight = _mm256_add_epi32(_mm512_castsi512_si256(a.v), _mm512_extracti64x4_epi64(a.v, 1));
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
}
template <int bits>
PIO_INLINE I32 shift_left(I32 a) {
  return {_mm512_slli_epi32(a.v, bits)};
}
PIO_INLINE I32 max(I32 a, I32 b) { return {_mm512_max_epi32(a.v, b.v)}; }
PIO_INLINE int32_t largest(I32 a) { return _mm512_reduce_max_epi32(a.v); }
PIO_INLINE I32 magnitude_bits(F32 a) {
  return {_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7FFFFFFF))};
}
PIO_INLINE F32 to_f32(I32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
PIO_INLINE I32 to_i32(F32 a) { return {_mm512_cvtps_epi32(a.v)}; }  // to nearest, ties to even
PIO_INLINE F32 bits_as_f32(I32 a) { return {_mm512_castsi512_ps(a.v)}; }
// Lanes to int8 and from it, in memory. Values must fit.
PIO_INLINE void store_i8(int8_t* p, I32 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
PIO_INLINE I32 load_i8(const int8_t* p) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
PIO_INLINE I32 load_u8(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}

PIO_INLINE Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
PIO_INLINE Bytes low_nibbles(Bytes a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
PIO_INLINE Bytes high_nibbles(Bytes a) { return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))}; }
PIO_INLINE Bytes repeat4(const void* p) {  // 4 bytes, in every lane
  int32_t four;
  std::memcpy(&four, p, 4);
  return {_mm512_set1_epi32(four)};
}
// acc + the four products of each lane. `w` are unsigned; dot_nibbles needs w <= 15, both need a in [-127, 127].
// kByteZero: what dot_bytes takes away from each w by itself is (128 - kByteZero); the caller corrects the rest.
constexpr int kByteZero = 128;
PIO_INLINE I32 dot_nibbles(I32 acc, Bytes w, Bytes a) { return {_mm512_dpbusd_epi32(acc.v, w.v, a.v)}; }
PIO_INLINE I32 dot_bytes(I32 acc, Bytes w, Bytes a) { return {_mm512_dpbusd_epi32(acc.v, w.v, a.v)}; }

// Four by four bytes of each 128-bit quarter transposed: byte 4 i + j of a quarter becomes its byte 4 j + i.
PIO_INLINE Bytes transpose_quarters(Bytes a) {
  const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return {_mm512_shuffle_epi8(a.v, _mm512_broadcast_i32x4(order))};
}
PIO_INLINE Bytes spread_low_bytes(I32 a) {  // the low bytes of each quarter's four lanes, in all of these
  const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
  return {_mm512_shuffle_epi8(a.v, _mm512_broadcast_i32x4(order))};
}
PIO_INLINE Bytes repeat_quarter(const uint8_t* p) {  // 16 bytes, in every quarter
  return {_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
// 64 bf16 from their signs and mantissas and the codes of their exponents, whose bytes are looked up in every quarter:
// out[0] from the first eight bytes of each quarter, out[1] from the others.
PIO_INLINE void join_exponents(Bytes kept, Bytes codes, Bytes high_table, Bytes low_table, Pairs* out) {
  const __m512i sign = _mm512_set1_epi8(-128);
  // table | (kept & sign), table | (kept & ~sign)
  const __m512i high = _mm512_ternarylogic_epi32(_mm512_shuffle_epi8(high_table.v, codes.v), kept.v, sign, 0xF8);
  const __m512i low = _mm512_ternarylogic_epi32(_mm512_shuffle_epi8(low_table.v, codes.v), kept.v, sign, 0xF4);
  out[0].v = _mm512_unpacklo_epi8(low, high);
  out[1].v = _mm512_unpackhi_epi8(low, high);
}
PIO_INLINE void store_bytes(uint8_t* p, Bytes a) { _mm512_storeu_si512(p, a.v); }
PIO_INLINE void store_quarter_sums(int32_t* p, I32 a) {  // p[i] = sum of lane i of the four quarters
  const __m256i eight = _mm256_add_epi32(_mm512_castsi512_si256(a.v), _mm512_extracti64x4_epi64(a.v, 1));
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), four);
}
PIO_INLINE I32 quarter_sums(const I32* a) {       // lane 4 i + j: the sum of lane j of the four quarters of a[i]
  const auto halves = [](__m512i x, __m512i y) {  // quarters 0 + 2 and 1 + 3 of both
    return _mm512_add_epi32(_mm512_shuffle_i32x4(x, y, 0x44), _mm512_shuffle_i32x4(x, y, 0xEE));
  };
  const __m512i x = halves(a[0].v, a[1].v), y = halves(a[2].v, a[3].v);
  return {_mm512_add_epi32(_mm512_shuffle_i32x4(x, y, 0x88), _mm512_shuffle_i32x4(x, y, 0xDD))};
}

PIO_INLINE Pairs load_pairs(const uint16_t* p) { return {_mm512_loadu_si512(p)}; }
PIO_INLINE __mmask32 first_of_32(int n) { return static_cast<__mmask32>((uint64_t{1} << n) - 1); }
PIO_INLINE Pairs load_pairs_n(const uint16_t* p, int n) {  // n <= 32 bf16, zeros beyond
  return {_mm512_maskz_loadu_epi16(first_of_32(n), p)};
}
PIO_INLINE void store_pairs_n(uint16_t* p, Pairs a, int n) { _mm512_mask_storeu_epi16(p, first_of_32(n), a.v); }
PIO_INLINE Pairs repeat_pair(const void* p) {  // two bf16, in every lane
  int32_t two;
  std::memcpy(&two, p, 4);
  return {_mm512_set1_epi32(two)};
}
PIO_INLINE F32 even(Pairs a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16))}; }  // the first of each pair
PIO_INLINE F32 odd(Pairs a) {                                                               // the second
  return {_mm512_castsi512_ps(_mm512_and_si512(a.v, _mm512_set1_epi32(-65536)))};
}
PIO_INLINE Pairs narrow_pairs(F32 a, F32 b) {  // rounded to nearest even
  const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(b)), 16);
  return {_mm512_or_si512(_mm512_cvtepu16_epi32(narrow(a)), high)};
}
// acc + both products of each lane. Order and rounding of the two additions are the set's own. Sapphire Rapids does one
// per cycle, as many multiply-adds as its two fma; what is saved is the widening. Zen 4 does twice as many.
PIO_INLINE F32 dot_pairs(F32 acc, Pairs a, Pairs b) { return {_mm512_dpbf16_ps(acc.v, (__m512bh)a.v, (__m512bh)b.v)}; }
PIO_INLINE Pairs as_pairs(F32 a) { return {_mm512_castps_si512(a.v)}; }
PIO_INLINE F32 as_lanes(Pairs a) { return {_mm512_castsi512_ps(a.v)}; }
// p[i] = sum of the lanes of a[i], i < 4, each in the same order.
PIO_INLINE void store_sums4(float* p, const F32* a) {
  __m256 e[4];
  for (int i = 0; i < 4; ++i) e[i] = _mm256_add_ps(_mm512_castps512_ps256(a[i].v), _mm512_extractf32x8_ps(a[i].v, 1));
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(e[0], e[1]), _mm256_hadd_ps(e[2], e[3]));
  _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
PIO_INLINE void transpose_lanes(F32 (&a)[16]) {  // lane j of a[i] becomes lane i of a[j]
  __m512 t[16], u[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(a[i].v, a[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(a[i].v, a[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      u[i + 2 * j] = _mm512_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
      u[i + 2 * j + 1] = _mm512_shuffle_ps(t[i + j], t[i + j + 2], 0xEE);
    }
  // u[4 q + c] holds columns c, c + 4, c + 8, c + 12 of rows 4 q .. 4 q + 3, a quarter each.
  for (int c = 0; c < 4; ++c) {
    const __m512 low0 = _mm512_shuffle_f32x4(u[c], u[c + 4], 0x88), low1 = _mm512_shuffle_f32x4(u[c], u[c + 4], 0xDD);
    const __m512 high0 = _mm512_shuffle_f32x4(u[c + 8], u[c + 12], 0x88);
    const __m512 high1 = _mm512_shuffle_f32x4(u[c + 8], u[c + 12], 0xDD);
    a[c].v = _mm512_shuffle_f32x4(low0, high0, 0x88);
    a[c + 8].v = _mm512_shuffle_f32x4(low0, high0, 0xDD);
    a[c + 4].v = _mm512_shuffle_f32x4(low1, high1, 0x88);
    a[c + 12].v = _mm512_shuffle_f32x4(low1, high1, 0xDD);
  }
}

PIO_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
PIO_INLINE void prefetch_far(const void* p) {  // to the second-level cache
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
}

}  // namespace pio::avx512
