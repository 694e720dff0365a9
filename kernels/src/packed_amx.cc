// The tile of packed weights on AMX: up to 16 activation rows by two panels. A panel is the second operand as it lies
// (int8), or after its nibbles were unpacked (int4); quantized activations are the first.
//
// The integer sums are exact and the float operations those of tile.cc in the same order, so the bits are those of
// AVX-512, which still does up to six rows: below that a tile of 16 is mostly empty.
#include <cstdint>
#include <cstring>

#include "isa.h"
#include "quant.h"
#include "target.h"

#if PIO_X86
#include <immintrin.h>

PIO_TARGET_BEGIN(PIO_AMX)
#include "amx.h"
#include "simd/avx512.h"

namespace pio::amx {
namespace {

using namespace pio::avx512;

constexpr int kMostColumns = 64;  // of a tile of int8

// Tiles 0 to 3 are sums [activations, weights], 4 activations, 5 and 6 weights.
void configure_packed(int activations, int columns) {
  TileShapes c;
  for (int t = 0; t < 7; ++t) c.rows[t] = static_cast<uint8_t>(t >= 5 ? columns / 4 : activations);
  c.row_bytes[4] = static_cast<uint16_t>(columns);
  load_shapes(c);
}

// Rows of activations evenly spaced.
struct Spaced {
  const char* data;
  int64_t stride;
};

Spaced spaced_rows(const Activations& a, const int64_t* rows, int n_rows) {
  bool even = true;
  for (int t = 1; t < n_rows; ++t) even = even && rows[t] == rows[0] + t;
  if (even) return {a.data + rows[0] * a.stride(), a.stride()};
  char* copy = reinterpret_cast<char*>(scratch_floats(2, (n_rows * a.stride() + 3) / 4));
  for (int t = 0; t < n_rows; ++t)
    std::memcpy(copy + t * a.stride(), a.data + rows[t] * a.stride(), static_cast<size_t>(a.stride()));
  return {copy, a.stride()};
}

constexpr int kBatch = 128;  // columns whose nibbles are unpacked, multiplied and scaled together
constexpr int kMostGroups = kBatch / 32;

// One call's work on a batch of groups, in three stages that work on different batches at a time: what a stage stores
// is loaded a whole batch later, so nothing waits for it (stage after stage ran at half the speed).
template <int bits, int P>
struct Batches {
  const uint8_t* w[P];
  const uint16_t* scales[P];
  Spaced a;
  int n_rows, group, columns;
  int64_t groups, act_bytes;
  float* out;
  alignas(64) uint8_t unpacked[2][P][kBatch * kSide];
  alignas(64) int32_t sums[2][kMostGroups][P][kSide][kSide];

  int64_t per_batch() const { return kBatch / group; }
  int64_t count() const { return (groups + per_batch() - 1) / per_batch(); }
  int64_t end_of(int64_t batch) const {
    const int64_t end = (batch + 1) * per_batch();
    return end < groups ? end : groups;
  }

  void unpack(int64_t batch) {
    if constexpr (bits == 4)
      for (int p = 0; p < P; ++p) {
        const uint8_t* from = w[p] + batch * kBatch * kSide / 2;
        const int64_t n = (end_of(batch) - batch * per_batch()) * group;
        for (int64_t k = 0; k < n; k += 8) {
          const Bytes both = load_bytes(from + k * 8);
          store_bytes(unpacked[batch % 2][p] + k * kSide, low_nibbles(both));
          store_bytes(unpacked[batch % 2][p] + k * kSide + 64, high_nibbles(both));
        }
      }
    memory_is_used(unpacked);
  }

  // Sums take turns in two pairs of tiles, so that a group does not wait for the stores of the one before.
  void multiply(int64_t batch) {
    for (int64_t g = batch * per_batch(); g < end_of(batch); g += 2) {
      const int64_t i = g - batch * per_batch();
      _tile_zero(0);
      _tile_zero(1);
      for (int k = 0; k < group; k += columns) {
        _tile_loadd(4, a.data + g * act_bytes + k, a.stride);
        _tile_loadd(5, weights(0, batch, g, i, k), 64);
        _tile_dpbsud(0, 4, 5);
        if constexpr (P == 2) {
          _tile_loadd(6, weights(P - 1, batch, g, i, k), 64);
          _tile_dpbsud(1, 4, 6);
        }
      }
      if (g + 1 < end_of(batch)) {
        _tile_zero(2);
        _tile_zero(3);
        for (int k = 0; k < group; k += columns) {
          _tile_loadd(4, a.data + (g + 1) * act_bytes + k, a.stride);
          _tile_loadd(5, weights(0, batch, g + 1, i + 1, k), 64);
          _tile_dpbsud(2, 4, 5);
          if constexpr (P == 2) {
            _tile_loadd(6, weights(P - 1, batch, g + 1, i + 1, k), 64);
            _tile_dpbsud(3, 4, 6);
          }
        }
      }
      _tile_stored(0, sums[batch % 2][i][0], 64);
      if constexpr (P == 2) _tile_stored(1, sums[batch % 2][i][P - 1], 64);
      if (g + 1 < end_of(batch)) {
        _tile_stored(2, sums[batch % 2][i + 1][0], 64);
        if constexpr (P == 2) _tile_stored(3, sums[batch % 2][i + 1][P - 1], 64);
      }
    }
    memory_is_used(sums);
  }

