// wide.h without tiles: int4 weights as bytes, bf16 rows as integers of 15 bits, by vectors of dot products (AVX-512
// VNNI).
//
// Weights are the bytes of wide_bytes.h. A row's integers have one step per 512 columns. Where the largest value is
// more than twice the ninth, the step is chosen so that eight of them may be beyond an int8: the low bytes are a row of
// int8, and a high byte that is not zero takes its column once more, for 256 times as much. So few values far above the
// others do not coarsen those, and cost at most eight products of four columns beside 128.
#pragma once
#include "wide_tiles.h"

namespace pio {

// Steps tried: a 127th of the row's largest value divided by up to 2^7.9, an eighth of an octave from one to the next.
// Integers are below 2^15 then.
constexpr int kStepLevels = 64;
constexpr int kLeastLevel = 8;  // an octave: a step less than twice as fine is not worth the products
constexpr int kMostHigh = 8;

// [blocks][tiles] of a head, the high bytes of sixteen rows, and twice up to 8 chunks of 8 rows by 64 columns. Sums
// over 512 columns are exact in int32.
struct IntegerRows : WideTiles<64> {
  static constexpr int kRows = 8;  // whose sums with two panels stay in registers
  struct Head {
    float scale[kWideTile];
    int32_t minus_sum[kWideTile];     // minus the sum of the integers
    int32_t high[kWideTile / kRows];  // entries of each eight rows in high(), zeros behind a row's own
    int32_t rows;                     // of x; the others are zeros
    int32_t unused[13];
  };
  // Four columns from 4 * quad on, of which one has a high byte here.
  struct High {
    int32_t quad;
    int8_t bytes[4];
  };
  static constexpr int64_t kHeadBytes = sizeof(Head) + kWideTile * kMostHigh * sizeof(High);

  using WideTiles::WideTiles;

  Head* head(int64_t block, int64_t tile) const {
    return reinterpret_cast<Head*>(data + (block * tiles + tile) * kHeadBytes + before(block, tile) * kTileBytes);
  }
  // [kMostHigh][8] of the eight rows that `row` is one of; from there on, the row's own are 8 apart.
  High* high(int64_t block, int64_t tile, int row) const {
    return reinterpret_cast<High*>(head(block, tile) + 1) + row / kRows * kRows * kMostHigh + row % kRows;
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
