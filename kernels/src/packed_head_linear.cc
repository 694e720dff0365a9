// head_linear over packed weights: the two products of absorbed MLA with kv_b_proj as it is packed, for few rows of x.
//
// out[h] = x[h] W[h]^T is the tile of `linear`. Transposed, x[h] W[h] sums over the rows of W, which are the lanes of a
// panel: x times the rows' scales becomes integers of 15 bits, one scale for a group of columns, and four by four bytes
// are transposed in registers, as int8_kv_attention does with values. The relative error of such an x is 2^-14 of its
// largest element.
#ifdef PIO_ISA
#include "simd/ahead.inc"
#include "simd/two_parts.inc"
namespace pio::PIO_ISA {

// x times the scales of up to kHeadGroups groups of columns, as bytes beside which sixteen rows of the weight lie. The
// groups go side by side: the way from a group's values to its integers is a chain.
struct Factors {
  alignas(64) uint8_t bytes[kHeadGroups * kMostHeadPanels * 128];  // [group][panel][hi, lo][64]
  float scale[kHeadGroups];
  int32_t zero[kHeadGroups];  // what the weights' zero point adds to every sum, negated
};

// Of groups [g, g + count). ahead: from their scales to those that come next, 32 bytes a panel and group.
template <class Ahead, int64_t count>
void take_factors(const Packed& w, int64_t g, const float* x, int64_t ahead, Factors& out) {
  const int64_t panels = w.panels(), between = w.groups() * kLanes;
  const uint16_t* scales = w.scales + g * kLanes;
  F32 to_integer[count];
  I32 most[count], all[count];  // most: as bits, so that a NaN is the largest of all
  bool usable[count];
  for (int i = 0; i < count; ++i) most[i] = all[i] = set_i32(0);
  for (int64_t p = 0; p < panels; ++p)
    for (int i = 0; i < count; ++i) {
      const uint16_t* from = scales + p * between + i * kLanes;
      if (i % 2 == 0) Ahead::fetch(from + ahead);
      most[i] = max(most[i], magnitude_bits(mul(load(x + 16 * p), load_as(from))));
    }
  for (int i = 0; i < count; ++i) {
    const int32_t bits = largest(most[i]);
    float m;
    std::memcpy(&m, &bits, 4);
    // Below 2^-100 the inverse would overflow; such a group counts as zero.
    usable[i] = m > 1e-30f && m < 3e38f;
    to_integer[i] = set(usable[i] ? kIntegers / m : 0.0f);
    out.scale[i] = m / kIntegers;
  }
  for (int64_t p = 0; p < panels; ++p)
    for (int i = 0; i < count; ++i) {
      const F32 factor = usable[i] ? mul(load(x + 16 * p), load_as(scales + p * between + i * kLanes)) : set(0.0f);
      I32 hi, lo;
      all[i] = add(all[i], split_vector(factor, to_integer[i], hi, lo));
      uint8_t* to = out.bytes + (i * panels + p) * 128;
      store_bytes(to, spread_low_bytes(hi));
      store_bytes(to + 64, spread_low_bytes(lo));
    }
  for (int i = 0; i < count; ++i) out.zero[i] = -(w.bits == 4 ? kNibbleZero : kByteZero) * sum(all[i]);
}

// out[0 .. group) = the factors times one group of columns, sixteen at a time: the sums of four are chains that leave
// the multipliers idle for half of the time. A head's panels are a page each, over which no prefetcher looks.
// ahead: bytes to what comes next.
template <int bits, class Ahead>
void multiply_group(const Packed& w, int64_t group, const uint8_t* x, float x_scale, int32_t x_zero, int64_t ahead,
                    float* out) {
  constexpr int kBlocks = bits == 4 ? 2 : 4;  // that hold sixteen columns
  const uint8_t* data = w.data + group * w.group_bytes();
  const int64_t panels = w.panels(), between = w.panel_bytes();
  const F32 scale = set(x_scale);
  const I32 zero = set_i32(x_zero);
  for (int k = 0; k < w.group; k += 16, data += 64 * kBlocks) {
    I32 hi[4], lo[4];
    for (int i = 0; i < 4; ++i) hi[i] = lo[i] = set_i32(0);
    for (int64_t p = 0; p < panels; ++p) {
      const uint8_t* from = data + p * between;
      const Bytes x_hi = load_bytes(x + p * 128), x_lo = load_bytes(x + p * 128 + 64);
      Bytes blocks[kBlocks];
      for (int i = 0; i < kBlocks; ++i) {
        Ahead::fetch(from + 64 * i + ahead);
        blocks[i] = load_bytes(from + 64 * i);
      }
      for (int i = 0; i < 4; ++i) {
        if constexpr (bits == 4) {
          const Bytes four = transpose_quarters(i % 2 ? high_nibbles(blocks[i / 2]) : low_nibbles(blocks[i / 2]));
          hi[i] = dot_nibbles(hi[i], four, x_hi);
          lo[i] = dot_nibbles(lo[i], four, x_lo);
        } else {
          const Bytes four = transpose_quarters(blocks[i]);
          hi[i] = dot_bytes(hi[i], four, x_hi);
          lo[i] = dot_bytes(lo[i], four, x_lo);
        }
      }
    }
    I32 sums[4];
    for (int i = 0; i < 4; ++i) sums[i] = add(shift_left<7>(hi[i]), lo[i]);
    store(out + k, mul(to_f32(add(quarter_sums(sums), zero)), scale));
  }
}

// out[0 .. cols) of groups [begin, begin + count) for one row of x [rows of w]. next: panels from the end of one to the
// same one of the next head.
template <class Ahead, int64_t count, class T>
void multiply_columns(const Packed& w, const float* x, T* out, int64_t begin, int64_t next) {
  alignas(64) float y[kMostGroup];
  Factors factors;
  const int64_t groups = begin + count < w.groups() ? count : (next + 1) * w.groups() - begin;
  take_factors<Ahead, count>(w, begin, x, groups * kLanes, factors);
  for (int i = 0; i < count; ++i) {
    const int64_t g = begin + i, left = w.panel_bytes() - g * w.group_bytes();
    const int64_t ahead = Ahead::kHeadBytes + (Ahead::kHeadBytes < left ? 0 : next * w.panel_bytes());
    const auto multiply = w.bits == 4 ? multiply_group<4, Ahead> : multiply_group<8, Ahead>;
    multiply(w, g, factors.bytes + i * w.panels() * 128, factors.scale[i], factors.zero[i], ahead, y);
    const int64_t from = g * w.group, to = std::min(from + w.group, w.cols);
    for (int64_t c = from; c < to; c += 16) {
      const int n = static_cast<int>(std::min<int64_t>(16, to - c));
      store_as_n(out + c, load(y + (c - from)), n);
    }
  }
}

template <class Ahead, class T>
void multiply_groups(const Packed& w, const T* x, T* out, int64_t begin, int64_t end, int64_t next) {
  alignas(64) float wide[kMostHeadPanels * 16];
  for (int64_t i = 0; i < w.rows; i += 16) store(wide + i, load_as(x + i));
  for (; begin + kHeadGroups <= end; begin += kHeadGroups)
    multiply_columns<Ahead, kHeadGroups>(w, wide, out, begin, next);
  for (; begin < end; ++begin) multiply_columns<Ahead, 1>(w, wide, out, begin, next);
}

template <class T>
void columns_of(const Packed& w, const void* x, void* out, int64_t begin, int64_t end, int64_t next) {
  const auto multiply = few_ways() ? multiply_groups<Far, T> : multiply_groups<Near, T>;
  multiply(w, static_cast<const T*>(x), static_cast<T*>(out), begin, end, next);
}

void packed_columns(const Packed& w, const void* x, void* out, Dtype dtype, int64_t begin, int64_t end, int64_t next) {
  (dtype == Dtype::f32 ? columns_of<float> : columns_of<uint16_t>)(w, x, out, begin, end, next);
}

}  // namespace pio::PIO_ISA
#else
#include <cstdint>

