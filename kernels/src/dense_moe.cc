// A whole mixture-of-experts layer in one call, for experts as torch stores them: y[t] = sum over the token's experts e
// of weight * down_e(silu(gate_e x) * up_e x). Rounds to the element type where transformers does before the down
// projection; the experts' outputs are added up in float32 and rounded once. Experts in 12 bits (lossless.h) give the
// same bits.
#ifdef PIO_ISA
#include "simd/kept.inc"
namespace pio::PIO_ISA {

template <class T>
PIO_INLINE void swiglu_kept_of(const float* gate, const float* up, int count, T* out, int64_t stride, int n) {
  for (int t = 0; t < count; ++t) {
    const F32 g = kept(out, silu(kept(out, load(gate + t * 16))));
    store_as_n(out + t * stride, mul(g, kept(out, load(up + t * 16))), n);
  }
}

// out[t * stride ..][0 .. n) = silu(gate[t]) * up[t], from element `first` of out on.
void swiglu_kept(const float* gate, const float* up, int count, void* out, Dtype dtype, int64_t first, int64_t stride,
                 int n) {
  dtype == Dtype::f32 ? swiglu_kept_of(gate, up, count, static_cast<float*>(out) + first, stride, n)
                      : swiglu_kept_of(gate, up, count, static_cast<uint16_t*>(out) + first, stride, n);
}

}  // namespace pio::PIO_ISA
#else
#include "check.h"
#define PIO_FILE "src/dense_moe.cc"
#include "dense.h"
#include "entries.h"
#include "foreach_isa.h"
#include "lossless.h"
#include "quant.h"
#include "routing.h"

namespace pio {

PIO_TABLE(swiglu_kept)

namespace {

// The weights of one projection of all experts, [experts, rows, cols].
struct Stack {
  const char* dense;  // or
  Lossless packed;    // the first expert's, in 12 bits
  int64_t rows, row_bytes;

  // Rows [from, from + n) of an expert as the tiles read them: where they lie, or made in the calling thread's memory.
  const char* take(int64_t expert, int64_t from, int n, int slot) const {
    if (dense) return dense + (expert * rows + from) * row_bytes;
    float* made = scratch_floats(slot, ceil_div(n * row_bytes, 4));
    expand_rows(packed.of(expert), from, from + n, reinterpret_cast<uint16_t*>(made));
    return reinterpret_cast<const char*>(made);
  }
};

struct DenseExperts {
  Stack gate_up, down;  // [experts, 2 * inner, hidden], [experts, hidden, inner]
  int64_t hidden, inner, size;
};

// middle[pair][from ..] of the pairs of one expert.
void gate_and_up(const DenseExperts& w, const Routing& routing, size_t active, int64_t from, const DenseInput& x,
                 void* middle) {
  alignas(64) float gate[kMostDenseSums], up[kMostDenseSums];
  const int64_t expert = routing.experts[active];
  const int n = static_cast<int>(std::min<int64_t>(x.tile.weights, w.inner - from));
  const char *gates = w.gate_up.take(expert, from, n, 4), *ups = w.gate_up.take(expert, w.inner + from, n, 5);
  for (int64_t b = x.first_block[active]; b < x.first_block[active + 1]; ++b) {
    const auto& block = x.blocks[static_cast<size_t>(b)];
    x.multiply(gates, x.row_bytes(), n, block, gate);
    x.multiply(ups, x.row_bytes(), n, block, up);
    for (int p = 0; p < n; p += kDensePanel)
      PIO_CALL(swiglu_kept)(gate + p * block.count, up + p * block.count, block.count, middle, x.dtype,
                            block.first * w.inner + from + p, w.inner, std::min(kDensePanel, n - p));
  }
}

// All experts' contributions to `n` columns of the output, added up in float32.
void down_and_add(const DenseExperts& w, const Routing& routing, int64_t from, int n, const DenseInput& middle,
                  float* sum) {
  alignas(64) float y[kMostDenseSums];
  for (size_t active = 0; active < routing.experts.size(); ++active) {
    const char* rows = w.down.take(routing.experts[active], from, n, 4);
    for (int64_t b = middle.first_block[active]; b < middle.first_block[active + 1]; ++b) {
      const auto& block = middle.blocks[static_cast<size_t>(b)];
      middle.multiply(rows, middle.row_bytes(), n, block, y);
      for (int p = 0; p < n; p += kDensePanel)
        add_weighted(y + p * block.count, block.count, routing.token.data() + block.first,
                     routing.weight.data() + block.first, sum + p, middle.tile.weights);
    }
  }
}

void run(const DenseExperts& w, const Routing& routing, const char* x, int64_t tokens, Dtype type, void* out,
         int threads) {
  const int64_t pairs = routing.pairs(), active = static_cast<int64_t>(routing.experts.size());
  std::vector<const void*> rows;
  for (const int64_t token : routing.token) rows.push_back(x + token * w.hidden * w.size);
  const DenseInput in = dense_input(std::move(rows), routing.first, w.hidden, type, 0, threads);
  char* middle = reinterpret_cast<char*>(scratch_floats(2, ceil_div(pairs * w.inner * w.size, 4)));
  const int64_t width = in.tile.weights, pieces = ceil_div(w.inner, width);
  parallel_for(active * pieces, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      gate_and_up(w, routing, static_cast<size_t>(i / pieces), i % pieces * width, in, middle);
  });

