// What the quantized kernels share: the packed layout, quantized activations, the tile that multiplies them.
// kernels/README.md draws the layout.
#pragma once
#include <cstdint>
#include <vector>

#include "check.h"

namespace pio {

constexpr int kLayout = 1;  // version of the packed layout; change it with the layout
constexpr int kLanes = 16;  // output rows interleaved in a panel

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A weight [rows, cols] as int4 or int8 with one bf16 scale per row and `group` columns.
struct Packed {
  const uint8_t* data;     // [panels][groups][group / per_block blocks][64]
  const uint16_t* scales;  // [panels][groups][16], bf16 bits
  int64_t rows, cols;
  int bits, group;

  int64_t panels() const { return ceil_div(rows, kLanes); }
  int64_t groups() const { return ceil_div(cols, group); }
  int64_t group_bytes() const { return static_cast<int64_t>(group) * kLanes * bits / 8; }
  int64_t panel_bytes() const { return groups() * group_bytes(); }
};

// Checks every argument, naming the kernel in the message.
Packed checked_packed(const char* kernel, Address data, Address scales, int64_t rows, int64_t cols, int bits,
                      int group);

// Rows of activations as int8, zero beyond the columns. Scale and sum lie beside their group: one pointer per row in
// the inner loop, where three spilled.
struct Activations {
  char* data;  // [rows][groups] of { int8 q[group]; float scale; int32 minus_sum: minus the sum of q }
  int64_t groups;
  int group;

  int64_t group_bytes() const { return group + 8; }
  int64_t stride() const { return groups * group_bytes(); }
};

// Activations in memory of the calling thread, valid until its next call with the same slot (0 or 1).
Activations scratch_activations(int slot, int64_t rows, int64_t cols, int group);
// float32 memory of the calling thread, 64-byte aligned, valid until its next call with the same slot (0 to 5).
// Kernels keep 1, 4 and 5 for what each thread needs by itself, as the caller is one of the threads.
float* scratch_floats(int slot, int64_t count);

// Quantizes rows [begin, end) of x [rows, cols] (element type `dtype`, dense) into `out`. Round to nearest of
// x * 127 / max|x| in each group; a group of zeros has scale 0. NaN and infinity give a scale that is not finite,
// which poisons the outputs of that row, as it would unquantized.
void quantize_rows(const void* x, Dtype dtype, int64_t cols, int64_t begin, int64_t end, const Activations& out,
                   int threads);

// Threads worth starting for work that reads `bytes` and does `macs` multiply-adds: below some 15 us on one core, none.
inline int threads_for(int64_t bytes, int64_t macs, int threads) {
  return bytes > (256 << 10) || macs > (2 << 20) ? threads : 1;
}

constexpr int kMaxTileRows = 16;
constexpr int kMaxTilePanels = 2;
constexpr int kMostAlone = 16;                                 // panels that few rows of activations meet at a time
constexpr int kMostFew = 6;                                    // such rows
constexpr int kMostTileSums = kMostAlone * kMostFew * kLanes;  // results of one call of a tile
static_assert(kMostTileSums >= kMaxTilePanels * kMaxTileRows * kLanes);

// How the current instruction set likes its tiles, and the multiplication itself:
// out[p * n_rows + t][16] = the 16 products of panel panels[p] with activation row rows[t], over all columns, for p <
// n_panels <= tile.panels (tile.alone for up to tile.few rows, whose weights come from memory) and t < n_rows <=
// tile.rows. The order of the additions depends on neither, so one row gives the same bits alone and in a batch.
struct Tile {
  int rows, panels, alone, few;
  void (*multiply)(const Packed& w, const int64_t* panels, int n_panels, const Activations& a, const int64_t* rows,
                   int n_rows, float* out);
};
Tile current_tile(int group);
Tile vector_tile();  // the same without AMX, at most six rows
Tile amx_tile();     // src/packed_amx.cc

}  // namespace pio