  const uint8_t* weights(int p, int64_t batch, int64_t g, int64_t i, int k) const {
    return bits == 4 ? unpacked[batch % 2][p] + (i * group + k) * kSide : w[p] + (g * group + k) * kSide;
  }

  void scale(int64_t batch) {
    const int64_t from = batch * per_batch(), n = end_of(batch) - from;
    F32 scale[kMostGroups][P];
    for (int64_t i = 0; i < n; ++i)
      for (int p = 0; p < P; ++p) scale[i][p] = load_bf16(scales[p] + (from + i) * kLanes);
    for (int t = 0; t < n_rows; ++t) {
      F32 y[P];
      for (int p = 0; p < P; ++p) y[p] = load(out + (p * n_rows + t) * kLanes);
      const char* own = a.data + t * a.stride + from * act_bytes + group;
      for (int64_t i = 0; i < n; ++i, own += act_bytes) {
        float factor;
        int32_t minus_sum;
        std::memcpy(&factor, own, 4);
        std::memcpy(&minus_sum, own + 4, 4);
        const I32 start = shift_left<bits == 4 ? 3 : 7>(set_i32(minus_sum));
        for (int p = 0; p < P; ++p)
          y[p] = fma(to_f32(add(load_i32(sums[batch % 2][i][p][t]), start)), mul(scale[i][p], set(factor)), y[p]);
      }
      for (int p = 0; p < P; ++p) store(out + (p * n_rows + t) * kLanes, y[p]);
    }
  }
};

template <int bits, int P>
void multiply_packed(const Packed& weight, const int64_t* panels, const Activations& act, const int64_t* rows,
                     int n_rows, float* out) {
  Batches<bits, P> work;
  for (int p = 0; p < P; ++p) {
    work.w[p] = weight.data + panels[p] * weight.panel_bytes();
    work.scales[p] = weight.scales + panels[p] * weight.groups() * kLanes;
  }
  work.a = spaced_rows(act, rows, n_rows);
  work.n_rows = n_rows;
  work.group = weight.group;
  work.columns = weight.group < kMostColumns ? weight.group : kMostColumns;
  work.groups = weight.groups();
  work.act_bytes = act.group_bytes();
  work.out = out;
  for (int i = 0; i < P * n_rows; ++i) store(out + i * kLanes, set(0.0f));
  configure_packed(n_rows, work.columns);
  const int64_t batches = work.count();
  work.unpack(0);
  for (int64_t b = 0; b < batches; ++b) {
    if (b + 1 < batches) work.unpack(b + 1);
    work.multiply(b);
    if (b > 0) work.scale(b - 1);
  }
  work.scale(batches - 1);
  _tile_release();
}

constexpr int kFewRows = 6;

void multiply_packed_tile(const Packed& w, const int64_t* panels, int n_panels, const Activations& a,
                          const int64_t* rows, int n_rows, float* out) {
  if (n_rows <= kFewRows) return vector_tile().multiply(w, panels, n_panels, a, rows, n_rows, out);
  if (n_panels == 2)
    return w.bits == 4 ? multiply_packed<4, 2>(w, panels, a, rows, n_rows, out)
                       : multiply_packed<8, 2>(w, panels, a, rows, n_rows, out);
  return w.bits == 4 ? multiply_packed<4, 1>(w, panels, a, rows, n_rows, out)
                     : multiply_packed<8, 1>(w, panels, a, rows, n_rows, out);
}

}  // namespace
}  // namespace pio::amx

PIO_TARGET_END

namespace pio {
Tile amx_tile() { return {amx::kSide, 2, vector_tile().alone, 1, amx::multiply_packed_tile}; }
}  // namespace pio
#else
namespace pio {
Tile amx_tile() { return {}; }  // never called: amx_in_use() is false
}  // namespace pio
#endif