  rows.clear();
  for (int64_t i = 0; i < pairs; ++i) rows.push_back(middle + i * w.inner * w.size);
  const DenseInput act = dense_input(std::move(rows), routing.first, w.inner, type, 0, threads);
  parallel_for(ceil_div(w.hidden, width), 1, threads, [&](int64_t begin, int64_t end) {
    float* sum = scratch_floats(1, tokens * width);
    for (int64_t from = begin * width; from < std::min(end * width, w.hidden); from += width) {
      const int n = static_cast<int>(std::min(width, w.hidden - from));
      std::memset(sum, 0, static_cast<size_t>(tokens * width) * sizeof(float));
      down_and_add(w, routing, from, n, act, sum);
      for (int p = 0; p < n; p += kDensePanel)
        store_sums(sum + p, width, tokens, out, type, from + p, w.hidden, std::min(kDensePanel, n - p));
    }
  });
}

void check_and_run(const DenseExperts& w, const char* kernel, Address x, int64_t tokens, Dtype type, Address experts,
                   Address weights, int64_t k, int64_t n_experts, Address out, int threads) {
  if (tokens == 0) return;
  require_address(x, size_of(type), kernel, "x");
  require_address(out, size_of(type), kernel, "out");
  require_address(experts, 8, kernel, "experts");
  require_address(weights, 4, kernel, "weights");
  const Routing routing = sort_by_expert(kernel, reinterpret_cast<const int64_t*>(experts),
                                         reinterpret_cast<const float*>(weights), tokens, k, n_experts);
  const int64_t values = 3 * w.hidden * w.inner;
  const int64_t bytes = static_cast<int64_t>(routing.experts.size()) * values * w.size;
  run(w, routing, reinterpret_cast<const char*>(x), tokens, type, reinterpret_cast<void*>(out),
      std::max(1, threads_for(bytes, values * tokens * k, threads)));
}

void check_counts(const char* kernel, int64_t tokens, int64_t hidden, int64_t inner, int64_t k, int64_t n_experts) {
  require(tokens >= 0 && hidden > 0 && inner > 0 && k > 0 && n_experts > 0,
          std::string(kernel) + ": tokens must not be negative, hidden, inner, k and n_experts must be positive");
}

}  // namespace

// x [tokens, hidden] -> out [tokens, hidden]. experts [tokens, k] int64 and weights [tokens, k] float32 say where each
// token goes. gate_up [n_experts, 2 * inner, hidden]: the rows of gate, then those of up; down [n_experts, hidden,
// inner]; both of x's element type.
void dense_moe(Address x, int64_t tokens, int64_t hidden, int64_t inner, int dtype, Address experts, Address weights,
               int64_t k, int64_t n_experts, Address gate_up, Address down, Address out, int threads) {
  const Dtype type = require_dtype(dtype, "dense_moe");
  check_counts("dense_moe", tokens, hidden, inner, k, n_experts);
  require_address(gate_up, size_of(type), "dense_moe", "gate_up");
  require_address(down, size_of(type), "dense_moe", "down");
  const auto size = static_cast<int64_t>(size_of(type));
  const DenseExperts w{{reinterpret_cast<const char*>(gate_up), {}, 2 * inner, hidden * size},
                       {reinterpret_cast<const char*>(down), {}, hidden, inner * size},
                       hidden,
                       inner,
                       size};
  check_and_run(w, "dense_moe", x, tokens, type, experts, weights, k, n_experts, out, threads);
}

// The same in bf16 over experts in 12 bits, each packed as a whole, one behind the other.
void lossless_moe(Address x, int64_t tokens, int64_t hidden, int64_t inner, Address experts, Address weights, int64_t k,
                  int64_t n_experts, Address gate_up_data, Address gate_up_index, Address down_data, Address down_index,
                  Address out, int threads) {
  check_counts("lossless_moe", tokens, hidden, inner, k, n_experts);
  const DenseExperts w{
      {nullptr, checked_lossless("lossless_moe", gate_up_data, gate_up_index, 2 * inner, hidden), 2 * inner,
       hidden * 2},
      {nullptr, checked_lossless("lossless_moe", down_data, down_index, hidden, inner), hidden, inner * 2},
      hidden,
      inner,
      2};
  check_and_run(w, "lossless_moe", x, tokens, Dtype::bf16, experts, weights, k, n_experts, out, threads);
}

}  // namespace pio
#endif