namespace pio {
constexpr int kMostHeadPanels = 32;  // of a head; more rows of int8 could overflow the sums
constexpr int kMostGroup = 128;
constexpr int64_t kHeadGroups = 4;  // of columns, side by side
constexpr int kNibbleZero = 8;
}  // namespace pio
#include "caches.h"
#include "dense.h"
#include "entries.h"
#include "heads.h"
#include "quant.h"
#include "two_parts.h"
#define PIO_FILE "src/packed_head_linear.cc"
#include "foreach_isa.h"

namespace pio {

PIO_TABLE(packed_columns)

namespace {

struct PackedHeads : HeadRows {
  Packed all;
  int64_t first, between, rows;  // of the weight: where a head's slice begins, from head to head, of the slice

  Packed of(int64_t head) const {
    const int64_t panel = (head * between + first) / kLanes;
    Packed slice = all;
    slice.data += panel * all.panel_bytes();
    slice.scales += panel * all.groups() * kLanes;
    slice.rows = rows;
    return slice;
  }
};

void run_packed_rows(const PackedHeads& a, int threads) {
  const int64_t n = a.heads * a.count(), panels = a.rows / kLanes;
  const Activations act = scratch_activations(0, n, a.all.cols, a.all.group);
  for (int64_t i = 0; i < n; ++i) {
    const Activations row{act.data + i * act.stride(), act.groups, act.group};
    quantize_rows(a.x_row(i / a.count(), i % a.count()), a.dtype, a.all.cols, 0, 1, row, 1);
  }
  const Tile tile = current_tile(a.all.group);
  const int64_t together = a.count() <= tile.few ? tile.alone : tile.panels, pieces = ceil_div(panels, together);
  parallel_for(a.heads * pieces, 1, threads, [&](int64_t begin, int64_t end) {
    alignas(64) float y[kMostTileSums];
    int64_t which[kMostAlone], rows[kMaxTileRows];
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t head = piece / pieces, panel = piece % pieces * together;
      const int n_panels = static_cast<int>(std::min(together, panels - panel));
      for (int p = 0; p < n_panels; ++p) which[p] = panel + p;
      for (int64_t r = 0; r < a.count(); r += tile.rows) {
        const int count = static_cast<int>(std::min<int64_t>(tile.rows, a.count() - r));
        for (int t = 0; t < count; ++t) rows[t] = head * a.count() + r + t;
        tile.multiply(a.of(head), which, n_panels, act, rows, count, y);
        for (int p = 0; p < n_panels; ++p)
          for (int t = 0; t < count; ++t)
            store_rows(y + (p * count + t) * kLanes, 1, nullptr, a.out_row(head, r + t), a.dtype, which[p] * kLanes,
                       a.rows, kLanes);
      }
    }
  });
}

// Pieces: heads by a few groups of columns, whose weights (3 KB a group at 192 rows of int4) stay for all rows of x.
void run_packed_columns(const PackedHeads& a, int threads) {
  const int64_t groups = a.all.groups(), pieces = ceil_div(groups, kHeadGroups);
  const int64_t next = a.between / kLanes - 1;
  parallel_for(a.heads * pieces, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t head = piece / pieces, g = piece % pieces * kHeadGroups;
      for (int64_t i = 0; i < a.count(); ++i)
        PIO_CALL(packed_columns)(a.of(head), a.x_row(head, i), a.out_row(head, i), a.dtype, g,
                                 std::min(g + kHeadGroups, groups), next);
    }
  });
}

}  // namespace

