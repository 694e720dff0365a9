// A weight of its own for each head: out[h] = x[h] W[h]^T, or x[h] W[h]. The two products of absorbed MLA, with the
// halves of kv_b_proj as they lie in its weight.
#ifdef PIO_ISA
#include "simd/elements.inc"
namespace pio::PIO_ISA {

// out[r][0 .. V vectors) = x[r] W of R rows of x [R, rows] as float32: lanes along the columns of W, one chain of
// multiply-adds over its rows. n: elements of the one vector where V = 1.
template <class E, int R, int V>
PIO_INLINE void multiply_columns(const float* x, int64_t rows, const typename E::Type* w, int64_t stride, int n,
                                 typename E::Type* const* out) {
  constexpr int kParts = E::kPerLane;
  F32 acc[R][V * kParts];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < V * kParts; ++i) acc[r][i] = set(0.0f);
  for (int64_t k = 0; k < rows; ++k) {
    F32 v[V * kParts];
    const typename E::Type* row = w + k * stride;
    for (int i = 0; i < V; ++i)
      E::widen(V > 1 || n == E::kWide ? E::load(row + i * E::kWide) : E::load_n(row, n), v + i * kParts);
    for (int r = 0; r < R; ++r) {
      const F32 factor = set(x[r * rows + k]);
      for (int i = 0; i < V * kParts; ++i) acc[r][i] = fma(v[i], factor, acc[r][i]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < V; ++i) E::store_n(out[r] + i * E::kWide, acc[r] + i * kParts, V > 1 ? E::kWide : n);
}

constexpr int kMostVectors = 4;

template <class E, int R>
void multiply_columns_rows(const float* x, int64_t rows, const typename E::Type* w, int64_t stride, int64_t cols,
                           typename E::Type* const* out) {
  constexpr int kFit = PIO_SUMS / (R * E::kPerLane), kVectors = kFit < 1              ? 1
                                                                : kFit > kMostVectors ? kMostVectors
                                                                                      : kFit;
  typename E::Type* to[R];
  int64_t c = 0;
  for (; c + kVectors * E::kWide <= cols; c += kVectors * E::kWide) {
    for (int r = 0; r < R; ++r) to[r] = out[r] + c;
    multiply_columns<E, R, kVectors>(x, rows, w + c, stride, E::kWide, to);
  }
  for (; c < cols; c += E::kWide) {
    for (int r = 0; r < R; ++r) to[r] = out[r] + c;
    multiply_columns<E, R, 1>(x, rows, w + c, stride, static_cast<int>(cols - c < E::kWide ? cols - c : E::kWide), to);
  }
}

template <class E>
void multiply_transposed_of(const void* const* x, int n_x, int64_t rows, const void* w, int64_t stride, int64_t cols,
                            void* const* out, float* memory) {
  using Type = typename E::Type;
  for (int r = 0; r < n_x; ++r) {
    const Type* from = static_cast<const Type*>(x[r]);
    for (int64_t k = 0; k < rows; k += 16) {
      const int n = static_cast<int>(rows - k < 16 ? rows - k : 16);
      store_n(memory + r * rows + k, load_as_n(from + k, n), n);
    }
  }
  const Type* weight = static_cast<const Type*>(w);
  Type* to[kHeadRows];
  for (int r = 0; r < n_x; ++r) to[r] = static_cast<Type*>(out[r]);
  int r = 0;
#if PIO_SUMS >= 16
  for (; r + 4 <= n_x; r += 4) multiply_columns_rows<E, 4>(memory + r * rows, rows, weight, stride, cols, to + r);
#endif
  for (; r < n_x; ++r) multiply_columns_rows<E, 1>(memory + r * rows, rows, weight, stride, cols, to + r);
}

// out[r][0 .. cols) = x[r] W for n_x <= kHeadRows rows of x; memory: n_x * rows floats.
void multiply_transposed(const void* const* x, int n_x, int64_t rows, const void* w, int64_t stride, int64_t cols,
                         void* const* out, Dtype dtype, float* memory) {
  dtype == Dtype::f32 ? multiply_transposed_of<Float32>(x, n_x, rows, w, stride, cols, out, memory)
                      : multiply_transposed_of<Bf16>(x, n_x, rows, w, stride, cols, out, memory);
}

}  // namespace pio::PIO_ISA
#else
#include <cstdint>

namespace pio {
constexpr int kHeadRows = 32;  // rows of x that pass a piece of the weight together
}
#include "dense.h"
#include "entries.h"
#include "heads.h"
#include "quant.h"
#define PIO_FILE "src/head_linear.cc"
#include "foreach_isa.h"

namespace pio {

PIO_TABLE(multiply_transposed)

namespace {

struct HeadLinear : HeadRows {
  const char* weight;
  int64_t w_head, w_row;  // bytes
  int64_t rows, cols;
  bool transposed;
};

// out[h][i][from ..] = x[h][i] . W[h][from ..] of all rows of x.
void multiply_rows(const HeadLinear& a, const DenseInput& x, int64_t head, int64_t from) {
  alignas(64) float y[kMostDenseSums];
  const int n = static_cast<int>(std::min<int64_t>(x.tile.weights, a.rows - from));
  for (int64_t b = x.first_block[static_cast<size_t>(head)]; b < x.first_block[static_cast<size_t>(head + 1)]; ++b) {
    const auto& block = x.blocks[static_cast<size_t>(b)];
    x.multiply(a.weight + head * a.w_head + from * a.w_row, a.w_row, n, block, y);
    for (int t = 0; t < block.count; ++t)
      for (int p = 0; p < n; p += kDensePanel)
        store_rows(y + (p * block.count + t * kDensePanel), 1, nullptr,
                   a.out_row(head, block.first - head * a.count() + t), a.dtype, from + p, a.rows,
                   std::min(kDensePanel, n - p));
  }
}

void run_rows(const HeadLinear& a, int threads) {
  std::vector<const void*> rows;
  std::vector<int64_t> groups;
  for (int64_t h = 0; h < a.heads; ++h) {
    groups.push_back(static_cast<int64_t>(rows.size()));
    for (int64_t i = 0; i < a.count(); ++i) rows.push_back(a.x_row(h, i));
  }
  groups.push_back(static_cast<int64_t>(rows.size()));
  const DenseInput x = dense_input(std::move(rows), groups, a.cols, a.dtype, 0, threads);
  const int64_t pieces = ceil_div(a.rows, x.tile.weights);
  parallel_for(a.heads * pieces, 2, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) multiply_rows(a, x, i / pieces, i % pieces * x.tile.weights);
  });
}

// Pieces: heads by 128 columns by blocks of rows of x.
void run_transposed(const HeadLinear& a, int threads) {
  constexpr int64_t kColumns = 128;
  const int64_t pieces = ceil_div(a.cols, kColumns), blocks = ceil_div(a.count(), kHeadRows);
  const int64_t size = static_cast<int64_t>(size_of(a.dtype));
  parallel_for(a.heads * pieces * blocks, 1, threads, [&](int64_t begin, int64_t end) {
    float* memory = scratch_floats(1, kHeadRows * a.rows);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / (pieces * blocks), c = i / blocks % pieces * kColumns, first = i % blocks * kHeadRows;
      const int n = static_cast<int>(std::min<int64_t>(kHeadRows, a.count() - first));
      const void* x[kHeadRows];
      void* out[kHeadRows];
      for (int r = 0; r < n; ++r) {
        x[r] = a.x_row(head, first + r);
        out[r] = a.out_row(head, first + r) + c * size;
      }
      PIO_CALL(multiply_transposed)(x, n, a.rows, a.weight + head * a.w_head + c * size, a.w_row / size,
                                    std::min(kColumns, a.cols - c), out, a.dtype, memory);
    }
  });
}

}  // namespace

