// The experts of moe that have many bf16 rows (wide.h); and what a layer of packed experts is.
#pragma once
#include <cstdint>
#include <vector>

#include "routing.h"
#include "wide.h"

namespace pio {

struct PackedLayer {
  Packed gate_up, down;  // gate_up: panels of gate, then as many of up, of every expert
  int64_t gate_panels, down_panels;
};

// Packed experts lie one after the other; an expert is `panels` panels.
inline Packed expert_of(const Packed& all, int64_t expert, int64_t panels) {
  Packed one = all;
  one.data += expert * panels * all.panel_bytes();
  one.scales += expert * panels * all.groups() * kLanes;
  one.rows = panels * kLanes;
  return one;
}

// silu(gate) * up of `count` rows of 16, to out[t * stride ..]. Defined in src/moe.cc.
void swiglu_rows(const float* gate, const float* up, int count, float* out, int64_t stride);

// The wide experts of one call: which they are, and what their tokens' middle activations are.
class WideExperts {
 public:
  // None where wide_in_use() is false of the call.
  WideExperts(const PackedLayer& layer, const Routing& routing, Dtype dtype, int64_t tokens, int threads);

  bool any() const { return !pieces_.empty(); }
  bool is_wide(size_t active) const { return any() && middle_[active].tiles.tiles > 0; }

  // Pieces of the first half: silu(gate x) * (up x) of some rows and columns of an expert; x [tokens, hidden].
  int64_t pieces() const { return static_cast<int64_t>(pieces_.size()); }
  void gate_and_up(int64_t piece, const uint16_t* x) const;
  // Between the halves: what the pieces made, as tiles.
  void pack_middle(int threads) const;
  // sum[token][0 .. 16 n_panels) += weight * (the expert's down projection), rows of sum `stride` apart.
  void down_and_add(size_t active, int64_t panel, int n_panels, float* sum, int64_t stride) const;

 private:
  struct Piece {
    size_t active;
    int64_t tile, tiles, panel, panels;
  };
  struct Middle {
    uint16_t* rows;  // [rows of the expert][inner, padded to a panel], bf16
    WideRows tiles;  // none where the expert is not wide
  };
  int64_t width() const { return layer_.gate_panels * kLanes; }

  const PackedLayer& layer_;
  const Routing& routing_;
  std::vector<Middle> middle_;  // of each active expert
  std::vector<Piece> pieces_;
};

}  // namespace pio
