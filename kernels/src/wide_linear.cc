// y = x W^T (+ bias) for many bf16 rows: the blocking of linear over wide.h.
//
// Columns in blocks of 512, outermost: of the rows' 512 a second-level cache of 2 MB holds half a megabyte, of their
// sums for all weight rows of a task up to one, and every pair of panels is unpacked once for all of them.
#include "wide_linear.h"

#include <algorithm>
#include <optional>

#include "dense.h"
#include "thread_pool.h"

namespace pio {
namespace {

constexpr int64_t kMostTiles = 32;                       // of 16 rows of x in a task
constexpr int64_t kMostPairs = 16;                       // of panels in a task
constexpr int64_t kSumsOfPair = 2 * kWideTile * kLanes;  // of a tile of rows

struct Task {
  const WideTarget* target;
  int64_t pair, pairs;  // of its panels
  int64_t tile, tiles;  // of the rows
};

std::vector<Task> tasks_of(const std::vector<WideTarget>& targets, int64_t tiles, int threads) {
  int64_t all = 0;
  for (const auto& target : targets) all += ceil_div(target.weight.panels(), 2);
  const int64_t row_blocks = ceil_div(tiles, kMostTiles), tiles_each = ceil_div(ceil_div(tiles, row_blocks), 2) * 2;
  // At least four tasks a thread, so that one that starts late or is interrupted does not hold up the end.
  const int64_t pairs_each = std::clamp<int64_t>(all * row_blocks / (4 * threads), 1, kMostPairs);
  std::vector<Task> out;
  for (int64_t tile = 0; tile < tiles; tile += tiles_each)
    for (const auto& target : targets) {
      const int64_t pairs = ceil_div(target.weight.panels(), 2);
      for (int64_t pair = 0; pair < pairs; pair += pairs_each)
        out.push_back({&target, pair, std::min(pairs_each, pairs - pair), tile, std::min(tiles_each, tiles - tile)});
    }
  return out;
}

int panels_of(const Packed& w, int64_t pair) { return static_cast<int>(std::min<int64_t>(2, w.panels() - 2 * pair)); }

// All pairs of a tile of rows before the next tile: rows of out lie pages apart, and sixteen pages at a time are few
// enough to be looked up once. Pair after pair it was a fifth of the whole call.
void store_task(const Task& task, int64_t m, const float* sums, int64_t stride) {
  const WideTarget& target = *task.target;
  for (int64_t i = 0; i < task.tiles; ++i) {
    const int64_t row = (task.tile + i) * kWideTile;
    const int count = static_cast<int>(std::min<int64_t>(kWideTile, m - row));
    for (int64_t pair = 0; pair < task.pairs; ++pair) {
      const int n_panels = panels_of(target.weight, task.pair + pair);
      for (int p = 0; p < n_panels; ++p) {
        const int64_t from = (2 * (task.pair + pair) + p) * kLanes;
        store_rows(sums + pair * stride + (i * n_panels + p) * kWideTile * kLanes, count, target.bias, target.out,
                   Dtype::bf16, row * target.weight.rows + from, target.weight.rows,
                   static_cast<int>(std::min<int64_t>(kLanes, target.weight.rows - from)));
      }
    }
  }
}

void run(const Task& task, const WideRows& x, int64_t m) {
  const WideTarget& target = *task.target;
  const int64_t stride = task.tiles * kSumsOfPair;
  float* sums = scratch_floats(1, task.pairs * stride);
  const auto weights = [&](int64_t step) {  // all pairs of a block of columns before the next
    const int64_t pair = task.pair + step % task.pairs;
    return WideWeights{&target.weight, {2 * pair, 2 * pair + 1}, panels_of(target.weight, pair), step / task.pairs};
  };
  const int64_t steps = x.blocks() * task.pairs;
  for (int64_t step = 0; step < steps; ++step) {
    const auto next = step + 1 < steps ? std::optional(weights(step + 1)) : std::nullopt;
    multiply_wide(weights(step), next, x, task.tile, task.tiles, sums + step % task.pairs * stride);
  }
  store_task(task, m, sums, stride);
}

}  // namespace

void wide_linear(const uint16_t* x, int64_t m, int64_t cols, const std::vector<WideTarget>& targets, int threads) {
  WideRows rows = wide_rows(targets[0].weight, m);
  rows.data = reinterpret_cast<char*>(scratch_floats(0, rows.memory() / 4));
  parallel_for(rows.tiles, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const uint16_t* from[kWideTile];
      const int count = static_cast<int>(std::min<int64_t>(kWideTile, m - i * kWideTile));
      for (int t = 0; t < count; ++t) from[t] = x + (i * kWideTile + t) * cols;
      pack_wide(from, count, cols, rows, i);
    }
  });
  const std::vector<Task> tasks = tasks_of(targets, rows.tiles, threads);
  parallel_for(static_cast<int64_t>(tasks.size()), 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(tasks[static_cast<size_t>(i)], rows, m);
  });
}

}  // namespace pio
