// The softmax of the attention kernels on AMX. Include inside the target region, after the vocabulary of avx512.
#pragma once
#include "amx.h"
#include "attention.h"
#include "fetcher.h"

namespace pio::amx {

using namespace pio::avx512;

// The memory of the tile after the next is asked for by a Fetcher (the first tile of a unit asks for that of the next
// as well), to the second-level cache: the first has no room for two tiles.
constexpr int64_t kAheadTokens = 2 * kTile;

// Scores are in units of ln 2: a power of two is cheaper than one of e.
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// Sums of probabilities, added across lanes when the unit ends. Rows come in fours.
struct RowSums {
  alignas(64) float lanes[kMostRows][16];
};

PIO_INLINE void start_rows(RowState& state, RowSums& sums, int rows) {
  for (int r = 0; r < rows; ++r) {
    state.most[r] = kHidden;
    store(sums.lanes[r], set(0.0f));
  }
}

// Maxima return to natural logarithms, which finishing rows expects.
PIO_INLINE void end_rows(const RowSums& sums, RowState& state, int rows) {
  for (int r = 0; r < rows; ++r) {
    state.most[r] *= kLn2;
    state.sum[r] = sum(load(sums.lanes[r]));
  }
}

// 2^x for x <= 0, and 1 exactly for 0: x = n + r, 0 <= r < 1, a polynomial of degree 5 for 2^r, relative error 1.5e-7.
// Far below, zero.
PIO_INLINE F32 exp2(F32 x) {
  const __m512 r = _mm512_reduce_ps(x.v, 1);  // minus the next integer below
  F32 p = set(1.8671311e-3f);
  p = fma(p, {r}, set(9.017028e-3f));
  p = fma(p, {r}, set(5.5799916e-2f));
  p = fma(p, {r}, set(0.24016444f));
  p = fma(p, {r}, set(0.6931513f));
  p = fma(p, {r}, set(1.0f));
  return {_mm512_scalef_ps(p.v, x.v)};
}

// Tokens from the first on that rows [row, row + 4) all see; where there is a mask, none is taken for granted.
template <class Attention>
PIO_INLINE int64_t open_tokens(const Attention& a, const Unit& u, int row) {
  if (a.mask || a.bias) return 0;
  return a.causal ? a.length - a.queries + (u.first_row + row) / a.group + 1 : a.length;
}

// Four columns of sixteen rows, 16 floats apart, as four vectors.
PIO_INLINE void turn_four(const float* p, F32 (&out)[4]) {
  __m512 v[4];
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_castps128_ps512(_mm_load_ps(p + 16 * i));
    v[i] = _mm512_mask_broadcast_f32x4(v[i], 0x00F0, _mm_load_ps(p + 16 * (i + 4)));
    v[i] = _mm512_mask_broadcast_f32x4(v[i], 0x0F00, _mm_load_ps(p + 16 * (i + 8)));
    v[i] = _mm512_mask_broadcast_f32x4(v[i], 0xF000, _mm_load_ps(p + 16 * (i + 12)));
  }
  const __m512 a = _mm512_unpacklo_ps(v[0], v[1]), b = _mm512_unpackhi_ps(v[0], v[1]);
  const __m512 c = _mm512_unpacklo_ps(v[2], v[3]), d = _mm512_unpackhi_ps(v[2], v[3]);
  // Vector i holds tokens i, 4 + i, 8 + i, 12 + i of the four rows, a quarter each: here a quarter's four neighbours.
  out[0].v = _mm512_shuffle_ps(a, c, 0x44);
  out[1].v = _mm512_shuffle_ps(a, c, 0xEE);
  out[2].v = _mm512_shuffle_ps(b, d, 0x44);
  out[3].v = _mm512_shuffle_ps(b, d, 0xEE);
}

// The largest lane of each of four vectors.
PIO_INLINE __m128 largest_of_four(const F32 (&x)[4]) {
  const __m512 a = _mm512_max_ps(_mm512_unpacklo_ps(x[0].v, x[1].v), _mm512_unpackhi_ps(x[0].v, x[1].v));
  const __m512 b = _mm512_max_ps(_mm512_unpacklo_ps(x[2].v, x[3].v), _mm512_unpackhi_ps(x[2].v, x[3].v));
  const __m512 four = _mm512_max_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xEE));
  const __m256 two = _mm256_max_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
  return _mm_max_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
}

// The sums of the lanes of four vectors.
PIO_INLINE __m128 total_of_four(const F32 (&x)[4]) {
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(x[0].v, x[1].v), _mm512_unpackhi_ps(x[0].v, x[1].v));
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(x[2].v, x[3].v), _mm512_unpackhi_ps(x[2].v, x[3].v));
  const __m512 four = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xEE));
  const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
  return _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
}

// Softmax of rows [row, row + 4), `row` a multiple of 4: scores become probabilities, maxima and sums are brought up
// to date, shrink is what everything gathered so far must be multiplied with.
template <int B>
PIO_INLINE void soften_four(F32 (&x)[4][B], RowState& state, RowSums& sums, int row, float* shrink) {
  F32 top[4];
  for (int r = 0; r < 4; ++r) {
    top[r] = x[r][0];
    for (int b = 1; b < B; ++b) top[r] = max(top[r], x[r][b]);
  }
  const __m128 before = _mm_loadu_ps(state.most + row), most = _mm_max_ps(before, largest_of_four(top));
  _mm_storeu_ps(state.most + row, most);
  _mm_storeu_ps(shrink, _mm512_castps512_ps128(exp2({_mm512_castps128_ps512(_mm_sub_ps(before, most))}).v));
  for (int r = 0; r < 4; ++r) {
    const F32 own = set(state.most[row + r]);
    F32 weights = mul(load(sums.lanes[row + r]), set(shrink[r]));
    for (int b = 0; b < B; ++b) {
      x[r][b] = exp2(sub(x[r][b], own));
      weights = add(weights, x[r][b]);
    }
    store(sums.lanes[row + r], weights);
  }
}

PIO_INLINE void shrink_row(float shrink, float* gathered, int64_t stride) {
  if (shrink == 1.0f) return;
  for (int64_t i = 0; i < stride; i += 16) store(gathered + i, mul(load(gathered + i), set(shrink)));
}

PIO_INLINE __m512i as_bits(F32 x) { return _mm512_castps_si512(x.v); }

// Rounded to nearest: the upper halves are a bf16.
PIO_INLINE __m512i rounded(F32 x) { return _mm512_add_epi32(as_bits(x), _mm512_set1_epi32(0x8000)); }

// Two vectors as the sum of two bf16 each, rounded to nearest: hi and lo hold x in the lower halves of their lanes, y
// in the upper ones. lo is what hi lacks.
PIO_INLINE void split_pair(F32 x, F32 y, __m512i& hi, __m512i& lo) {
  const __m512i upper = _mm512_set1_epi32(-65536);
  const __m512i x_hi = _mm512_and_si512(rounded(x), upper), y_hi = _mm512_and_si512(rounded(y), upper);
  const __m512i x_lo = rounded(sub(x, {_mm512_castsi512_ps(x_hi)}));
  const __m512i y_lo = rounded(sub(y, {_mm512_castsi512_ps(y_hi)}));
  hi = _mm512_or_si512(_mm512_srli_epi32(x_hi, 16), y_hi);
  lo = _mm512_ternarylogic_epi32(_mm512_srli_epi32(x_lo, 16), y_lo, upper, 0xF8);  // a | (b & c)
}

}  // namespace pio::amx
