// Attention that reads an int8 cache (layout: int8_kv_append.cc) directly; no dequantized history exists anywhere.
//
// One unit of work = one batch row, one KV head, up to 32 query rows (all query heads of the KV head, several queries)
// and one stretch of the history, walked once in tiles of 64 tokens with an online softmax. Queries and probabilities
// become integers of 15 bits in two int8 parts, hi and lo (v = s (128 hi + lo)), so both products are integer dot
// products, exact in int32; their relative error, 2^-14 of the largest element, is below bf16's 2^-8.
//
// A key may have two parts with a scale each: the latent and the rotary part of MLA, whose values are the latents
// again. Results depend on shapes only, never on the number of threads.
#ifdef PIO_ISA
#include "simd/two_parts.inc"
#include "simd/visible.inc"
namespace pio::PIO_ISA {

template <class T>
PIO_INLINE void take_query_row(const T* q, const float* channel, int64_t dim, QueryPart& out, int row) {
  alignas(64) float v[kWidestHead + 16];
  F32 top = set(0);
  for (int64_t i = 0; i < dim; i += 16) {
    const int n = static_cast<int>(dim - i < 16 ? dim - i : 16);
    F32 x = load_as_n(q + i, n);
    if (channel) x = mul(x, load_n(channel + i, n));
    store(v + i, x);
    top = max(top, abs(x));
  }
  const float most = largest(top);
  int8_t* hi = out.hi + row * out.stride;
  int8_t* lo = out.lo + row * out.stride;
  split_in_two(v, dim, most > 0 ? kIntegers / most : 0.0f, hi, lo);
  out.scale[row] = most / kIntegers;
  // dot_bytes leaves kByteZero times the sum of its signed operand in the result.
  out.zero_hi[row] = -kByteZero * total(hi, out.stride);
  out.zero_lo[row] = -kByteZero * total(lo, out.stride);
}

void take_queries(const Int8Attention& a, const Unit& u, QueryPart* parts) {
  for (int part = 0; part < a.parts; ++part)
    for (int r = 0; r < u.rows; ++r) {
      const int64_t row = u.first_row + r, head = u.kv_head * a.group + row % a.group;
      const KeyPart& key = a.key[part];
      const int64_t at = u.batch * key.q_batch + head * key.q_head + row / a.group * key.q_token;
      if (a.dtype == Dtype::f32)
        take_query_row(static_cast<const float*>(key.q) + at, key.channel, key.dim, parts[part], r);
      else
        take_query_row(static_cast<const uint16_t*>(key.q) + at, key.channel, key.dim, parts[part], r);
    }
}

// Where a unit begins, in tokens of the cache.
PIO_INLINE int64_t begin_of(const Int8Attention& a, const Unit& u) {
  return (u.batch * a.kv_heads + u.kv_head) * a.capacity + u.from;
}

// Tokens from those of the tile at t to what is asked for meanwhile, into the second-level cache: the next tile; of
// short units the next unit, since a tile or two are over before memory has answered.
PIO_INLINE int64_t ahead_of(const Int8Attention& a, const Unit& u, const Unit* next, int64_t t) {
  if (next) return begin_of(a, *next) - begin_of(a, u);
  return t + kTile < u.to ? kTile : 0;
}

PIO_INLINE void fetch_tokens(const Int8Attention& a, int64_t from, int64_t count) {
  const auto fetch = [](const void* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) prefetch_far(static_cast<const char*>(p) + i);
  };
  for (int part = 0; part < a.parts; ++part) {
    fetch(a.key[part].codes + from * a.key[part].dim, count * a.key[part].dim);
    fetch(a.key[part].scales + from, count * 4);
  }
  fetch(a.value_codes + from * a.value_dim, count * a.value_dim);
  fetch(a.value_scales + from, count * 4);
}

// The first tile, or all of a short unit, unless the thread's last unit asked for it.
void fetch_beginning(const Int8Attention& a, const Unit& u, const Unit* next) {
  thread_local int64_t asked_for = -1;
  const bool came = asked_for == begin_of(a, u);
  asked_for = next ? begin_of(a, *next) : -1;
  if (!came) fetch_tokens(a, begin_of(a, u), next ? u.to - u.from : std::min(kTile, u.to - u.from));
}

