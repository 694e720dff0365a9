// The half of a layer before the residual sum: projections, cache, attention, output projection.
#include <algorithm>

#include "decoder/decoder.h"
#include "decoder/rows.h"
#include "entries.h"

namespace pio::decoder {
namespace {

// One attention call does at most this many multiply-adds; what lies between two looks at the interrupt.
constexpr int64_t kCallMacs = 4'000'000'000;

int64_t as_int(Address address) { return static_cast<int64_t>(address); }

}  // namespace

bool absorbs(int64_t queries, int64_t length, int64_t nope, int64_t rope, int64_t v, int64_t rank) {
  // Pairs of query and key under the causal mask. Per head: absorbed, q and out cross the latent space, and both
  // products are of its width; expanded, every cached latent becomes a key and a value first.
  const int64_t pairs = queries * length - queries * (queries - 1) / 2;
  const int64_t projections = rank * (nope + v);
  return queries * projections + pairs * (2 * rank + rope) <= length * projections + pairs * (nope + rope + v);
}

// Queries [batch, heads, tokens, dim] of a block; keys and values lie in the cache, or `expanded`: rows of heads x
// (key, value) for every token, `span` elements between batch rows. Strides in elements.
struct Decoder::Heads {
  struct Query {
    Address data;
    int64_t dim, batch, head, token;
  };
  Query q, second;  // second.dim 0: keys have one part
  int64_t kv_heads, group, value_dim;
  float scaling;
  Address expanded;
  int64_t span;
};

namespace {

// One call of an attention kernel: `rows` batch rows from row `row` of the pass, the block's row `place`.
struct Piece {
  int64_t row, place, first_token, rows, queries;
  int64_t length;  // tokens of the cache that are looked at
  std::vector<int64_t> mask;
  Address out;
};

}  // namespace

struct Decoder::Attention {
  const Decoder& decoder;
  const Pass& pass;
  const Heads& h;
  const CacheMemory& memory;
  const LayerCache& cache;

  int64_t query(const Heads::Query& q, const Piece& p) const {
    return as_int(decoder.element(q.data, p.place * q.batch + p.first_token * q.token));
  }

  void int8(const Piece& p) const {
    const int64_t one = h.kv_heads * memory.capacity;
    const auto part = [&](const Heads::Query& q, Address codes, Address scales, Address channel) {
      return std::vector<int64_t>{query(q, p),
                                  as_int(channel),
                                  as_int(codes) + p.row * one * q.dim,
                                  as_int(scales) + p.row * one * 4,
                                  q.dim,
                                  q.batch,
                                  q.head,
                                  q.token};
    };
    const bool latents = h.second.dim != 0;
    std::vector<int64_t> second;
    if (latents) second = part(h.second, cache.second, cache.second_scales, cache.second_channel);
    const Address codes = latents ? cache.first : cache.second;
    const Address scales = latents ? cache.first_scales : cache.second_scales;
    int8_kv_attention(part(h.q, cache.first, cache.first_scales, cache.first_channel), second,
                      {as_int(codes) + p.row * one * h.value_dim, as_int(scales) + p.row * one * 4,
                       as_int(latents ? cache.first_channel : cache.second_channel), h.value_dim},
                      p.mask, p.rows, h.kv_heads, h.group, p.queries, p.length, memory.capacity, h.scaling, pass.causal,
                      p.out, decoder.model_.dtype, pass.threads);
  }

