// What the attention over a dense cache works on: shared by its per-instruction-set half and its entry.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "attention.h"
#include "check.h"

namespace pio {

constexpr int64_t kWidestDenseHead = 4096;

// One part of every key, and of every query: a product is the sum over the parts.
struct DenseKeyPart {
  const char *q, *k;
  int64_t dim, q_batch, q_head, q_token, k_batch, k_head, k_token;  // strides in elements
};

struct KvAttention {
  DenseKeyPart key[2];
  int parts = 0;
  const char* values;
  int64_t value_dim, v_batch, v_head, v_token;
  const uint8_t* mask = nullptr;  // 1: seen
  const float* bias = nullptr;    // added to the scores
  int64_t mask_batch = 0, mask_head = 0, mask_query = 0;
  int64_t kv_heads, group, queries, length;
  float softmax_scale;
  bool causal;
  char* out;
  Dtype dtype;

  int64_t wide() const { return dtype == Dtype::f32 ? 16 : 32; }  // elements of one vector
  int64_t padded(int64_t dim) const { return (dim + wide() - 1) / wide() * wide(); }
  // Elements of a query row: its parts one after the other, each padded with zeros to whole vectors.
  int64_t query_width() const {
    int64_t out = 0;
    for (int i = 0; i < parts; ++i) out += padded(key[i].dim);
    return out;
  }

  void take_part(const std::vector<int64_t>& n) {
    require(n.size() == 9, "kv_attention: a key part is described by 9 numbers");
    require_address(static_cast<Address>(n[0]), size_of(dtype), "kv_attention", "q");
    if (length > 0) require_address(static_cast<Address>(n[4]), size_of(dtype), "kv_attention", "keys");
    require_dim(n[8]);
    key[parts++] = {reinterpret_cast<const char*>(n[0]),
                    reinterpret_cast<const char*>(n[4]),
                    n[8],
                    n[1],
                    n[2],
                    n[3],
                    n[5],
                    n[6],
                    n[7]};
  }
  void take_values(const std::vector<int64_t>& n) {
    require(n.size() == 5, "kv_attention: values are described by 5 numbers");
    if (length > 0) require_address(static_cast<Address>(n[0]), size_of(dtype), "kv_attention", "values");
    require_dim(n[4]);
    values = reinterpret_cast<const char*>(n[0]);
    v_batch = n[1];
    v_head = n[2];
    v_token = n[3];
    value_dim = n[4];
  }
  void take_mask(const std::vector<int64_t>& n) {
    if (n.empty()) return;
    require(n.size() == 5, "kv_attention: a mask is described by 5 numbers");
    mask = reinterpret_cast<const uint8_t*>(n[0]);
    bias = reinterpret_cast<const float*>(n[1]);
    mask_batch = n[2];
    mask_head = n[3];
    mask_query = n[4];
  }
  static void require_dim(int64_t dim) {
    require(dim > 0 && dim <= kWidestDenseHead,
            "kv_attention: a head must have 1 to 4096 values, got " + std::to_string(dim));
  }
};

// A unit's key part and values from token t on.
inline const char* key_of(const KvAttention& a, const DenseKeyPart& k, const Unit& u, int64_t t) {
  return k.k + static_cast<int64_t>(size_of(a.dtype)) * (u.batch * k.k_batch + u.kv_head * k.k_head + t * k.k_token);
}
inline const char* value_of(const KvAttention& a, const Unit& u, int64_t t) {
  return a.values +
         static_cast<int64_t>(size_of(a.dtype)) * (u.batch * a.v_batch + u.kv_head * a.v_head + t * a.v_token);
}

// Memory of one unit's walk. Values are gathered in the order in which vectors widen: of every 32 bf16, first the even
// ones, then the odd ones.
struct KvScratch {
  RowState* state;
  float* gathered;  // [rows, stride]
  int64_t stride;   // the values' dimension, padded
  char* queries;    // [rows, query_width]
  float* keys;      // of a tile: [16-token blocks][lane rows][16 tokens], a lane row is one element or one pair of bf16
  const Unit* next;  // of a short unit the one that this thread mostly has next, or null
};

// One unit in bf16 on AMX: what attend_dense is on the other sets (src/kv_attention_amx.cc).
void amx_attend_dense(const KvAttention& a, const Unit& u, const KvScratch& s);

}  // namespace pio
