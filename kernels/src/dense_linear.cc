// y = x W^T (+ bias) for bf16 and float32 weights as torch stores them; several weights may read one x.
#include <algorithm>
#include <vector>

#include "dense.h"
#include "entries.h"
#include "quant.h"
#include "thread_pool.h"

namespace pio {
namespace {

struct Target {
  const char* weight;
  const void* bias;
  void* out;
  int64_t rows;
  int64_t first_panel;  // panels are numbered through all targets
};

struct Activation {
  const char* data;
  int64_t m, cols;
  Dtype dtype;

  int64_t row_bytes() const { return cols * static_cast<int64_t>(size_of(dtype)); }
};

// Rows [begin, end) of x times the 16 weight rows from `from` on.
void multiply_block(const Target& target, const DenseTile& tile, const Activation& x, int64_t from, int64_t begin,
                    int64_t end) {
  alignas(64) float y[kMostDenseRows * kDensePanel];
  const void *w[kDensePanel], *rows[kMostDenseRows];
  const int n = static_cast<int>(std::min<int64_t>(kDensePanel, target.rows - from));
  for (int i = 0; i < n; ++i) w[i] = target.weight + (from + i) * x.row_bytes();
  for (int64_t r = begin; r < end; r += tile.rows) {
    const int count = static_cast<int>(std::min<int64_t>(tile.rows, end - r));
    for (int t = 0; t < count; ++t) rows[t] = x.data + (r + t) * x.row_bytes();
    tile.multiply(w, n, rows, count, x.cols, x.dtype, y);
    store_rows(y, count, target.bias, target.out, x.dtype, r * target.rows + from, target.rows, n);
  }
}

// Rows of x that stay in a core's L2 (512 KB of 1 MB or more) while the weights pass by.
int64_t rows_per_block(int64_t row_bytes, int tile_rows) {
  const int64_t fit = std::clamp<int64_t>((512 << 10) / row_bytes, 48, 384);
  return fit / tile_rows * tile_rows;
}

void multiply_all(const std::vector<Target>& targets, int64_t panels, const Activation& x, int threads) {
  const DenseTile tile = current_dense_tile();
  const int64_t block = rows_per_block(x.row_bytes(), tile.rows), blocks = ceil_div(x.m, block);
  // As in linear: about 64 KB of weights a piece at one row, a single panel in a batch.
  const int64_t grain = x.m > 8 ? 1
                                : std::clamp<int64_t>((64 << 10) / (kDensePanel * x.row_bytes()), 1,
                                                      std::max<int64_t>(1, panels / (4 * std::max(1, threads))));
  parallel_for(panels * blocks, grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = i % panels, first = i / panels * block;
      size_t j = targets.size() - 1;
      while (targets[j].first_panel > panel) --j;
      multiply_block(targets[j], tile, x, (panel - targets[j].first_panel) * kDensePanel, first,
                     std::min(first + block, x.m));
    }
  });
}

}  // namespace

// x [m, cols] -> out [m, rows] for each target. targets: four numbers each, the addresses of the weight [rows, cols],
// of bias (0: none) and out, and rows. x, weights, bias and out have the same element type and are dense.
void dense_linear(Address x, int64_t m, int64_t cols, int dtype, const std::vector<uint64_t>& targets, int threads) {
  const Dtype type = require_dtype(dtype, "dense_linear");
  require(!targets.empty() && targets.size() % 4 == 0, "dense_linear: targets must be four numbers each");
  require(m >= 0 && cols > 0, "dense_linear: m must not be negative, cols must be positive");
  std::vector<Target> all;
  int64_t panels = 0, rows = 0;
  for (size_t i = 0; i < targets.size(); i += 4) {
    require_address(targets[i], size_of(type), "dense_linear", "weight");
    if (m > 0) require_address(targets[i + 2], size_of(type), "dense_linear", "out");
    const int64_t own = static_cast<int64_t>(targets[i + 3]);
    require(own > 0, "dense_linear: rows must be positive");
    all.push_back({reinterpret_cast<const char*>(targets[i]), reinterpret_cast<const void*>(targets[i + 1]),
                   reinterpret_cast<void*>(targets[i + 2]), own, panels});
    panels += ceil_div(own, kDensePanel);
    rows += own;
  }
  if (m == 0) return;
  require_address(x, size_of(type), "dense_linear", "x");
  const Activation in{reinterpret_cast<const char*>(x), m, cols, type};
  multiply_all(all, panels, in, threads_for(rows * in.row_bytes(), rows * cols * m, threads));
}

}  // namespace pio
