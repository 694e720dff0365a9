#include "decoder/decoder.h"

#include <algorithm>
#include <string>

#include "decoder/rows.h"
#include "entries.h"
#include "lossless.h"
#include "thread_pool.h"

namespace pio::decoder {
namespace {

// A pass of many tokens goes through a layer in blocks, so that scratch memory is bounded and an interrupt is seen
// in time: the longest kernel call, at 40 G multiply-adds, takes a few tenths of a second on two AVX-512 cores.
constexpr int64_t kBlockMacs = 40'000'000'000;
constexpr int64_t kLeastBlock = 128, kMostBlock = 2048;
// Scratch memory above this is given back after the pass that needed it.
constexpr int64_t kKept = 64 << 20;

int64_t macs(const Linear& w) { return w.rows * w.cols; }
int64_t macs(const Mlp& m) { return macs(m.gate) + macs(m.up); }

// Multiply-adds per row of the largest single kernel call of a layer.
int64_t largest_call(const Layer& layer, int64_t hidden) {
  int64_t most = 1;
  if (layer.mlp) most = std::max(most, macs(*layer.mlp));
  if (layer.mixture) most = std::max(most, 3 * layer.mixture->router.top_k * hidden * layer.mixture->experts.inner);
  return most;
}

}  // namespace

Decoder::Decoder(Model model, std::function<void()> poll)
    : model_(std::move(model)),
      poll_(std::move(poll)),
      dtype_(require_dtype(model_.dtype, "decoder")),
      size_(static_cast<int64_t>(size_of(dtype_))) {
  require(!model_.layers.empty(), "decoder: a model must have layers");
  require(model_.table.has_value() == model_.head.has_value(), "decoder: table and head come together");
  int64_t most = 1;
  for (const Layer& layer : model_.layers) {
    require(layer.grouped.has_value() != layer.latent.has_value(), "decoder: a layer has one kind of attention");
    require(layer.mlp.has_value() != layer.mixture.has_value(), "decoder: a layer has one kind of feed-forward part");
    most = std::max(most, largest_call(layer, model_.hidden));
  }
  block_rows_ = std::clamp(kBlockMacs / most, kLeastBlock, kMostBlock);
}

int64_t Decoder::scratch_bytes() const {
  int64_t total = 0;
  for (const Buffer& buffer : buffers_) total += buffer.size();
  return total;
}

void Decoder::check(const Pass& pass) const {
  const size_t alignment = static_cast<size_t>(size_);
  require(pass.batch > 0 && pass.tokens > 0, "decoder: a pass needs at least one row and one token");
  require(pass.threads > 0, "decoder: threads must be positive");
  require_address(pass.x, alignment, "decoder", "x");
  require_address(pass.out, alignment, "decoder", "out");
  require_address(pass.cos, alignment, "decoder", "cos");
  require_address(pass.sin, alignment, "decoder", "sin");
  const CacheMemory& cache = *pass.cache;
  require(cache.layers.size() == 1 || cache.layers.size() == model_.layers.size(),
          "decoder: the cache has " + std::to_string(cache.layers.size()) + " layers, the model " +
              std::to_string(model_.layers.size()));
  require(cache.batch == pass.batch, "decoder: the cache holds " + std::to_string(cache.batch) +
                                         " rows, the batch has " + std::to_string(pass.batch));
  require(pass.start >= 0 && pass.start + pass.tokens <= cache.capacity,
          "decoder: " + std::to_string(pass.tokens) + " tokens after " + std::to_string(pass.start) +
              " do not fit into a cache of " + std::to_string(cache.capacity));
  for (const int64_t row : pass.visual->positions)
    require(row >= 0 && row < pass.batch * pass.tokens, "decoder: a visual position lies outside the pass");
}

std::vector<Block> Decoder::blocks(const Pass& pass) const {
  // A mask that is not causal may look at tokens of later blocks, which are not in the cache yet.
  if (!pass.causal || pass.batch * pass.tokens <= block_rows_) return {{0, pass.batch, 0, pass.tokens}};
  std::vector<Block> out;
  for (int64_t b = 0; b < pass.batch; ++b)
    for (int64_t t = 0; t < pass.tokens; t += block_rows_)
      out.push_back({b, 1, t, std::min(block_rows_, pass.tokens - t)});
  return out;
}

void Decoder::run(const CacheMemory& cache, const Visual& visual, Pass pass) {
  const std::lock_guard<std::mutex> alone(busy_);
  keep_threads(pass.threads, [&] { run_layers(cache, visual, pass); });
  trim();
}

void Decoder::trim() {
  if (scratch_bytes() <= kKept) return;
  for (Buffer& buffer : buffers_) buffer.release();
}

void Decoder::run_layers(const CacheMemory& cache, const Visual& visual, Pass& pass) {
  pass.cache = &cache;
  pass.visual = &visual;
  pass.dtype = dtype_;
  check(pass);
  const std::vector<Block> all = blocks(pass);
  const Address pending = take(kPending, pass.batch * pass.tokens * model_.hidden);
  for (size_t i = 0; i < model_.layers.size(); ++i) {
    const Layer& layer = model_.layers[i];
    for (const Block& block : all) {
      enter_layer(pass, block, i);
      layer.grouped ? grouped(pass, block, i, *layer.grouped) : latent(pass, block, i, *layer.latent);
      poll_();
      const int64_t first = (block.first_batch * pass.tokens + block.first_token) * model_.hidden;
      const Address hidden = element(pass.out, first);
      const Address before = i == 0 ? element(pass.x, first) : hidden;
      const Norm& n = layer.before_feed_forward;
      rms_norm(buffers_[kProjected].take(0), before, n.weight, hidden, buffers_[kNormed].take(0), block.rows(),
               model_.hidden, model_.hidden, n.eps, model_.dtype, pass.threads);
      feed_forward(pass, block.rows(), layer, element(pending, first));
      poll_();
    }
  }
  for (const Block& block : all) leave_stack(pass, block);
}

void Decoder::enter_layer(const Pass& pass, const Block& block, size_t layer) {
  const Norm& n = model_.layers[layer].before_attention;
  const Address out = take(kNormed, block.rows() * model_.hidden);
  if (layer == 0) {
    const int64_t first = (block.first_batch * pass.tokens + block.first_token) * model_.hidden;
    return norm(pass, element(pass.x, first), model_.hidden, n, out, block.rows(), model_.hidden);
  }
  norm_after(pass, block, n, buffers_[kPending].take(0), out, layer - 1);
}

void Decoder::leave_stack(const Pass& pass, const Block& block) {
  const int64_t first = (block.first_batch * pass.tokens + block.first_token) * model_.hidden;
  norm_after(pass, block, model_.last, buffers_[kPending].take(0), element(pass.out, first), model_.layers.size() - 1);
}

// hidden += added (and what `layer` gains from images); out = norm(hidden). out may be the hidden states themselves.
void Decoder::norm_after(const Pass& pass, const Block& block, const Norm& n, Address added, Address out,
                         size_t layer) {
  const int64_t first = (block.first_batch * pass.tokens + block.first_token) * model_.hidden;
  const int64_t count = block.rows() * model_.hidden;
  const Address hidden = element(pass.out, first);
  if (layer < pass.visual->embeds.size()) {
    add_rows(element(added, first), hidden, hidden, count, dtype_, pass.threads);
    add_visuals(pass, block, hidden, layer);
    return norm(pass, hidden, model_.hidden, n, out, block.rows(), model_.hidden);
  }
  rms_norm(element(added, first), hidden, n.weight, hidden, out, block.rows(), model_.hidden, model_.hidden, n.eps,
           model_.dtype, pass.threads);
}

void Decoder::add_visuals(const Pass& pass, const Block& block, Address hidden, size_t layer) {
  const std::vector<int64_t>& rows = pass.visual->positions;
  const int64_t first = block.first_batch * pass.tokens + block.first_token;
  auto next = std::lower_bound(rows.begin(), rows.end(), first);
  for (; next != rows.end() && *next < first + block.rows(); ++next) {
    const Address target = element(hidden, (*next - first) * model_.hidden);
    add_rows(element(pass.visual->embeds[layer], (next - rows.begin()) * model_.hidden), target, target, model_.hidden,
             dtype_, 1);
  }
}

void Decoder::norm(const Pass& pass, Address x, int64_t x_stride, const Norm& n, Address out, int64_t rows,
                   int64_t width) {
  rms_norm(x, 0, n.weight, 0, out, rows, width, x_stride, n.eps, model_.dtype, pass.threads);
}

void Decoder::multiply(const Pass& pass, Address x, int64_t rows, std::initializer_list<Output> outputs) {
  for (auto next = outputs.begin(); next != outputs.end();) {
    const Linear& first = *next->weight;
    std::vector<uint64_t> targets;
    for (; next != outputs.end() && next->weight->bits == first.bits && next->weight->group == first.group; ++next) {
      const Linear& w = *next->weight;
      if (w.bits)
        targets.insert(targets.end(), {w.data, w.scales, w.bias, next->out, static_cast<uint64_t>(w.rows)});
      else
        targets.insert(targets.end(), {w.data, w.bias, next->out, static_cast<uint64_t>(w.rows)});
    }
    if (first.bits == kLosslessBits)
      lossless_linear(x, rows, first.cols, targets, pass.threads);
    else if (first.bits)
      linear(x, rows, first.cols, model_.dtype, first.bits, first.group, targets, pass.threads);
    else
      dense_linear(x, rows, first.cols, model_.dtype, targets, pass.threads);
  }
}

}  // namespace pio::decoder
