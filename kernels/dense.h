// What the kernels over dense bf16 and float32 weights share: the tile that multiplies rows by rows, and what happens
// to its sixteen columns.
#pragma once
#include <cstdint>

#include "check.h"

namespace pio {

constexpr int kDensePanel = 16;    // weight rows of a panel: what one call of a tile multiplies
constexpr int kMostDenseRows = 6;  // of every set

// How the current instruction set multiplies dense rows: out[t * 16 + i] = w[i] . x[t] over `cols` elements, i < n_w <=
// 16, t < n_x <= rows, accumulated in float32. Columns of out past n_w are written, with anything. The order of the
// additions depends on neither n_w nor n_x, so one row gives the same bits alone and in a batch.
struct DenseTile {
  int rows;
  void (*multiply)(const void* const* w, int n_w, const void* const* x, int n_x, int64_t cols, Dtype dtype, float* out);
};
DenseTile current_dense_tile();

// out and bias of `stride` elements a row, from element `first` on: out[t][0 .. n) = y[t] + bias, y of `count` rows of
// 16. Defined in src/linear.cc.
void store_rows(const float* y, int count, const void* bias, void* out, Dtype dtype, int64_t first, int64_t stride,
                int n);

}  // namespace pio
