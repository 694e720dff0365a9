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
  int64_t first_task;  // tasks are groups of weight rows, numbered through all targets
};

// The weight rows [from, to) times all of x. Each block of x passes all of them, so what is read from memory is read
// once and what comes again and again comes from the second-level cache.
void multiply_group(const Target& target, const DenseInput& x, int64_t from, int64_t to) {
  alignas(64) float y[kMostDenseSums];
  for (const auto& block : x.blocks)
    for (int64_t w = from; w < to; w += x.tile.weights) {
      const int n = static_cast<int>(std::min<int64_t>(x.tile.weights, to - w));
      x.multiply(target.weight + w * x.row_bytes(), x.row_bytes(), n, block, y);
      for (int p = 0; p < n; p += kDensePanel)
        store_rows(y + p * block.count, block.count, target.bias, target.out, x.dtype,
                   block.first * target.rows + w + p, target.rows, std::min(kDensePanel, n - p));
    }
}

// Weight rows of a task. Few rows of x: pieces of 64 KB, so that handing out costs less than 1 %. A batch: what half of
// a second-level cache holds (1 MB on the processors so far; 2 MB where there is AMX, which needs it more), but at
// least four tasks a thread.
int64_t group_rows(const DenseTile& tile, int64_t row_bytes, int64_t rows, int64_t m, int threads) {
  const int64_t bytes = m <= 8 ? 64 << 10 : tile.pack ? 1 << 20 : 512 << 10;
  const int64_t fit = std::min(bytes / row_bytes, rows / (4 * threads));
  return std::max<int64_t>(1, fit / tile.weights) * tile.weights;
}

void multiply_all(const std::vector<Target>& targets, int64_t tasks, int64_t group, const DenseInput& x, int threads) {
  parallel_for(tasks, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      size_t j = targets.size() - 1;
      while (targets[j].first_task > task) --j;
      const int64_t from = (task - targets[j].first_task) * group;
      multiply_group(targets[j], x, from, std::min(from + group, targets[j].rows));
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
  int64_t rows = 0;
  for (size_t i = 0; i < targets.size(); i += 4) {
    require_address(targets[i], size_of(type), "dense_linear", "weight");
    if (m > 0) require_address(targets[i + 2], size_of(type), "dense_linear", "out");
    const int64_t own = static_cast<int64_t>(targets[i + 3]);
    require(own > 0, "dense_linear: rows must be positive");
    all.push_back({reinterpret_cast<const char*>(targets[i]), reinterpret_cast<const void*>(targets[i + 1]),
                   reinterpret_cast<char*>(targets[i + 2]), own, 0});
    rows += own;
  }
  if (m == 0) return;
  require_address(x, size_of(type), "dense_linear", "x");
  const int64_t row_bytes = cols * static_cast<int64_t>(size_of(type));
  const int used = std::max(1, threads_for(rows * row_bytes, rows * cols * m, threads));
  const int64_t group = group_rows(current_dense_tile(type), row_bytes, rows, m, used);
  int64_t tasks = 0;
  for (auto& target : all) {
    target.first_task = tasks;
    tasks += ceil_div(target.rows, group);
  }
  std::vector<const void*> from(static_cast<size_t>(m));
  for (int64_t r = 0; r < m; ++r) from[static_cast<size_t>(r)] = reinterpret_cast<const char*>(x) + r * row_bytes;
  multiply_all(all, tasks, group, dense_input(std::move(from), {0, m}, cols, type, 0, used), used);
}

}  // namespace pio
