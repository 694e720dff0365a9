// The entry functions of the kernels, for callers in C++. Each is described where it is defined, in src/<name>.cc;
// Python sees the same functions (bindings.cc). Errors are std::invalid_argument, thrown before memory is touched.
#pragma once
#include <cstdint>
#include <vector>

#include "check.h"

// clang-format off
namespace pio {

void dequantize(Address data, Address scales, int64_t rows, int64_t cols, int bits, int group, Address indices, int64_t count, Address out, int dtype, int threads);
void linear(Address x, int64_t m, int64_t cols, int dtype, int bits, int group, const std::vector<uint64_t>& targets, int threads);
void dense_linear(Address x, int64_t m, int64_t cols, int dtype, const std::vector<uint64_t>& targets, int threads);
void lossless_linear(Address x, int64_t m, int64_t cols, const std::vector<uint64_t>& targets, int threads);
void expand_lossless(Address data, Address index, int64_t rows, int64_t cols, Address indices, int64_t count, Address out, int threads);
void lossless_moe(Address x, int64_t tokens, int64_t hidden, int64_t inner, Address experts, Address weights, int64_t k, int64_t n_experts, Address gate_up_data, Address gate_up_index, Address down_data, Address down_index, Address out, int threads);
constexpr int64_t kMostShared = 8;  // tokens of a call of moe with a shared expert
void moe(Address x, int64_t tokens, int64_t hidden, int64_t inner, int dtype, Address experts, Address weights, int64_t k, int64_t n_experts, Address gate_up_data, Address gate_up_scales, Address down_data, Address down_scales, int bits, int group, const std::vector<uint64_t>& shared, Address out, int threads);
void head_linear(const std::vector<int64_t>& x, const std::vector<int64_t>& weight, const std::vector<int64_t>& out, int64_t batch, int64_t heads, int64_t tokens, bool transposed, int dtype, int threads);
void packed_head_linear(const std::vector<int64_t>& x, const std::vector<int64_t>& weight, const std::vector<int64_t>& out, int64_t batch, int64_t heads, int64_t tokens, bool transposed, int dtype, int threads);
void dense_moe(Address x, int64_t tokens, int64_t hidden, int64_t inner, int dtype, Address experts, Address weights, int64_t k, int64_t n_experts, Address gate_up, Address down, Address out, int threads);
void rms_norm(Address x, Address residual, Address weight, Address sum, Address out, int64_t rows, int64_t width, int64_t x_stride, float eps, int dtype, int threads);
void norm_rope(Address x, Address weight, Address cos, Address sin, Address out, int64_t batch, int64_t tokens, int64_t heads, int64_t dim, int64_t rope, int64_t x_batch, int64_t x_token, int64_t angle_batch, bool neighbours, float eps, int dtype, int angle_dtype, int threads);
void swiglu(Address gate, Address up, Address out, int64_t rows, int64_t width, int64_t gate_stride, int64_t up_stride, int dtype, int threads);
void int8_kv_append(Address x, Address channel, Address codes, Address scales, int64_t batch, int64_t heads, int64_t tokens, int64_t dim, int64_t capacity, int64_t start, int64_t x_batch, int64_t x_head, int64_t x_token, int dtype, int threads);
void int8_kv_attention(const std::vector<int64_t>& keys, const std::vector<int64_t>& second, const std::vector<int64_t>& values, const std::vector<int64_t>& mask, int64_t batch, int64_t kv_heads, int64_t group, int64_t queries, int64_t length, int64_t capacity, float softmax_scale, bool causal, Address out, int dtype, int threads);
void kv_attention(const std::vector<int64_t>& keys, const std::vector<int64_t>& second, const std::vector<int64_t>& values, const std::vector<int64_t>& mask, int64_t batch, int64_t kv_heads, int64_t group, int64_t queries, int64_t length, float softmax_scale, bool causal, Address out, int dtype, int threads);
void argmax(Address x, Address out, int64_t rows, int64_t width, int64_t stride, int dtype, int threads);

}  // namespace pio
// clang-format on
