// Weights of 12 bits (lossless.h) as bf16 again: into memory, for products of several rows, or in registers between
// memory and the product of a single row, which waits for memory and reads a quarter less of it.
#ifdef PIO_ISA
#include "simd/ahead.inc"
#include "simd/elements.inc"
namespace pio::PIO_ISA {

// The two bytes of a value but for sign and mantissa, by the code of its exponent; in every quarter of a register.
struct Exponents {
  Bytes high, low;
};

PIO_INLINE Exponents exponents_of(const uint8_t* marks) {
  uint8_t high[kLosslessExponents], low[kLosslessExponents];
  for (int i = 0; i < kLosslessExponents; ++i) {
    high[i] = marks[i] >> 1;
    low[i] = static_cast<uint8_t>(marks[i] << 7);
  }
  return {repeat_quarter(high), repeat_quarter(low)};
}

// 128 columns of a row.
PIO_INLINE void widen_block(const uint8_t* block, const Exponents& e, Pairs* out) {
  const Bytes codes = load_bytes(block);
  join_exponents(load_bytes(block + 64), low_nibbles(codes), e.high, e.low, out);
  join_exponents(load_bytes(block + 128), high_nibbles(codes), e.high, e.low, out + 2);
}

void expand_lossless_rows(const Lossless& w, int64_t from, int64_t to, uint16_t* out) {
  for (int64_t r = from; r < to; ++r, out += w.cols) {
    const LosslessGroup group = w.group_of(r / kLosslessRows);
    const int64_t panel = group.first + (r - group.row) % group.apart, place = (r - group.row) / group.apart;
    const Exponents e = exponents_of(w.marks(panel));
    const LosslessExtra* extra = w.extras(panel);
    for (int64_t b = 0; b < w.blocks(); ++b) {
      Pairs wide[4];
      widen_block(w.row(r) + b * kLosslessBlockBytes, e, wide);
      uint16_t* here = out + b * kLosslessBlock;
      const int64_t left = w.cols - b * kLosslessBlock;
      for (int i = 0; i < 4; ++i)
        if (left > 32 * i)
          store_pairs_n(here + 32 * i, wide[i], left - 32 * i < 32 ? static_cast<int>(left - 32 * i) : 32);
      for (int n = w.within(extra, w.extras_in(panel, b)); n > 0; --n, ++extra)
        if (extra->row == place && extra->column < left) here[extra->column] = extra->value;
    }
  }
}

// One block of R rows, with the values that have exponents of their own, times x: only rows that have some go through
// memory. Apart: one block in a dozen of normal weights.
template <int R>
PIO_APART void multiply_patched(const uint8_t* block, int64_t stride, const Exponents& e, const LosslessExtra* extra,
                                int count, int first, const Pairs* x, int n, F32* acc) {
  for (int r = 0; r < R; ++r) {
    Pairs wide[4];
    widen_block(block + r * stride, e, wide);
    bool own = false;
    for (int i = 0; i < count; ++i) own = own || extra[i].row == first + r;
    if (own) {
      alignas(64) uint16_t values[kLosslessBlock];
      for (int i = 0; i < 4; ++i) store_pairs_n(values + 32 * i, wide[i], 32);
      for (int i = 0; i < count; ++i)
        if (extra[i].row == first + r) values[extra[i].column % kLosslessBlock] = extra[i].value;
      for (int i = 0; i < 4; ++i) wide[i] = load_pairs(values + 32 * i);
    }
    for (int i = 0; i < n; ++i) acc[r] = dot_pairs(acc[r], wide[i], x[i]);
  }
}

// R rows of a panel from place `first` on. x is read as far as there are columns; beyond, both factors are zeros.
template <int R, class Ahead>
void multiply_places(const Lossless& w, int64_t panel, int first, const uint16_t* x, float* out) {
  const LosslessGroup group = w.group_of(panel);
  const int64_t stride = group.apart * w.row_bytes();
  const uint8_t* rows = w.row(group.row + panel - group.first + first * group.apart);
  // Bytes until a stream ends, and from there to what it goes on with.
  const int64_t left_in_stream = (group.first + group.apart - panel) * w.row_bytes(), next = (R - 1) * stride;
  const Exponents e = exponents_of(w.marks(panel));
  const LosslessExtra* extra = w.extras(panel);
  F32 acc[R];
  for (int r = 0; r < R; ++r) acc[r] = set(0.0f);
  for (int64_t b = 0; b < w.blocks(); ++b, rows += kLosslessBlockBytes) {
    const uint16_t* here = x + b * kLosslessBlock;
    const int64_t left = w.cols - b * kLosslessBlock;
    const int n = left >= kLosslessBlock ? 4 : static_cast<int>((left + 31) / 32);
    Pairs wanted[4];
    for (int i = 0; i < 4; ++i)
      wanted[i] = left >= 32 * (i + 1)
                      ? load_pairs(here + 32 * i)
                      : load_pairs_n(here + 32 * i, left > 32 * i ? static_cast<int>(left - 32 * i) : 0);
    const int64_t place = b * kLosslessBlockBytes + Ahead::kLosslessBytes;
    const int64_t ahead = Ahead::kLosslessBytes + (place < left_in_stream ? 0 : next);
    const int count = w.extras_in(panel, b);
    if (count || n < 4) {
      const int own = w.within(extra, count);
      multiply_patched<R>(rows, stride, e, extra, own, first, wanted, n, acc);
      extra += own;
      continue;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const uint8_t* block = rows + r * stride;
      for (int i = 0; i < kLosslessBlockBytes; i += 64) Ahead::fetch(block + ahead + i);
      Pairs wide[4];
      widen_block(block, e, wide);
      for (int i = 0; i < 4; ++i) acc[r] = dot_pairs(acc[r], wide[i], wanted[i]);
    }
  }
  for (int r = 0; r < R; r += 4) store_sums4(out + r, acc + r);
}

template <class Ahead>
void multiply_panel_of(const Lossless& w, int64_t panel, const uint16_t* x, float* out) {
  constexpr int kAtOnce = PIO_DENSE_ROWS > 1 ? kLosslessRows : PIO_DENSE_WEIGHTS;
  for (int first = 0; first < kLosslessRows; first += kAtOnce)
    multiply_places<kAtOnce, Ahead>(w, panel, first, x, out + first);
}

void multiply_lossless_panel(const Lossless& w, int64_t panel, const uint16_t* x, float* out) {
  few_ways() ? multiply_panel_of<Far>(w, panel, x, out) : multiply_panel_of<Near>(w, panel, x, out);
}

}  // namespace pio::PIO_ISA
#else
#define PIO_FILE "src/lossless.cc"
#include "caches.h"  // before it: the first half needs both too
#include "lossless.h"

