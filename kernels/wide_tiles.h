// What both kinds of tiles of wide.h share: tiles of sixteen rows by `columns`, block of columns after block.
#pragma once
#include "wide.h"

namespace pio {

template <int64_t columns>
struct WideTiles {
  static constexpr int64_t kColumns = columns;
  static constexpr int64_t kBlockTiles = kWideColumns / columns;

  char* data;
  int64_t tiles;   // of rows
  int64_t chunks;  // of columns

  explicit WideTiles(const WideRows& rows)
      : data(rows.data), tiles(rows.tiles), chunks(ceil_div(rows.columns, columns)) {}

  int64_t blocks() const { return ceil_div(chunks, kBlockTiles); }
  int64_t chunks_of(int64_t block) const {
    const int64_t left = chunks - block * kBlockTiles;
    return left < kBlockTiles ? left : kBlockTiles;
  }
  // Chunks before those of a block and a tile.
  int64_t before(int64_t block, int64_t tile) const { return block * kBlockTiles * tiles + tile * chunks_of(block); }
};

}  // namespace pio
