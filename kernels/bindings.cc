// optimizations._native: one line per kernel.
//
// Tensors cross as addresses; the Python face (optimizations/native/) checks them against the tensors they come from.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "caches.h"
#include "check.h"
#include "decoder/bind.h"
#include "isa.h"
#include "thread_pool.h"

namespace nb = nanobind;
using namespace nb::literals;

// Declares a kernel and binds it under its own name; the interpreter lock is released while it runs. A wrong signature
// here is a link error. Arguments after the parameter list are the names that Python sees.
#define PIO_BIND(result, name, parameters, ...) \
  result name parameters;                       \
  module.def(#name, &name, nb::call_guard<nb::gil_scoped_release>() __VA_OPT__(, ) __VA_ARGS__)

namespace pio {

NB_MODULE(_native, module) {
  module.def("isa", &isa, "Name of the instruction set in use.");
  module.def("available_isas", &available_isas, "Names of the sets this machine can run, worst first.");
  module.def("set_isa", &set_isa, "name"_a, "Uses that set from now on; 'auto' is the best.");
  module.def("few_ways", &few_ways, "Whether memory is asked for into the second-level cache: the first has few ways.");
  module.def("set_few_ways", &set_few_ways, "few"_a, "Takes it for that from now on.");
  module.def("thread_source", &thread_source, "Where threads come from: 'torch' (its OpenMP runtime) or 'own'.");
  module.def("set_thread_source", &set_thread_source, "source"_a, "Takes threads from there from now on.");
  module.def("pool_workers", &pool_workers, "Own worker threads alive, without the caller.");
  isa();  // a wrong PIO_ISA is an error of the import, not of the first call

  // clang-format off
  PIO_BIND(uint32_t, stream_read, (Address data, int64_t bytes, int threads), "data"_a, "bytes"_a, "threads"_a);
  PIO_BIND(int64_t, dot_products, (Address bytes, int64_t rounds, int threads), "bytes"_a, "rounds"_a, "threads"_a);
  PIO_BIND(int64_t, tile_products, (Address bytes, int64_t rounds, bool bf16, int threads), "bytes"_a, "rounds"_a, "bf16"_a, "threads"_a);
  PIO_BIND(int, packed_layout, (void));
  PIO_BIND(void, pack, (Address weight, int64_t rows, int64_t cols, int dtype, int bits, int group, Address data, Address scales, int threads), "weight"_a, "rows"_a, "cols"_a, "dtype"_a, "bits"_a, "group"_a, "data"_a, "scales"_a, "threads"_a);
  PIO_BIND(void, dequantize, (Address data, Address scales, int64_t rows, int64_t cols, int bits, int group, Address indices, int64_t count, Address out, int dtype, int threads), "data"_a, "scales"_a, "rows"_a, "cols"_a, "bits"_a, "group"_a, "indices"_a, "count"_a, "out"_a, "dtype"_a, "threads"_a);
  PIO_BIND(void, linear, (Address x, int64_t m, int64_t cols, int dtype, int bits, int group, const std::vector<uint64_t>& targets, int threads), "x"_a, "m"_a, "cols"_a, "dtype"_a, "bits"_a, "group"_a, "targets"_a, "threads"_a);
  PIO_BIND(void, dense_linear, (Address x, int64_t m, int64_t cols, int dtype, const std::vector<uint64_t>& targets, int threads), "x"_a, "m"_a, "cols"_a, "dtype"_a, "targets"_a, "threads"_a);
  PIO_BIND(int64_t, pack_lossless, (Address weight, int64_t rows, int64_t cols, Address data, Address index, int threads), "weight"_a, "rows"_a, "cols"_a, "data"_a, "index"_a, "threads"_a);
  PIO_BIND(void, expand_lossless, (Address data, Address index, int64_t rows, int64_t cols, Address indices, int64_t count, Address out, int threads), "data"_a, "index"_a, "rows"_a, "cols"_a, "indices"_a, "count"_a, "out"_a, "threads"_a);
  PIO_BIND(void, lossless_linear, (Address x, int64_t m, int64_t cols, const std::vector<uint64_t>& targets, int threads), "x"_a, "m"_a, "cols"_a, "targets"_a, "threads"_a);
  PIO_BIND(void, lossless_moe, (Address x, int64_t tokens, int64_t hidden, int64_t inner, Address experts, Address weights, int64_t k, int64_t n_experts, Address gate_up_data, Address gate_up_index, Address down_data, Address down_index, Address out, int threads), "x"_a, "tokens"_a, "hidden"_a, "inner"_a, "experts"_a, "weights"_a, "k"_a, "n_experts"_a, "gate_up_data"_a, "gate_up_index"_a, "down_data"_a, "down_index"_a, "out"_a, "threads"_a);
  PIO_BIND(void, moe, (Address x, int64_t tokens, int64_t hidden, int64_t inner, int dtype, Address experts, Address weights, int64_t k, int64_t n_experts, Address gate_up_data, Address gate_up_scales, Address down_data, Address down_scales, int bits, int group, const std::vector<uint64_t>& shared, Address out, int threads), "x"_a, "tokens"_a, "hidden"_a, "inner"_a, "dtype"_a, "experts"_a, "weights"_a, "k"_a, "n_experts"_a, "gate_up_data"_a, "gate_up_scales"_a, "down_data"_a, "down_scales"_a, "bits"_a, "group"_a, "shared"_a, "out"_a, "threads"_a);
  PIO_BIND(void, head_linear, (const std::vector<int64_t>& x, const std::vector<int64_t>& weight, const std::vector<int64_t>& out, int64_t batch, int64_t heads, int64_t tokens, bool transposed, int dtype, int threads), "x"_a, "weight"_a, "out"_a, "batch"_a, "heads"_a, "tokens"_a, "transposed"_a, "dtype"_a, "threads"_a);
  PIO_BIND(void, packed_head_linear, (const std::vector<int64_t>& x, const std::vector<int64_t>& weight, const std::vector<int64_t>& out, int64_t batch, int64_t heads, int64_t tokens, bool transposed, int dtype, int threads), "x"_a, "weight"_a, "out"_a, "batch"_a, "heads"_a, "tokens"_a, "transposed"_a, "dtype"_a, "threads"_a);
  PIO_BIND(void, dense_moe, (Address x, int64_t tokens, int64_t hidden, int64_t inner, int dtype, Address experts, Address weights, int64_t k, int64_t n_experts, Address gate_up, Address down, Address out, int threads), "x"_a, "tokens"_a, "hidden"_a, "inner"_a, "dtype"_a, "experts"_a, "weights"_a, "k"_a, "n_experts"_a, "gate_up"_a, "down"_a, "out"_a, "threads"_a);
  PIO_BIND(void, rms_norm, (Address x, Address residual, Address weight, Address sum, Address out, int64_t rows, int64_t width, int64_t x_stride, float eps, int dtype, int threads), "x"_a, "residual"_a, "weight"_a, "sum"_a, "out"_a, "rows"_a, "width"_a, "x_stride"_a, "eps"_a, "dtype"_a, "threads"_a);
  PIO_BIND(void, norm_rope, (Address x, Address weight, Address cos, Address sin, Address out, int64_t batch, int64_t tokens, int64_t heads, int64_t dim, int64_t rope, int64_t x_batch, int64_t x_token, int64_t angle_batch, bool neighbours, float eps, int dtype, int angle_dtype, int threads), "x"_a, "weight"_a, "cos"_a, "sin"_a, "out"_a, "batch"_a, "tokens"_a, "heads"_a, "dim"_a, "rope"_a, "x_batch"_a, "x_token"_a, "angle_batch"_a, "neighbours"_a, "eps"_a, "dtype"_a, "angle_dtype"_a, "threads"_a);
  PIO_BIND(void, swiglu, (Address gate, Address up, Address out, int64_t rows, int64_t width, int64_t gate_stride, int64_t up_stride, int dtype, int threads), "gate"_a, "up"_a, "out"_a, "rows"_a, "width"_a, "gate_stride"_a, "up_stride"_a, "dtype"_a, "threads"_a);
  PIO_BIND(void, gelu, (Address x, Address out, int64_t rows, int64_t width, int64_t stride, int dtype, int threads), "x"_a, "out"_a, "rows"_a, "width"_a, "stride"_a, "dtype"_a, "threads"_a);
  PIO_BIND(void, argmax, (Address x, Address out, int64_t rows, int64_t width, int64_t stride, int dtype, int threads), "x"_a, "out"_a, "rows"_a, "width"_a, "stride"_a, "dtype"_a, "threads"_a);
  PIO_BIND(void, int8_kv_append, (Address x, Address channel, Address codes, Address scales, int64_t batch, int64_t heads, int64_t tokens, int64_t dim, int64_t capacity, int64_t start, int64_t x_batch, int64_t x_head, int64_t x_token, int dtype, int threads), "x"_a, "channel"_a, "codes"_a, "scales"_a, "batch"_a, "heads"_a, "tokens"_a, "dim"_a, "capacity"_a, "start"_a, "x_batch"_a, "x_head"_a, "x_token"_a, "dtype"_a, "threads"_a);
  PIO_BIND(void, int8_kv_attention, (const std::vector<int64_t>& keys, const std::vector<int64_t>& second, const std::vector<int64_t>& values, const std::vector<int64_t>& mask, int64_t batch, int64_t kv_heads, int64_t group, int64_t queries, int64_t length, int64_t capacity, float softmax_scale, bool causal, Address out, int dtype, int threads), "keys"_a, "second"_a, "values"_a, "mask"_a, "batch"_a, "kv_heads"_a, "group"_a, "queries"_a, "length"_a, "capacity"_a, "softmax_scale"_a, "causal"_a, "out"_a, "dtype"_a, "threads"_a);
  PIO_BIND(void, kv_attention, (const std::vector<int64_t>& keys, const std::vector<int64_t>& second, const std::vector<int64_t>& values, const std::vector<int64_t>& mask, int64_t batch, int64_t kv_heads, int64_t group, int64_t queries, int64_t length, float softmax_scale, bool causal, Address out, int dtype, int threads), "keys"_a, "second"_a, "values"_a, "mask"_a, "batch"_a, "kv_heads"_a, "group"_a, "queries"_a, "length"_a, "softmax_scale"_a, "causal"_a, "out"_a, "dtype"_a, "threads"_a);
  // clang-format on
  decoder::bind(module);
}

}  // namespace pio
