// y = x W^T (+ bias) for packed int4 and int8 weights; several weights may read one x.
#ifdef PIO_ISA
namespace pio::PIO_ISA {

// out[t][0 .. n) = y[t] + bias, where y[t] are `count` rows of 16 and out rows are `stride` elements apart.
template <class T>
PIO_INLINE void store_rows_of(const float* y, int count, const T* bias, T* out, int64_t stride, int n) {
  const F32 b = !bias ? set(0.0f) : n == 16 ? load_as(bias) : load_as_n(bias, n);
  for (int t = 0; t < count; ++t) {
    const F32 v = add(load(y + t * 16), b);
    n == 16 ? store_as(out + t * stride, v) : store_as_n(out + t * stride, v, n);
  }
}

// first: the element of out and of bias to start with.
void store_rows(const float* y, int count, const void* bias, void* out, Dtype dtype, int64_t first, int64_t stride,
                int n) {
  if (dtype == Dtype::f32) {
    const auto* b = static_cast<const float*>(bias);
    return store_rows_of(y, count, b ? b + first % stride : b, static_cast<float*>(out) + first, stride, n);
  }
  const auto* b = static_cast<const uint16_t*>(bias);
  store_rows_of(y, count, b ? b + first % stride : b, static_cast<uint16_t*>(out) + first, stride, n);
}

}  // namespace pio::PIO_ISA
#else
#define PIO_FILE "src/linear.cc"
#include "dense.h"  // before it: the first half needs both too
#include "quant.h"

#include "foreach_isa.h"
#include "wide_linear.h"

namespace pio {

PIO_TABLE(store_rows)

void store_rows(const float* y, int count, const void* bias, void* out, Dtype dtype, int64_t first, int64_t stride,
                int n) {
  PIO_CALL(store_rows)(y, count, bias, out, dtype, first, stride, n);
}

namespace {

struct Target {
  Packed weight;
  const void* bias;
  void* out;
  int64_t first_task;  // tasks are groups of panels (of few rows, panels), numbered through all targets
};

// Rows [begin, end) of the activations times `n_panels` panels from `panel` on.
void multiply_block(const Target& target, const Tile& tile, const Activations& a, Dtype dtype, int64_t panel,
                    int n_panels, int64_t begin, int64_t end) {
  alignas(64) float y[kMostTileSums];
  int64_t panels[kMostAlone], rows[kMaxTileRows];
  for (int p = 0; p < n_panels; ++p) panels[p] = panel + p;
  for (int64_t r = begin; r < end; r += tile.rows) {
    const int count = static_cast<int>(std::min<int64_t>(tile.rows, end - r));
    for (int t = 0; t < count; ++t) rows[t] = r + t;
    tile.multiply(target.weight, panels, n_panels, a, rows, count, y);
    for (int p = 0; p < n_panels; ++p) {
      const int64_t from = panels[p] * kLanes;
      const int n = static_cast<int>(std::min<int64_t>(kLanes, target.weight.rows - from));
      PIO_CALL(store_rows)(y + p * count * kLanes, count, target.bias, target.out, dtype, r * target.weight.rows + from,
                           target.weight.rows, n);
    }
  }
}

// Activation rows that stay in a core's L2 (512 KB of 1 MB or more) while the weights pass by.
int64_t rows_per_block(int64_t stride, int tile_rows) {
  const int64_t fit = std::clamp<int64_t>((512 << 10) / stride, 48, 384);
  return fit / tile_rows * tile_rows;
}

int64_t panels_of_task(const Tile& tile, int64_t m) { return m <= tile.few ? 1 : tile.panels; }

void multiply_all(const std::vector<Target>& targets, int64_t tasks, const Activations& a, int64_t m, Dtype dtype,
                  int threads) {
  const Tile tile = current_tile(targets[0].weight.group);
  const int64_t block = rows_per_block(a.stride(), tile.rows), blocks = ceil_div(m, block);
  // A piece of work: about 64 KB of weights at few rows, so that handing out costs less than 1 %, but as many panels as
  // meet it at a time; and a single group of panels in a batch.
  const int64_t each = panels_of_task(tile, m),
                together = m <= tile.few ? tile.alone : 1;  // panels of a task, tasks at once
  const int64_t task_bytes = targets[0].weight.panel_bytes() * each;
  const int64_t grain =
      m > 8 ? 1 : std::max<int64_t>(std::min((64 << 10) / task_bytes, tasks / (4 * threads)) / together, 1) * together;
  parallel_for(tasks * blocks, grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin, taken; i < end; i += taken) {
      const int64_t task = i % tasks, first = i / tasks * block;
      size_t j = targets.size() - 1;
      while (targets[j].first_task > task) --j;
      const int64_t panel = (task - targets[j].first_task) * each;
      taken = std::min(together, end - i);
      const int n = static_cast<int>(std::min(taken * each, targets[j].weight.panels() - panel));
      taken = ceil_div(n, each);
      multiply_block(targets[j], tile, a, dtype, panel, n, first, std::min(first + block, m));
    }
  });
}

}  // namespace

// x [m, cols] -> out [m, rows] for each target. targets: five numbers each, the addresses of data, scales, bias (0:
// none) and out, and rows. All weights have the same bits and group; x, bias and out the same element type.
void linear(Address x, int64_t m, int64_t cols, int dtype, int bits, int group, const std::vector<uint64_t>& targets,
            int threads) {
  const Dtype type = require_dtype(dtype, "linear");
  require(!targets.empty() && targets.size() % 5 == 0, "linear: targets must be five numbers each");
  require(m >= 0, "linear: m must not be negative");
  const Tile tile = current_tile(group);
  std::vector<Target> all;
  int64_t tasks = 0, bytes = 0;
  for (size_t i = 0; i < targets.size(); i += 5) {
    const Packed w =
        checked_packed("linear", targets[i], targets[i + 1], static_cast<int64_t>(targets[i + 4]), cols, bits, group);
    if (m > 0) require_address(targets[i + 3], size_of(type), "linear", "out");
    all.push_back({w, reinterpret_cast<const void*>(targets[i + 2]), reinterpret_cast<void*>(targets[i + 3]), tasks});
    tasks += ceil_div(w.panels(), panels_of_task(tile, m));
    bytes += w.panels() * w.panel_bytes();
  }
  if (m == 0) return;
  require_address(x, size_of(type), "linear", "x");
  const int used = threads_for(bytes, bytes * 8 / bits * m, threads);
  if (wide_in_use(type, m, bits)) {
    std::vector<WideTarget> wide;
    for (const Target& target : all) wide.push_back({target.weight, target.bias, target.out});
    return wide_linear(reinterpret_cast<const uint16_t*>(x), m, cols, wide, std::max(1, used));
  }
  const Activations a = scratch_activations(0, m, cols, group);
  quantize_rows(reinterpret_cast<const void*>(x), type, cols, 0, m, a, used);
  multiply_all(all, tasks, a, m, type, used);
}

}  // namespace pio
#endif
