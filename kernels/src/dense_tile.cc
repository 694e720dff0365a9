// Rows of dense weights times rows of activations, both as they lie in memory: the inner loop of dense_linear,
// dense_moe and head_linear.
//
// Lanes run along the columns, which is how both are stored; a product is one chain of multiply-adds per lane and the
// lanes are added at the end, always in the same order.
#ifdef PIO_ISA
#include "simd/ahead.inc"
#include "simd/elements.inc"
namespace pio::PIO_ISA {

// W weight rows (a multiple of 4), `stride` bytes apart, and T activation rows: out[t * 16 + i], i < W. A single
// activation row waits for memory: Sapphire Rapids, 9,728 x 2,560 in bf16, eight rows of weights, 19.6 GB/s without
// fetching ahead, 22.7 to 23.2 with 256 to 1,024 bytes, and 21.6 where the beginnings of the following rows are left
// out.
// next: bytes from the end of one of these weight rows to what its stream goes on with.
template <class E, int W, int T, class Ahead>
void multiply_dense(const void* const* weights, int64_t stride, const void* const* rows, int64_t cols, int64_t next,
                    float* out) {
  using Type = typename E::Type;
  const Type *w[W], *x[T];
  for (int i = 0; i < W; ++i) w[i] = static_cast<const Type*>(weights[i]);
  for (int t = 0; t < T; ++t) x[t] = static_cast<const Type*>(rows[t]);
  F32 acc[T][W];
  for (int t = 0; t < T; ++t)
    for (int i = 0; i < W; ++i) acc[t][i] = set(0.0f);
  int64_t k = 0;
  for (; k + E::kWide <= cols; k += E::kWide) {
    typename E::Lanes a[T];
    for (int t = 0; t < T; ++t) a[t] = E::load(x[t] + k);
    // At the end of the rows, the beginnings of those that follow.
    const int64_t place = k * static_cast<int64_t>(sizeof(Type)) + Ahead::kDenseBytes;
    const int64_t ahead = place < stride ? place : place + next;
    for (int i = 0; i < W; ++i) {
      if constexpr (Ahead::kFetches) Ahead::fetch(reinterpret_cast<const char*>(w[i]) + ahead);
      const auto b = E::load(w[i] + k);
      for (int t = 0; t < T; ++t) acc[t][i] = E::dot(acc[t][i], b, a[t]);
    }
  }
  if (k < cols) {
    const int n = static_cast<int>(cols - k);
    for (int t = 0; t < T; ++t) {
      const auto a = E::load_n(x[t] + k, n);
      for (int i = 0; i < W; ++i) acc[t][i] = E::dot(acc[t][i], E::load_n(w[i] + k, n), a);
    }
  }
  for (int t = 0; t < T; ++t)
    for (int i = 0; i < W; i += 4) store_sums4(out + t * kDensePanel + i, acc[t] + i);
}

template <class E, int T, class Ahead>
void multiply_panel_rows(const char* w, int64_t stride, int n_w, const void* const* x, int64_t cols, float* out) {
  // Few rows: as many weight rows at once as hide the latency of the dot products. One row on its own reads memory,
  // and eight streams are what the prefetchers follow.
  constexpr int kAtOnce = PIO_DENSE_ROWS > 1 && T <= 2 ? 8 : PIO_DENSE_WEIGHTS;
  const void* some[kAtOnce];
  int i = 0;
  for (; i + kAtOnce <= n_w; i += kAtOnce) {
    for (int j = 0; j < kAtOnce; ++j) some[j] = w + (i + j) * stride;
    multiply_dense<E, kAtOnce, T, Ahead>(some, stride, x, cols, (kAtOnce - 1) * stride, out + i);
  }
  for (; i < n_w; i += 4) {
    for (int j = 0; j < 4; ++j) some[j] = w + (i + j < n_w ? i + j : n_w - 1) * stride;
    multiply_dense<E, 4, T, Ahead>(some, stride, x, cols, 3 * stride, out + i);
  }
}

// T rows of x, weights from memory. Not the next rows side by side but every so many-th, so that each stream goes on
// through several rows: a new stream is slow until the prefetchers follow it.
template <class E, int T, class Ahead>
void multiply_streams(const char* w, int64_t stride, int n_w, const void* const* x, int64_t cols, float* out) {
  constexpr int kStreams = PIO_DENSE_ROWS > 1 && T <= 2 ? 8 : PIO_DENSE_WEIGHTS;
  const int apart = n_w / kDensePanel * kDensePanel / kStreams, rest = kStreams * apart;
  for (int i = 0; i < apart; ++i) {
    const void* some[kStreams];
    alignas(64) float y[T * kDensePanel];
    for (int j = 0; j < kStreams; ++j) some[j] = w + (j * apart + i) * stride;
    const int64_t next = i + 1 < apart ? 0 : (kStreams - 1) * apart * stride;
    multiply_dense<E, kStreams, T, Ahead>(some, stride, x, cols, next, y);
    for (int j = 0; j < kStreams; ++j) {
      const int row = j * apart + i;
      for (int t = 0; t < T; ++t)
        out[(row / kDensePanel * T + t) * kDensePanel + row % kDensePanel] = y[t * kDensePanel + j];
    }
  }
  if (rest < n_w) multiply_panel_rows<E, T, Ahead>(w + rest * stride, stride, n_w - rest, x, cols, out + rest * T);
}

// More weight rows than a panel come from memory, see DenseTile::few.
template <class E, int T>
void multiply_some(const char* w, int64_t stride, int n_w, const void* const* x, int64_t cols, float* out) {
  n_w > kDensePanel ? multiply_streams<E, T, Far>(w, stride, n_w, x, cols, out)
                    : multiply_panel_rows<E, T, Cached>(w, stride, n_w, x, cols, out);
}

template <class E>
void multiply_panel(const char* w, int64_t stride, int n_w, const void* const* x, int n_x, int64_t cols, float* out) {
  switch (n_x) {
    case 1:
      return few_ways() ? multiply_streams<E, 1, Far>(w, stride, n_w, x, cols, out)
                        : multiply_panel_rows<E, 1, Near>(w, stride, n_w, x, cols, out);
#if PIO_DENSE_ROWS > 1
    case 2:
      return multiply_some<E, 2>(w, stride, n_w, x, cols, out);
    case 3:
      return multiply_some<E, 3>(w, stride, n_w, x, cols, out);
    case 4:
      return multiply_some<E, 4>(w, stride, n_w, x, cols, out);
    case 5:
      return multiply_some<E, 5>(w, stride, n_w, x, cols, out);
    case 6:
      return multiply_some<E, 6>(w, stride, n_w, x, cols, out);
#endif
  }
}

void multiply_dense_panel(const void* w, int64_t stride, int n_w, const void* const* x, int n_x, int64_t cols,
                          Dtype dtype, float* out) {
  const char* from = static_cast<const char*>(w);
  dtype == Dtype::f32 ? multiply_panel<Float32>(from, stride, n_w, x, n_x, cols, out)
                      : multiply_panel<Bf16>(from, stride, n_w, x, n_x, cols, out);
}

DenseTile dense_tile() {
  const bool far = few_ways();
  const int alone = far ? Far::kDenseTogether : Near::kDenseTogether, few = far ? PIO_DENSE_ROWS : 1;
  return {kDensePanel, PIO_DENSE_ROWS, alone, few, multiply_dense_panel, nullptr, nullptr, nullptr, nullptr};
}

}  // namespace pio::PIO_ISA
#else
#define PIO_FILE "src/dense_tile.cc"
#include "caches.h"  // before it: the first half needs both too
#include "dense.h"

