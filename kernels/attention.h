// What attention over an int8 cache and over a dense one share: how the work is cut, and what a row may see.
// `Attention` is Int8Attention or KvAttention.
#pragma once
#include <algorithm>
#include <cstdint>
#include <optional>

#include "piece.h"
#include "thread_pool.h"

namespace pio {

constexpr int64_t kTile = 64;   // tokens: 4 KB of probabilities for 8 rows stay in the first-level cache
constexpr int kRows = 32;       // query rows of a unit
constexpr int kMostRows = 128;  // the same where tiles multiply
constexpr int kMostSplits = 16;
constexpr int64_t kPart = 32;      // tokens of a tile that are multiplied together on AMX, elsewhere blocks of 16
constexpr int64_t kStretch = 256;  // tokens worth a unit of their own
// Multiply-adds for which shorter ones are, in a history of few stretches: 256 tokens of four rows of 128 + 128 values.
constexpr int64_t kLeastWork = 1 << 18;
constexpr float kHidden = -1e30f;  // score of a token that a row must not see; finite, so that no NaN arises

// load(kEdge + 16 - n) is n zeros, then kHidden.
alignas(64) inline constexpr float kEdge[32] = {0,       0,       0,       0,       0,       0,       0,       0,
                                                0,       0,       0,       0,       0,       0,       0,       0,
                                                kHidden, kHidden, kHidden, kHidden, kHidden, kHidden, kHidden, kHidden,
                                                kHidden, kHidden, kHidden, kHidden, kHidden, kHidden, kHidden, kHidden};

// Query rows [first_row, first_row + rows) of one KV head against tokens [from, to). Row = query * group + head in
// group.
struct Unit {
  int64_t batch, kv_head, first_row, from, to;
  int rows;
};

struct RowState {
  float most[kMostRows], sum[kMostRows];
};

struct Plan {
  int64_t rows, row_blocks, splits;  // rows: of a unit at most
  int64_t stretch;                   // tokens of history per unit, whole parts
};

// Splits of a history that are worth it. A tile is enough for the 20 heads that share MLA's latents; each begins with
// packing their queries, so a long history is not cut that finely.
template <class Attention>
int64_t worthy_splits(const Attention& a, int64_t rows) {
  int64_t per_token = a.value_dim;
  for (int i = 0; i < a.parts; ++i) per_token += a.key[i].dim;
  const int64_t least = std::max(kLeastWork / (per_token * std::min(rows, a.queries * a.group)), kTile);
  return std::max<int64_t>(a.length / kStretch, a.length >= 8 * least ? 4 : a.length >= 2 * least ? 2 : 1);
}

// Splits the history only when there are too few units to share out. Depends on shapes alone, so that the result does
// too.
template <class Attention>
Plan plan(const Attention& a, int64_t batch, int64_t rows, int64_t part) {
  Plan p;
  p.rows = rows;
  p.row_blocks = (a.queries * a.group + rows - 1) / rows;
  const int64_t units = batch * a.kv_heads * p.row_blocks;
  const int64_t wanted =
      std::min<int64_t>(std::min<int64_t>(kMostSplits, (kMostSplits + units - 1) / units), worthy_splits(a, rows));
  const int64_t splits = std::max<int64_t>(1, wanted);
  p.stretch = (a.length + splits * part - 1) / (splits * part) * part;
  p.splits = p.stretch > 0 ? (a.length + p.stretch - 1) / p.stretch : 1;  // an empty history is one empty stretch
  return p;
}

template <class Attention>
Unit unit_of(const Attention& a, const Plan& p, int64_t place, int64_t split) {
  Unit u;
  const int64_t block = place % p.row_blocks;
  u.kv_head = place / p.row_blocks % a.kv_heads;
  u.batch = place / p.row_blocks / a.kv_heads;
  u.first_row = block * p.rows;
  u.rows = static_cast<int>(std::min<int64_t>(p.rows, a.queries * a.group - u.first_row));
  const int64_t last_query = (u.first_row + u.rows - 1) / a.group;
  const int64_t seen = a.causal ? a.length - a.queries + last_query + 1 : a.length;
  u.from = split * p.stretch;
  u.to = std::min(u.from + p.stretch, seen);
  return u;
}

// The unit after `u`, the i-th of `units`, where its memory is worth asking for meanwhile: a short one is over before
// memory has answered. The same thread mostly has it.
template <class Attention>
std::optional<Unit> after_short(const Attention& a, const Plan& p, const Unit& u, int64_t i, int64_t units) {
  if (u.to - u.from > kStretch || i + 1 == units) return std::nullopt;
  return unit_of(a, p, (i + 1) / p.splits, (i + 1) % p.splits);
}

// finish(place, begin, end) for rows [begin, end) of every place; a row is made of `floats` values.
template <class Finish>
void finish_places(int64_t places, int64_t rows, int64_t floats, int threads, const Finish& finish) {
  constexpr int64_t kTogether = 8;
  const int64_t pieces = (rows + kTogether - 1) / kTogether;
  const int64_t grain = std::max<int64_t>(1, kPieceBytes / (kTogether * floats * 4));
  parallel_for(places * pieces, grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % pieces * kTogether;
      finish(i / pieces, first, first + kTogether);
    }
  });
}

}  // namespace pio
