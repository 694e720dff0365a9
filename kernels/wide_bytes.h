// Many bf16 rows over int4 weights as products of int8 tiles on AMX: half the products and half the tile loads of bf16
// tiles (wide.h), whose place it takes for int4.
//
// Both operands get one scale per row and 512 columns. For the weights that adds at most 3 % to the error that int4 has
// (kernels/README.md). A row of activations whose largest value there is more than sqrt(32) times their root mean
// square gets a second int8 each for what the first leaves over, 15 bits in all, and costs as much as in bf16; so no
// row is rounded more coarsely than groups of 32 may round it, in which the largest value is never more than that.
#pragma once
#include <cstdint>

#include "wide.h"

namespace pio {

constexpr int64_t kByteColumns = 64;    // of a tile
constexpr int64_t kByteBlockTiles = 8;  // 512 columns: sums of their products are exact in int32, and in float32
constexpr float kCoarseSquare = 32.0f;  // (largest value / root mean square)^2 up to which one int8 each will do
constexpr float kFineUnits = 254.0f;    // of the second int8 in one of the first

// Rows of x as int8 tiles: [blocks][tiles] of a head, up to 8 tiles of 16 rows by 64 columns, and as many of what those
// left over, which are written where head.fine.
struct ByteRows {
  struct Head {
    float scale[kWideTile];
    uint32_t fine;  // bit t: row t has a second part. The others' is zero.
    uint32_t unused[15];
  };

  char* data;
  int64_t tiles;   // of 16 rows
  int64_t chunks;  // of 64 columns

  int64_t blocks() const { return ceil_div(chunks, kByteBlockTiles); }
  int64_t chunks_of(int64_t block) const {
    const int64_t left = chunks - block * kByteBlockTiles;
    return left < kByteBlockTiles ? left : kByteBlockTiles;
  }
  Head* head(int64_t block, int64_t tile) const {
    const int64_t heads = block * tiles + tile, before = block * kByteBlockTiles * tiles + tile * chunks_of(block);
    return reinterpret_cast<Head*>(data + heads * static_cast<int64_t>(sizeof(Head)) + before * 2 * kTileBytes);
  }
  char* coarse(int64_t block, int64_t tile) const { return reinterpret_cast<char*>(head(block, tile) + 1); }
  char* fine(int64_t block, int64_t tile) const { return coarse(block, tile) + chunks_of(block) * kTileBytes; }
  int64_t bytes() const { return tiles * (blocks() * static_cast<int64_t>(sizeof(Head)) + chunks * 2 * kTileBytes); }
};

// As for WideRows. A row whose values are not all finite gives sums that are not finite, alone.
void pack_wide(const uint16_t* const* rows, int count, int64_t cols, const ByteRows& out, int64_t tile);
void multiply_wide(const Packed& w, const int64_t* panels, int n_panels, int64_t block, const ByteRows& x,
                   int64_t first, int64_t n, float* sums);

}  // namespace pio
