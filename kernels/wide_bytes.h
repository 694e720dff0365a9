// wide.h by tiles of int8, for int4 weights: half the products and half the tile loads of bf16 tiles.
//
// Both operands get one scale per row and 512 columns. For the weights that adds at most 3 % to the error that int4 has
// (kernels/README.md). A row of activations whose largest value there is more than sqrt(32) times their root mean
// square gets a second int8 each for what the first leaves over, 15 bits in all, and costs as much as in bf16; so no
// row is rounded more coarsely than groups of 32 may round it, in which the largest value is never more than that.
#pragma once
#include "wide_tiles.h"

namespace pio {

constexpr float kCoarseSquare = 32.0f;  // (largest value / root mean square)^2 up to which one int8 each will do
constexpr float kFineUnits = 254.0f;    // of the second int8 in one of the first

// [blocks][tiles] of a head, up to 8 tiles of 16 rows by 64 columns, and as many of what those left over, which are
// written where head.fine. Sums over 512 columns are exact in int32, and in float32.
struct ByteRows : WideTiles<64> {
  struct Head {
    float scale[kWideTile];
    uint32_t fine;  // bit t: row t has a second part. The others' is zero.
    uint32_t unused[15];
  };
  static constexpr int64_t kHeadBytes = sizeof(Head);

  using WideTiles::WideTiles;

  Head* head(int64_t block, int64_t tile) const {
    return reinterpret_cast<Head*>(data + (block * tiles + tile) * kHeadBytes + before(block, tile) * 2 * kTileBytes);
  }
  char* coarse(int64_t block, int64_t tile) const { return reinterpret_cast<char*>(head(block, tile) + 1); }
  char* fine(int64_t block, int64_t tile) const { return coarse(block, tile) + chunks_of(block) * kTileBytes; }
  int64_t memory() const { return tiles * (blocks() * kHeadBytes + chunks * 2 * kTileBytes); }
};

namespace amx {  // as in wide.h
void pack_byte_rows(const uint16_t* const* rows, int count, int64_t cols, const ByteRows& out, int64_t tile);
void multiply_byte_rows(const Packed& w, const int64_t* panels, int n_panels, int64_t block, const ByteRows& x,
                        int64_t first, int64_t n, float* sums);
}  // namespace amx

}  // namespace pio