// out[b, h, t] = x[b, h, t] W[h]^T (x of `cols`, out of `rows` values), or transposed: x[b, h, t] W[h] (x of `rows`,
// out of `cols`). x, out: {address, batch, head, token strides}; weight: {address, head, row strides, rows, cols};
// strides in elements, the values of a row are dense. All of one element type, accumulated in float32.
void head_linear(const std::vector<int64_t>& x, const std::vector<int64_t>& weight, const std::vector<int64_t>& out,
                 int64_t batch, int64_t heads, int64_t tokens, bool transposed, int dtype, int threads) {
  const Dtype type = require_dtype(dtype, "head_linear");
  require(weight.size() == 5, "head_linear: a weight is described by 5 numbers");
  require(weight[3] > 0 && weight[4] > 0, "head_linear: rows and cols must be positive");
  const HeadRows shared = head_rows("head_linear", x, out, batch, heads, tokens, type);
  if (shared.count() == 0) return;
  require_address(static_cast<Address>(weight[0]), size_of(type), "head_linear", "weight");
  const int64_t size = static_cast<int64_t>(size_of(type));
  const HeadLinear a{
      shared,    reinterpret_cast<const char*>(weight[0]), weight[1] * size, weight[2] * size, weight[3], weight[4],
      transposed};
  const int64_t values = heads * a.rows * a.cols;
  const int used = std::max(1, threads_for(values * size, values * a.count(), threads));
  transposed ? run_transposed(a, used) : run_rows(a, used);
}

}  // namespace pio
#endif
