// One unit of attention over an int8 cache on AMX, in place of attend: the same integers, the same tiles of 64 tokens.
//
// Queries and probabilities, hi and lo, are the first operand; the cache is the second. A block of keys is a tile as it
// lies: sixteen quads of elements by sixteen tokens. Values need quads of tokens, which four byte transposes and
// sixteen moves of a quarter make of 256 bytes.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "int8_kv_attention.h"
#include "isa.h"
#include "target.h"

#if PIO_X86
#include <immintrin.h>

PIO_TARGET_BEGIN(PIO_AMX)
#include "simd/avx512.h"
#define PIO_ISA avx512
#include "simd/math.inc"
#include "simd/visible.inc"
#undef PIO_ISA
#include "attention_amx.h"

namespace pio::amx {
namespace {

using namespace pio::avx512;

constexpr int kBlocks = kTile / kSide;

// One unit's walk. A: tiles of the first operand. 1 holds hi and lo of up to eight rows, 2 are hi and lo of up to
// sixteen, 4 hi and lo of twice sixteen. With A tiles, 4 / A blocks or groups are multiplied at once.
template <int A>
struct Int8Walk {
  static constexpr int kAtOnce = 4 / A;
  const Int8Attention& a;
  const Unit& u;
  const Scratch& s;
  const int64_t base;  // the unit's KV head, in tokens
  const int low;       // A = 1: the first row of lo
  Fetcher fetcher;
  RowSums sums;
  float factor[2][kRows], scale[kRows], shrink[kRows];
  int32_t zero[2][kRows], value_zero[kRows];
  alignas(64) int32_t dots[2][kBlocks][A][kSide][kSide];  // [key part][block][tile][row][token]
  alignas(64) int32_t gathers[kAtOnce][A][kSide][kSide];
  alignas(64) int8_t p[A][kSide][kTile];
  alignas(64) uint8_t packed[kAtOnce][kSide][64];  // [group of sixteen elements][quad of tokens][element, token]
  alignas(64) uint8_t rest[kAtOnce][kTileBytes];

  Int8Walk(const Int8Attention& a, const Unit& u, const Scratch& s)
      : a(a), u(u), s(s), base((u.batch * a.kv_heads + u.kv_head) * a.capacity), low((u.rows + 3) / 4 * 4) {}

  void configure() const {
    TileShapes shapes;
    if (A == 1)
      for (const int t : {0, 1, 2, 3, 6}) shapes.rows[t] = static_cast<uint8_t>(low + u.rows);
    load_shapes(shapes);
  }

  // Of [tile][row][sixteen]: where a row's hi and lo are.
  template <class T>
  static T* hi_of(T* tiles, int row, int width) {
    return tiles + row * width;
  }
  template <class T>
  T* lo_of(T* tiles, int row, int width) const {
    return tiles + (A == 1 ? low + row : A * kSide / 2 + row) * width;
  }

  void take_queries() {
    for (int part = 0; part < a.parts; ++part) {
      const QueryPart& q = s.query[part];
      for (int r = 0; r < u.rows; ++r) {
        factor[part][r] = q.scale[r] * a.softmax_scale * kLog2E;
        zero[part][r] = 128 * q.zero_hi[r] + q.zero_lo[r];
      }
      if (A == 1) std::memcpy(q.hi + low * q.stride, q.lo, static_cast<size_t>(u.rows * q.stride));
      memory_is_used(q.hi);
    }
  }

  void fetch_from(int64_t t) {
    if (t >= a.length) return;
    const int64_t n = (std::min(kTile, a.length - t) + 15) / 16 * 16;
    for (int part = 0; part < a.parts; ++part) {
      fetcher.add(a.key[part].codes + (base + t) * a.key[part].dim, a.key[part].dim, n, a.key[part].dim);
      fetcher.add(a.key[part].scales + base + t, 64, n / 16, 64);
    }
    if (a.value_codes == a.key[0].codes) return;
    fetcher.add(a.value_codes + (base + t) * a.value_dim, a.value_dim, n, a.value_dim);
    fetcher.add(a.value_scales + base + t, 64, n / 16, 64);
  }

