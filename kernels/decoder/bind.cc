#include "decoder/bind.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>

#include "decoder/decoder.h"
#include "decoder/rows.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace pio::decoder {
namespace {

// Lets Python's signal handlers run, ten times a second at most: Ctrl-C becomes the KeyboardInterrupt that it is.
class Interrupts {
 public:
  void operator()() {
    const auto now = std::chrono::steady_clock::now();
    if (now - last_ < std::chrono::milliseconds(100)) return;
    last_ = now;
    nb::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

void bind_weights(nb::module_& m) {
  nb::class_<Linear>(m, "Linear")
      .def(nb::init<Address, Address, Address, int64_t, int64_t, int, int>(), "data"_a, "scales"_a, "bias"_a, "rows"_a,
           "cols"_a, "bits"_a, "group"_a);
  nb::class_<Norm>(m, "Norm").def(nb::init<Address, float>(), "weight"_a, "eps"_a);
  nb::class_<Mlp>(m, "Mlp").def(nb::init<Linear, Linear, Linear>(), "gate"_a, "up"_a, "down"_a);
  nb::class_<Experts>(m, "Experts")
      .def(nb::init<Address, Address, Address, Address, int64_t, int64_t, int, int>(), "gate_up"_a, "gate_up_scales"_a,
           "down"_a, "down_scales"_a, "count"_a, "inner"_a, "bits"_a, "group"_a);
  nb::class_<Router>(m, "Router")
      .def(nb::init<Address, Address, int64_t, int64_t, int64_t, bool, bool, float>(), "weight"_a, "correction"_a,
           "top_k"_a, "groups"_a, "top_groups"_a, "softmax"_a, "normalize"_a, "scale"_a);
  nb::class_<Mixture>(m, "Mixture")
      .def(nb::init<Router, Experts, std::optional<Mlp>>(), "router"_a, "experts"_a, "shared"_a.none());
}

void bind_layers(nb::module_& m) {
  nb::class_<Grouped>(m, "Grouped")
      .def(nb::init<Linear, Linear, Linear, Linear, Norm, Norm, int64_t, int64_t, int64_t, float>(), "q"_a, "k"_a,
           "v"_a, "o"_a, "q_norm"_a, "k_norm"_a, "heads"_a, "kv_heads"_a, "dim"_a, "scaling"_a);
  nb::class_<Latent>(m, "Latent")
      .def(nb::init<std::optional<Linear>, Norm, Linear, Linear, Linear, Linear, Norm, Address, int64_t, int64_t,
                    int64_t, int64_t, int64_t, bool, bool, float>(),
           "q_a"_a.none(), "q_norm"_a, "q"_a, "kv_a"_a, "kv_b"_a, "o"_a, "kv_norm"_a, "kv_b_dense"_a, "heads"_a,
           "nope"_a, "rope"_a, "v"_a, "rank"_a, "neighbours"_a, "by_head"_a, "scaling"_a);
  nb::class_<Layer>(m, "Layer")
      .def(nb::init<Norm, Norm, std::optional<Grouped>, std::optional<Latent>, std::optional<Mlp>,
                    std::optional<Mixture>>(),
           "before_attention"_a, "before_feed_forward"_a, "grouped"_a.none(), "latent"_a.none(), "mlp"_a.none(),
           "mixture"_a.none());
  nb::class_<Model>(m, "Model")
      .def(nb::init<int64_t, int64_t, int, Norm, std::vector<Layer>, std::optional<Linear>, std::optional<Linear>>(),
           "hidden"_a, "rope"_a, "dtype"_a, "last"_a, "layers"_a, "table"_a.none() = nb::none(),
           "head"_a.none() = nb::none());
  nb::class_<LayerCache>(m, "LayerCache")
      .def(nb::init<Address, Address, Address, Address, Address, Address>(), "first"_a, "first_scales"_a,
           "first_channel"_a, "second"_a, "second_scales"_a, "second_channel"_a);
  nb::class_<CacheMemory>(m, "CacheMemory")
      .def(nb::init<bool, int64_t, int64_t, std::vector<LayerCache>>(), "int8"_a, "batch"_a, "capacity"_a, "layers"_a);
  nb::class_<Visual>(m, "Visual")
      .def(nb::init<std::vector<int64_t>, std::vector<Address>>(), "positions"_a, "embeds"_a);
}

void run(Decoder& decoder, const CacheMemory& cache, const Visual& visual, Address x, Address out, Address cos,
         Address sin, int64_t angle_batch, Address mask, int64_t mask_batch, int64_t mask_query, bool causal,
         int64_t batch, int64_t tokens, int64_t start, int threads) {
  const Pass pass = {x,      out,   cos,    sin,   angle_batch, mask,       mask_batch, mask_query,
                     causal, batch, tokens, start, threads,     Dtype::f32, nullptr,    nullptr};
  decoder.run(cache, visual, pass);
}

// What a step reads of a pass; its rows are those of its tokens.
Pass step_pass(Address cos, Address sin, int64_t angle_batch, Address mask, int64_t mask_batch, int64_t batch,
               int64_t start, int threads) {
  Pass pass{};
  pass.cos = cos;
  pass.sin = sin;
  pass.angle_batch = angle_batch;
  pass.mask = mask;
  pass.mask_batch = mask_batch;
  pass.causal = true;
  pass.batch = batch;
  pass.tokens = 1;
  pass.start = start;
  pass.threads = threads;
  return pass;
}

void step(Decoder& decoder, const CacheMemory& cache, const std::vector<int64_t>& tokens, Address logits, Address cos,
          Address sin, int64_t angle_batch, Address mask, int64_t mask_batch, int64_t start, int threads) {
  const auto batch = static_cast<int64_t>(tokens.size());
  decoder.step(cache, tokens, logits, step_pass(cos, sin, angle_batch, mask, mask_batch, batch, start, threads));
}

std::vector<int64_t> greedy(Decoder& decoder, const CacheMemory& cache, Address ids, int64_t stride, int64_t length,
                            const std::vector<int64_t>& forbidden, Address cos, Address sin, int64_t angle_batch,
                            Address mask, int64_t mask_batch, int64_t batch, int64_t start, int threads) {
  require_address(ids, sizeof(int64_t), "decoder", "ids");
  return decoder.greedy(cache, reinterpret_cast<int64_t*>(ids), stride, length, forbidden,
                        step_pass(cos, sin, angle_batch, mask, mask_batch, batch, start, threads));
}

}  // namespace

void bind(nb::module_& module) {
  nb::module_ m = module.def_submodule("decoder", "The decoder stack as one call.");
  bind_weights(m);
  bind_layers(m);
  nb::class_<Decoder>(m, "Decoder")
      .def(
          "__init__", [](Decoder* self, const Model& model) { new (self) Decoder(model, Interrupts()); }, "model"_a)
      .def("run", &run, nb::call_guard<nb::gil_scoped_release>(), "cache"_a, "visual"_a, "x"_a, "out"_a, "cos"_a,
           "sin"_a, "angle_batch"_a, "mask"_a, "mask_batch"_a, "mask_query"_a, "causal"_a, "batch"_a, "tokens"_a,
           "start"_a, "threads"_a)
      .def("step", &step, nb::call_guard<nb::gil_scoped_release>(), "cache"_a, "tokens"_a, "logits"_a, "cos"_a, "sin"_a,
           "angle_batch"_a, "mask"_a, "mask_batch"_a, "start"_a, "threads"_a)
      .def("greedy", &greedy, nb::call_guard<nb::gil_scoped_release>(), "cache"_a, "ids"_a, "stride"_a, "length"_a,
           "forbidden"_a, "cos"_a, "sin"_a, "angle_batch"_a, "mask"_a, "mask_batch"_a, "batch"_a, "start"_a,
           "threads"_a)
      .def_prop_ro("scratch_bytes", &Decoder::scratch_bytes)
      .def_prop_rw("block_rows", &Decoder::block_rows, &Decoder::set_block_rows);
  m.def("absorbs", &absorbs, "queries"_a, "length"_a, "nope"_a, "rope"_a, "v"_a, "rank"_a);
  m.def(
      "choose_experts",
      [](const Router& router, Address logits, int64_t rows, int64_t count, int dtype, Address experts, Address weights,
         int threads) {
        choose_experts(router, logits, rows, count, require_dtype(dtype, "choose_experts"), experts, weights, threads);
      },
      nb::call_guard<nb::gil_scoped_release>(), "router"_a, "logits"_a, "rows"_a, "count"_a, "dtype"_a, "experts"_a,
      "weights"_a, "threads"_a);
}

}  // namespace pio::decoder
