// The half of a layer after attention: one SwiGLU, or a router, its experts and perhaps a shared one.
#include "decoder/decoder.h"
#include "decoder/rows.h"
#include "entries.h"
#include "lossless.h"

namespace pio::decoder {
namespace {

// Whether moe can take the shared expert along: integers packed like the experts, without biases.
bool one_of(const Experts& e, const Mlp& m) {
  if (e.bits == 0 || e.bits == kLosslessBits) return false;
  const auto fits = [&](const Linear& w) { return w.bits == e.bits && w.group == e.group && w.bias == 0; };
  return m.gate.rows == e.inner && fits(m.gate) && fits(m.up) && fits(m.down);
}

std::vector<uint64_t> addresses_of(const Mlp& m) {
  return {m.gate.data, m.gate.scales, m.up.data, m.up.scales, m.down.data, m.down.scales};
}

}  // namespace

void Decoder::feed_forward(const Pass& pass, int64_t rows, const Layer& layer, Address out) {
  const Address x = buffers_[kNormed].take(0);
  layer.mlp ? mlp(pass, rows, *layer.mlp, x, out) : mixture(pass, rows, *layer.mixture, x, out);
}

void Decoder::mlp(const Pass& pass, int64_t rows, const Mlp& m, Address x, Address out) {
  const int64_t inner = m.gate.rows;
  const Address gate = take(kGate, rows * inner), up = take(kUp, rows * inner);
  multiply(pass, x, rows, {{&m.gate, gate}, {&m.up, up}});
  swiglu(gate, up, gate, rows, inner, inner, inner, model_.dtype, pass.threads);
  multiply(pass, gate, rows, {{&m.down, out}});
}

void Decoder::mixture(const Pass& pass, int64_t rows, const Mixture& m, Address x, Address out) {
  const Router& router = m.router;
  const Experts& e = m.experts;
  const Address logits = buffers_[kLogits].take(rows * e.count * 4);
  const std::vector<uint64_t> target = {router.weight, 0, logits, static_cast<uint64_t>(e.count)};
  if (router.softmax) {
    dense_linear(x, rows, model_.hidden, model_.dtype, target, pass.threads);
  } else {
    const Address wide = buffers_[kWide].take(rows * model_.hidden * 4);
    widen_rows(x, wide, rows * model_.hidden, dtype_, pass.threads);
    dense_linear(wide, rows, model_.hidden, static_cast<int>(Dtype::f32), target, pass.threads);
  }
  const Address experts = buffers_[kExperts].take(rows * router.top_k * 8);
  const Address weights = buffers_[kWeights].take(rows * router.top_k * 4);
  choose_experts(router, logits, rows, e.count, dtype_, experts, weights, pass.threads);
  // Of few rows the shared expert is one more of the others: three calls less for which threads wait for each other.
  const bool joined = m.shared && rows <= kMostShared && one_of(e, *m.shared);
  if (e.bits == kLosslessBits)
    lossless_moe(x, rows, model_.hidden, e.inner, experts, weights, router.top_k, e.count, e.gate_up, e.gate_up_scales,
                 e.down, e.down_scales, out, pass.threads);
  else if (e.bits)
    moe(x, rows, model_.hidden, e.inner, model_.dtype, experts, weights, router.top_k, e.count, e.gate_up,
        e.gate_up_scales, e.down, e.down_scales, e.bits, e.group,
        joined ? addresses_of(*m.shared) : std::vector<uint64_t>{}, out, pass.threads);
  else
    dense_moe(x, rows, model_.hidden, e.inner, model_.dtype, experts, weights, router.top_k, e.count, e.gate_up, e.down,
              out, pass.threads);
  if (!m.shared || joined) return;
  const Address mixed = take(kMixed, rows * model_.hidden);
  mlp(pass, rows, *m.shared, x, mixed);
  add_rows(out, mixed, out, rows * model_.hidden, dtype_, pass.threads);
}

}  // namespace pio::decoder