#include "foreach_isa.h"
#include "quant.h"

namespace pio {

PIO_TABLE(dense_tile)

DenseTile current_dense_tile(Dtype dtype) {
  return dtype == Dtype::bf16 && amx_in_use() ? amx_dense_tile() : PIO_CALL(dense_tile)();
}

namespace {

void pack_blocks(DenseInput& in, int slot, int threads) {
  std::vector<int64_t> at = {0};
  for (const auto& block : in.blocks) at.push_back(at.back() + in.tile.block_bytes(block.count, in.cols));
  char* memory = reinterpret_cast<char*>(scratch_floats(slot, at.back() / 4));
  const int64_t count = static_cast<int64_t>(in.blocks.size());
  parallel_for(count, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      auto& block = in.blocks[static_cast<size_t>(i)];
      in.tile.pack(in.rows.data() + block.first, block.count, in.cols, memory + at[static_cast<size_t>(i)]);
      block.packed = memory + at[static_cast<size_t>(i)];
    }
  });
}

}  // namespace

DenseInput dense_input(std::vector<const void*> rows, const std::vector<int64_t>& groups, int64_t cols, Dtype dtype,
                       int slot, int threads) {
  DenseInput in{current_dense_tile(dtype), dtype, cols, std::move(rows), {}, {}};
  for (size_t g = 0; g + 1 < groups.size(); ++g) {
    in.first_block.push_back(static_cast<int64_t>(in.blocks.size()));
    for (int64_t r = groups[g]; r < groups[g + 1]; r += in.tile.rows)
      in.blocks.push_back({r, static_cast<int>(std::min<int64_t>(in.tile.rows, groups[g + 1] - r)), nullptr});
  }
  in.first_block.push_back(static_cast<int64_t>(in.blocks.size()));
  if (in.tile.pack) pack_blocks(in, slot, threads);
  return in;
}

}  // namespace pio
#endif
