// y = x W^T (+ bias) for bf16 and float32 weights as torch stores them, and for bf16 weights in 12 bits (lossless.h),
// with the same bits; several weights may read one x.
#include <algorithm>
#include <optional>
#include <vector>

#include "dense.h"
#include "entries.h"
#include "lossless.h"
#include "quant.h"
#include "thread_pool.h"

namespace pio {
namespace {

struct Target {
  const char* weight;              // dense, or
  std::optional<Lossless> packed;  // in 12 bits
  const void* bias;
  char* out;
  int64_t rows;
  int64_t first_task;  // tasks are groups of weight rows, numbered through all targets
};

constexpr int64_t kPartBlocks = 32;  // of 32 rows of x that pass a part of the weights together

void store_block(const Target& target, const DenseInput& x, const DenseInput::Block& block, int64_t from, int n,
                 const float* y) {
  for (int p = 0; p < n; p += kDensePanel)
    store_rows(y + p * block.count, block.count, target.bias, target.out, x.dtype, block.first * target.rows + from + p,
               target.rows, std::min(kDensePanel, n - p));
}

// The weight rows [from, to) as the tiles read them: where they lie, or made in memory of the calling thread.
const char* dense_rows(const Target& target, const DenseInput& x, int64_t from, int64_t to) {
  if (!target.packed) return target.weight + from * x.row_bytes();
  float* rows = scratch_floats(4, ceil_div((to - from) * x.row_bytes(), 4));
  expand_rows(*target.packed, from, to, reinterpret_cast<uint16_t*>(rows));
  return reinterpret_cast<const char*>(rows);
}

// The weight rows [from, to), which begin at `rows`, times all of x. Each block of x passes all of them, so what is
// read from memory is read once and what comes again and again comes from the second-level cache.
void multiply_rows(const Target& target, const char* rows, const DenseInput& x, int64_t from, int64_t to) {
  alignas(64) float y[kMostDenseSums];
  for (const auto& block : x.blocks)
    for (int64_t w = from; w < to; w += x.together()) {
      const int n = static_cast<int>(std::min<int64_t>(x.together(), to - w));
      x.multiply(rows + (w - from) * x.row_bytes(), x.row_bytes(), n, block, y);
      store_block(target, x, block, w, n, y);
    }
}

void multiply_group(const Target& target, const DenseInput& x, int64_t from, int64_t to) {
  // What one block alone reads need not stay for others: it is made a tile at a time.
  const int64_t step = target.packed && x.blocks.size() == 1 ? x.together() : to - from;
  for (int64_t w = from; w < to; w += step) {
    const int64_t end = std::min(w + step, to);
    multiply_rows(target, dense_rows(target, x, w, end), x, w, end);
  }
}

// The same in parts of the columns, so that neither long rows of weights nor many rows of x leave the second-level
// cache: of up to 1,024 rows a part is 1 MB.
void multiply_parts(const Target& target, const DenseInput& x, int64_t from, int64_t to) {
  const int64_t tasks = ceil_div(to - from, x.tile.weights), all = static_cast<int64_t>(x.blocks.size());
  const char* rows = dense_rows(target, x, from, to);
  for (int64_t first = 0; first < all; first += kPartBlocks) {
    const int64_t count = std::min(kPartBlocks, all - first);
    const void* blocks[kPartBlocks];
    int n_x[kPartBlocks];
    for (int64_t i = 0; i < count; ++i) {
      blocks[i] = x.blocks[static_cast<size_t>(first + i)].packed;
      n_x[i] = x.blocks[static_cast<size_t>(first + i)].count;
    }
    float* sums = scratch_floats(1, tasks * count * kDenseSums);
    for (int64_t part = 0; part < ceil_div(x.cols, kPartColumns); ++part)
      for (int64_t j = 0; j < tasks; ++j) {
        const int64_t w = from + j * x.tile.weights;
        x.tile.multiply_part(rows + (w - from) * x.row_bytes(), x.row_bytes(),
                             static_cast<int>(std::min<int64_t>(x.tile.weights, to - w)), blocks, n_x, count, x.cols,
                             part, sums + j * count * kDenseSums);
      }
    alignas(64) float y[kMostDenseSums];
    // All weights of a block of rows before the next block: rows of out lie pages apart.
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < tasks; ++j) {
        const int64_t w = from + j * x.tile.weights;
        const int n = static_cast<int>(std::min<int64_t>(x.tile.weights, to - w));
        const auto& block = x.blocks[static_cast<size_t>(first + i)];
        if (block.count == 1)
          x.multiply(rows + (w - from) * x.row_bytes(), x.row_bytes(), n, block, y);
        else
          x.tile.results(sums + (j * count + i) * kDenseSums, n, block.count, y);
        store_block(target, x, block, w, n, y);
      }
  }
}

// From how many rows on the copy of the weights is worth it: 2,560 columns and 64, 128, 512 rows took 0.68, 1.67, 4.0
// ms without and 0.85, 1.76, 3.6 ms with it, 9,728 columns 4.4, 7.4, 41.5 and 4.1, 6.6, 23.0 ms.
constexpr int64_t kPartRows = 128;
bool in_parts(const DenseTile& tile, int64_t m) { return tile.multiply_part && m >= kPartRows; }

// Weight rows of a task. Few rows of x: pieces of 512 KB, so that little of what is prefetched belongs to another
// thread (64 KB: 4 % slower). A batch: what half of a second-level cache holds (1 MB on the processors so far; 2 MB
// where there is AMX, which needs it more), but at least four tasks a thread.
int64_t group_rows(const DenseTile& tile, int64_t row_bytes, int64_t rows, int64_t m, int threads) {
  if (in_parts(tile, m)) {  // a megabyte of sums, a pass of x for at most 512 weight rows
    const int64_t fit = std::min((256 << 10) / std::min(m, kPartBlocks * tile.rows), rows / (4 * threads));
    return std::clamp<int64_t>(fit / tile.weights, 1, 16) * tile.weights;
  }
  const int64_t bytes = tile.pack && m > 8 ? 1 << 20 : 512 << 10;
  const int64_t fit = std::min(bytes / row_bytes, rows / (4 * threads));
  return std::max<int64_t>(1, fit / tile.weights) * tile.weights;
}

void multiply_all(const std::vector<Target>& targets, int64_t tasks, int64_t group, const DenseInput& x, int threads) {
  parallel_for(tasks, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      size_t j = targets.size() - 1;
      while (targets[j].first_task > task) --j;
      const int64_t from = (task - targets[j].first_task) * group;
      const int64_t to = std::min(from + group, targets[j].rows), m = static_cast<int64_t>(x.rows.size());
      in_parts(x.tile, m) ? multiply_parts(targets[j], x, from, to) : multiply_group(targets[j], x, from, to);
    }
  });
}

