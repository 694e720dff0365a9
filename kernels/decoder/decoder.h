// The decoder stack as one call: all layers over a cache, composed of the kernels of src/.
#pragma once
#include <array>
#include <functional>
#include <initializer_list>
#include <memory>
#include <mutex>

#include "decoder/buffer.h"
#include "decoder/layers.h"
#include "decoder/rows.h"

namespace pio::decoder {

// DeepStack: after layer i < embeds.size(), row positions[j] of hidden states gains row j of embeds[i]. positions:
// ascending indices into [batch * tokens].
struct Visual {
  std::vector<int64_t> positions;
  std::vector<Address> embeds;
};

// One forward pass. Dense row-major memory in the element type of the model.
struct Pass {
  Address x, out;       // [batch, tokens, hidden]; out: after the last norm, and the hidden states until then
  Address cos, sin;     // [1 or batch, tokens, rope]
  int64_t angle_batch;  // elements between batches of cos and sin, 0 when all share their positions
  Address mask;         // bytes, 1: seen; or 0
  int64_t mask_batch, mask_query;  // strides; tokens of the cache dense
  bool causal;                     // query i sees the first start + i + 1 tokens, besides the mask
  int64_t batch, tokens;
  int64_t start;  // tokens in the cache already
  int threads;
  Dtype dtype;
  const CacheMemory* cache;
  const Visual* visual;
};

// Rows of a pass that go through a layer together: whole batch rows, or a stretch of tokens of one of them.
struct Block {
  int64_t first_batch, batch, first_token, tokens;
  int64_t rows() const { return batch * tokens; }
};

// Whether latent attention over `length` cached tokens (the queries' own among them) takes fewer multiplications with
// absorbed queries than with expanded latents.
bool absorbs(int64_t queries, int64_t length, int64_t nope, int64_t rope, int64_t v, int64_t rank);

class Decoder {
 public:
  // poll: called between kernels; what it throws ends the pass. The cache is then as it was, but for slots past
  // `start`.
  Decoder(Model model, std::function<void()> poll);

  // Throws std::invalid_argument when the arguments do not fit the model.
  void run(const CacheMemory& cache, const Visual& visual, Pass pass);

  // One token of every row (step.cc): looked up, passed through the layers and multiplied with the output layer.
  // tokens: [batch]; logits: [batch, vocabulary]. Of `pass` x, out and tokens are not read. Throws as run, and where
  // the model has no output layer or no such token.
  void step(const CacheMemory& cache, const std::vector<int64_t>& tokens, Address logits, Pass pass);

  // The same from the last of `length` ids of every row to the next, the likeliest one that is not `forbidden`: it is
  // written behind them and returned. Rows of ids are `stride` apart.
  std::vector<int64_t> greedy(const CacheMemory& cache, int64_t* ids, int64_t stride, int64_t length,
                              const std::vector<int64_t>& forbidden, Pass pass);

  int64_t scratch_bytes() const;
  // Rows that go through a layer together.
  int64_t block_rows() const { return block_rows_; }
  void set_block_rows(int64_t rows) {
    require(rows > 0, "decoder: block_rows must be positive");
    block_rows_ = rows;
  }

 private:
  struct Output {
    const Linear* weight;
    Address out;
  };
  enum Slot {
    kNormed,
    kPending,
    kQ,
    kK,
    kV,
    kQTurned,
    kKTurned,
    kQuery,
    kAttended,
    kProjected,
    kGate,
    kUp,
    kWide,
    kLogits,
    kExperts,
    kWeights,
    kMixed,
    kExpanded,
    kEmbedded,
    kHidden,
    kVocabulary,
    kSlots
  };

  void run_layers(const CacheMemory& cache, const Visual& visual, Pass& pass);
  void take_step(const CacheMemory& cache, const std::vector<int64_t>& tokens, Address logits, Pass& pass);
  void look_up(const std::vector<int64_t>& tokens, const Pass& pass, Address out) const;
  void forbid(const std::vector<int64_t>& forbidden, Address logits, int64_t rows) const;
  void trim();

  void check(const Pass& pass) const;
  std::vector<Block> blocks(const Pass& pass) const;
  void enter_layer(const Pass& pass, const Block& block, size_t layer);
  void leave_stack(const Pass& pass, const Block& block);
  void norm_after(const Pass& pass, const Block& block, const Norm& norm, Address added, Address out, size_t layer);
  void add_visuals(const Pass& pass, const Block& block, Address hidden, size_t layer);

  // attention.cc: normed -> projected
  void grouped(const Pass& pass, const Block& block, size_t layer, const Grouped& a);
  void latent(const Pass& pass, const Block& block, size_t layer, const Latent& a);
  void absorbed(const Pass& pass, const Block& block, size_t layer, const Latent& a, Address q);
  void expanded(const Pass& pass, const Block& block, size_t layer, const Latent& a, Address q);
  void by_head(const Pass& pass, const Block& block, const Latent& a, bool keys, const Strided& x, const Strided& out);
  void turn(const Pass& pass, const Block& block, Address x, const Norm* norm, Address out, int64_t heads, int64_t dim,
            int64_t x_token, bool neighbours);
  struct Heads;      // what attention reads: queries and where keys and values lie
  struct Attention;  // calls the kernel of the cache's kind
  void attend(const Pass& pass, const Block& block, size_t layer, const Heads& heads, Address out);
  void append(const Pass& pass, const Block& block, size_t layer, bool second, Address x, int64_t heads, int64_t dim,
              int64_t x_batch, int64_t x_head, int64_t x_token);

  // feed_forward.cc: normed -> out
  void feed_forward(const Pass& pass, int64_t rows, const Layer& layer, Address out);
  void mlp(const Pass& pass, int64_t rows, const Mlp& m, Address x, Address out);
  void mixture(const Pass& pass, int64_t rows, const Mixture& m, Address x, Address out);

  // Products of x [rows, cols] with weights of the same width.
  void multiply(const Pass& pass, Address x, int64_t rows, std::initializer_list<Output> outputs);
  void norm(const Pass& pass, Address x, int64_t x_stride, const Norm& norm, Address out, int64_t rows, int64_t width);
  Address take(Slot slot, int64_t elements) { return buffers_[slot].take(elements * size_); }
  Address element(Address base, int64_t index) const { return base + static_cast<Address>(index * size_); }

  Model model_;
  std::function<void()> poll_;
  Dtype dtype_;
  int64_t size_;  // bytes of an element
  int64_t block_rows_;
  std::mutex busy_;
  std::array<Buffer, kSlots> buffers_;
};

}  // namespace pio::decoder
