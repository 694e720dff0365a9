// wide.h without tiles: int4 weights as bytes, bf16 rows as integers, by vectors of dot products (AVX-512 VNNI).
//
// Weights are the bytes of wide_bytes.h. A row's integers have one step per 512 columns: a 127th of its largest value
// there or of four times the root mean square, whichever is less. What an int8 does not hold takes its column again,
// a value x in units of four root mean squares at most |x| <= x^2 times; all together that is 512 / 16 = 32 times, 33
// as the root mean square is taken of rounded values. So outliers cost a row a quarter at most, and one of normal
// values nothing.
#pragma once
#include "wide_tiles.h"

namespace pio {

constexpr float kReachSquare = 16.0f;  // (what an int8 reaches / root mean square)^2, at most

// [blocks][tiles] of a head, what sixteen rows take again, and twice up to 8 chunks of 8 rows by 64 columns. Sums over
// 512 columns are exact in int32.
struct IntegerRows : WideTiles<64> {
  static constexpr int kRows = 8;  // whose sums with two panels stay in registers
  struct Head {
    float scale[kWideTile];
    int32_t minus_sum[kWideTile];      // minus the sum of the integers
    int32_t again[kWideTile / kRows];  // entries of each eight rows in again(), zeros behind a row's own
    int32_t rows;                      // of x; the others are zeros
    int32_t unused[13];
  };
  // Four columns from 4 * quad on, of which one is taken again.
  struct Again {
    int32_t quad;
    int8_t values[4];
  };
  static constexpr int64_t kMostAgain = 36;
  static constexpr int64_t kHeadBytes = sizeof(Head) + kWideTile * kMostAgain * sizeof(Again);

  using WideTiles::WideTiles;

  Head* head(int64_t block, int64_t tile) const {
    return reinterpret_cast<Head*>(data + (block * tiles + tile) * kHeadBytes + before(block, tile) * kTileBytes);
  }
  // [kMostAgain][8] of the eight rows that `row` is one of; from there on, the row's own are 8 apart.
  Again* again(int64_t block, int64_t tile, int row) const {
    return reinterpret_cast<Again*>(head(block, tile) + 1) + row / kRows * kRows * kMostAgain + row % kRows;
  }
  // Eight rows after eight rows, so that what is read together lies together.
  char* values(int64_t block, int64_t tile, int row) const {
    return reinterpret_cast<char*>(head(block, tile)) + kHeadBytes +
           (row / kRows * chunks_of(block) * kRows + row % kRows) * kColumns;
  }
  int64_t memory() const { return tiles * (blocks() * kHeadBytes + chunks * kTileBytes); }
};

namespace vectors {  // as in wide.h
void pack_integer_rows(const uint16_t* const* rows, int count, int64_t cols, const IntegerRows& out, int64_t tile);
void multiply_integer_rows(const WideWeights& w, const WideWeights* next, const IntegerRows& x, int64_t first,
                           int64_t n, float* sums);
}  // namespace vectors

}  // namespace pio
