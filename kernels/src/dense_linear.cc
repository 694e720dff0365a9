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
  char* out;
  int64_t rows;
  int64_t first_task;  // tasks are `tile.weights` weight rows, numbered through all targets
};

// Blocks [begin, end) of x times the weight rows of one task.
void multiply_blocks(const Target& target, const DenseInput& x, int64_t from, int64_t begin, int64_t end) {
  alignas(64) float y[kMostDenseSums];
  const int n = static_cast<int>(std::min<int64_t>(x.tile.weights, target.rows - from));
  for (int64_t i = begin; i < end; ++i) {
    const auto& block = x.blocks[static_cast<size_t>(i)];
    x.multiply(target.weight + from * x.row_bytes(), x.row_bytes(), n, block, y);
    for (int p = 0; p < n; p += kDensePanel)
      store_rows(y + p * block.count, block.count, target.bias, target.out, x.dtype,
                 block.first * target.rows + from + p, target.rows, std::min(kDensePanel, n - p));
  }
}

// Blocks of x that stay in a core's L2 (512 KB of 1 MB or more) while the weights pass by.
int64_t blocks_at_once(const DenseInput& x) {
  return std::max<int64_t>(1, std::clamp<int64_t>((512 << 10) / x.row_bytes(), 48, 384) / x.tile.rows);
}

void multiply_all(const std::vector<Target>& targets, int64_t tasks, const DenseInput& x, int threads) {
  const int64_t blocks = static_cast<int64_t>(x.blocks.size()), some = blocks_at_once(x);
  // As in linear: about 64 KB of weights a piece at one row, a single task in a batch.
  const int64_t grain = x.rows.size() > 8 ? 1
                                          : std::clamp<int64_t>((64 << 10) / (x.tile.weights * x.row_bytes()), 1,
                                                                std::max<int64_t>(1, tasks / (4 * threads)));
  parallel_for(tasks * ceil_div(blocks, some), grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t task = i % tasks, first = i / tasks * some;
      size_t j = targets.size() - 1;
      while (targets[j].first_task > task) --j;
      multiply_blocks(targets[j], x, (task - targets[j].first_task) * x.tile.weights, first,
                      std::min(first + some, blocks));
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
  const DenseTile tile = current_dense_tile(type);
  std::vector<Target> all;
  int64_t tasks = 0, rows = 0;
  for (size_t i = 0; i < targets.size(); i += 4) {
    require_address(targets[i], size_of(type), "dense_linear", "weight");
    if (m > 0) require_address(targets[i + 2], size_of(type), "dense_linear", "out");
    const int64_t own = static_cast<int64_t>(targets[i + 3]);
    require(own > 0, "dense_linear: rows must be positive");
    all.push_back({reinterpret_cast<const char*>(targets[i]), reinterpret_cast<const void*>(targets[i + 1]),
                   reinterpret_cast<char*>(targets[i + 2]), own, tasks});
    tasks += ceil_div(own, tile.weights);
    rows += own;
  }
  if (m == 0) return;
  require_address(x, size_of(type), "dense_linear", "x");
  const int64_t row_bytes = cols * static_cast<int64_t>(size_of(type));
  const int used = std::max(1, threads_for(rows * row_bytes, rows * cols * m, threads));
  std::vector<const void*> from(static_cast<size_t>(m));
  for (int64_t r = 0; r < m; ++r) from[static_cast<size_t>(r)] = reinterpret_cast<const char*>(x) + r * row_bytes;
  multiply_all(all, tasks, dense_input(std::move(from), {0, m}, cols, type, 0, used), used);
}

}  // namespace pio
