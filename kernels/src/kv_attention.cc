// Attention over a cache of keys and values in the element type itself, bf16 or float32, with any strides.
//
// One unit of work = one batch row, one KV head, up to 32 query rows (all query heads of the KV head, several queries)
// and one stretch of the history, walked once in tiles of 64 tokens with an online softmax, all of it in float32. A
// tile of keys is transposed once for all rows, sixteen tokens to a vector, so nothing is summed across lanes; values
// are read as they lie.
//
// A key may have two parts in different memory: the latent and the rotary part of MLA, whose values are the latents
// again. Results depend on shapes only, never on the number of threads.
#ifdef PIO_ISA
#include "simd/elements.inc"
#include "simd/visible.inc"
namespace pio::PIO_ISA {

// Query rows of the unit side by side, zeros between the parts.
template <class E>
void take_dense_queries(const KvAttention& a, const Unit& u, char* out) {
  using Type = typename E::Type;
  const int64_t width = a.query_width();
  auto* row_out = reinterpret_cast<Type*>(out);
  std::memset(out, 0, static_cast<size_t>(u.rows * width) * sizeof(Type));
  for (int r = 0; r < u.rows; ++r, row_out += width) {
    const int64_t row = u.first_row + r, head = u.kv_head * a.group + row % a.group;
    Type* to = row_out;
    for (int part = 0; part < a.parts; ++part) {
      const DenseKeyPart& k = a.key[part];
      const int64_t at = u.batch * k.q_batch + head * k.q_head + row / a.group * k.q_token;
      std::memcpy(to, reinterpret_cast<const Type*>(k.q) + at, static_cast<size_t>(k.dim) * sizeof(Type));
      to += a.padded(k.dim);
    }
  }
}

// What to ask for while the tile at t is worked on, into the second-level cache: its values, then the next tile's keys.
// Of short units both of the next unit, since a tile or two are over before memory has answered.
PIO_INLINE const char* next_values(const KvAttention& a, const Unit& u, const Unit* next, int64_t t) {
  return next ? value_of(a, *next, next->from + t - u.from) : value_of(a, u, t);
}
PIO_INLINE const char* next_keys(const KvAttention& a, int part, const Unit& u, const Unit* next, int64_t t) {
  if (next) return key_of(a, a.key[part], *next, next->from + t - u.from);
  return key_of(a, a.key[part], u, t + kTile < u.to ? t + kTile : t);
}

// The first tile's keys, or all of a short unit, unless the thread's last unit asked for it.
void fetch_beginning(const KvAttention& a, const Unit& u, const Unit* next) {
  thread_local const char* asked_for = nullptr;
  const bool came = asked_for == key_of(a, a.key[0], u, u.from);
  asked_for = next ? key_of(a, a.key[0], *next, next->from) : nullptr;
  if (came) return;
  const int64_t size = static_cast<int64_t>(size_of(a.dtype)), end = next ? u.to : std::min(u.from + kTile, u.to);
  for (int64_t t = u.from; t < end; ++t) {
    for (int part = 0; part < a.parts; ++part)
      for (int64_t i = 0; i < size * a.key[part].dim; i += 64) prefetch_far(key_of(a, a.key[part], u, t) + i);
    for (int64_t i = 0; next && i < size * a.value_dim; i += 64) prefetch_far(value_of(a, u, t) + i);
  }
}

// Up to sixteen tokens of one key part, transposed: lane row i holds element (or pair) i of all of them. wanted: memory
// that is asked for meanwhile, with its distance between tokens.
template <class E>
void transpose_keys(const typename E::Type* keys, int64_t token, int64_t dim, int count, const char* wanted,
                    int64_t wanted_token, float* out) {
  for (int64_t i = 0; i < dim; i += E::kWide) {
    const int n = static_cast<int>(dim - i < E::kWide ? dim - i : E::kWide);
    for (int j = 0; j < 16; ++j) prefetch_far(wanted + j * wanted_token + i * static_cast<int64_t>(sizeof *keys));
    F32 lanes[16];
    for (int j = 0; j < 16; ++j) {
      const typename E::Type* p = keys + j * token + i;
      lanes[j] = j >= count ? set(0.0f) : E::as_lanes(n == E::kWide ? E::load(p) : E::load_n(p, n));
    }
    transpose_lanes(lanes);
    for (int j = 0; j < 16; ++j) store(out + i / E::kPerLane * 16 + j * 16, lanes[j]);
  }
}

// Blocks [begin, end) of sixteen tokens of the tile at t. Nothing but this asks for the second part.
template <class E>
void take_keys(const KvAttention& a, const Unit& u, const KvScratch& s, int64_t t, int count, int begin, int end) {
  using Type = typename E::Type;
  const int64_t block = a.query_width() / E::kPerLane * 16, size = sizeof(Type);
  float* out = s.keys;
  for (int part = 0; part < a.parts; ++part) {
    const DenseKeyPart& k = a.key[part];
    const auto* keys = reinterpret_cast<const Type*>(key_of(a, k, u, t));
    const char* wanted = part == 0 ? next_values(a, u, s.next, t) : next_keys(a, part, u, s.next, t);
    const int64_t token = part == 0 ? a.v_token : k.k_token;
    for (int b = begin; b < end; ++b)
      transpose_keys<E>(keys + 16 * b * k.k_token, k.k_token, k.dim, count - 16 * b, wanted + 16 * b * token * size,
                        token * size, out + (b - begin) * block);
    out += a.padded(k.dim) / E::kPerLane * 16;
  }
}

// scores[r][16 b ..] of R rows and B blocks of sixteen tokens, not yet scaled.
template <class E, int R, int B>
PIO_INLINE void score(const typename E::Type* q, int64_t width, const float* keys, float (*scores)[kTile]) {
  const int64_t rows = width / E::kPerLane, block = rows * 16;
  F32 acc[R][B];
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < B; ++b) acc[r][b] = set(0.0f);
  for (int64_t i = 0; i < rows; ++i) {
    typename E::Lanes k[B];
    for (int b = 0; b < B; ++b) k[b] = E::from_lanes(load(keys + b * block + i * 16));
    for (int r = 0; r < R; ++r) {
      const auto x = E::repeat(q + r * width + i * E::kPerLane);
      for (int b = 0; b < B; ++b) acc[r][b] = E::dot(acc[r][b], k[b], x);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < B; ++b) store(scores[r] + 16 * b, acc[r][b]);
}

// Softmax of the tile's scores of one row: updates its maximum and sum, turns scores into probabilities, and returns
// what everything gathered so far must be multiplied with.
PIO_INLINE float soften(const KvAttention& a, const Unit& u, RowState& state, int row, int64_t t, int blocks,
                        float* scores) {
  F32 top = set(kHidden);
  for (int b = 0; b < blocks; ++b) {
    const F32 s = fma(load(scores + 16 * b), set(a.softmax_scale), visible(a, u, row, t + 16 * b));
    const F32 seen = max(s, set(kHidden));
    store(scores + 16 * b, seen);
    top = max(top, seen);
  }
  const float here = largest(top), most = here > state.most[row] ? here : state.most[row];
  F32 weights = set(0);
  for (int b = 0; b < blocks; ++b) {
    const F32 p = exp(sub(load(scores + 16 * b), set(most)));
    weights = add(weights, p);
    store(scores + 16 * b, p);
  }
  alignas(64) float shrink[16];
  store(shrink, exp(set(state.most[row] - most)));
  state.most[row] = most;
  state.sum[row] = state.sum[row] * shrink[0] + sum(weights);
  return shrink[0];
}

// gathered[r] = gathered[r] * shrink[r] + the tile's probabilities times V vectors of its values.
template <class E, int R, int V, bool kFetches>
PIO_APART void gather(const float (*p)[kTile], const float* shrink, const typename E::Type* values, int64_t token,
                      int count, int n, const char* wanted, int64_t wanted_token, float* gathered, int64_t stride) {
  constexpr int kParts = E::kPerLane;
  F32 acc[R][V * kParts];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < V * kParts; ++i) acc[r][i] = mul(load(gathered + r * stride + 16 * i), set(shrink[r]));
  for (int j = 0; j < count; ++j) {
    F32 v[V * kParts];
    const typename E::Type* row = values + j * token;
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) {
      if constexpr (kFetches) prefetch_far(wanted + j * wanted_token + i * 64);
      E::widen(V > 1 || n == E::kWide ? E::load(row + i * E::kWide) : E::load_n(row, n), v + i * kParts);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F32 weight = set(p[r][j]);
#pragma GCC unroll 8
      for (int i = 0; i < V * kParts; ++i) acc[r][i] = fma(v[i], weight, acc[r][i]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < V * kParts; ++i) store(gathered + r * stride + 16 * i, acc[r][i]);
}

constexpr int most_of(int fit, int limit) { return fit < 1 ? 1 : fit > limit ? limit : fit; }

constexpr int kBlocksAtOnce = 2;  // of sixteen tokens, transposed: 36 KB of MLA's latents

// Blocks [begin, end) of R rows' scores.
template <class E, int R>
PIO_INLINE void score_rows(const KvAttention& a, const KvScratch& s, int row, int begin, int end,
                           float (*scores)[kTile]) {
  const int64_t width = a.query_width();
  const auto* q = reinterpret_cast<const typename E::Type*>(s.queries) + row * width;
  auto* first = reinterpret_cast<float (*)[kTile]>(&scores[row][16 * begin]);
  if (end - begin == kBlocksAtOnce)
    score<E, R, kBlocksAtOnce>(q, width, s.keys, first);
  else
    score<E, R, 1>(q, width, s.keys, first);
}

// Scores of R rows to what they gather of the tile's values; the first rows ask for the next tile's keys meanwhile.
template <class E, int R>
void gather_rows(const KvAttention& a, const Unit& u, const KvScratch& s, int row, int64_t t, int count,
                 float (*all_scores)[kTile]) {
  using Type = typename E::Type;
  constexpr int kVectors = most_of(PIO_SUMS / (R * E::kPerLane), 4);
  float (*scores)[kTile] = all_scores + row;
  float shrink[R];
  for (int r = 0; r < R; ++r) shrink[r] = soften(a, u, *s.state, row + r, t, (count + 15) / 16, scores[r]);
  const auto* values = reinterpret_cast<const Type*>(value_of(a, u, t));
  const char* wanted = next_keys(a, 0, u, s.next, t);
  const int64_t size = sizeof(Type), token = size * a.key[0].k_token;
  float* gathered = s.gathered + row * s.stride;
  const auto columns = row == 0 ? gather<E, R, kVectors, true> : gather<E, R, kVectors, false>;
  int64_t i = 0;
  for (; i + kVectors * E::kWide <= a.value_dim; i += kVectors * E::kWide)
    columns(scores, shrink, values + i, a.v_token, count, E::kWide, wanted + i * size, token, gathered + i, s.stride);
  for (; i < a.value_dim; i += E::kWide) {
    const int n = static_cast<int>(a.value_dim - i < E::kWide ? a.value_dim - i : E::kWide);
    gather<E, R, 1, false>(scores, shrink, values + i, a.v_token, count, n, nullptr, 0, gathered + i, s.stride);
  }
}

template <int R>
struct Rows {
  static constexpr int kCount = R;
};

// do_rows(Rows<R>(), row) for all rows, as many at a time as the registers hold.
template <class Do>
PIO_INLINE void by_rows(int rows, const Do& do_rows) {
  int row = 0;
#if PIO_SUMS >= 16
  for (; row + 8 <= rows; row += 8) do_rows(Rows<8>(), row);
  for (; row + 4 <= rows; row += 4) do_rows(Rows<4>(), row);
#endif
  for (; row + 2 <= rows; row += 2) do_rows(Rows<2>(), row);
  for (; row < rows; ++row) do_rows(Rows<1>(), row);
}

template <class E>
void attend_dense_of(const KvAttention& a, const Unit& u, const KvScratch& s) {
  for (int r = 0; r < u.rows; ++r) {
    s.state->most[r] = kHidden;
    s.state->sum[r] = 0;
  }
  fetch_beginning(a, u, s.next);
  std::memset(s.gathered, 0, sizeof(float) * static_cast<size_t>(u.rows * s.stride));
  take_dense_queries<E>(a, u, s.queries);
  alignas(64) float scores[kRows][kTile];
  for (int64_t t = u.from; t < u.to; t += kTile) {
    const int count = static_cast<int>(u.to - t < kTile ? u.to - t : kTile), blocks = (count + 15) / 16;
    for (int b = 0; b < blocks; b += kBlocksAtOnce) {
      const int end = b + kBlocksAtOnce < blocks ? b + kBlocksAtOnce : blocks;
      take_keys<E>(a, u, s, t, count, b, end);
      by_rows(u.rows, [&](auto rows, int row) { score_rows<E, rows.kCount>(a, s, row, b, end, scores); });
    }
    by_rows(u.rows, [&](auto rows, int row) { gather_rows<E, rows.kCount>(a, u, s, row, t, count, scores); });
  }
}

// One unit: leaves maxima, sums and unnormalized outputs of its rows in the scratch memory.
void attend_dense(const KvAttention& a, const Unit& u, const KvScratch& s) {
  a.dtype == Dtype::f32 ? attend_dense_of<Float32>(a, u, s) : attend_dense_of<Bf16>(a, u, s);
}

// Output rows [begin, end) of one unit's place from the stretches of its history, `room` floats apart. A row that saw
// nothing gives zeros.
template <class E>
void finish_dense_of(const KvAttention& a, const Unit& u, int begin, int end, const RowState* states,
                     const float* gathered, int64_t stride, int64_t room, int splits) {
  using Type = typename E::Type;
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
    Type* out = reinterpret_cast<Type*>(a.out) + ((u.batch * a.queries + row / a.group) * heads + head) * a.value_dim;
    for (int64_t i = 0; i < a.value_dim; i += E::kWide) {
      F32 parts[E::kPerLane];
      for (int k = 0; k < E::kPerLane; ++k) {
        parts[k] = set(0);
        for (int p = 0; p < splits; ++p)
          parts[k] = fma(load(gathered + p * room + r * stride + i + 16 * k), set(weight[p] * inverse), parts[k]);
      }
      E::store_n(out + i, parts, static_cast<int>(a.value_dim - i < E::kWide ? a.value_dim - i : E::kWide));
    }
  }
}

