// Weights of 12 bits (lossless.h) as bf16 again: into memory, for products of many rows, or in registers between memory
// and the products of a few, which wait for memory and read a quarter less of it.
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

// 32 columns of T rows of x; nothing beyond the last column.
template <int T>
PIO_INLINE void take_columns(const uint16_t* const* x, int64_t from, int64_t cols, Pairs* out) {
  for (int t = 0; t < T; ++t)
    out[t] = cols >= 32 ? load_pairs(x[t] + from) : load_pairs_n(x[t] + from, static_cast<int>(cols));
}

// One block of R rows, with the values that have exponents of their own, times T rows of x: only rows that have some go
// through memory. Apart: one block in a dozen of normal weights, and the last one where columns end within it.
template <int R, int T>
PIO_APART void multiply_patched(const uint8_t* block, int64_t stride, const Exponents& e, const LosslessExtra* extra,
                                int count, int first, const uint16_t* const* x, int64_t from, int64_t cols,
                                F32 (*acc)[T]) {
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
    for (int i = 0; i < 4 && 32 * i < cols; ++i) {
      Pairs columns[T];
      take_columns<T>(x, from + 32 * i, cols - 32 * i, columns);
      for (int t = 0; t < T; ++t) acc[r][t] = dot_pairs(acc[r][t], wide[i], columns[t]);
    }
  }
}

// R rows of a panel from place `first` on times T rows of x: out[t][i], i < R.
template <int R, int T, class Ahead>
void multiply_places(const Lossless& w, int64_t panel, int first, const uint16_t* const* x,
                     float (*out)[kLosslessRows]) {
  const LosslessGroup group = w.group_of(panel);
  const int64_t stride = group.apart * w.row_bytes();
  const uint8_t* rows = w.row(group.row + panel - group.first + first * group.apart);
  // Bytes until a stream ends, and from there to what it goes on with.
  const int64_t left_in_stream = (group.first + group.apart - panel) * w.row_bytes(), next = (R - 1) * stride;
  const Exponents e = exponents_of(w.marks(panel));
  const LosslessExtra* extra = w.extras(panel);
  F32 acc[R][T];
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) acc[r][t] = set(0.0f);
  for (int64_t b = 0; b < w.blocks(); ++b, rows += kLosslessBlockBytes) {
    const int64_t from = b * kLosslessBlock, left = w.cols - from;
    const int64_t place = b * kLosslessBlockBytes + Ahead::kLosslessBytes;
    const int64_t ahead = Ahead::kLosslessBytes + (place < left_in_stream ? 0 : next);
    const int count = w.extras_in(panel, b);
    if (count || left < kLosslessBlock) {
      const int own = w.within(extra, count);
      multiply_patched<R, T>(rows, stride, e, extra, own, first, x, from, left, acc);
      extra += own;
      continue;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const uint8_t* block = rows + r * stride;
      for (int i = 0; i < kLosslessBlockBytes; i += 64) Ahead::fetch(block + ahead + i);
      Pairs wide[4];
      widen_block(block, e, wide);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) acc[r][t] = dot_pairs(acc[r][t], wide[i], load_pairs(x[t] + from + 32 * i));
    }
  }
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; r += 4) {
      const F32 four[4] = {acc[r][t], acc[r + 1][t], acc[r + 2][t], acc[r + 3][t]};
      store_sums4(out[t] + first + r, four);
    }
}

template <int T, class Ahead>
void multiply_panel_of(const Lossless& w, int64_t panel, const uint16_t* const* x, float (*out)[kLosslessRows]) {
  constexpr int kAtOnce = PIO_DENSE_ROWS > 1 && T <= 2 ? kLosslessRows : PIO_DENSE_WEIGHTS;
  for (int first = 0; first < kLosslessRows; first += kAtOnce)
    multiply_places<kAtOnce, T, Ahead>(w, panel, first, x, out);
}

template <class Ahead>
void multiply_by_rows(const Lossless& w, int64_t panel, const uint16_t* const* x, int n_x,
                      float (*out)[kLosslessRows]) {
  switch (n_x) {
    case 1:
      return multiply_panel_of<1, Ahead>(w, panel, x, out);
#if PIO_DENSE_ROWS > 1
    case 2:
      return multiply_panel_of<2, Ahead>(w, panel, x, out);
    case 3:
      return multiply_panel_of<3, Ahead>(w, panel, x, out);
    case 4:
      return multiply_panel_of<4, Ahead>(w, panel, x, out);
    case 5:
      return multiply_panel_of<5, Ahead>(w, panel, x, out);
    case 6:
      return multiply_panel_of<6, Ahead>(w, panel, x, out);
#endif
  }
}

void multiply_lossless_panel(const Lossless& w, int64_t panel, const uint16_t* const* x, int n_x,
                             float (*out)[kLosslessRows]) {
  few_ways() ? multiply_by_rows<Far>(w, panel, x, n_x, out) : multiply_by_rows<Near>(w, panel, x, n_x, out);
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

void multiply_lossless(const Lossless& w, int64_t panel, const uint16_t* const* x, int n_x,
                       float (*out)[kLosslessRows]) {
  PIO_CALL(multiply_lossless_panel)(w, panel, x, n_x, out);
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
