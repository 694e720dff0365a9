// What the attention over an int8 cache works on: shared by its per-instruction-set half and its entry.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "attention.h"
#include "check.h"
#include "piece.h"
#include "two_parts.h"

namespace pio {

constexpr int64_t kWidestHead = 1024;  // 127 * 127 * 128 * 1024 still fits int32
struct KeyPart {
  const void* q;
  const float* channel;  // [dim]: the cache holds key / channel, so the query is multiplied; or none
  const uint8_t* codes;
  const float* scales;
  int64_t dim, q_batch, q_head, q_token;
};

struct Int8Attention {
  KeyPart key[2];
  int parts = 0;
  const uint8_t* value_codes;
  const float *value_scales, *value_channel;
  int64_t value_dim;
  const uint8_t* mask = nullptr;  // 1: seen
  const float* bias = nullptr;    // added to the scores
  int64_t mask_batch = 0, mask_head = 0, mask_query = 0;
  int64_t kv_heads, group, queries, length, capacity;
  float softmax_scale;
  bool causal;
  void* out;
  Dtype dtype;

  void take_part(const std::vector<int64_t>& k) {
    require(k.size() == 8, "int8_kv_attention: a key part is described by 8 numbers");
    require_address(static_cast<Address>(k[0]), size_of(dtype), "int8_kv_attention", "q");
    require_address(static_cast<Address>(k[2]), 1, "int8_kv_attention", "key codes");
    require_address(static_cast<Address>(k[3]), 4, "int8_kv_attention", "key scales");
    require_dim(k[4]);
    key[parts++] = {reinterpret_cast<const void*>(k[0]),
                    reinterpret_cast<const float*>(k[1]),
                    reinterpret_cast<const uint8_t*>(k[2]),
                    reinterpret_cast<const float*>(k[3]),
                    k[4],
                    k[5],
                    k[6],
                    k[7]};
  }
  void take_keys(const std::vector<int64_t>& first, const std::vector<int64_t>& second) {
    take_part(first);
    if (!second.empty()) take_part(second);
  }
  void take_values(const std::vector<int64_t>& v) {
    require(v.size() == 4, "int8_kv_attention: values are described by 4 numbers");
    require_address(static_cast<Address>(v[0]), 1, "int8_kv_attention", "value codes");
    require_address(static_cast<Address>(v[1]), 4, "int8_kv_attention", "value scales");
    require_dim(v[3]);
    value_codes = reinterpret_cast<const uint8_t*>(v[0]);
    value_scales = reinterpret_cast<const float*>(v[1]);
    value_channel = reinterpret_cast<const float*>(v[2]);
    value_dim = v[3];
  }
  void take_mask(const std::vector<int64_t>& m) {
    if (m.empty()) return;
    require(m.size() == 5, "int8_kv_attention: a mask is described by 5 numbers");
    mask = reinterpret_cast<const uint8_t*>(m[0]);
    bias = reinterpret_cast<const float*>(m[1]);
    mask_batch = m[2];
    mask_head = m[3];
    mask_query = m[4];
  }
  static void require_dim(int64_t dim) {
    require(dim > 0 && dim % 4 == 0 && dim <= kWidestHead,
            "int8_kv_attention: a head must have a multiple of 4 values, at most 1024, got " + std::to_string(dim));
  }
};

// Query rows as integers in two parts.
struct QueryPart {
  int8_t *hi, *lo;
  int64_t stride;  // dim rounded up to 16, the rest zero
  float scale[kRows];
  int32_t zero_hi[kRows], zero_lo[kRows];
};

// Probabilities of a tile for up to 8 rows: two parts, spread for dot_bytes against transposed values.
struct TileParts {
  alignas(64) uint8_t parts[8][2][kTile / 16][64];
  float shrink[8], scale[8];
  int32_t zero[8];
};

struct Scratch {
  QueryPart* query;
  RowState* state;
  float* gathered;  // [rows, stride]
  int64_t stride;
  const Unit* next;  // of a short unit the one that this thread mostly has next, or null
};

struct QueryMemory {
  QueryPart parts[2];
  std::vector<int8_t> bytes;
  explicit QueryMemory(const Int8Attention& a) {
    int64_t size = 0;
    for (int i = 0; i < a.parts; ++i) size += 2 * kRows * ((a.key[i].dim + 15) / 16 * 16);
    bytes.resize(static_cast<size_t>(size + 64));  // a tile reads 64 at a time, past the end of the last row
    int8_t* next = bytes.data();
    for (int i = 0; i < a.parts; ++i) {
      parts[i].stride = (a.key[i].dim + 15) / 16 * 16;
      parts[i].hi = next;
      parts[i].lo = next + kRows * parts[i].stride;
      next += 2 * kRows * parts[i].stride;
    }
  }
};

// One unit on AMX, its queries taken: what attend is on the other sets (src/int8_kv_attention_amx.cc).
void amx_attend_int8(const Int8Attention& a, const Unit& u, const Scratch& s);

}  // namespace pio