  void dense(const Piece& p) const {
    const auto part = [&](const Heads::Query& q, const Strided& k) {
      return std::vector<int64_t>{query(q, p), q.batch, q.head,  q.token, as_int(k.data),
                                  k.batch,     k.head,  k.token, q.dim};
    };
    const auto cached = [&](Address base, int64_t heads, int64_t dim) {
      const int64_t row = heads * memory.capacity * dim;
      // Latents and rotary keys are one head, which all heads read.
      return Strided{decoder.element(base, p.row * row), row, heads == 1 ? 0 : memory.capacity * dim, dim};
    };
    Strided keys = cached(cache.first, h.kv_heads, h.q.dim), values = keys;
    std::vector<int64_t> second;
    if (h.expanded) {
      const int64_t pair = h.q.dim + h.value_dim;
      keys = {decoder.element(h.expanded, p.place * h.span), h.span, pair, h.kv_heads * pair};
      values = keys;
      values.data = decoder.element(keys.data, h.q.dim);
    }
    if (h.second.dim)
      second = part(h.second, cached(cache.second, 1, h.second.dim));
    else
      values = cached(cache.second, h.kv_heads, h.value_dim);
    kv_attention(part(h.q, keys), second, {as_int(values.data), values.batch, values.head, values.token, h.value_dim},
                 p.mask, p.rows, h.kv_heads, h.group, p.queries, p.length, h.scaling, pass.causal, p.out,
                 decoder.model_.dtype, pass.threads);
  }
};

void Decoder::attend(const Pass& pass, const Block& block, size_t layer, const Heads& h, Address out) {
  const Attention attention = {*this, pass, h, *pass.cache, pass.cache->of(layer)};
  const int64_t heads = h.kv_heads * h.group;
  const int64_t per_query =
      heads * (pass.start + block.first_token + block.tokens) * (h.q.dim + h.second.dim + h.value_dim);
  const bool whole = block.rows() * per_query <= kCallMacs;
  const int64_t rows = whole ? block.batch : 1;
  const int64_t step = whole ? block.tokens : std::clamp<int64_t>(kCallMacs / per_query, 1, block.tokens);
  for (int64_t b = 0; b < block.batch; b += rows)
    for (int64_t t = 0; t < block.tokens; t += step) {
      Piece p = {block.first_batch + b, b, t, rows, std::min(step, block.tokens - t), 0, {}, 0};
      const int64_t first = block.first_token + t;
      // A mask that is not causal speaks of all tokens; causality ends at the last query's own.
      p.length = pass.causal ? pass.start + first + p.queries : pass.start + pass.tokens;
      p.out = element(out, (b * block.tokens + t) * heads * h.value_dim);
      if (pass.mask)
        p.mask = {as_int(pass.mask) + p.row * pass.mask_batch + first * pass.mask_query, 0, pass.mask_batch, 0,
                  pass.mask_query};
      pass.cache->int8 ? attention.int8(p) : attention.dense(p);
      poll_();
    }
}

// x [batch, heads, tokens, dim] of a block becomes the cache's next tokens.
void Decoder::append(const Pass& pass, const Block& block, size_t layer, bool second, Address x, int64_t heads,
                     int64_t dim, int64_t x_batch, int64_t x_head, int64_t x_token) {
  const CacheMemory& memory = *pass.cache;
  const LayerCache& cache = memory.of(layer);
  const Address data = second ? cache.second : cache.first, scales = second ? cache.second_scales : cache.first_scales;
  const int64_t start = pass.start + block.first_token, one = heads * memory.capacity;
  if (memory.int8)
    return int8_kv_append(x, second ? cache.second_channel : cache.first_channel,
                          data + static_cast<Address>(block.first_batch * one * dim),
                          scales + static_cast<Address>(block.first_batch * one * 4), block.batch, heads, block.tokens,
                          dim, memory.capacity, start, x_batch, x_head, x_token, model_.dtype, pass.threads);
  const Strided to = {element(data, (block.first_batch * one + start) * dim), one * dim, memory.capacity * dim, dim};
  copy_block({x, x_batch, x_head, x_token}, to, block.batch, heads, block.tokens, dim, static_cast<size_t>(size_),
             pass.threads);
}

// Normalizes (when there is a norm) and rotates heads [rows, heads, dim] into [batch, heads, tokens, dim].
void Decoder::turn(const Pass& pass, const Block& block, Address x, const Norm* n, Address out, int64_t heads,
                   int64_t dim, int64_t x_token, bool neighbours) {
  const int64_t angle = block.first_batch * pass.angle_batch + block.first_token * model_.rope;
  norm_rope(x, n ? n->weight : 0, element(pass.cos, angle), element(pass.sin, angle), out, block.batch, block.tokens,
            heads, dim, model_.rope, block.tokens * x_token, x_token, pass.angle_batch, neighbours, n ? n->eps : 0.0f,
            model_.dtype, model_.dtype, pass.threads);
}

void Decoder::grouped(const Pass& pass, const Block& block, size_t layer, const Grouped& a) {
  const int64_t rows = block.rows(), wide = a.heads * a.dim, narrow = a.kv_heads * a.dim;
  const Address q = take(kQ, rows * wide), k = take(kK, rows * narrow), v = take(kV, rows * narrow);
  multiply(pass, buffers_[kNormed].take(0), rows, {{&a.q, q}, {&a.k, k}, {&a.v, v}});
  const Address q_turned = take(kQTurned, rows * wide), k_turned = take(kKTurned, rows * narrow);
  turn(pass, block, q, &a.q_norm, q_turned, a.heads, a.dim, wide, false);
  turn(pass, block, k, &a.k_norm, k_turned, a.kv_heads, a.dim, narrow, false);
  const int64_t n = block.tokens;
  append(pass, block, layer, false, k_turned, a.kv_heads, a.dim, n * narrow, n * a.dim, a.dim);
  append(pass, block, layer, true, v, a.kv_heads, a.dim, n * narrow, a.dim, narrow);
  const Address attended = take(kAttended, rows * wide);
  const Heads heads = {
      {q_turned, a.dim, n * wide, n * a.dim, a.dim}, {}, a.kv_heads, a.heads / a.kv_heads, a.dim, a.scaling, 0, 0};
  attend(pass, block, layer, heads, attended);
  multiply(pass, attended, rows, {{&a.o, take(kProjected, rows * model_.hidden)}});
}

void Decoder::latent(const Pass& pass, const Block& block, size_t layer, const Latent& a) {
  const int64_t rows = block.rows(), n = block.tokens, wide = a.heads * (a.nope + a.rope), both = a.rank + a.rope;
  const Address x = buffers_[kNormed].take(0), kv = take(kK, rows * both), q = take(kQ, rows * wide);
  if (a.q_a) {
    const int64_t low = a.q_a->rows;
    const Address narrow = take(kGate, rows * low), normed = take(kUp, rows * low);
    multiply(pass, x, rows, {{&*a.q_a, narrow}, {&a.kv_a, kv}});
    norm(pass, narrow, low, a.q_norm, normed, rows, low);
    multiply(pass, normed, rows, {{&a.q, q}});
  } else {
    multiply(pass, x, rows, {{&a.q, q}, {&a.kv_a, kv}});
  }
  const Address q_turned = take(kQTurned, rows * wide), k_turned = take(kKTurned, rows * a.rope);
  turn(pass, block, q, nullptr, q_turned, a.heads, a.nope + a.rope, wide, a.neighbours);
  turn(pass, block, element(kv, a.rank), nullptr, k_turned, 1, a.rope, both, a.neighbours);
  const Address latents = take(kV, rows * a.rank);
  norm(pass, kv, both, a.kv_norm, latents, rows, a.rank);
  append(pass, block, layer, false, latents, 1, a.rank, n * a.rank, 0, a.rank);
  append(pass, block, layer, true, k_turned, 1, a.rope, n * a.rope, 0, a.rope);
  take(kAttended, rows * a.heads * a.v);
  const bool short_enough = absorbs(pass.tokens, pass.start + pass.tokens, a.nope, a.rope, a.v, a.rank);
  if (pass.cache->int8 || short_enough)
    absorbed(pass, block, layer, a, q_turned);
  else
    expanded(pass, block, layer, a, q_turned);
  multiply(pass, buffers_[kAttended].take(0), rows, {{&a.o, take(kProjected, rows * model_.hidden)}});
}

// k = W_k c and v = W_v c for a latent c: q . k = (W_k^T q) . c and sum p v = W_v (sum p c), so nothing is expanded.
void Decoder::absorbed(const Pass& pass, const Block& block, size_t layer, const Latent& a, Address q) {
  const int64_t n = block.tokens, rows = block.rows(), d = a.nope + a.rope;
  const Address into = take(kQuery, rows * a.heads * a.rank), gathered = take(kWide, rows * a.heads * a.rank);
  by_head(pass, block, a, true, {q, a.heads * n * d, n * d, d}, {into, a.heads * n * a.rank, n * a.rank, a.rank});
  const Heads heads = {{into, a.rank, a.heads * n * a.rank, n * a.rank, a.rank},
                       {element(q, a.nope), a.rope, a.heads * n * d, n * d, d},
                       1,
                       a.heads,
                       a.rank,
                       a.scaling,
                       0,
                       0};
  attend(pass, block, layer, heads, gathered);
  by_head(pass, block, a, false, {gathered, n * a.heads * a.rank, a.rank, a.heads * a.rank},
          {buffers_[kAttended].take(0), n * a.heads * a.v, a.v, a.heads * a.v});
}

// The half of kv_b that expands keys (transposed) or values, for x of every head. Packed, both halves took a token 0.30
// ms a layer of GLM-4.7-Flash where the dense copy took 0.59, and 0.17 since; eight tokens 0.70 and 0.88, sixteen 1.12
// and 1.03 (Sapphire Rapids).
void Decoder::by_head(const Pass& pass, const Block& block, const Latent& a, bool keys, const Strided& x,
                      const Strided& out) {
  constexpr int64_t kFewRows = 8;
  const int64_t first = keys ? 0 : a.nope, rows = keys ? a.nope : a.v, all = a.nope + a.v;
  const std::vector<int64_t> from = {as_int(x.data), x.batch, x.head, x.token};
  const std::vector<int64_t> to = {as_int(out.data), out.batch, out.head, out.token};
  if (a.by_head && block.rows() <= kFewRows)
    return packed_head_linear(
        from, {as_int(a.kv_b.data), as_int(a.kv_b.scales), a.rank, a.kv_b.bits, a.kv_b.group, first, all, rows}, to,
        block.batch, a.heads, block.tokens, keys, model_.dtype, pass.threads);
  head_linear(from, {as_int(element(a.kv_b_dense, first * a.rank)), all * a.rank, a.rank, rows, a.rank}, to,
              block.batch, a.heads, block.tokens, keys, model_.dtype, pass.threads);
}

// Keys and values of the whole history, expanded once per pass: later blocks of a row add their own.
void Decoder::expanded(const Pass& pass, const Block& block, size_t layer, const Latent& a, Address q) {
  const LayerCache& cache = pass.cache->of(layer);
  const int64_t n = block.tokens, d = a.nope + a.rope, row = a.heads * (a.nope + a.v);
  const int64_t total = pass.start + pass.tokens, to = pass.start + block.first_token + n;
  const Address wide = take(kExpanded, block.batch * total * row);
  for (int64_t b = 0; b < block.batch; ++b) {
    const int64_t first = (block.first_batch + b) * pass.cache->capacity;
    for (int64_t t = block.first_token ? to - n : 0; t < to; t += block_rows_) {
      multiply(pass, element(cache.first, (first + t) * a.rank), std::min(block_rows_, to - t),
               {{&a.kv_b, element(wide, (b * total + t) * row)}});
      poll_();
    }
  }
  const Heads heads = {{q, a.nope, a.heads * n * d, n * d, d},
                       {element(q, a.nope), a.rope, a.heads * n * d, n * d, d},
                       a.heads,
                       1,
                       a.v,
                       a.scaling,
                       wide,
                       total * row};
  attend(pass, block, layer, heads, buffers_[kAttended].take(0));
}

}  // namespace pio::decoder
