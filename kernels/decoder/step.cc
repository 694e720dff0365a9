// Decoding: from the last token of every row to the logits of the next one, and to that token itself.
#include <cstring>
#include <string>

#include "decoder/decoder.h"
#include "entries.h"
#include "lossless.h"
#include "thread_pool.h"

namespace pio::decoder {

void Decoder::step(const CacheMemory& cache, const std::vector<int64_t>& tokens, Address logits, Pass pass) {
  const std::lock_guard<std::mutex> alone(busy_);
  keep_threads(pass.threads, [&] { take_step(cache, tokens, logits, pass); });
  trim();
}

std::vector<int64_t> Decoder::greedy(const CacheMemory& cache, int64_t* ids, int64_t stride, int64_t length,
                                     const std::vector<int64_t>& forbidden, Pass pass) {
  const std::lock_guard<std::mutex> alone(busy_);
  require(model_.head.has_value(), "decoder: a step needs a model with table and head");
  require(length > 0 && length < stride, "decoder: a greedy step needs a token before it and room for one behind it");
  std::vector<int64_t> tokens;
  for (int64_t b = 0; b < pass.batch; ++b) tokens.push_back(ids[b * stride + length - 1]);
  const int64_t vocabulary = model_.head->rows;
  const Address logits = take(kVocabulary, pass.batch * vocabulary);
  keep_threads(pass.threads, [&] {
    take_step(cache, tokens, logits, pass);
    forbid(forbidden, logits, pass.batch);
    argmax(logits, reinterpret_cast<Address>(tokens.data()), pass.batch, vocabulary, vocabulary, model_.dtype,
           pass.threads);
  });
  for (int64_t b = 0; b < pass.batch; ++b) ids[b * stride + length] = tokens[static_cast<size_t>(b)];
  trim();
  return tokens;
}

void Decoder::take_step(const CacheMemory& cache, const std::vector<int64_t>& tokens, Address logits, Pass& pass) {
  require(model_.head.has_value(), "decoder: a step needs a model with table and head");
  require_address(logits, static_cast<size_t>(size_), "decoder", "logits");
  pass.batch = static_cast<int64_t>(tokens.size());
  require(pass.batch > 0, "decoder: a step needs at least one row");
  pass.tokens = 1;
  pass.x = take(kEmbedded, pass.batch * model_.hidden);
  pass.out = take(kHidden, pass.batch * model_.hidden);
  look_up(tokens, pass, pass.x);
  run_layers(cache, Visual{}, pass);
  multiply(pass, pass.out, pass.batch, {{&*model_.head, logits}});
}

void Decoder::look_up(const std::vector<int64_t>& tokens, const Pass& pass, Address out) const {
  const Linear& table = *model_.table;
  if (table.bits == kLosslessBits)
    return expand_lossless(table.data, table.scales, table.rows, table.cols, reinterpret_cast<Address>(tokens.data()),
                           pass.batch, out, 1);
  if (table.bits)
    return dequantize(table.data, table.scales, table.rows, table.cols, table.bits, table.group,
                      reinterpret_cast<Address>(tokens.data()), pass.batch, out, model_.dtype, 1);
  for (size_t b = 0; b < tokens.size(); ++b) {
    require(tokens[b] >= 0 && tokens[b] < table.rows,
            "decoder: token " + std::to_string(tokens[b]) + " is outside 0 .. " + std::to_string(table.rows - 1));
    std::memcpy(reinterpret_cast<void*>(element(out, static_cast<int64_t>(b) * model_.hidden)),
                reinterpret_cast<const void*>(element(table.data, tokens[b] * model_.hidden)),
                static_cast<size_t>(model_.hidden * size_));
  }
}

// Ids outside of the vocabulary cannot be chosen anyway.
void Decoder::forbid(const std::vector<int64_t>& forbidden, Address logits, int64_t rows) const {
  const int64_t vocabulary = model_.head->rows;
  const uint32_t never = 0xFF800000;  // minus infinity; its upper half is that of bfloat16
  const auto half = static_cast<uint16_t>(never >> 16);
  for (int64_t b = 0; b < rows; ++b)
    for (const int64_t id : forbidden) {
      if (id < 0 || id >= vocabulary) continue;
      void* value = reinterpret_cast<void*>(element(logits, b * vocabulary + id));
      std::memcpy(value, dtype_ == Dtype::f32 ? static_cast<const void*>(&never) : &half, static_cast<size_t>(size_));
    }
}

}  // namespace pio::decoder