// scores[r][0..16) += q . k of sixteen tokens, scaled. ahead: bytes to what is fetched meanwhile.
template <int R>
PIO_INLINE void score_block(const QueryPart& q, int row, const uint8_t* codes, const float* scales, int64_t dim,
                            int64_t ahead, float softmax_scale, F32* scores) {
  I32 hi[R], lo[R];
  for (int r = 0; r < R; ++r) hi[r] = lo[r] = set_i32(0);
  const int8_t* q_hi = q.hi + row * q.stride;
  const int8_t* q_lo = q.lo + row * q.stride;
  for (int64_t i = 0; i < dim; i += 4) {
    prefetch_far(codes + 16 * i + ahead);
    const Bytes k = load_bytes(codes + 16 * i);
    for (int r = 0; r < R; ++r) {
      hi[r] = dot_bytes(hi[r], k, repeat4(q_hi + r * q.stride + i));
      lo[r] = dot_bytes(lo[r], k, repeat4(q_lo + r * q.stride + i));
    }
  }
  const F32 scale = load(scales);
  for (int r = 0; r < R; ++r) {
    const I32 high = shift_left<7>(add(hi[r], set_i32(q.zero_hi[row + r])));
    const I32 dot = add(high, add(lo[r], set_i32(q.zero_lo[row + r])));
    scores[r] = fma(mul(to_f32(dot), set(q.scale[row + r] * softmax_scale)), scale, scores[r]);
  }
}

// Softmax of the tile's scores of one row: updates its maximum and sum, rescales what it gathered so far, and leaves
// the probabilities times the values' scales as integers. Returns nothing to add when the row sees nothing.
PIO_INLINE void probabilities(RowState& state, int row, const float* scores, const float* value_scales, int blocks,
                              TileParts& tile, int r) {
  F32 top = load(scores);
  for (int b = 1; b < blocks; ++b) top = max(top, load(scores + 16 * b));
  const float here = largest(top), most = here > state.most[row] ? here : state.most[row];
  float shrink[16];
  store(shrink, exp(set(state.most[row] - most)));
  alignas(64) float weighted[kTile];
  F32 weights = set(0), largest_weighted = set(0);
  for (int b = 0; b < blocks; ++b) {
    const F32 p = exp(sub(load(scores + 16 * b), set(most)));
    const F32 w = mul(p, load(value_scales + 16 * b));
    weights = add(weights, p);
    largest_weighted = max(largest_weighted, w);
    store(weighted + 16 * b, w);
  }
  state.most[row] = most;
  state.sum[row] = state.sum[row] * shrink[0] + sum(weights);
  const float biggest = largest(largest_weighted);
  const F32 to_integer = set(biggest > 0 ? kIntegers / biggest : 0.0f);
  I32 all = set_i32(0);
  for (int b = 0; b < blocks; ++b) {
    I32 hi, lo;
    all = add(all, split_vector(load(weighted + 16 * b), to_integer, hi, lo));
    store_bytes(tile.parts[r][0][b], spread_low_bytes(hi));
    store_bytes(tile.parts[r][1][b], spread_low_bytes(lo));
  }
  tile.shrink[r] = shrink[0];
  tile.scale[r] = biggest / kIntegers;
  tile.zero[r] = -kByteZero * sum(all);
}

// gathered[r] = gathered[r] * shrink + the tile's probabilities times its values.
template <int R>
PIO_INLINE void gather_values(const TileParts& tile, const uint8_t* codes, int64_t dim, int64_t ahead, int blocks,
                              float* gathered, int64_t stride) {
  alignas(64) int32_t sums[R][kWidestHead + 16];
  for (int64_t i = 0; i < dim; i += 4) {
    I32 hi[R], lo[R];
    for (int r = 0; r < R; ++r) hi[r] = lo[r] = set_i32(0);
    for (int b = 0; b < blocks; ++b) {
      const uint8_t* from = codes + 16 * (b * dim + i);
      prefetch_far(from + ahead);
      const Bytes v = transpose_quarters(load_bytes(from));
      for (int r = 0; r < R; ++r) {
        hi[r] = dot_bytes(hi[r], v, load_bytes(tile.parts[r][0][b]));
        lo[r] = dot_bytes(lo[r], v, load_bytes(tile.parts[r][1][b]));
      }
    }
    for (int r = 0; r < R; ++r) store_quarter_sums(sums[r] + i, add(shift_left<7>(hi[r]), lo[r]));
  }
  for (int r = 0; r < R; ++r) {
    const F32 shrink = set(tile.shrink[r]), scale = set(tile.scale[r]);
    const I32 zero = set_i32(tile.zero[r]);
    float* row = gathered + r * stride;
    for (int64_t i = 0; i < dim; i += 16) {
      const F32 fresh = mul(to_f32(add(load_i32(sums[r] + i), zero)), scale);
      store(row + i, fma(load(row + i), shrink, fresh));
    }
  }
}

