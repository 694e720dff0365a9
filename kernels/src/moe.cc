// A whole mixture-of-experts layer in one call: y[t] = sum over the token's experts e of weight * down_e(silu(gate_e x)
// * up_e x), for packed int4 and int8 experts.
#ifdef PIO_ISA
namespace pio::PIO_ISA {

// out[t * stride ..][0 .. 16) = silu(gate[t]) * up[t]
void swiglu_rows(const float* gate, const float* up, int count, float* out, int64_t stride) {
  for (int t = 0; t < count; ++t) store(out + t * stride, mul(silu(load(gate + t * 16)), load(up + t * 16)));
}

// sum[token[t]][0 .. 16) += weight[t] * y[t]
void add_weighted(const float* y, int count, const int64_t* tokens, const float* weights, float* sum, int64_t stride) {
  for (int t = 0; t < count; ++t) {
    float* s = sum + tokens[t] * stride;
    store(s, fma(set(weights[t]), load(y + t * 16), load(s)));
  }
}

// out[t * stride ..][0 .. n) = sum[t * sum_stride ..]
void store_sums(const float* sum, int64_t sum_stride, int64_t count, void* out, Dtype dtype, int64_t first,
                int64_t stride, int n) {
  for (int64_t t = 0; t < count; ++t) {
    const F32 v = load(sum + t * sum_stride);
    if (dtype == Dtype::f32)
      store_as_n(static_cast<float*>(out) + first + t * stride, v, n);
    else
      store_as_n(static_cast<uint16_t*>(out) + first + t * stride, v, n);
  }
}

}  // namespace pio::PIO_ISA
#else
#include <optional>
#include <string>

#define PIO_FILE "src/moe.cc"
#include "quant.h"  // before it: the first half needs it too

#include "entries.h"
#include "foreach_isa.h"
#include "routing.h"
#include "wide_moe.h"

namespace pio {

PIO_TABLE(swiglu_rows)
PIO_TABLE(add_weighted)
PIO_TABLE(store_sums)

void add_weighted(const float* y, int count, const int64_t* tokens, const float* weights, float* sum, int64_t stride) {
  PIO_CALL(add_weighted)(y, count, tokens, weights, sum, stride);
}

void swiglu_rows(const float* gate, const float* up, int count, float* out, int64_t stride) {
  PIO_CALL(swiglu_rows)(gate, up, count, out, stride);
}

void store_sums(const float* sum, int64_t sum_stride, int64_t count, void* out, Dtype dtype, int64_t first,
                int64_t stride, int n) {
  PIO_CALL(store_sums)(sum, sum_stride, count, out, dtype, first, stride, n);
}

namespace {

constexpr int64_t kWideUnits = 8;  // pairs of panels of a task where experts are wide: all rows pass once per task

// Up to so many tokens an expert mostly has a single row, so a task takes as many panels as one row meets at a time
// (Tile::alone).
constexpr int64_t kFewTokens = kMostShared;

struct Expert {
  Packed gate, up, down;
};

struct Experts {
  PackedLayer layer;
  int64_t count;
  std::optional<Expert> shared;  // number `count`

