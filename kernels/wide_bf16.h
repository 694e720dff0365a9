// wide.h by tiles of bf16, for int8 weights: activations are left as they are, weights' values rounded to bf16.
#pragma once
#include "wide_tiles.h"

namespace pio {

// [blocks][tiles][up to 16 chunks][16 rows][32]. Within every eight columns the order is 0 2 4 6 1 3 5 7, as a panel's
// bytes come out of their words.
struct Bf16Rows : WideTiles<32> {
  using WideTiles::WideTiles;

  char* at(int64_t block, int64_t tile) const { return data + before(block, tile) * kTileBytes; }
  int64_t memory() const { return tiles * chunks * kTileBytes; }
};

namespace amx {  // as in wide.h
void pack_bf16_rows(const uint16_t* const* rows, int count, int64_t cols, const Bf16Rows& out, int64_t tile);
void multiply_bf16_rows(const Packed& w, const int64_t* panels, int n_panels, int64_t block, const Bf16Rows& x,
                        int64_t first, int64_t n, float* sums);
}  // namespace amx

}  // namespace pio
