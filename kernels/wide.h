// Many bf16 rows over packed weights on AMX: weights become tiles once per block of columns and are multiplied with all
// rows from there, so that no group costs anything per row. int8 weights meet the rows as bf16 tiles (wide_bf16.h),
// int4 weights as int8 tiles (wide_bytes.h); callers need not know.
#pragma once
#include <cstdint>

#include "isa.h"
#include "quant.h"

namespace pio {

// From how many rows on. 16 draft tokens and the token before them stay below, so a row of theirs has the bits it has
// alone. One core, 512 x 2560 in int4 g32: 32 rows take 0.19 ms as bf16 tiles, 0.29 as few rows do.
constexpr int64_t kWideRows = 32;

constexpr int kWideTile = 16;         // rows of x in a tile
constexpr int64_t kTileBytes = 1024;  // 16 rows of 64 bytes
// Columns between two visits of the sums: two panels of them are 32 KB of bf16 or 16 of int8, which stay in the
// first-level cache (48 KB) while all rows pass.
constexpr int64_t kWideColumns = 512;

inline bool wide_in_use(Dtype dtype, int64_t rows) { return dtype == Dtype::bf16 && rows >= kWideRows && amx_in_use(); }

// Rows of x as tiles, block of columns after block of columns.
struct WideRows {
  char* data;
  int64_t tiles;    // of 16 rows
  int64_t columns;  // with those that pad them to a group
  bool bytes;       // int8 tiles, else bf16

  int64_t blocks() const { return ceil_div(columns, kWideColumns); }
  int64_t memory() const;  // bytes that data needs
};

// The tiles of `rows` rows that w will multiply, their memory still to be given.
inline WideRows wide_rows(const Packed& w, int64_t rows) {
  return {nullptr, ceil_div(rows, kWideTile), w.groups() * w.group, w.bits == 4};
}

// Tile `tile` of out = up to 16 rows of x [cols] at rows[t], zeros beyond the columns. A row whose values are not all
// finite gives sums that are not finite, alone.
void pack_wide(const uint16_t* const* rows, int count, int64_t cols, const WideRows& out, int64_t tile);

// One block of columns of up to two panels times the tiles [first, first + n) of x:
// sums [n][n_panels][16 rows][16] += (block 0: =). Each block goes on from the sums before, so a row has the same bits
// whatever other rows there are.
void multiply_wide(const Packed& w, const int64_t* panels, int n_panels, int64_t block, const WideRows& x,
                   int64_t first, int64_t n, float* sums);

}  // namespace pio