// Few rows of x meet weights in 12 bits between memory and their products, without a copy of them. Panels [from, to) of
// one group.
void multiply_panels(const Target& target, const DenseInput& x, int64_t from, int64_t to) {
  alignas(64) float y[kLosslessRows][kMostFew][kDensePanel];
  const uint16_t* rows[kMostFew];
  const int m = static_cast<int>(x.rows.size());
  for (int t = 0; t < m; ++t) rows[t] = static_cast<const uint16_t*>(x.rows[static_cast<size_t>(t)]);
  const LosslessGroup group = target.packed->group_of(from);
  for (int64_t panel = from; panel < to; ++panel) {
    float places[kMostFew][kLosslessRows];
    multiply_lossless(*target.packed, panel, rows, m, places);
    for (int r = 0; r < kLosslessRows; ++r)
      for (int t = 0; t < m; ++t) y[r][t][panel - from] = places[t][r];
  }
  for (int r = 0; r < kLosslessRows; ++r) {
    const int64_t row = group.row + (from - group.first) + r * group.apart;
    const int n = static_cast<int>(std::min(to - from, target.rows - row));
    if (n > 0) store_rows(y[r][0], m, target.bias, target.out, x.dtype, row, target.rows, n);
  }
}

// Panels of all targets, numbered through them.
void multiply_few(std::vector<Target> targets, const DenseInput& x, int threads) {
  int64_t panels = 0;
  for (auto& target : targets) {
    target.first_task = panels;
    panels += target.packed->panels();
  }
  parallel_for(panels, kLosslessApart, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin, next; i < end; i = next) {
      size_t j = targets.size() - 1;
      while (targets[j].first_task > i) --j;
      const int64_t from = i - targets[j].first_task;
      const LosslessGroup group = targets[j].packed->group_of(from);
      const int64_t to = std::min(group.first + group.apart, end - targets[j].first_task);
      multiply_panels(targets[j], x, from, to);
      next = targets[j].first_task + to;
    }
  });
}