  // x: rows, y: kAtOnce tiles of the cache.
  void multiply(const int8_t* hi, const int8_t* lo, int64_t stride, const uint8_t* const* y) {
    if constexpr (A == 1) {
      _tile_loadd(6, hi, stride);
      _tile_loadd(4, y[0], 64);
      _tile_dpbsud(0, 6, 4);
      _tile_loadd(5, y[1], 64);
      _tile_dpbsud(1, 6, 5);
      _tile_loadd(4, y[2], 64);
      _tile_dpbsud(2, 6, 4);
      _tile_loadd(5, y[3], 64);
      _tile_dpbsud(3, 6, 5);
    } else if constexpr (A == 2) {
      _tile_loadd(6, hi, stride);
      _tile_loadd(7, lo, stride);
      _tile_loadd(4, y[0], 64);
      _tile_dpbsud(0, 6, 4);
      _tile_dpbsud(1, 7, 4);
      _tile_loadd(5, y[1], 64);
      _tile_dpbsud(2, 6, 5);
      _tile_dpbsud(3, 7, 5);
    } else {
      _tile_loadd(4, y[0], 64);
      _tile_loadd(6, hi, stride);
      _tile_dpbsud(0, 6, 4);
      _tile_loadd(7, hi + kSide * stride, stride);
      _tile_dpbsud(1, 7, 4);
      _tile_loadd(6, lo, stride);
      _tile_dpbsud(2, 6, 4);
      _tile_loadd(7, lo + kSide * stride, stride);
      _tile_dpbsud(3, 7, 4);
    }
  }

  static void clear() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  static void keep(int32_t* out) {
    _tile_stored(0, out, 64);
    _tile_stored(1, out + 256, 64);
    _tile_stored(2, out + 512, 64);
    _tile_stored(3, out + 768, 64);
    memory_is_used(out);
  }

  // The products of one key part with blocks [b, b + kAtOnce); blocks that are not there repeat the last.
  void score(int part, int b, int blocks, int64_t t) {
    const KeyPart& key = a.key[part];
    const QueryPart& q = s.query[part];
    const uint8_t* from[kAtOnce];
    for (int i = 0; i < kAtOnce; ++i) from[i] = key.codes + (base + t + std::min(b + i, blocks - 1) * kSide) * key.dim;
    const int64_t share = fetcher.share(12, A * ((key.dim + 63) / 64 + (a.parts > 1 ? 8 : 0)));
    clear();
    for (int64_t i = 0; i < key.dim; i += 64) {
      const uint8_t* y[kAtOnce];
      for (int j = 0; j < kAtOnce; ++j) y[j] = from[j] + 16 * i;
      if (key.dim - i < 64) {
        const size_t bytes = static_cast<size_t>(16 * (key.dim - i));
        for (int j = 0; j < kAtOnce; ++j) {
          std::memcpy(rest[j], y[j], bytes);
          std::memset(rest[j] + bytes, 0, kTileBytes - bytes);
          y[j] = rest[j];
        }
        memory_is_used(rest);
      }
      multiply(q.hi + i, q.lo + i, q.stride, y);
      fetcher.fetch(share);
    }
    keep(&dots[part][b][0][0][0]);
  }

  // Scores of rows [row, row + 4) for block b.
  void take_scores(int row, int b, int64_t t, int64_t open, F32* out) const {
    for (int r = 0; r < 4; ++r) {
      const int here = std::min(row + r, u.rows - 1);
      F32 x = set(0.0f);
      for (int part = 0; part < a.parts; ++part) {
        const int32_t* dot = &dots[part][b][0][0][0];
        const I32 hi = shift_left<7>(load_i32(hi_of(dot, here, kSide)));
        const I32 both = add(add(hi, load_i32(lo_of(dot, here, kSide))), set_i32(zero[part][here]));
        const F32 scales = load(a.key[part].scales + base + t + 16 * b);
        x = fma(mul(to_f32(both), set(factor[part][here])), scales, x);
      }
      if (16 * b + 16 > open) x = fma(visible(a, u, here, t + 16 * b), set(kLog2E), x);
      out[r] = max(x, set(kHidden));
    }
  }

