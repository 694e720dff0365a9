// Many bf16 rows over packed weights: weights are unpacked once per block of columns and multiplied with all rows from
// there, so that no group costs anything per row. On AMX int8 weights meet the rows as bf16 tiles (wide_bf16.h) and
// int4 weights as int8 tiles (wide_bytes.h); on AVX-512 int4 weights do as bytes (wide_integers.h). Callers need not
// know.
#pragma once
#include <cstdint>
#include <optional>

#include "isa.h"
#include "quant.h"

namespace pio {

// From how many rows on, of a call or of an expert. 16 draft tokens and the token before them stay below, so a row of
// theirs has the bits it has alone. Tiles, one core: 512 x 2560 in int4 g32, 32 rows take 0.19 ms as bf16 tiles, 0.29
// as few rows do; experts of 2048 x 768 on a busy machine, 16 rows 8.8 and 8.7 ms, 24 rows 8.4 and 9.6 (13.5 and 12.9
// while others used the caches), 32 rows 15.3 and 16.7. Vectors, a prompt of Qwen3-4B: 32 and 40 tokens 0.98 times as
// fast as few rows, 48 tokens 1.04, 64 tokens 1.08.
constexpr int64_t kWideRows = 32;

constexpr int kWideTile = 16;         // rows of x in a tile
constexpr int64_t kTileBytes = 1024;  // 16 rows of 64 bytes
// Columns between two visits of the sums: two panels of them are 32 KB of bf16 or 16 of int8, which stay in the
// first-level cache (48 KB, 32 on Zen 4) while all rows pass.
constexpr int64_t kWideColumns = 512;

enum class WideForm { bf16_tiles, byte_tiles, integers };

// Whether `rows` rows, of a call or of an expert, are multiplied so.
bool wide_in_use(Dtype dtype, int64_t rows, int bits);

// Rows of x as tiles, block of columns after block of columns.
struct WideRows {
  char* data;
  int64_t tiles;    // of 16 rows
  int64_t columns;  // with those that pad them to a group
  WideForm form;

  int64_t blocks() const { return ceil_div(columns, kWideColumns); }
  int64_t memory() const;  // bytes that data needs
};

// The tiles of `rows` rows that w will multiply, their memory still to be given.
WideRows wide_rows(const Packed& w, int64_t rows);

// Tile `tile` of out = up to 16 rows of x [cols] at rows[t], zeros beyond the columns. A row whose values are not all
// finite gives sums that are not finite, alone.
void pack_wide(const uint16_t* const* rows, int count, int64_t cols, const WideRows& out, int64_t tile);

// Up to two panels of a weight, one block of their columns.
struct WideWeights {
  const Packed* weight;
  int64_t panels[2];
  int n_panels;
  int64_t block;
};

// They times the tiles [first, first + n) of x: sums [n][n_panels][16 rows][16] += (block 0: =). Each block goes on
// from the sums before, so a row has the same bits whatever other rows there are. next: what comes then, to ask memory
// for.
void multiply_wide(const WideWeights& w, const std::optional<WideWeights>& next, const WideRows& x, int64_t first,
                   int64_t n, float* sums);

}  // namespace pio