Target target_of(Address bias, Address out, Address rows, Dtype dtype, int64_t m, const char* kernel) {
  if (m > 0) require_address(out, size_of(dtype), kernel, "out");
  const auto own = static_cast<int64_t>(rows);
  require(own > 0, std::string(kernel) + ": rows must be positive");
  return {nullptr, {}, reinterpret_cast<const void*>(bias), reinterpret_cast<char*>(out), own, 0};
}

void run(std::vector<Target> targets, Address x, int64_t m, int64_t cols, Dtype dtype, const char* kernel,
         int threads) {
  if (m == 0) return;
  require_address(x, size_of(dtype), kernel, "x");
  int64_t rows = 0, tasks = 0;
  for (const auto& target : targets) rows += target.rows;
  const int64_t row_bytes = cols * static_cast<int64_t>(size_of(dtype));
  const int used = std::max(1, threads_for(rows * row_bytes, rows * cols * m, threads));
  const int64_t group = group_rows(current_dense_tile(dtype), row_bytes, rows, m, used);
  for (auto& target : targets) {
    target.first_task = tasks;
    tasks += ceil_div(target.rows, group);
  }
  std::vector<const void*> from(static_cast<size_t>(m));
  for (int64_t r = 0; r < m; ++r) from[static_cast<size_t>(r)] = reinterpret_cast<const char*>(x) + r * row_bytes;
  const DenseInput in = dense_input(std::move(from), {0, m}, cols, dtype, 0, used);
  if (targets[0].packed && !in.tile.pack && m <= std::min<int64_t>(kMostFew, in.tile.rows))
    return multiply_few(std::move(targets), in, used);
  multiply_all(targets, tasks, group, in, used);
}

void check_sizes(size_t numbers, size_t each, int64_t m, int64_t cols, const char* kernel, const char* many) {
  require(numbers > 0 && numbers % each == 0, std::string(kernel) + ": targets must be " + many + " numbers each");
  require(m >= 0 && cols > 0, std::string(kernel) + ": m must not be negative, cols must be positive");
}

}  // namespace

// x [m, cols] -> out [m, rows] for each target. targets: four numbers each, the addresses of the weight [rows, cols],
// of bias (0: none) and out, and rows. x, weights, bias and out have the same element type and are dense.
void dense_linear(Address x, int64_t m, int64_t cols, int dtype, const std::vector<uint64_t>& targets, int threads) {
  const Dtype type = require_dtype(dtype, "dense_linear");
  check_sizes(targets.size(), 4, m, cols, "dense_linear", "four");
  std::vector<Target> all;
  for (size_t i = 0; i < targets.size(); i += 4) {
    require_address(targets[i], size_of(type), "dense_linear", "weight");
    all.push_back(target_of(targets[i + 1], targets[i + 2], targets[i + 3], type, m, "dense_linear"));
    all.back().weight = reinterpret_cast<const char*>(targets[i]);
  }
  run(std::move(all), x, m, cols, type, "dense_linear", threads);
}

// The same over weights in 12 bits, in bf16. targets: five numbers each, the addresses of data, index, bias (0: none)
// and out, and rows.
void lossless_linear(Address x, int64_t m, int64_t cols, const std::vector<uint64_t>& targets, int threads) {
  check_sizes(targets.size(), 5, m, cols, "lossless_linear", "five");
  std::vector<Target> all;
  for (size_t i = 0; i < targets.size(); i += 5) {
    all.push_back(target_of(targets[i + 2], targets[i + 3], targets[i + 4], Dtype::bf16, m, "lossless_linear"));
    all.back().packed = checked_lossless("lossless_linear", targets[i], targets[i + 1], all.back().rows, cols);
  }
  run(std::move(all), x, m, cols, Dtype::bf16, "lossless_linear", threads);
}

}  // namespace pio
