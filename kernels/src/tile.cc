// Packed weights times quantized activations: the inner loop of linear and moe.
//
// Integer dot products inside a group, exact; one float multiply-add per group with the product of the two scales.
// The weights' zero point (8 or 128) costs nothing: the integer sum starts at minus zero point times the sum of
// the activations.
#ifdef PIO_ISA
#include "simd/ahead.inc"
namespace pio::PIO_ISA {

// Scales are a thirtieth of the bytes; asked for further ahead, into the second level, they came late (0.95 of a
// token).
constexpr int kAheadScales = 64;

// One group of columns of P panels times a single row, which waits for memory; memory gives most to several streams.
// left: bytes until the panels end, next: from there to what is read then.
template <int bits, int P, class Ahead>
PIO_INLINE void dot_group_alone(const uint8_t* const* w, const char* a, int group, int64_t left, int64_t next,
                                I32 (&acc)[P][1]) {
  constexpr int kStep = 32 / bits;  // columns in 64 bytes
  for (int k = 0; k < group; k += kStep) {
    const int64_t ahead = Ahead::kPanelBytes + (k * 64 / kStep + Ahead::kPanelBytes < left ? 0 : next);
    const Bytes first4 = repeat4(a + k), next4 = repeat4(a + k + (bits == 4 ? 4 : 0));
    for (int p = 0; p < P; ++p) {
      const uint8_t* from = w[p] + k * 64 / kStep;
      const Bytes all = load_bytes(from);
      Ahead::fetch(from + ahead);
      if constexpr (bits == 4)
        acc[p][0] = dot_nibbles(dot_nibbles(acc[p][0], low_nibbles(all), first4), high_nibbles(all), next4);
      else
        acc[p][0] = dot_bytes(acc[p][0], all, first4);
    }
  }
}

// One group of columns for P panels and T rows, into acc. w[p] and a[t] point at the group; left and next as above,
// where the weights come from memory.
template <int bits, int P, int T, class Ahead>
PIO_INLINE void dot_group(const uint8_t* const* w, const char* const* a, int group, int64_t left, int64_t next,
                          I32 (&acc)[P][T]) {
  constexpr int kStep = 32 / bits;  // columns in 64 bytes
  for (int k = 0; k < group; k += kStep) {
    const int64_t ahead = Ahead::kPanelBytes + (k * 64 / kStep + Ahead::kPanelBytes < left ? 0 : next);
    Bytes low[P], high[P];
    for (int p = 0; p < P; ++p) {
      const uint8_t* from = w[p] + k * 64 / kStep;
      const Bytes all = load_bytes(from);
      if constexpr (Ahead::kFetches) Ahead::fetch(from + ahead);
      low[p] = bits == 4 ? low_nibbles(all) : all;
      high[p] = bits == 4 ? high_nibbles(all) : all;
    }
    for (int t = 0; t < T; ++t) {
      const Bytes first4 = repeat4(a[t] + k), next4 = repeat4(a[t] + k + (bits == 4 ? 4 : 0));
      for (int p = 0; p < P; ++p)
        if constexpr (bits == 4)
          acc[p][t] = dot_nibbles(dot_nibbles(acc[p][t], low[p], first4), high[p], next4);
        else
          acc[p][t] = dot_bytes(acc[p][t], low[p], first4);
    }
  }
}

PIO_INLINE float scale_of(const char* a, int group) {
  float out;
  std::memcpy(&out, a + group, 4);
  return out;
}
PIO_INLINE int32_t minus_sum_of(const char* a, int group) {
  int32_t out;
  std::memcpy(&out, a + group + 4, 4);
  return out;
}

// apart: panels of out between two of these. next: panels between the end of one and what its stream goes on with.
template <int bits, int P, int T, class Ahead>
void multiply(const Packed& weight, const int64_t* panels, const Activations& act, const int64_t* rows, float* out,
              int apart = 1, int64_t next = 0) {
  const int64_t groups = weight.groups(), group_bytes = weight.group_bytes(), act_bytes = act.group_bytes();
  const int group = weight.group;
  const uint8_t* w[P];
  const uint16_t* ws[P];
  for (int p = 0; p < P; ++p) {
    w[p] = weight.data + panels[p] * weight.panel_bytes();
    ws[p] = weight.scales + panels[p] * groups * kLanes;
  }
  const char* a[T];
  for (int t = 0; t < T; ++t) a[t] = act.data + rows[t] * act.stride();
  F32 y[P][T];
  for (int p = 0; p < P; ++p)
    for (int t = 0; t < T; ++t) y[p][t] = set(0.0f);
  for (int64_t g = 0; g < groups; ++g) {
    I32 acc[P][T];
    for (int t = 0; t < T; ++t) {
      I32 start = set_i32(0);
      if constexpr (bits == 4) start = shift_left<3>(set_i32(minus_sum_of(a[t], group)));
      if constexpr (bits == 8 && kByteZero == 128) start = shift_left<7>(set_i32(minus_sum_of(a[t], group)));
      for (int p = 0; p < P; ++p) acc[p][t] = start;
    }
    if constexpr (T == 1)
      dot_group_alone<bits, P, Ahead>(w, a[0], group, weight.panel_bytes() - g * group_bytes,
                                      next * weight.panel_bytes(), acc);
    else
      dot_group<bits, P, T, Ahead>(w, a, group, weight.panel_bytes() - g * group_bytes, next * weight.panel_bytes(),
                                   acc);
    const int64_t ahead = kAheadScales + (g * kLanes + kAheadScales < groups * kLanes ? 0 : next * groups * kLanes);
    for (int p = 0; p < P; ++p) {
      const F32 scale = load_bf16(ws[p] + g * kLanes);
      if constexpr (Ahead::kFetches) prefetch(ws[p] + g * kLanes + ahead);
      for (int t = 0; t < T; ++t) y[p][t] = fma(to_f32(acc[p][t]), mul(scale, set(scale_of(a[t], group))), y[p][t]);
      w[p] += group_bytes;
    }
    for (int t = 0; t < T; ++t) a[t] += act_bytes;
  }
  for (int p = 0; p < P; ++p)
    for (int t = 0; t < T; ++t) store(out + (p * apart * T + t) * kLanes, y[p][t]);
}

template <int bits, int P>
void multiply_rows(const Packed& w, const int64_t* panels, const Activations& a, const int64_t* rows, int n_rows,
                   float* out) {
  switch (n_rows) {
    case 2:
      return multiply<bits, P, 2, Cached>(w, panels, a, rows, out);
#if PIO_TILE_ROWS > 2
    case 3:
      return multiply<bits, P, 3, Cached>(w, panels, a, rows, out);
    case 4:
      return multiply<bits, P, 4, Cached>(w, panels, a, rows, out);
#endif
#if PIO_TILE_ROWS > 4
    case 5:
      return multiply<bits, P, 5, Cached>(w, panels, a, rows, out);
    case 6:
      return multiply<bits, P, 6, Cached>(w, panels, a, rows, out);
#endif
  }
}

template <int n>
struct Count {
  static constexpr int value = n;
};

// T rows whose weights come from memory: as many panels side by side as memory and registers like, by powers of two. Of
// neighbours every so many-th, not the next: each is a stream that goes on through several panels, since a new stream
// is slow until the prefetchers follow it.
template <int bits, int T, class Ahead>
void multiply_few(const Packed& w, const int64_t* panels, int n_panels, const Activations& a, const int64_t* rows,
                  float* out) {
  const auto take = [&](auto count, auto multiply) {
    constexpr int n = decltype(count)::value;
    const int apart = n_panels / n;
    for (int i = 0; i < apart; ++i) {
      int64_t some[n];
      for (int p = 0; p < n; ++p) some[p] = panels[p * apart + i];
      multiply(w, some, a, rows, out + i * T * kLanes, apart, i + 1 < apart ? 0 : (n - 1) * apart);
    }
    panels += n * apart;
    out += n * apart * T * kLanes;
    n_panels -= n * apart;
  };
#if PIO_TILE_PANELS > 1
  if constexpr (Ahead::kPanels >= 8 && T == 1) take(Count<8>(), multiply<bits, 8, T, Ahead>);
  if constexpr (T <= 2) take(Count<4>(), multiply<bits, 4, T, Ahead>);
  take(Count<2>(), multiply<bits, 2, T, Ahead>);
#endif
  take(Count<1>(), multiply<bits, 1, T, Ahead>);
}

template <int bits, class Ahead>
void few_rows(const Packed& w, const int64_t* panels, int n_panels, const Activations& a, const int64_t* rows,
              int n_rows, float* out) {
  switch (n_rows) {
    case 1:
      return multiply_few<bits, 1, Ahead>(w, panels, n_panels, a, rows, out);
#if PIO_TILE_PANELS > 1
    case 2:
      return multiply_few<bits, 2, Ahead>(w, panels, n_panels, a, rows, out);
    case 3:
      return multiply_few<bits, 3, Ahead>(w, panels, n_panels, a, rows, out);
    case 4:
      return multiply_few<bits, 4, Ahead>(w, panels, n_panels, a, rows, out);
    case 5:
      return multiply_few<bits, 5, Ahead>(w, panels, n_panels, a, rows, out);
    case 6:
      return multiply_few<bits, 6, Ahead>(w, panels, n_panels, a, rows, out);
#endif
  }
}

template <class Ahead>
void few_by_bits(const Packed& w, const int64_t* panels, int n_panels, const Activations& a, const int64_t* rows,
                 int n_rows, float* out) {
  (w.bits == 4 ? few_rows<4, Ahead> : few_rows<8, Ahead>)(w, panels, n_panels, a, rows, n_rows, out);
}

void multiply_tile(const Packed& w, const int64_t* panels, int n_panels, const Activations& a, const int64_t* rows,
                   int n_rows, float* out) {
  if (n_rows == 1 || n_panels > PIO_TILE_PANELS) {
    const auto few = few_ways() ? few_by_bits<Far> : few_by_bits<Near>;
    return few(w, panels, n_panels, a, rows, n_rows, out);
  }
#if PIO_TILE_PANELS > 1
  if (n_panels == 2)
    return w.bits == 4 ? multiply_rows<4, 2>(w, panels, a, rows, n_rows, out)
                       : multiply_rows<8, 2>(w, panels, a, rows, n_rows, out);
#endif
  (void)n_panels;
  return w.bits == 4 ? multiply_rows<4, 1>(w, panels, a, rows, n_rows, out)
                     : multiply_rows<8, 1>(w, panels, a, rows, n_rows, out);
}

Tile tile() {
  if (PIO_TILE_PANELS == 1) return {PIO_TILE_ROWS, PIO_TILE_PANELS, 1, 1, multiply_tile};
  return few_ways() ? Tile{PIO_TILE_ROWS, PIO_TILE_PANELS, Far::kTogether, PIO_TILE_ROWS, multiply_tile}
                    : Tile{PIO_TILE_ROWS, PIO_TILE_PANELS, Near::kTogether, 1, multiply_tile};
}

}  // namespace pio::PIO_ISA
#else
#define PIO_FILE "src/tile.cc"
#include "caches.h"  // before it: the first half needs both too
#include "quant.h"

#include "foreach_isa.h"

namespace pio {

PIO_TABLE(tile)

Tile vector_tile() { return PIO_CALL(tile)(); }

// Groups of 32 columns leave AMX with as much scaling as multiplying: there AVX-512 is as fast (Sapphire Rapids).
Tile current_tile(int group) { return amx_in_use() && group >= 64 ? amx_tile() : vector_tile(); }

}  // namespace pio
#endif
