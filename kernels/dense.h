// What the kernels over dense bf16 and float32 weights share: the tile that multiplies rows by rows, activations as it
// wants them, and what happens to its results.
#pragma once
#include <cstdint>
#include <vector>

#include "check.h"

namespace pio {

constexpr int kDensePanel = 16;       // weight rows whose results lie side by side
constexpr int kMostDenseSums = 1024;  // results of one call of a tile, of every set

// How the current instruction set multiplies dense rows, accumulated in float32. The order of the additions depends on
// neither n_w nor n_x, so one row gives the same bits alone and in a batch.
struct DenseTile {
  int weights, rows;  // at most, of one call
  int alone, few;     // weight rows at most where there are up to `few` rows of x, and weights come from memory
  // out[i / 16][t][i % 16] = w[i] . x[t] over `cols` elements, i < n_w, t < n_x, weight rows `stride` bytes apart.
  // Where the last sixteen weight rows are not complete, anything is written in their place. x: the rows' addresses;
  // where the set packs, x[0] is the address of the packed block.
  void (*multiply)(const void* w, int64_t stride, int n_w, const void* const* x, int n_x, int64_t cols, Dtype dtype,
                   float* out);
  // Bytes of a packed block of n_x rows, or null; and how to fill it.
  int64_t (*block_bytes)(int n_x, int64_t cols);
  void (*pack)(const void* const* x, int n_x, int64_t cols, void* block);
  // For many rows, where the set packs, else null: the same product in parts of kPartColumns columns, which leaves its
  // sums in memory between them (kDenseSums floats for each packed block of more than one row), and then their results
  // as multiply() gives them, to the bit.
  void (*multiply_part)(const void* w, int64_t stride, int n_w, const void* const* blocks, const int* n_x,
                        int64_t count, int64_t cols, int64_t part, float* sums);
  void (*results)(const float* sums, int n_w, int n_x, float* out);
};
// 32 weight rows of a part are 32 KB, which stay in the first-level cache (48 KB) while all rows pass.
constexpr int64_t kPartColumns = 512;
constexpr int64_t kDenseSums = 1024;
DenseTile current_dense_tile(Dtype dtype);
DenseTile amx_dense_tile();  // bf16 on AMX, src/dense_amx.cc

// Activation rows as the current tile wants them, cut into blocks that do not cross the borders of groups.
struct DenseInput {
  struct Block {
    int64_t first;  // row
    int count;
    const void* packed;
  };
  DenseTile tile;
  Dtype dtype;
  int64_t cols;
  std::vector<const void*> rows;
  std::vector<Block> blocks;
  std::vector<int64_t> first_block;  // of each group, and one more at the end

  int64_t row_bytes() const { return cols * static_cast<int64_t>(size_of(dtype)); }
  // Weight rows of a call.
  int together() const { return static_cast<int64_t>(rows.size()) <= tile.few ? tile.alone : tile.weights; }
  // One call of the tile; see DenseTile::multiply.
  void multiply(const void* w, int64_t stride, int n_w, const Block& block, float* out) const {
    const void* const* x = block.packed ? &block.packed : rows.data() + block.first;
    tile.multiply(w, stride, n_w, x, block.count, cols, dtype, out);
  }
};

// rows: the addresses of all rows; groups: the first row of each group, and their number at the end. Packed blocks lie
// in scratch_floats(slot) of the calling thread.
DenseInput dense_input(std::vector<const void*> rows, const std::vector<int64_t>& groups, int64_t cols, Dtype dtype,
                       int slot, int threads);

// out and bias of `stride` elements a row, from element `first` on: out[t][0 .. n) = y[t] + bias, y of `count` rows of
// 16. Defined in src/linear.cc.
void store_rows(const float* y, int count, const void* bias, void* out, Dtype dtype, int64_t first, int64_t stride,
                int n);

}  // namespace pio
