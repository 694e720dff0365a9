// Experts with many rows, over wide.h: gate and up with SwiGLU into rows of bf16, whose tiles down multiplies.
#include "wide_moe.h"

#include <algorithm>
#include <array>
#include <optional>

#include "dense.h"
#include "thread_pool.h"

namespace pio {
namespace {

constexpr int64_t kMostTiles = 32;  // of 16 rows in a piece: their 512 columns stay in the second-level cache

constexpr int kTileSums = kWideTile * kLanes;

using Panels = std::array<int64_t, 2>;

// All blocks of columns of up to two panels times some tiles of x; `then` are the panels after them.
void multiply_blocks(const Packed& w, const Panels& panels, int n_panels, const std::optional<Panels>& then,
                     const WideRows& x, int64_t first, int64_t n, float* sums) {
  const auto weights = [&](const Panels& p, int64_t block) { return WideWeights{&w, {p[0], p[1]}, n_panels, block}; };
  for (int64_t block = 0; block < x.blocks(); ++block) {
    const auto next = block + 1 < x.blocks() ? std::optional(weights(panels, block + 1))
                      : then                 ? std::optional(weights(*then, 0))
                                             : std::nullopt;
    multiply_wide(weights(panels, block), next, x, first, n, sums);
  }
}

}  // namespace

WideExperts::WideExperts(const PackedLayer& layer, const Routing& routing, Dtype dtype, int64_t tokens, int threads)
    : layer_(layer), routing_(routing) {
  if (!wide_in_use(dtype, tokens, layer.down.bits)) return;
  const size_t active = routing.experts.size();
  int64_t bytes = 0, most = 0;
  const auto row_bytes = [&](const WideRows& tiles) { return tiles.tiles * kWideTile * width() * 2; };
  for (size_t e = 0; e < active; ++e) {
    const int64_t rows = routing.first[e + 1] - routing.first[e];
    middle_.push_back({nullptr, wide_rows(layer.down, wide_in_use(dtype, rows, layer.down.bits) ? rows : 0)});
    bytes += middle_.back().tiles.memory() + row_bytes(middle_.back().tiles);
    most += middle_.back().tiles.tiles > 0;
  }
  char* memory = reinterpret_cast<char*>(scratch_floats(3, bytes / 4));
  for (Middle& middle : middle_) {
    middle.tiles.data = memory;
    memory += middle.tiles.memory();
    middle.rows = reinterpret_cast<uint16_t*>(memory);
    memory += row_bytes(middle.tiles);
  }
  // A piece gathers its rows of x: all panels of an expert share that, unless there would be too few pieces.
  const int64_t each = most >= 8 * threads ? layer.gate_panels : std::max<int64_t>(1, ceil_div(layer.gate_panels, 8));
  for (size_t e = 0; e < active; ++e) {
    const int64_t tiles = middle_[e].tiles.tiles;
    for (int64_t tile = 0; tile < tiles; tile += kMostTiles)
      for (int64_t panel = 0; panel < layer.gate_panels; panel += each)
        pieces_.push_back(
            {e, tile, std::min(kMostTiles, tiles - tile), panel, std::min(each, layer.gate_panels - panel)});
  }
}

void WideExperts::gate_and_up(int64_t index, const uint16_t* x) const {
  const Piece& piece = pieces_[static_cast<size_t>(index)];
  const Packed w = expert_of(layer_.gate_up, routing_.experts[piece.active], 2 * layer_.gate_panels);
  const int64_t from = routing_.first[piece.active] + piece.tile * kWideTile, end = routing_.first[piece.active + 1];
  const auto count_of = [&](int64_t i) {
    return static_cast<int>(std::min<int64_t>(kWideTile, end - from - i * kWideTile));
  };
  WideRows in = wide_rows(w, piece.tiles * kWideTile);
  in.data = reinterpret_cast<char*>(scratch_floats(4, in.memory() / 4));
  for (int64_t i = 0; i < piece.tiles; ++i) {
    const uint16_t* rows[kWideTile];
    for (int t = 0; t < count_of(i); ++t)
      rows[t] = x + routing_.token[static_cast<size_t>(from + i * kWideTile + t)] * w.cols;
    pack_wide(rows, count_of(i), w.cols, in, i);
  }
  float* sums = scratch_floats(5, piece.tiles * 2 * kTileSums);
  alignas(64) float y[kTileSums] = {};
  for (int64_t panel = piece.panel; panel < piece.panel + piece.panels; ++panel) {
    const bool another = panel + 1 < piece.panel + piece.panels;
    multiply_blocks(w, {panel, panel + layer_.gate_panels}, 2,
                    another ? std::optional(std::array{panel + 1, panel + 1 + layer_.gate_panels}) : std::nullopt, in,
                    0, in.tiles, sums);
    for (int64_t i = 0; i < piece.tiles; ++i) {
      const float* gate = sums + i * 2 * kTileSums;
      swiglu_rows(gate, gate + kTileSums, count_of(i), y, kLanes);
      store_rows(y, count_of(i), nullptr, middle_[piece.active].rows, Dtype::bf16,
                 (piece.tile + i) * kWideTile * width() + panel * kLanes, width(), kLanes);
    }
  }
}

void WideExperts::pack_middle(int threads) const {
  if (!any()) return;
  std::vector<int64_t> first = {0};  // tile of each expert, numbered through all
  for (const Middle& middle : middle_) first.push_back(first.back() + middle.tiles.tiles);
  parallel_for(first.back(), 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const size_t e = static_cast<size_t>(std::upper_bound(first.begin(), first.end(), i) - first.begin()) - 1;
      const int64_t tile = i - first[e], rows = routing_.first[e + 1] - routing_.first[e];
      const uint16_t* from[kWideTile];
      const int count = static_cast<int>(std::min<int64_t>(kWideTile, rows - tile * kWideTile));
      for (int t = 0; t < count; ++t) from[t] = middle_[e].rows + (tile * kWideTile + t) * width();
      pack_wide(from, count, layer_.down.cols, middle_[e].tiles, tile);
    }
  });
}

void WideExperts::down_and_add(size_t active, int64_t panel, int n_panels, float* sum, int64_t stride) const {
  const WideRows& middle = middle_[active].tiles;
  const Packed w = expert_of(layer_.down, routing_.experts[active], layer_.down_panels);
  const int64_t end = routing_.first[active + 1];
  for (int64_t tile = 0; tile < middle.tiles; tile += kMostTiles) {
    const int64_t tiles = std::min(kMostTiles, middle.tiles - tile);
    float* sums = scratch_floats(5, tiles * n_panels * kTileSums);
    multiply_blocks(w, {panel, panel + 1}, n_panels, std::nullopt, middle, tile, tiles, sums);
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t at = routing_.first[active] + (tile + i) * kWideTile;
      const int count = static_cast<int>(std::min<int64_t>(kWideTile, end - at));
      for (int p = 0; p < n_panels; ++p)
        add_weighted(sums + (i * n_panels + p) * kTileSums, count, routing_.token.data() + at,
                     routing_.weight.data() + at, sum + p * kLanes, stride);
    }
  }
}

}  // namespace pio