  // Probabilities times the values' scales as integers of a row's own scale; x [row][block]. Packing leaves quads of
  // tokens in the order quad, block; so does pack().
  void to_integers(F32 (&x)[4][kBlocks], int row) {
    F32 top[4], total[4];
    for (int r = 0; r < 4; ++r) top[r] = max(max(x[r][0], x[r][1]), max(x[r][2], x[r][3]));
    alignas(16) float most[4], sum_of[4];
    _mm_store_ps(most, largest_of_four(top));
    for (int r = 0; r < 4; ++r) {
      const F32 to_integer = set(most[r] > 0 ? kIntegers / most[r] : 0.0f);
      I32 sum_all = set_i32(0);
      __m512i hi[kBlocks], lo[kBlocks];
      for (int b = 0; b < kBlocks; ++b) {
        const I32 integer = to_i32(mul(x[r][b], to_integer));
        sum_all = add(sum_all, integer);
        hi[b] = _mm512_srai_epi32(_mm512_add_epi32(integer.v, _mm512_set1_epi32(64)), 7);
        lo[b] = _mm512_sub_epi32(integer.v, _mm512_slli_epi32(hi[b], 7));
      }
      total[r] = to_f32(sum_all);
      _mm512_store_si512(hi_of(&p[0][0][0], row + r, kTile), pack_bytes(hi));
      _mm512_store_si512(lo_of(&p[0][0][0], row + r, kTile), pack_bytes(lo));
    }
    _mm_store_ps(sum_of, total_of_four(total));
    for (int r = 0; r < 4; ++r) {
      scale[row + r] = most[r] / kIntegers;
      value_zero[row + r] = -kByteZero * static_cast<int32_t>(sum_of[r]);
    }
  }
  static __m512i pack_bytes(const __m512i (&x)[kBlocks]) {
    return _mm512_packs_epi16(_mm512_packs_epi32(x[0], x[1]), _mm512_packs_epi32(x[2], x[3]));
  }

  void soften(int64_t t, int count) {
    const int64_t share = fetcher.share(28, (u.rows + 3) / 4 * kBlocks * 2);
    for (int row = 0; row < u.rows; row += 4) {
      const int64_t open = open_tokens(a, u, row) - t;
      F32 x[4][kBlocks];
      for (int b = 0; b < kBlocks; ++b) {
        fetcher.fetch(share);
        F32 four[4] = {set(kHidden), set(kHidden), set(kHidden), set(kHidden)};
        if (16 * b < count) take_scores(row, b, t, open, four);
        for (int r = 0; r < 4; ++r) x[r][b] = four[r];
        fetcher.fetch(share);
      }
      soften_four(x, *s.state, sums, row, shrink + row);
      for (int b = 0; b < kBlocks; ++b)
        for (int r = 0; r < 4; ++r)
          x[r][b] = 16 * b < count ? mul(x[r][b], load(a.value_scales + base + t + 16 * b)) : set(0.0f);
      to_integers(x, row);
    }
  }

  // Elements [16 g, 16 g + 16) of the tile's values, a quad of tokens to a row.
  void pack(int64_t g, int64_t t, int blocks, uint8_t (&out)[kSide][64]) const {
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const int quads = static_cast<int>(std::min<int64_t>(4, a.value_dim / 4 - 4 * g));
    for (int b = 0; b < kBlocks && b < blocks; ++b) {  // the first for the compiler, which warned of out[16]
      const uint8_t* codes = a.value_codes + (base + t + 16 * b) * a.value_dim + 256 * g;
      const auto* one = reinterpret_cast<const __m128i*>(codes);
      const __m128i *two = one + (quads > 1 ? 4 : 0), *three = one + (quads > 2 ? 8 : 0);
      const __m128i* four = one + (quads > 3 ? 12 : 0);
      for (int i = 0; i < 4; ++i) {
        __m512i all = _mm512_castsi128_si512(_mm_loadu_si128(one + i));
        all = _mm512_mask_broadcast_i32x4(all, 0x00F0, _mm_loadu_si128(two + i));
        all = _mm512_mask_broadcast_i32x4(all, 0x0F00, _mm_loadu_si128(three + i));
        all = _mm512_mask_broadcast_i32x4(all, 0xF000, _mm_loadu_si128(four + i));
        _mm512_store_si512(out[4 * i + b], _mm512_shuffle_epi8(all, order));
      }
    }
  }