// R query rows against one tile.
template <int R>
void attend_tile(const Int8Attention& a, const Unit& u, const Scratch& s, int row, int64_t t, int blocks) {
  alignas(64) float scores[R][kTile];
  const int64_t base = begin_of(a, u) + t - u.from;
  const int64_t ahead = row == 0 ? ahead_of(a, u, s.next, t) : 0;
  for (int b = 0; b < blocks; ++b) {
    F32 block[R];
    for (int r = 0; r < R; ++r) block[r] = set(0);
    for (int part = 0; part < a.parts; ++part) {
      const KeyPart& key = a.key[part];
      score_block<R>(s.query[part], row, key.codes + (base + 16 * b) * key.dim, key.scales + base + 16 * b, key.dim,
                     ahead * key.dim, a.softmax_scale, block);
    }
    for (int r = 0; r < R; ++r)
      store(scores[r] + 16 * b, max(add(block[r], visible(a, u, row + r, t + 16 * b)), set(kHidden)));
  }
  TileParts tile;
  for (int r = 0; r < R; ++r) probabilities(*s.state, row + r, scores[r], a.value_scales + base, blocks, tile, r);
  gather_values<R>(tile, a.value_codes + base * a.value_dim, a.value_dim, ahead * a.value_dim, blocks,
                   s.gathered + row * s.stride, s.stride);
}

// One unit, its queries taken: leaves maxima, sums and unnormalized outputs of its rows in the scratch memory.
void attend(const Int8Attention& a, const Unit& u, const Scratch& s) {
  for (int r = 0; r < u.rows; ++r) {
    s.state->most[r] = kHidden;
    s.state->sum[r] = 0;
  }
  fetch_beginning(a, u, s.next);
  std::memset(s.gathered, 0, sizeof(float) * static_cast<size_t>(u.rows * s.stride));
  for (int64_t t = u.from; t < u.to; t += kTile) {
    const int blocks = static_cast<int>(((u.to - t < kTile ? u.to - t : kTile) + 15) / 16);
    int row = 0;
    for (; row + 8 <= u.rows; row += 8) attend_tile<8>(a, u, s, row, t, blocks);
    for (; row + 4 <= u.rows; row += 4) attend_tile<4>(a, u, s, row, t, blocks);
    for (; row < u.rows; ++row) attend_tile<1>(a, u, s, row, t, blocks);
  }
}

// Output rows [begin, end) of one unit's place from the stretches of its history. A row that saw nothing gives zeros.
void finish_rows(const Int8Attention& a, const Unit& u, int begin, int end, const RowState* states,
                 const float* gathered, int64_t stride, int splits) {
  const int64_t heads = a.kv_heads * a.group;
  for (int r = begin; r < end; ++r) {
    float most = kHidden, weight[kMostSplits], sum_all = 0;
    for (int p = 0; p < splits; ++p) most = states[p].most[r] > most ? states[p].most[r] : most;
    for (int p = 0; p < splits; ++p) {
      weight[p] = __builtin_expf(states[p].most[r] - most);
      sum_all += weight[p] * states[p].sum[r];
    }
    const float inverse = most > kHidden / 2 && sum_all > 0 ? 1.0f / sum_all : 0.0f;
    const int64_t row = u.first_row + r, head = u.kv_head * a.group + row % a.group;
    const int64_t at = ((u.batch * a.queries + row / a.group) * heads + head) * a.value_dim;
    for (int64_t i = 0; i < a.value_dim; i += 16) {
      const int n = static_cast<int>(a.value_dim - i < 16 ? a.value_dim - i : 16);
      F32 out = set(0);
      for (int p = 0; p < splits; ++p)
        out = fma(load(gathered + (p * kRows + r) * stride + i), set(weight[p] * inverse), out);
      if (a.value_channel) out = mul(out, load_n(a.value_channel + i, n));
      if (a.dtype == Dtype::f32)
        store_n(static_cast<float*>(a.out) + at + i, out, n);
      else
        store_bf16_n(static_cast<uint16_t*>(a.out) + at + i, out, n);
    }
  }
}

}  // namespace pio::PIO_ISA
#else
#include "int8_kv_attention.h"
#include "quant.h"
#define PIO_FILE "src/int8_kv_attention.cc"
#include "foreach_isa.h"

