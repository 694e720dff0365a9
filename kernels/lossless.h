// bf16 weights in 12 bits, every bit of them: sign and mantissa as they are, the exponent as one of sixteen that eight
// rows have most often. Values with another exponent, one in some thousands, are listed and put in when their block is
// read. kernels/README.md draws the layout.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "check.h"
#include "quant.h"

namespace pio {

constexpr int kLosslessBits = 12;
constexpr int kLosslessRows = 8;     // rows that share their exponents: a panel
constexpr int kLosslessApart = 16;   // rows between two of a panel: each is a stream that goes on with the next panel's
constexpr int kLosslessBlock = 128;  // columns of a block: 64 bytes of exponent codes, 128 of signs and mantissas
constexpr int kLosslessBlockBytes = 192;
constexpr int kLosslessExponents = 16;

// A value whose exponent is none of the panel's: its bits, its row in the panel, its column in the block.
struct LosslessExtra {
  uint16_t value;
  uint8_t row, column;
};
static_assert(sizeof(LosslessExtra) == 4);

// Panels `first` to `first + apart - 1` take turns in the rows from `row` on: row + i is place i / apart of panel
// first + i % apart. The last rows of a weight may be fewer, and then `apart` is less.
struct LosslessGroup {
  int64_t first, apart, row;
};

// A weight [rows, cols]. `index` has two parts: marks, a panel's at a time, and behind all of them the extras, panel by
// panel, block by block.
struct Lossless {
  const uint8_t* data;   // [rows, padded to whole panels][blocks][192]
  const uint8_t* index;  // [panels] of { uint8 exponents[16]; uint32 first extra; uint16 extras[blocks] }, then extras
  int64_t rows, cols;

  int64_t panels() const { return ceil_div(rows, kLosslessRows); }
  int64_t blocks() const { return ceil_div(cols, kLosslessBlock); }
  LosslessGroup group_of(int64_t panel) const {
    const int64_t first = panel / kLosslessApart * kLosslessApart;
    return {first, std::min<int64_t>(kLosslessApart, panels() - first), first * kLosslessRows};
  }
  int64_t row_bytes() const { return blocks() * kLosslessBlockBytes; }
  int64_t mark_bytes() const { return (kLosslessExponents + 4 + 2 * blocks() + 3) / 4 * 4; }
  int64_t data_bytes() const { return panels() * kLosslessRows * row_bytes(); }
  // Room for one value in 256 with an exponent of its own, and for one a row at least.
  int64_t most_extras() const { return rows * ceil_div(cols, 256); }
  int64_t index_bytes() const {
    return panels() * mark_bytes() + most_extras() * static_cast<int64_t>(sizeof(LosslessExtra));
  }

  const uint8_t* row(int64_t r) const { return data + r * row_bytes(); }
  const uint8_t* marks(int64_t panel) const { return index + panel * mark_bytes(); }
  const LosslessExtra* room() const { return reinterpret_cast<const LosslessExtra*>(index + panels() * mark_bytes()); }
  // Whatever the bytes of an index are, what is read of it lies within: a damaged one gives wrong values, no more.
  const LosslessExtra* extras(int64_t panel) const {
    uint32_t first;
    std::memcpy(&first, marks(panel) + kLosslessExponents, 4);
    return room() + std::min<int64_t>(first, most_extras());
  }
  int extras_in(int64_t panel, int64_t block) const {
    uint16_t count;
    std::memcpy(&count, marks(panel) + kLosslessExponents + 4 + 2 * block, 2);
    return count;
  }
  int within(const LosslessExtra* from, int count) const {
    return static_cast<int>(std::min<int64_t>(count, room() + most_extras() - from));
  }
  // One of several of this shape that lie one after the other.
  Lossless of(int64_t i) const { return {data + i * data_bytes(), index + i * index_bytes(), rows, cols}; }
};

// Checks every argument, naming the kernel in the message. Defined in src/lossless_pack.cc.
Lossless checked_lossless(const char* kernel, Address data, Address index, int64_t rows, int64_t cols);

// Rows [from, to) as bf16, `cols` apart. Defined in src/lossless.cc.
void expand_rows(const Lossless& w, int64_t from, int64_t to, uint16_t* out);

// out[t][i] = the row at place i of a panel times x[t] over all columns, t < n_x, with the bits that the dense tile of
// the sets without AMX gives. n_x: 1 to that tile's rows. Anything where there is no such row.
void multiply_lossless(const Lossless& w, int64_t panel, const uint16_t* const* x, int n_x,
                       float (*out)[kLosslessRows]);

}  // namespace pio