// head_linear where W[h] are rows [h * between + first, + rows) of one packed weight [heads * between, cols]. x, out:
// {address, batch, head, token strides in elements}; weight: {data, scales, cols, bits, group, first, between, rows},
// the last three multiples of 16, rows at most 512.
void packed_head_linear(const std::vector<int64_t>& x, const std::vector<int64_t>& weight,
                        const std::vector<int64_t>& out, int64_t batch, int64_t heads, int64_t tokens, bool transposed,
                        int dtype, int threads) {
  const char* name = "packed_head_linear";
  const Dtype type = require_dtype(dtype, name);
  require(weight.size() == 8, "packed_head_linear: a weight is described by 8 numbers");
  const HeadRows shared = head_rows(name, x, out, batch, heads, tokens, type);
  const int64_t first = weight[5], between = weight[6], rows = weight[7];
  require(first >= 0 && rows > 0 && first + rows <= between && (first | between | rows) % kLanes == 0,
          "packed_head_linear: a head's rows must be whole panels of 16 within the rows of a head");
  require(rows <= kMostHeadPanels * kLanes, "packed_head_linear: a head has at most 512 rows");
  const Packed all =
      checked_packed(name, static_cast<Address>(weight[0]), static_cast<Address>(weight[1]), heads * between, weight[2],
                     static_cast<int>(weight[3]), static_cast<int>(weight[4]));
  require(all.group <= kMostGroup, "packed_head_linear: groups of more than 128 columns");
  if (shared.count() == 0) return;
  const PackedHeads a{shared, all, first, between, rows};
  const int64_t values = heads * rows * all.cols;
  const int used = std::max(1, threads_for(values * all.bits / 8, values * a.count(), threads));
  transposed ? run_packed_columns(a, used) : run_packed_rows(a, used);
}

}  // namespace pio
#endif
