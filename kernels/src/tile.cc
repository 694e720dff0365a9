// Packed weights times quantized activations: the inner loop of linear and moe.
//
// Integer dot products inside a group, exact; one float multiply-add per group with the product of the two scales.
// The weights' zero point (8 or 128) costs nothing: the integer sum starts at minus zero point times the sum of
// the activations.
#ifdef PIO_ISA
namespace pio::PIO_ISA {

// One group of columns for P panels and T rows, into acc. w[p] and a[t] point at the group.
template <int bits, int P, int T>
PIO_INLINE void dot_group(const uint8_t* const* w, const char* const* a, int group, I32 (&acc)[P][T]) {
  if constexpr (bits == 4) {
    for (int k = 0; k < group; k += 8) {
      Bytes low[P], high[P];
      for (int p = 0; p < P; ++p) {
        const Bytes both = load_bytes(w[p] + k * 8);
        // One row, Zen 4: +6 to +15 % at 4 KiB, +5 to +10 % at 1 KiB. int8, with twice the bytes per step, loses 10 %.
        if constexpr (T == 1) prefetch(w[p] + k * 8 + 4096);
        low[p] = low_nibbles(both);
        high[p] = high_nibbles(both);
      }
      for (int t = 0; t < T; ++t) {
        const Bytes first4 = repeat4(a[t] + k), next4 = repeat4(a[t] + k + 4);
        for (int p = 0; p < P; ++p) acc[p][t] = dot_nibbles(dot_nibbles(acc[p][t], low[p], first4), high[p], next4);
      }
    }
  } else {
    for (int k = 0; k < group; k += 4) {
      Bytes all[P];
      for (int p = 0; p < P; ++p) all[p] = load_bytes(w[p] + k * 16);
      for (int t = 0; t < T; ++t) {
        const Bytes four = repeat4(a[t] + k);
        for (int p = 0; p < P; ++p) acc[p][t] = dot_bytes(acc[p][t], all[p], four);
      }
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

template <int bits, int P, int T>
void multiply(const Packed& weight, const int64_t* panels, const Activations& act, const int64_t* rows, float* out) {
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
    dot_group<bits, P, T>(w, a, group, acc);
    for (int p = 0; p < P; ++p) {
      const F32 scale = load_bf16(ws[p] + g * kLanes);
      for (int t = 0; t < T; ++t) y[p][t] = fma(to_f32(acc[p][t]), mul(scale, set(scale_of(a[t], group))), y[p][t]);
      w[p] += group_bytes;
    }
    for (int t = 0; t < T; ++t) a[t] += act_bytes;
  }
  for (int p = 0; p < P; ++p)
    for (int t = 0; t < T; ++t) store(out + (p * T + t) * kLanes, y[p][t]);
}

template <int bits, int P>
void multiply_rows(const Packed& w, const int64_t* panels, const Activations& a, const int64_t* rows, int n_rows,
                   float* out) {
  switch (n_rows) {
    case 1:
      return multiply<bits, P, 1>(w, panels, a, rows, out);
    case 2:
      return multiply<bits, P, 2>(w, panels, a, rows, out);
#if PIO_TILE_ROWS > 2
    case 3:
      return multiply<bits, P, 3>(w, panels, a, rows, out);
    case 4:
      return multiply<bits, P, 4>(w, panels, a, rows, out);
#endif
#if PIO_TILE_ROWS > 4
    case 5:
      return multiply<bits, P, 5>(w, panels, a, rows, out);
    case 6:
      return multiply<bits, P, 6>(w, panels, a, rows, out);
#endif
  }
}

void multiply_tile(const Packed& w, const int64_t* panels, int n_panels, const Activations& a, const int64_t* rows,
                   int n_rows, float* out) {
#if PIO_TILE_PANELS > 1
  if (n_panels == 2)
    return w.bits == 4 ? multiply_rows<4, 2>(w, panels, a, rows, n_rows, out)
                       : multiply_rows<8, 2>(w, panels, a, rows, n_rows, out);
#endif
  (void)n_panels;
  return w.bits == 4 ? multiply_rows<4, 1>(w, panels, a, rows, n_rows, out)
                     : multiply_rows<8, 1>(w, panels, a, rows, n_rows, out);
}

Tile tile() { return {PIO_TILE_ROWS, PIO_TILE_PANELS, multiply_tile}; }

}  // namespace pio::PIO_ISA
#else
#define PIO_FILE "src/tile.cc"
#include "quant.h"  // before it: the first half needs it too

#include "foreach_isa.h"

namespace pio {

PIO_TABLE(tile)

Tile vector_tile() { return PIO_CALL(tile)(); }

// Groups of 32 columns leave AMX with as much scaling as multiplying: there AVX-512 is as fast (Sapphire Rapids).
Tile current_tile(int group) { return amx_in_use() && group >= 64 ? amx_tile() : vector_tile(); }

}  // namespace pio
#endif
