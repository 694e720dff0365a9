// One unit of attention over a bf16 cache on AMX, in place of attend_dense: the same tiles of 64 tokens, the same
// state.
//
// Scores: keys are the first operand, read as they lie (16 tokens by 32 elements); queries are the second, packed once
// per unit. What comes out has a token to a row, so sixteen by sixteen scores are turned round, four query rows at a
// time, which stay in registers through the softmax. Values: probabilities are the first operand, values the second,
// which wants pairs of tokens beside each other.
//
// Probabilities are multiplied as the sum of two bf16, p = hi + lo: |p - hi - lo| <= 2^-17 p, where hi alone would lose
// 2^-9 p. The tile instruction takes subnormals as zero and adds in an order of its own.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "isa.h"
#include "kv_attention.h"
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

constexpr int kStep = 32;  // tokens of one product with values, two blocks of scores
constexpr int kSteps = kTile / kStep;

// One unit's walk. T: tiles of query rows worked on together, a strip: 1, or 2 of sixteen.
template <int T>
struct Walk {
  static constexpr int kStrip = T * kSide, kStrips = T == 1 ? 1 : kMostRows / kStrip;
  const KvAttention& a;
  const Unit& u;
  const KvScratch& s;
  const int64_t width;  // elements of a padded key
  const int strips;
  // A product costs the same at any height, so where the last tile of a single strip, from row `last` on, has at most
  // eight rows, it holds hi and, from row `low` on, lo: six products for the 20 heads of GLM in place of eight.
  const int last;
  const bool stacked;
  const int low;
  char *const keys, *const values;
  Fetcher fetcher;
  RowSums sums;
  alignas(64) float scores[2 * kSteps][T][kSide][kSide];        // [token][row]
  alignas(64) uint16_t p[kStrips][kSteps][2][T][kSide][kStep];  // hi and lo

  Walk(const KvAttention& a, const Unit& u, const KvScratch& s)
      : a(a),
        u(u),
        s(s),
        width(a.query_width()),
        strips((u.rows + kStrip - 1) / kStrip),
        last(T == 2 && u.rows > kSide ? kSide : 0),
        stacked(strips == 1 && u.rows - last <= kSide / 2),
        low(last + (u.rows - last + 3) / 4 * 4),
        keys(reinterpret_cast<char*>(s.keys)),
        values(keys + 2 * kTile * width) {}

  void configure() const {
    TileShapes shapes;
    // One tile of few rows: those of probabilities and of what is gathered are no higher.
    if (T == 1)
      for (int t = 4; t < 8; ++t) shapes.rows[t] = static_cast<uint8_t>(stacked ? low + u.rows : u.rows);
    load_shapes(shapes);
  }

  // [row tile][chunk of 32 elements][pair of elements][row]. Meanwhile the unit's first tile comes.
  void pack_queries() {
    char* out = s.queries;
    const int64_t share = fetcher.share(100, strips * T * width / 32);
    for (int first = 0; first < strips * kStrip; first += kSide) {
      int64_t query[kSide], head[kSide];
      for (int j = 0; j < kSide; ++j) {
        const int64_t row = u.first_row + std::min(first + j, u.rows - 1);
        query[j] = row / a.group;
        head[j] = u.kv_head * a.group + row % a.group;
      }
      for (int part = 0; part < a.parts; ++part) {
        const DenseKeyPart& k = a.key[part];
        const auto* q = reinterpret_cast<const uint16_t*>(k.q) + u.batch * k.q_batch;
        for (int64_t i = 0; i < k.dim; i += 32, out += kTileBytes) {
          const int n = static_cast<int>(std::min<int64_t>(32, k.dim - i));
          F32 lanes[kSide];
          for (int j = 0; j < kSide; ++j)
            lanes[j] = as_lanes(load_pairs_n(q + head[j] * k.q_head + query[j] * k.q_token + i, n));
          transpose_lanes(lanes);
          for (int j = 0; j < kSide; ++j) store(reinterpret_cast<float*>(out + 64 * j), lanes[j]);
          fetcher.fetch(share);
        }
      }
    }
  }

