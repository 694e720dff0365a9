// Rows of dense weights times rows of activations, both as they lie in memory: the inner loop of dense_linear,
// dense_moe and head_linear.
//
// Lanes run along the columns, which is how both are stored; a product is one chain of multiply-adds per lane and the
// lanes are added at the end, always in the same order.
#ifdef PIO_ISA
#include "simd/elements.inc"
namespace pio::PIO_ISA {

// W weight rows (a multiple of 4) and T activation rows: out[t * 16 + i], i < W.
template <class E, int W, int T>
void multiply_dense(const void* const* weights, const void* const* rows, int64_t cols, float* out) {
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
    for (int i = 0; i < W; ++i) {
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

template <class E, int T>
void multiply_panel_rows(const void* const* w, int n_w, const void* const* x, int64_t cols, float* out) {
  // Few rows: as many weight rows at once as hide the latency of the dot products. One row on its own reads memory,
  // and eight streams are what the prefetchers follow.
  constexpr int kAtOnce = PIO_DENSE_ROWS > 1 && T <= 2 ? 8 : PIO_DENSE_WEIGHTS;
  int i = 0;
  for (; i + kAtOnce <= n_w; i += kAtOnce) multiply_dense<E, kAtOnce, T>(w + i, x, cols, out + i);
  for (; i < n_w; i += 4) {
    const void* four[4];
    for (int j = 0; j < 4; ++j) four[j] = w[i + j < n_w ? i + j : n_w - 1];
    multiply_dense<E, 4, T>(four, x, cols, out + i);
  }
}

template <class E>
void multiply_panel(const void* const* w, int n_w, const void* const* x, int n_x, int64_t cols, float* out) {
  switch (n_x) {
    case 1:
      return multiply_panel_rows<E, 1>(w, n_w, x, cols, out);
#if PIO_DENSE_ROWS > 1
    case 2:
      return multiply_panel_rows<E, 2>(w, n_w, x, cols, out);
    case 3:
      return multiply_panel_rows<E, 3>(w, n_w, x, cols, out);
    case 4:
      return multiply_panel_rows<E, 4>(w, n_w, x, cols, out);
    case 5:
      return multiply_panel_rows<E, 5>(w, n_w, x, cols, out);
    case 6:
      return multiply_panel_rows<E, 6>(w, n_w, x, cols, out);
#endif
  }
}

void multiply_dense_panel(const void* const* w, int n_w, const void* const* x, int n_x, int64_t cols, Dtype dtype,
                          float* out) {
  dtype == Dtype::f32 ? multiply_panel<Float32>(w, n_w, x, n_x, cols, out)
                      : multiply_panel<Bf16>(w, n_w, x, n_x, cols, out);
}

DenseTile dense_tile() { return {PIO_DENSE_ROWS, multiply_dense_panel}; }

}  // namespace pio::PIO_ISA
#else
#define PIO_FILE "src/dense_tile.cc"
#include "dense.h"  // before it: the first half needs it too

#include "foreach_isa.h"

namespace pio {

PIO_TABLE(dense_tile)

DenseTile current_dense_tile() { return PIO_CALL(dense_tile)(); }

}  // namespace pio
#endif