#include "foreach_isa.h"

namespace pio {

PIO_TABLE(expand_lossless_rows)
PIO_TABLE(multiply_lossless_panel)

void expand_rows(const Lossless& w, int64_t from, int64_t to, uint16_t* out) {
  PIO_CALL(expand_lossless_rows)(w, from, to, out);
}

void multiply_lossless(const Lossless& w, int64_t panel, const uint16_t* x, float (&out)[kLosslessRows]) {
  PIO_CALL(multiply_lossless_panel)(w, panel, x, out);
}

// out[i] = row indices[i] of the weight as bf16 [count, cols]; indices = 0 stands for the rows 0 .. count - 1.
void expand_lossless(Address data, Address index, int64_t rows, int64_t cols, Address indices, int64_t count,
                     Address out, int threads) {
  const Lossless w = checked_lossless("expand_lossless", data, index, rows, cols);
  if (count == 0) return;
  require_address(out, 2, "expand_lossless", "out");
  const auto* wanted = reinterpret_cast<const int64_t*>(indices);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = wanted ? wanted[i] : i;
    require(row >= 0 && row < rows,
            "expand_lossless: row " + std::to_string(row) + " is outside 0 .. " + std::to_string(rows - 1));
  }
  parallel_for(count, std::max<int64_t>(1, 65536 / cols), threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = wanted ? wanted[i] : i;
      expand_rows(w, row, row + 1, reinterpret_cast<uint16_t*>(out) + i * cols);
    }
  });
}

}  // namespace pio
#endif
