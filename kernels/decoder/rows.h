// Small passes over rows between the kernels: copies, sums, widening, and the choice of experts.
#pragma once
#include <cstdint>

#include "check.h"
#include "decoder/layers.h"

namespace pio::decoder {

// out[i] = a[i] + b[i], rounded to the element type; out may be a or b.
void add_rows(Address a, Address b, Address out, int64_t count, Dtype dtype, int threads);

// out[i] = x[i] as float32.
void widen_rows(Address x, Address out, int64_t count, Dtype dtype, int threads);

// A block [batch, heads, tokens, dim] with strides in elements.
struct Strided {
  Address data;
  int64_t batch, head, token;
};

// to[b, h, t, 0 .. dim) = from[b, h, t, 0 .. dim); elements of `size` bytes.
void copy_block(const Strided& from, const Strided& to, int64_t batch, int64_t heads, int64_t tokens, int64_t dim,
                size_t size, int threads);

// logits [rows, count] -> experts int64 [rows, top_k] in descending order of preference, the lower number first among
// equals, and weights float32 [rows, top_k]. Logits in the element type for softmax routers, else float32.
void choose_experts(const Router& router, Address logits, int64_t rows, int64_t count, Dtype dtype, Address experts,
                    Address weights, int threads);

}  // namespace pio::decoder
