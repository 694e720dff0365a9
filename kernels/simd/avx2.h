// The vocabulary on AVX2 + FMA: sixteen lanes in two registers.
#pragma once

// Activation rows and weight panels of one tile (src/tile.cc): 2 x (2 + 2) sums in 16 registers.
#undef PIO_TILE_ROWS
#undef PIO_TILE_PANELS
#define PIO_TILE_ROWS 2
#define PIO_TILE_PANELS 1

// Weight rows and activation rows of one dense tile (src/dense_tile.cc); sums that fit in the registers.
#undef PIO_DENSE_WEIGHTS
#undef PIO_DENSE_ROWS
#undef PIO_SUMS
#define PIO_DENSE_WEIGHTS 4
#define PIO_DENSE_ROWS 1
#define PIO_SUMS 4

namespace pio::avx2 {

struct F32 {
  __m256 a, b;
};
struct I32 {
  __m256i a, b;
};
struct Bytes {
  __m256i a, b;
};
struct Pairs {  // 16 lanes of two bf16, the first in the low half
  __m256i a, b;
};

PIO_INLINE F32 set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
PIO_INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
PIO_INLINE void store(float* p, F32 x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
PIO_INLINE F32 load_n(const float* p, int n) {
  float all[16] = {};
  std::memcpy(all, p, n * sizeof(float));
  return load(all);
}
PIO_INLINE void store_n(float* p, F32 x, int n) {
  float all[16];
  store(all, x);
  std::memcpy(p, all, n * sizeof(float));
}
PIO_INLINE __m256 widen(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
PIO_INLINE F32 load_bf16(const uint16_t* p) { return {widen(p), widen(p + 8)}; }
PIO_INLINE F32 load_bf16_n(const uint16_t* p, int n) {
  uint16_t all[16] = {};
  std::memcpy(all, p, n * sizeof(uint16_t));
  return load_bf16(all);
}
// To nearest, ties to even; a NaN stays a NaN.
PIO_INLINE __m256i narrow(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  return _mm256_srli_epi32(_mm256_blendv_epi8(up, _mm256_set1_epi32(0x7FC00000), _mm256_castps_si256(nan)), 16);
}
PIO_INLINE void store_bf16(uint16_t* p, F32 x) {
  const __m256i pairs = _mm256_packus_epi32(narrow(x.a), narrow(x.b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(pairs, 0xD8));
}
PIO_INLINE void store_bf16_n(uint16_t* p, F32 x, int n) {
  uint16_t all[16];
  store_bf16(all, x);
  std::memcpy(p, all, n * sizeof(uint16_t));
}

PIO_INLINE F32 add(F32 x, F32 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
PIO_INLINE F32 sub(F32 x, F32 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
PIO_INLINE F32 mul(F32 x, F32 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
PIO_INLINE F32 div(F32 x, F32 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
PIO_INLINE F32 fma(F32 x, F32 y, F32 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
PIO_INLINE F32 max(F32 x, F32 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
PIO_INLINE F32 min(F32 x, F32 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
PIO_INLINE F32 select_greater(F32 x, F32 y, F32 yes, F32 no) {  // x > y ? yes : no
  return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ)),
          _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ))};
}
PIO_INLINE F32 abs(F32 x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
PIO_INLINE F32 sqrt(F32 x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
PIO_INLINE F32 round(F32 x) { return {_mm256_round_ps(x.a, 8), _mm256_round_ps(x.b, 8)}; }
PIO_INLINE float sum(F32 x) {
  const __m256 eight = _mm256_add_ps(x.a, x.b);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
PIO_INLINE float largest(F32 x) {
  const __m256 eight = _mm256_max_ps(x.a, x.b);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

PIO_INLINE I32 set_i32(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
PIO_INLINE I32 load_i32(const int32_t* p) {
  const auto* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
PIO_INLINE void store_i32(int32_t* p, I32 x) {
  auto* q = reinterpret_cast<__m256i*>(p);
  _mm256_storeu_si256(q, x.a);
  _mm256_storeu_si256(q + 1, x.b);
}
PIO_INLINE I32 add(I32 x, I32 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
PIO_INLINE int32_t sum(I32 x) {
  const __m256i eight = _mm256_add_epi32(x.a, x.b);
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
}
template <int bits>
PIO_INLINE I32 shift_left(I32 x) {
  return {_mm256_slli_epi32(x.a, bits), _mm256_slli_epi32(x.b, bits)};
}
PIO_INLINE I32 max(I32 x, I32 y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
PIO_INLINE int32_t largest(I32 x) {
  const __m256i eight = _mm256_max_epi32(x.a, x.b);
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
}
PIO_INLINE I32 magnitude_bits(F32 x) {
  const __m256i mask = _mm256_set1_epi32(0x7FFFFFFF);
  return {_mm256_and_si256(_mm256_castps_si256(x.a), mask), _mm256_and_si256(_mm256_castps_si256(x.b), mask)};
}
PIO_INLINE F32 to_f32(I32 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
PIO_INLINE I32 to_i32(F32 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
PIO_INLINE F32 bits_as_f32(I32 x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
PIO_INLINE void store_i8(int8_t* p, I32 x) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xD8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
PIO_INLINE I32 load_i8(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))};
}
PIO_INLINE I32 load_u8(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}

PIO_INLINE Bytes load_bytes(const uint8_t* p) {
  const auto* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
PIO_INLINE Bytes low_nibbles(Bytes x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
PIO_INLINE Bytes high_nibbles(Bytes x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(_mm256_srli_epi16(x.a, 4), mask), _mm256_and_si256(_mm256_srli_epi16(x.b, 4), mask)};
}
PIO_INLINE Bytes repeat4(const void* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return {_mm256_set1_epi32(four), _mm256_set1_epi32(four)};
}
// VPMADDUBSW adds two products in 16 bits with saturation. Nibbles: 2 * 15 * 127 = 3810 fits. Whole bytes would not
// (2 * 255 * 127), so they go through signs: |w - 128| * (a with the sign of w - 128), at most 2 * 127 * 127 = 32258.
constexpr int kByteZero = 0;
PIO_INLINE __m256i add_pairs(__m256i acc, __m256i words) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
}
PIO_INLINE I32 dot_nibbles(I32 acc, Bytes w, Bytes a) {
  return {add_pairs(acc.a, _mm256_maddubs_epi16(w.a, a.a)), add_pairs(acc.b, _mm256_maddubs_epi16(w.b, a.b))};
}
PIO_INLINE __m256i dot_signed(__m256i acc, __m256i w, __m256i a) {
  const __m256i centred = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
  return add_pairs(acc, _mm256_maddubs_epi16(_mm256_abs_epi8(centred), _mm256_sign_epi8(a, centred)));
}
PIO_INLINE I32 dot_bytes(I32 acc, Bytes w, Bytes a) {
  return {dot_signed(acc.a, w.a, a.a), dot_signed(acc.b, w.b, a.b)};
}

// Four by four bytes of each 128-bit quarter transposed: byte 4 i + j of a quarter becomes its byte 4 j + i.
PIO_INLINE Bytes transpose_quarters(Bytes x) {
  const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m256i twice = _mm256_broadcastsi128_si256(order);
  return {_mm256_shuffle_epi8(x.a, twice), _mm256_shuffle_epi8(x.b, twice)};
}
PIO_INLINE Bytes spread_low_bytes(I32 x) {  // the low bytes of each quarter's four lanes, in all of these
  const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
  const __m256i twice = _mm256_broadcastsi128_si256(order);
  return {_mm256_shuffle_epi8(x.a, twice), _mm256_shuffle_epi8(x.b, twice)};
}
PIO_INLINE Bytes repeat_quarter(const uint8_t* p) {  // 16 bytes, in every quarter
  const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {twice, twice};
}
PIO_INLINE void join_half(__m256i kept, __m256i codes, Bytes high_table, Bytes low_table, __m256i& first,
                          __m256i& second) {
  const __m256i sign = _mm256_set1_epi8(-128);
  const __m256i high = _mm256_or_si256(_mm256_shuffle_epi8(high_table.a, codes), _mm256_and_si256(kept, sign));
  const __m256i low = _mm256_or_si256(_mm256_shuffle_epi8(low_table.a, codes), _mm256_andnot_si256(sign, kept));
  first = _mm256_unpacklo_epi8(low, high);
  second = _mm256_unpackhi_epi8(low, high);
}
// 64 bf16 from their signs and mantissas and the codes of their exponents, whose bytes are looked up in every quarter:
// out[0] from the first eight bytes of each quarter, out[1] from the others.
PIO_INLINE void join_exponents(Bytes kept, Bytes codes, Bytes high_table, Bytes low_table, Pairs* out) {
  join_half(kept.a, codes.a, high_table, low_table, out[0].a, out[1].a);
  join_half(kept.b, codes.b, high_table, low_table, out[0].b, out[1].b);
}
PIO_INLINE void store_bytes(uint8_t* p, Bytes x) {
  auto* q = reinterpret_cast<__m256i*>(p);
  _mm256_storeu_si256(q, x.a);
  _mm256_storeu_si256(q + 1, x.b);
}
PIO_INLINE void store_quarter_sums(int32_t* p, I32 x) {  // p[i] = sum of lane i of the four quarters
  const __m256i eight = _mm256_add_epi32(x.a, x.b);
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), four);
}
PIO_INLINE I32 quarter_sums(const I32* x) {  // lane 4 i + j: the sum of lane j of the four quarters of x[i]
  alignas(32) int32_t sums[16];
  for (int i = 0; i < 4; ++i) store_quarter_sums(sums + 4 * i, x[i]);
  return load_i32(sums);
}

PIO_INLINE Pairs load_pairs(const uint16_t* p) {
  const auto* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
PIO_INLINE Pairs load_pairs_n(const uint16_t* p, int n) {  // n <= 32 bf16, zeros beyond
  uint16_t all[32] = {};
  std::memcpy(all, p, n * sizeof(uint16_t));
  return load_pairs(all);
}
PIO_INLINE void store_pairs_n(uint16_t* p, Pairs x, int n) {
  uint16_t all[32];
  auto* q = reinterpret_cast<__m256i*>(all);
  _mm256_storeu_si256(q, x.a);
  _mm256_storeu_si256(q + 1, x.b);
  std::memcpy(p, all, n * sizeof(uint16_t));
}
PIO_INLINE Pairs repeat_pair(const void* p) {  // two bf16, in every lane
  int32_t two;
  std::memcpy(&two, p, 4);
  return {_mm256_set1_epi32(two), _mm256_set1_epi32(two)};
}
PIO_INLINE F32 even(Pairs x) {  // the first of each pair
  return {_mm256_castsi256_ps(_mm256_slli_epi32(x.a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(x.b, 16))};
}
PIO_INLINE F32 odd(Pairs x) {  // the second
  const __m256i high = _mm256_set1_epi32(-65536);
  return {_mm256_castsi256_ps(_mm256_and_si256(x.a, high)), _mm256_castsi256_ps(_mm256_and_si256(x.b, high))};
}
PIO_INLINE Pairs narrow_pairs(F32 x, F32 y) {  // rounded to nearest even
  return {_mm256_or_si256(narrow(x.a), _mm256_slli_epi32(narrow(y.a), 16)),
          _mm256_or_si256(narrow(x.b), _mm256_slli_epi32(narrow(y.b), 16))};
}
// acc + both products of each lane. Order and rounding of the two additions are the set's own.
PIO_INLINE F32 dot_pairs(F32 acc, Pairs x, Pairs y) { return fma(odd(x), odd(y), fma(even(x), even(y), acc)); }
PIO_INLINE Pairs as_pairs(F32 x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
PIO_INLINE F32 as_lanes(Pairs x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
// p[i] = sum of the lanes of x[i], i < 4, each in the same order.
PIO_INLINE void store_sums4(float* p, const F32* x) {
  __m256 e[4];
  for (int i = 0; i < 4; ++i) e[i] = _mm256_add_ps(x[i].a, x[i].b);
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(e[0], e[1]), _mm256_hadd_ps(e[2], e[3]));
  _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
// Eight by eight, then the two halves off the diagonal change places.
PIO_INLINE void transpose8(__m256* r) {
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      u[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
      u[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xEE);
    }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}
PIO_INLINE void transpose_lanes(F32 (&x)[16]) {  // lane j of x[i] becomes lane i of x[j]
  __m256 quarter[4][8];
  for (int i = 0; i < 8; ++i) {
    quarter[0][i] = x[i].a;
    quarter[1][i] = x[i].b;
    quarter[2][i] = x[i + 8].a;
    quarter[3][i] = x[i + 8].b;
  }
  for (auto& q : quarter) transpose8(q);
  for (int i = 0; i < 8; ++i) {
    x[i] = {quarter[0][i], quarter[2][i]};
    x[i + 8] = {quarter[1][i], quarter[3][i]};
  }
}

PIO_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
PIO_INLINE void prefetch_far(const void* p) {  // to the second-level cache
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
}

}  // namespace pio::avx2