  Expert of(int64_t e) const {
    if (e == count) return *shared;
    const Packed gate = expert_of(layer.gate_up, 2 * e, layer.gate_panels);
    return {gate, expert_of(layer.gate_up, 2 * e + 1, layer.gate_panels), expert_of(layer.down, e, layer.down_panels)};
  }
};

std::optional<Expert> shared_expert(const std::vector<uint64_t>& addresses, const PackedLayer& layer, int64_t tokens) {
  if (addresses.empty()) return {};
  require(addresses.size() == 6, "moe: a shared expert is described by 6 addresses");
  require(tokens <= kMostShared, "moe: a shared expert is for at most 8 tokens, got " + std::to_string(tokens));
  const auto part = [&](size_t i, const Packed& like, int64_t rows) {
    return checked_packed("moe: shared expert", addresses[i], addresses[i + 1], rows, like.cols, like.bits, like.group);
  };
  const int64_t inner = layer.gate_panels * kLanes;
  return Expert{part(0, layer.gate_up, inner), part(2, layer.gate_up, inner), part(4, layer.down, layer.down.rows)};
}

void add_shared(Routing& routing, int64_t number, int64_t tokens) {
  routing.experts.push_back(number);
  for (int64_t t = 0; t < tokens; ++t) {
    routing.token.push_back(t);
    routing.weight.push_back(1.0f);
  }
  routing.first.push_back(routing.pairs());
}

// hidden[pair][16 panel ..] of the pairs of one expert, for `n` panels of gate and as many of up.
void gate_and_up(const Expert& w, const Tile& tile, const Routing& routing, size_t active, int64_t panel, int n,
                 const Activations& x, float* hidden, int64_t stride) {
  alignas(64) float gate[kMostTileSums], up[kMostTileSums];
  int64_t panels[kMostAlone];
  for (int p = 0; p < n; ++p) panels[p] = panel + p;
  for (int64_t s = routing.first[active]; s < routing.first[active + 1]; s += tile.rows) {
    const int count = static_cast<int>(std::min<int64_t>(tile.rows, routing.first[active + 1] - s));
    const int at_once = count <= tile.few ? n : tile.panels;
    const int64_t* rows = routing.token.data() + s;
    for (int first = 0; first < n; first += at_once) {
      const int some = std::min(at_once, n - first);
      tile.multiply(w.gate, panels + first, some, x, rows, count, gate);
      tile.multiply(w.up, panels + first, some, x, rows, count, up);
      for (int p = 0; p < some; ++p)
        PIO_CALL(swiglu_rows)(gate + p * count * kLanes, up + p * count * kLanes, count,
                              hidden + s * stride + panels[first + p] * kLanes, stride);
    }
  }
}

// One expert's contributions to `n_panels` panels of the output, added up in float32.
void down_and_add(const Packed& w, const Tile& tile, const Routing& routing, size_t active, int64_t panel, int n_panels,
                  const Activations& hidden, float* sum, int64_t stride) {
  alignas(64) float y[kMostTileSums];
  int64_t panels[kMostAlone], rows[kMaxTileRows];
  for (int p = 0; p < n_panels; ++p) panels[p] = panel + p;
  for (int64_t s = routing.first[active]; s < routing.first[active + 1]; s += tile.rows) {
    const int count = static_cast<int>(std::min<int64_t>(tile.rows, routing.first[active + 1] - s));
    for (int t = 0; t < count; ++t) rows[t] = s + t;
    const int at_once = count <= tile.few ? n_panels : tile.panels;
    for (int first = 0; first < n_panels; first += at_once) {
      const int n = std::min(at_once, n_panels - first);
      tile.multiply(w, panels + first, n, hidden, rows, count, y);
      for (int p = 0; p < n; ++p)
        PIO_CALL(add_weighted)(y + p * count * kLanes, count, routing.token.data() + s, routing.weight.data() + s,
                               sum + (first + p) * kLanes, stride);
    }
  }
}

// The rows of experts that are not wide, neighbours together.
void quantize_narrow(const Routing& routing, const WideExperts& wide, const float* middle, int64_t width,
                     const Activations& out, int threads) {
  for (size_t e = 0; e < routing.experts.size();) {
    size_t end = e;
    while (end < routing.experts.size() && !wide.is_wide(end)) ++end;
    if (end > e) quantize_rows(middle, Dtype::f32, width, routing.first[e], routing.first[end], out, threads);
    e = end + 1;
  }
}

}  // namespace

// x [tokens, hidden] -> out [tokens, hidden]. experts [tokens, k] int64 and weights [tokens, k] float32 say where each
// token goes. gate_up: n_experts weights of 2 * inner rows, packed as inner rows of gate padded to 16, then of up;
// down: n_experts weights [hidden, inner]. shared: addresses of data and scales of gate, up and down of one more expert
// of the same sizes, bits and group, whose output every token gains unweighted (at most 8 tokens); or empty.
void moe(Address x, int64_t tokens, int64_t hidden, int64_t inner, int dtype, Address experts, Address weights,
         int64_t k, int64_t n_experts, Address gate_up_data, Address gate_up_scales, Address down_data,
         Address down_scales, int bits, int group, const std::vector<uint64_t>& shared, Address out, int threads) {
  const Dtype type = require_dtype(dtype, "moe");
  require(tokens >= 0 && k > 0 && n_experts > 0, "moe: tokens must not be negative, k and n_experts must be positive");
  const int64_t gate_panels = ceil_div(inner, kLanes), down_panels = ceil_div(hidden, kLanes);
  const PackedLayer layer = {
      checked_packed("moe: gate_up", gate_up_data, gate_up_scales, 2 * gate_panels * kLanes, hidden, bits, group),
      checked_packed("moe: down", down_data, down_scales, hidden, inner, bits, group), gate_panels, down_panels};
  const Experts all = {layer, n_experts, shared_expert(shared, layer, tokens)};
  if (tokens == 0) return;
  require_address(x, size_of(type), "moe", "x");
  require_address(out, size_of(type), "moe", "out");
  require_address(experts, 8, "moe", "experts");
  require_address(weights, 4, "moe", "weights");
  Routing routing = sort_by_expert("moe", reinterpret_cast<const int64_t*>(experts),
                                   reinterpret_cast<const float*>(weights), tokens, k, n_experts);
  if (all.shared) add_shared(routing, n_experts, tokens);
  const Tile tile = current_tile(group);
  const int64_t active = static_cast<int64_t>(routing.experts.size());
  const int64_t expert_bytes = 2 * gate_panels * layer.gate_up.panel_bytes() + down_panels * layer.down.panel_bytes();
  const int used = threads_for(active * expert_bytes, expert_bytes * 8 / bits * routing.pairs(), threads);

  const WideExperts wide(layer, routing, type, tokens, std::max(1, used));
  std::vector<size_t> narrow;
  for (size_t e = 0; e < routing.experts.size(); ++e)
    if (!wide.is_wide(e)) narrow.push_back(e);
  const Activations in = scratch_activations(0, narrow.empty() ? 0 : tokens, hidden, group);
  if (!narrow.empty()) quantize_rows(reinterpret_cast<const void*>(x), type, hidden, 0, tokens, in, used);

  const int64_t width = gate_panels * kLanes;
  float* middle = scratch_floats(0, narrow.empty() ? 0 : routing.pairs() * width);
  const int64_t some = tokens <= kFewTokens ? tile.alone : tile.panels;  // panels of a task
  const int64_t pieces = wide.pieces() + static_cast<int64_t>(narrow.size()) * gate_panels;
  parallel_for(pieces, some, used, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin, n; i < end; i += n) {
      if (i < wide.pieces()) {
        wide.gate_and_up(i, reinterpret_cast<const uint16_t*>(x));
        n = 1;
        continue;
      }
      const int64_t j = i - wide.pieces(), panel = j % gate_panels;
      const size_t e = narrow[static_cast<size_t>(j / gate_panels)];
      n = std::min({some, end - i, gate_panels - panel});
      gate_and_up(all.of(routing.experts[e]), tile, routing, e, panel, static_cast<int>(n), in, middle, width);
    }
  });

  // The padding of `inner` to 16 is silu(0) * 0 = 0, so it may be quantized along with the rest; the weights there are
  // 0 too.
  const Activations act = scratch_activations(1, narrow.empty() ? 0 : routing.pairs(), width, group);
  quantize_narrow(routing, wide, middle, width, act, used);
  wide.pack_middle(used);

  const int64_t each = some * (wide.any() ? kWideUnits : 1), stride = each * kLanes;
  parallel_for(down_panels, each, used, [&](int64_t begin, int64_t end) {
    float* sum = scratch_floats(1, tokens * stride);
    for (int64_t first = begin; first < end; first += each) {
      const int64_t last = std::min(first + each, end);
      std::memset(sum, 0, static_cast<size_t>(tokens * stride) * sizeof(float));
      for (size_t e = 0; e < routing.experts.size(); ++e)
        for (int64_t panel = first; panel < last; panel += some) {
          const int n = static_cast<int>(std::min<int64_t>(some, last - panel));
          float* own = sum + (panel - first) * kLanes;
          wide.is_wide(e) ? wide.down_and_add(e, panel, n, own, stride)
                          : down_and_add(all.of(routing.experts[e]).down, tile, routing, e, panel, n, act, own, stride);
        }
      for (int64_t panel = first; panel < last; ++panel)
        PIO_CALL(store_sums)(sum + (panel - first) * kLanes, stride, tokens, reinterpret_cast<void*>(out), type,
                             panel * kLanes, hidden,
                             static_cast<int>(std::min<int64_t>(kLanes, hidden - panel * kLanes)));
    }
  });
}

}  // namespace pio
#endif