  const char* key(const DenseKeyPart& k, int64_t t) const { return key_of(a, k, u, t); }
  const char* value(int64_t t) const { return value_of(a, u, t); }

  // A tile from token t on, where there is one. Latents that are keys and values are fetched once.
  void fetch_from(int64_t t) {
    if (t >= a.length) return;
    const int64_t rows = std::min(kTile, a.length - t);
    for (int part = 0; part < a.parts; ++part)
      fetcher.add(key(a.key[part], t), 2 * a.key[part].k_token, rows, 2 * a.key[part].dim);
    if (a.values != a.key[0].k) fetcher.add(value(t), 2 * a.v_token, rows, 2 * a.value_dim);
  }

  static void clear() {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (T == 2) _tile_zero(2);
    if constexpr (T == 2) _tile_zero(3);
  }

  // Two blocks of sixteen tokens against one chunk of a strip.
  void score_chunk(const char* k, int64_t stride, const char* q, int64_t share) {
    if constexpr (T == 1) {
      _tile_loadd(2, q, 64);
      _tile_loadd(3, k, stride);
      _tile_dpbf16ps(0, 3, 2);
      fetcher.fetch(share);
      _tile_loadd(3, k + kSide * stride, stride);
      _tile_dpbf16ps(1, 3, 2);
    } else {
      _tile_loadd(4, k, stride);
      _tile_loadd(6, q, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, q + width * kSide * 2, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, k + kSide * stride, stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }

  void store_scores(int step) {
    if constexpr (T == 1) {
      _tile_stored(0, scores[2 * step][0], 64);
      _tile_stored(1, scores[2 * step + 1][0], 64);
    } else {
      _tile_stored(0, scores[2 * step][0], 64);
      _tile_stored(1, scores[2 * step][T - 1], 64);
      _tile_stored(2, scores[2 * step + 1][0], 64);
      _tile_stored(3, scores[2 * step + 1][T - 1], 64);
    }
  }

  // Tokens behind the last that a row sees are read, then hidden, where the history has them.
  bool lies_whole(int64_t t, int count) const {
    bool whole = t + (count + kStep - 1) / kStep * kStep <= a.length;
    for (int part = 0; part < a.parts; ++part) whole = whole && a.key[part].dim % 32 == 0;
    return whole;
  }

  // Elements and tokens that are not there become zeros, of 32 tokens at a time.
  void copy_keys(int64_t t, int count) {
    std::memset(keys, 0, static_cast<size_t>((count + kStep - 1) / kStep * kStep * width * 2));
    char* out = keys;
    for (int part = 0; part < a.parts; out += 2 * a.padded(a.key[part].dim), ++part)
      for (int i = 0; i < count; ++i)
        std::memcpy(out + i * width * 2, key(a.key[part], t + i), static_cast<size_t>(2 * a.key[part].dim));
    memory_is_used(keys);
  }

  void score(int strip, int64_t t, int count, bool whole) {
    const int64_t share = fetcher.share(35, strips * kSteps * width / 16);
    for (int step = 0; step * kStep < count; ++step) {
      clear();
      const char *q = s.queries + strip * kStrip * width * 2, *copy = keys + step * kStep * width * 2;
      for (int part = 0; part < a.parts; ++part) {
        const int64_t bytes = 2 * a.padded(a.key[part].dim);
        const char* k = whole ? key(a.key[part], t + step * kStep) : copy;
        const int64_t stride = whole ? 2 * a.key[part].k_token : 2 * width;
        for (int64_t i = 0; i < bytes; i += 64, q += kTileBytes) {
          score_chunk(k + i, stride, q, share);
          fetcher.fetch(share);
        }
        copy += bytes;
      }
      store_scores(step);
    }
    memory_is_used(scores);
  }

  // Scores of a strip to probabilities, four rows at a time.
  void soften(int strip, int64_t t, int count) {
    const F32 scale = set(a.softmax_scale * kLog2E);
    const int64_t share = fetcher.share(8, (u.rows + 3) / 4 * 4);
    for (int at = 0; at < kStrip && strip * kStrip + at < u.rows; at += 4) {
      const int row = strip * kStrip + at;
      const int64_t open = open_tokens(a, u, row) - t;
      F32 x[4][2 * kSteps];
      for (int b = 0; b < 2 * kSteps; ++b) {
        fetcher.fetch(share);
        F32 four[4] = {set(kHidden), set(kHidden), set(kHidden), set(kHidden)};
        if (16 * b < count) {
          turn_four(&scores[b][at / kSide][0][at % kSide], four);
          for (int r = 0; r < 4; ++r) {
            four[r] = mul(four[r], scale);
            if (16 * b + 16 > open)
              four[r] = fma(visible(a, u, std::min(row + r, u.rows - 1), t + 16 * b), set(kLog2E), four[r]);
            four[r] = max(four[r], set(kHidden));
          }
        }
        for (int r = 0; r < 4; ++r) x[r][b] = four[r];
      }
      float shrink[4];
      soften_four(x, *s.state, sums, row, shrink);
      for (int r = 0; r < 4; ++r) {
        if (t != u.from) shrink_row(shrink[r], s.gathered + (row + r) * s.stride, s.stride);
        const bool both = stacked && at >= last;  // in one tile
        if (t != u.from && both) shrink_row(shrink[r], s.gathered + (low + row + r - last) * s.stride, s.stride);
        for (int step = 0; step < kSteps; ++step) {
          auto& to = p[strip][step];
          __m512i hi, lo;
          split_pair(x[r][2 * step], x[r][2 * step + 1], hi, lo);
          _mm512_store_si512(to[0][at / kSide][at % kSide + r], hi);
          _mm512_store_si512(both ? to[0][at / kSide][low + at + r - 2 * last] : to[1][at / kSide][at % kSide + r], lo);
        }
      }
    }
  }

  // [chunk of 32 elements][step][even, odd elements][pair of tokens i, 16 + i][16].
  void pack_values(int64_t t, int count) {
    const int64_t share = fetcher.share(35, kTile / 2);
    for (int i = 0; i < (count + kStep - 1) / kStep * kSide; ++i) {
      const int first = i / kSide * kStep + i % kSide, second = first + kSide;
      const auto *one = reinterpret_cast<const uint16_t*>(value(t + first)), *two = one + kSide * a.v_token;
      char* out = values + i / kSide * 2 * kTileBytes + i % kSide * 64;
      for (int64_t c = 0; c < a.value_dim; c += 32, out += kSteps * 2 * kTileBytes) {
        const int n = static_cast<int>(std::min<int64_t>(32, a.value_dim - c));
        const __m512i x = load_pairs_n(one + c, first < count ? n : 0).v;
        const __m512i y = load_pairs_n(two + c, second < count ? n : 0).v;
        _mm512_store_si512(out, _mm512_mask_blend_epi16(0xAAAAAAAA, x, _mm512_slli_epi32(y, 16)));
        _mm512_store_si512(out + kTileBytes, _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(x, 16), y));
      }
      fetcher.fetch(share);
    }
    memory_is_used(values);
  }

  void gather_step(const char* v, const uint16_t (&x)[2][T][kSide][kStep]) {
    if constexpr (T == 1) {
      _tile_loadd(0, v, 64);
      _tile_loadd(6, x[0][0], 64);
      _tile_dpbf16ps(4, 6, 0);
      _tile_loadd(1, v + kTileBytes, 64);
      _tile_dpbf16ps(5, 6, 1);
      if (stacked) return;
      _tile_loadd(7, x[1][0], 64);
      _tile_dpbf16ps(4, 7, 0);
      _tile_dpbf16ps(5, 7, 1);
    } else {
      _tile_loadd(4, v, 64);
      _tile_loadd(5, v + kTileBytes, 64);
      for (int part = 0; part < 2; ++part) {
        _tile_loadd(6, x[part][0], 64);
        _tile_dpbf16ps(0, 6, 4);
        _tile_dpbf16ps(1, 6, 5);
        if (part == 1 && stacked) continue;
        _tile_loadd(7, x[part][T - 1], 64);
        _tile_dpbf16ps(2, 7, 4);
        _tile_dpbf16ps(3, 7, 5);
      }
    }
  }

  // gathered += probabilities times values; the first tile of a unit begins them.
  void gather(int strip, int count, bool begins) {
    memory_is_used(p);
    const int64_t share = fetcher.share(25, strips * kSteps * (s.stride / 32));
    const int64_t row = 4 * s.stride;
    const char* v = values;
    for (int64_t c = 0; c < a.value_dim; c += 32, v += kSteps * 2 * kTileBytes) {
      float *one = s.gathered + strip * kStrip * s.stride + c, *two = one + kSide * s.stride;
      if constexpr (T == 1) {
        _tile_zero(4);
        _tile_zero(5);
        if (!begins) _tile_loadd(4, one, row);
        if (!begins) _tile_loadd(5, one + 16, row);
      } else if (begins) {
        clear();
      } else {
        _tile_loadd(0, one, row);
        _tile_loadd(1, one + 16, row);
        _tile_loadd(2, two, row);
        _tile_loadd(3, two + 16, row);
      }
      for (int step = 0; step * kStep < count; ++step) {
        gather_step(v + step * 2 * kTileBytes, p[strip][step]);
        fetcher.fetch(share);
      }
      if constexpr (T == 1) {
        _tile_stored(4, one, row);
        _tile_stored(5, one + 16, row);
      } else {
        _tile_stored(0, one, row);
        _tile_stored(1, one + 16, row);
        _tile_stored(2, two, row);
        _tile_stored(3, two + 16, row);
      }
    }
    memory_is_used(s.gathered);
  }

  // Strips before the first that sees tokens from t on.
  int blind(int64_t t) const {
    int strip = 0;
    while (strip + 1 < strips && open_tokens(a, u, (strip + 1) * kStrip - 1) <= t && !a.mask && !a.bias) ++strip;
    return strip;
  }

  void tile(int64_t t) {
    const int count = static_cast<int>(std::min<int64_t>(kTile, u.to - t));
    const bool whole = lies_whole(t, count);
    if (!whole) copy_keys(t, count);
    fetcher.start();
    if (t == u.from) fetch_from(t + kTile);
    fetch_from(t + kAheadTokens);
    const int first = blind(t);
    for (int strip = first; strip < strips; ++strip) {
      score(strip, t, count, whole);
      soften(strip, t, count);
    }
    pack_values(t, count);
    for (int strip = first; strip < strips; ++strip) gather(strip, count, t == u.from);
  }

  void all() {
    start_rows(*s.state, sums, (u.rows + 3) / 4 * 4);
    // What the first tile does not begin.
    const int64_t unseen = u.from < u.to ? blind(u.from) : strips;
    std::memset(s.gathered, 0, sizeof(float) * static_cast<size_t>(unseen * kStrip * s.stride));
    std::memset(p, 0, sizeof p[0] * static_cast<size_t>(strips));
    configure();
    fetcher.start();
    fetch_from(u.from);
    pack_queries();
    fetcher.fetch_rest();
    memory_is_used(s.queries);
    for (int64_t t = u.from; t < u.to; t += kTile) tile(t);
    _tile_release();
    end_rows(sums, *s.state, u.rows);
    float* const sum = s.gathered + last * s.stride;
    for (int64_t i = 0; stacked && i < (u.rows - last) * s.stride; i += 16)
      store(sum + i, add(load(sum + i), load(sum + (low - last) * s.stride + i)));
  }
};

}  // namespace
}  // namespace pio::amx

namespace pio {

void amx_attend_dense(const KvAttention& a, const Unit& u, const KvScratch& s) {
  if (u.rows <= amx::kSide)
    amx::Walk<1>(a, u, s).all();
  else
    amx::Walk<2>(a, u, s).all();
}

}  // namespace pio

PIO_TARGET_END
#else
namespace pio {
void amx_attend_dense(const KvAttention&, const Unit&, const KvScratch&) {}  // never called: amx_in_use() is false
}  // namespace pio
#endif