  // gathered = gathered * shrink + probabilities times values.
  void gather(int64_t t, int blocks) {
    const int64_t groups = (a.value_dim + 15) / 16;
    const int64_t share = fetcher.share(60, groups + (groups + kAtOnce - 1) / kAtOnce * u.rows);
    for (int64_t g = 0; g < groups; g += kAtOnce) {
      const uint8_t* y[kAtOnce];
      const int n = static_cast<int>(std::min<int64_t>(kAtOnce, groups - g));
      for (int i = 0; i < kAtOnce; ++i) {
        y[i] = packed[i][0];
        if (i >= n) continue;
        pack(g + i, t, blocks, packed[i]);
        fetcher.fetch(share);
      }
      memory_is_used(packed);
      memory_is_used(p);
      clear();
      multiply(hi_of(&p[0][0][0], 0, kTile), lo_of(&p[0][0][0], 0, kTile), kTile, y);
      keep(&gathers[0][0][0][0]);
      for (int r = 0; r < u.rows; ++r) {
        fetcher.fetch(share);
        for (int i = 0; i < n; ++i) {
          const int32_t* dot = &gathers[i][0][0][0];
          const I32 hi = shift_left<7>(load_i32(hi_of(dot, r, kSide)));
          const I32 both = add(add(hi, load_i32(lo_of(dot, r, kSide))), set_i32(value_zero[r]));
          float* to = s.gathered + r * s.stride + 16 * (g + i);
          store(to, fma(load(to), set(shrink[r]), mul(to_f32(both), set(scale[r]))));
        }
      }
    }
  }

  void all() {
    start_rows(*s.state, sums, (u.rows + 3) / 4 * 4);
    std::memset(s.gathered, 0, sizeof(float) * static_cast<size_t>(u.rows * s.stride));
    std::memset(p, 0, sizeof p);
    std::memset(packed, 0, sizeof packed);
    fetcher.start();
    fetch_from(u.from);
    fetcher.fetch_rest();
    take_queries();
    configure();
    for (int64_t t = u.from; t < u.to; t += kTile) {
      const int count = static_cast<int>(std::min<int64_t>(kTile, u.to - t)), blocks = (count + kSide - 1) / kSide;
      fetcher.start();
      if (t == u.from) fetch_from(t + kTile);
      fetch_from(t + kAheadTokens);
      for (int part = 0; part < a.parts; ++part)
        for (int b = 0; b < blocks; b += kAtOnce) score(part, b, blocks, t);
      soften(t, count);
      gather(t, blocks);
    }
    _tile_release();
    end_rows(sums, *s.state, u.rows);
  }
};

}  // namespace
}  // namespace pio::amx

namespace pio {

void amx_attend_int8(const Int8Attention& a, const Unit& u, const Scratch& s) {
  if (u.rows <= amx::kSide / 2)
    amx::Int8Walk<1>(a, u, s).all();
  else if (u.rows <= amx::kSide)
    amx::Int8Walk<2>(a, u, s).all();
  else
    amx::Int8Walk<4>(a, u, s).all();
}

}  // namespace pio

PIO_TARGET_END
#else
namespace pio {
void amx_attend_int8(const Int8Attention&, const Unit&, const Scratch&) {}  // never called: amx_in_use() is false
}  // namespace pio
#endif