namespace pio {

PIO_TABLE(take_queries)
PIO_TABLE(attend)
PIO_TABLE(finish_rows)

namespace {

// All splits of one place (batch row, KV head, block of query rows), then its output; or one split alone when the
// places are too few to share out.
void run(const Int8Attention& a, int64_t batch, int threads) {
  const Plan p = plan(a, batch, kRows, amx_in_use() ? kPart : 16);
  const int64_t places = batch * a.kv_heads * p.row_blocks, stride = (a.value_dim + 15) / 16 * 16;
  const int64_t room = kRows * stride;
  const bool alone = p.splits == 1;
  std::vector<RowState> states(static_cast<size_t>(alone ? 0 : places * p.splits));
  float* gathered = alone ? nullptr : scratch_floats(0, places * p.splits * room);
  const int64_t bytes = a.length * a.kv_heads * batch * (a.key[0].dim + a.value_dim);
  const int used = bytes * std::max<int64_t>(1, a.queries / 16) < kPieceBytes ? 1 : threads;
  const auto attend = amx_in_use() ? amx_attend_int8 : PIO_CALL(attend);
  parallel_for(places * p.splits, 1, used, [&](int64_t begin, int64_t end) {
    QueryMemory memory(a);
    RowState own_state;
    float* own = alone ? scratch_floats(1, room) : nullptr;
    for (int64_t i = begin; i < end; ++i) {
      const Unit u = unit_of(a, p, i / p.splits, i % p.splits);
      const std::optional<Unit> next = after_short(a, p, u, i, places * p.splits);
      const Scratch s{memory.parts, alone ? &own_state : &states[static_cast<size_t>(i)],
                      alone ? own : gathered + i * room, stride, next ? &*next : nullptr};
      PIO_CALL(take_queries)(a, u, s.query);
      attend(a, u, s);
      if (alone) PIO_CALL(finish_rows)(a, u, 0, u.rows, &own_state, own, stride, 1);
    }
  });
  if (alone) return;
  finish_places(places, kRows, p.splits * stride, threads, [&](int64_t place, int64_t begin, int64_t end) {
    const Unit u = unit_of(a, p, place, 0);
    PIO_CALL(finish_rows)(a, u, static_cast<int>(begin), std::min(u.rows, static_cast<int>(end)),
                          &states[static_cast<size_t>(place * p.splits)], gathered + place * p.splits * room, stride,
                          static_cast<int>(p.splits));
  });
}

}  // namespace

// out[b, t, h] = softmax(softmax_scale * q[b, h, t] . keys + mask) values, over the first `length` tokens of the cache.
//
// keys, second: {q, channel, codes, scales, dim, q_batch, q_head, q_token}; `second` may be empty. values: {codes,
// scales, channel, dim}. mask: {bool address, float32 address, batch, head, query strides}, either address or none;
// strides in elements, tokens dense. causal: query i sees the first length - queries + i + 1 tokens.
// out: [batch, queries, kv_heads * group, value dim] dense, of the queries' type.
void int8_kv_attention(const std::vector<int64_t>& keys, const std::vector<int64_t>& second,
                       const std::vector<int64_t>& values, const std::vector<int64_t>& mask, int64_t batch,
                       int64_t kv_heads, int64_t group, int64_t queries, int64_t length, int64_t capacity,
                       float softmax_scale, bool causal, Address out, int dtype, int threads) {
  Int8Attention a;
  a.dtype = require_dtype(dtype, "int8_kv_attention");
  require(kv_heads > 0 && group > 0 && queries >= 0 && batch >= 0, "int8_kv_attention: counts must be positive");
  require(length >= 0 && length <= capacity && capacity % 16 == 0,
          "int8_kv_attention: length must be within the capacity, a multiple of 16");
  require(!causal || length >= queries, "int8_kv_attention: causal attention needs the queries' own tokens cached");
  a.take_keys(keys, second);
  a.take_values(values);
  a.take_mask(mask);
  require_address(out, size_of(a.dtype), "int8_kv_attention", "out");
  a.kv_heads = kv_heads;
  a.group = group;
  a.queries = queries;
  a.length = length;
  a.capacity = capacity;
  a.softmax_scale = softmax_scale;
  a.causal = causal;
  a.out = reinterpret_cast<void*>(out);
  if (batch > 0 && queries > 0) run(a, batch, threads);
}

}  // namespace pio
#endif
