// What the native decoder knows of a model: addresses of weights, which Python keeps alive, with their sizes and
// settings. Everything is filled once by optimizations/decoder/plan.py.
#pragma once
#include <cstdint>
#include <optional>
#include <vector>

#include "check.h"

namespace pio::decoder {

// y = x W^T + bias. bits 0: `data` is [rows, cols] in the element type of the model; 4 or 8: packed integers; 12: bf16
// without loss (lossless.h), `scales` its index, group unused. kernels/README.md draws all of them.
struct Linear {
  Address data, scales, bias;
  int64_t rows, cols;
  int bits, group;
};

struct Norm {
  Address weight;
  float eps;
};

struct Mlp {
  Linear gate, up, down;
};

// Stacked experts: gate_up [count, 2 * inner, hidden], down [count, hidden, inner]; packed or dense as in Linear.
struct Experts {
  Address gate_up, gate_up_scales, down, down_scales;
  int64_t count, inner;
  int bits, group;
};

// softmax: probabilities in float32 over the logits' element type, weights rounded to it (Qwen3-MoE). Otherwise
// sigmoids of float32 logits, a correction [count] for the choice alone, groups of experts, a final scale (GLM).
// weight: [count, hidden], float32 in the second case.
struct Router {
  Address weight, correction;
  int64_t top_k, groups, top_groups;
  bool softmax, normalize;
  float scale;
};

struct Mixture {
  Router router;
  Experts experts;
  std::optional<Mlp> shared;  // runs for every token, added
};

// Query heads share key/value heads; norm per head, rotation of halves.
struct Grouped {
  Linear q, k, v, o;
  Norm q_norm, k_norm;
  int64_t heads, kv_heads, dim;
  float scaling;
};

// Multi-head latent attention: the cache holds latents [rank] and a rotary key [rope] per token, shared by all heads.
// kv_b [heads * (nope + v), rank] expands latents; kv_b_dense is the same in the element type, for absorption. by_head:
// kv_b is packed and its halves of a head are whole panels, so that few queries can be absorbed without the dense one.
struct Latent {
  std::optional<Linear> q_a;  // with q_norm and q of its width; without: q reads the layer's input
  Norm q_norm;
  Linear q, kv_a, kv_b, o;
  Norm kv_norm;
  Address kv_b_dense;
  int64_t heads, nope, rope, v, rank;
  bool neighbours, by_head;
  float scaling;
};

struct Layer {
  Norm before_attention, before_feed_forward;
  std::optional<Grouped> grouped;
  std::optional<Latent> latent;
  std::optional<Mlp> mlp;
  std::optional<Mixture> mixture;
};

struct Model {
  int64_t hidden;
  int64_t rope;  // values of a row of cos and sin
  int dtype;     // check.h
  Norm last;
  std::vector<Layer> layers;
  // Both or none: rows that tokens are looked up in, and the output layer, [vocabulary, hidden] each.
  std::optional<Linear> table, head;
};

// Memory of one layer's cache for all rows of the batch. Dense: first [batch, kv_heads, capacity, d], second likewise.
// int8: codes, with scales and for the first an optional channel vector (src/int8_kv_append.cc).
struct LayerCache {
  Address first, first_scales, first_channel, second, second_scales, second_channel;
};

// One entry per layer, or a single one that the layers use one after the other when nothing has to be kept.
struct CacheMemory {
  bool int8;
  int64_t batch, capacity;
  std::vector<LayerCache> layers;

  const LayerCache& of(size_t layer) const { return layers[layers.size() == 1 ? 0 : layer]; }
};

}  // namespace pio::decoder