void finish_dense(const KvAttention& a, const Unit& u, int begin, int end, const RowState* states,
                  const float* gathered, int64_t stride, int64_t room, int splits) {
  a.dtype == Dtype::f32 ? finish_dense_of<Float32>(a, u, begin, end, states, gathered, stride, room, splits)
                        : finish_dense_of<Bf16>(a, u, begin, end, states, gathered, stride, room, splits);
}

}  // namespace pio::PIO_ISA
#else
#include "entries.h"
#include "kv_attention.h"
#include "quant.h"
#define PIO_FILE "src/kv_attention.cc"
#include "foreach_isa.h"

namespace pio {

PIO_TABLE(attend_dense)
PIO_TABLE(finish_dense)

namespace {

// Whether the units are those of kv_attention_amx.cc.
bool on_tiles(const KvAttention& a) { return a.dtype == Dtype::bf16 && amx_in_use(); }

// Rows of a unit, and of its memory: on AMX those of whole tiles, one or a multiple of two.
int64_t most_rows(const KvAttention& a) { return on_tiles(a) ? kMostRows : kRows; }
int64_t rows_of(const KvAttention& a) {
  const int64_t rows = std::min(most_rows(a), a.queries * a.group);
  if (!on_tiles(a)) return rows;
  return rows <= 16 ? 16 : (rows + 31) / 32 * 32;
}

// The calling thread's own memory for one unit: queries, half a tile of keys (on AMX a tile, and one of values) and,
// where the history is not split, what is gathered.
KvScratch own_memory(const KvAttention& a, int64_t rows, int64_t stride, bool gathers) {
  const int64_t width = a.query_width(), per_float = 4 / static_cast<int64_t>(size_of(a.dtype));
  const int64_t keys = kTile * (on_tiles(a) ? width + stride : width / 2) / per_float;
  const int64_t queries = rows * width / per_float;
  float* memory = scratch_floats(1, keys + queries + (gathers ? rows * stride : 0));
  return {nullptr, memory + keys + queries, stride, reinterpret_cast<char*>(memory + keys), memory, nullptr};
}

int threads_of(const KvAttention& a, int64_t batch, int threads) {
  const int64_t values = a.query_width() + a.value_dim;
  const int64_t bytes = batch * a.kv_heads * a.length * values * static_cast<int64_t>(size_of(a.dtype));
  return threads_for(bytes, batch * a.kv_heads * a.group * a.queries * a.length * values, threads);
}

// All splits of one place (batch row, KV head, block of query rows), then its output; or one split alone when the
// places are too few to share out.
void run(const KvAttention& a, int64_t batch, int threads) {
  const Plan p = plan(a, batch, most_rows(a), on_tiles(a) ? kPart : 16);
  const int64_t places = batch * a.kv_heads * p.row_blocks, stride = a.padded(a.value_dim);
  const int64_t rows = rows_of(a), room = rows * stride;
  const bool alone = p.splits == 1;
  const auto attend = on_tiles(a) ? amx_attend_dense : PIO_CALL(attend_dense);
  std::vector<RowState> states(static_cast<size_t>(alone ? 0 : places * p.splits));
  float* gathered = alone ? nullptr : scratch_floats(0, places * p.splits * room);
  parallel_for(places * p.splits, 1, threads_of(a, batch, threads), [&](int64_t begin, int64_t end) {
    RowState own_state;
    for (int64_t i = begin; i < end; ++i) {
      const Unit u = unit_of(a, p, i / p.splits, i % p.splits);
      KvScratch s = own_memory(a, rows, stride, alone);
      const std::optional<Unit> next = after_short(a, p, u, i, places * p.splits);
      s.next = next ? &*next : nullptr;
      s.state = alone ? &own_state : &states[static_cast<size_t>(i)];
      if (!alone) s.gathered = gathered + i * room;
      attend(a, u, s);
      if (alone) PIO_CALL(finish_dense)(a, u, 0, u.rows, s.state, s.gathered, stride, room, 1);
    }
  });
  if (alone) return;
  finish_places(places, rows, p.splits * stride, threads, [&](int64_t place, int64_t begin, int64_t end) {
    const Unit u = unit_of(a, p, place, 0);
    PIO_CALL(finish_dense)(a, u, static_cast<int>(begin), std::min(u.rows, static_cast<int>(end)),
                           &states[static_cast<size_t>(place * p.splits)], gathered + place * p.splits * room, stride,
                           room, static_cast<int>(p.splits));
  });
}

}  // namespace

// out[b, t, h] = softmax(softmax_scale * q[b, h, t] . keys + mask) values, over the first `length` tokens of the cache.
//
// keys, second: {q, its batch, head, token strides, keys, their batch, head, token strides, dim}; `second` may be
// empty. values: {values, batch, head, token strides, dim}. mask: {bool address, float32 address, batch, head, query
// strides}, either address or none. Strides in elements; the values of a head and the tokens of a mask are dense.
// causal: query i sees the first length - queries + i + 1 tokens. out: [batch, queries, kv_heads * group, value dim]
// dense. queries, keys, values and out have one element type.
void kv_attention(const std::vector<int64_t>& keys, const std::vector<int64_t>& second,
                  const std::vector<int64_t>& values, const std::vector<int64_t>& mask, int64_t batch, int64_t kv_heads,
                  int64_t group, int64_t queries, int64_t length, float softmax_scale, bool causal, Address out,
                  int dtype, int threads) {
  KvAttention a;
  a.dtype = require_dtype(dtype, "kv_attention");
  require(kv_heads > 0 && group > 0 && queries >= 0 && batch >= 0 && length >= 0,
          "kv_attention: counts must be positive");
  require(!causal || length >= queries, "kv_attention: causal attention needs the queries' own tokens cached");
  if (batch == 0 || queries == 0) return;
  a.length = length;
  a.take_part(keys);
  if (!second.empty()) a.take_part(second);
  a.take_values(values);
  a.take_mask(mask);
  require_address(out, size_of(a.dtype), "kv_attention", "out");
  a.kv_heads = kv_heads;
  a.group = group;
  a.queries = queries;
  a.softmax_scale = softmax_scale;
  a.causal = causal;
  a.out = reinterpret_cast<char*>(out);
  run(a, batch, threads);
}

}  // namespace pio
#endif
