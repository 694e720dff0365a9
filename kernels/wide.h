// Many bf16 rows over packed weights on AMX: weights are unpacked to bf16 tiles once per block of columns and
// multiplied with all rows from there, so that neither groups nor int8 activations cost anything per row.
#pragma once
#include <cstdint>

#include "isa.h"
#include "quant.h"

namespace pio {

// From how many rows on. 16 draft tokens and the token before them stay below, so a row of theirs has the bits it has
// alone. One core, 512 x 2560 in int4 g32: 32 rows take 0.19 ms, 0.29 with int8 activations.
constexpr int64_t kWideRows = 32;

constexpr int kWideTile = 16;         // rows of x in a tile
constexpr int64_t kTileBytes = 1024;  // 16 rows of 32 bf16, or 16 pairs of columns for 16 weight rows
constexpr int64_t kTileColumns = 32;
// Columns between two visits of the sums, in tiles: 512 columns of two panels are 32 KB of bf16, which stay in the
// first-level cache (48 KB) while all rows pass.
constexpr int64_t kBlockTiles = 16;

inline bool wide_in_use(Dtype dtype, int64_t rows) { return dtype == Dtype::bf16 && rows >= kWideRows && amx_in_use(); }

// Rows of x as tiles, block of columns after block of columns: [blocks][tiles][up to 16 chunks][16 rows][32]. Within
// every eight columns the order is 0 2 4 6 1 3 5 7, as the nibbles come out of their words.
struct WideRows {
  char* data;
  int64_t tiles;   // of 16 rows
  int64_t chunks;  // of 32 columns

  int64_t blocks() const { return ceil_div(chunks, kBlockTiles); }
  int64_t chunks_of(int64_t block) const {
    const int64_t left = chunks - block * kBlockTiles;
    return left < kBlockTiles ? left : kBlockTiles;
  }
  char* at(int64_t block, int64_t tile) const {
    return data + (block * kBlockTiles * tiles + tile * chunks_of(block)) * kTileBytes;
  }
  int64_t bytes() const { return tiles * chunks * kTileBytes; }
};

inline int64_t wide_chunks(const Packed& w) { return w.groups() * w.group / kTileColumns; }

// Tile `tile` of out = up to 16 rows of x [cols] at rows[t], zeros beyond the columns.
void pack_wide(const uint16_t* const* rows, int count, int64_t cols, const WideRows& out, int64_t tile);
// Columns [16 panel, 16 panel + 16) of a tile = y, rows of 16 float32, rounded to bf16.
void pack_wide_sums(const float* y, int count, int64_t panel, const WideRows& out, int64_t tile);

// One block of columns of up to two panels times the tiles [first, first + n) of x:
// sums [n][n_panels][16 rows][16] += (block 0: =). Each block goes on from the sums before, so a row has the same bits
// whatever other rows there are.
void multiply_wide(const Packed& w, const int64_t* panels, int n_panels, int64_t block, const WideRows& x,
                   int64_t first, int64_t n, float* sums);

}  // namespace pio
