// Decoding: from the last token of every row to the logits of the next one.
#include <cstring>
#include <string>

#include "decoder/decoder.h"
#include "entries.h"

namespace pio::decoder {

void Decoder::step(const CacheMemory& cache, const int64_t* tokens, Address logits, Pass pass) {
  const std::lock_guard<std::mutex> alone(busy_);
  require(model_.head.has_value(), "decoder: a step needs a model with table and head");
  require_address(logits, static_cast<size_t>(size_), "decoder", "logits");
  require(pass.batch > 0, "decoder: a step needs at least one row");
  pass.tokens = 1;
  pass.x = take(kEmbedded, pass.batch * model_.hidden);
  pass.out = take(kHidden, pass.batch * model_.hidden);
  look_up(tokens, pass, pass.x);
  run_layers(cache, Visual{}, pass);
  multiply(pass, pass.out, pass.batch, {{&*model_.head, logits}});
  trim();
}

void Decoder::look_up(const int64_t* tokens, const Pass& pass, Address out) const {
  const Linear& table = *model_.table;
  if (table.bits)
    return dequantize(table.data, table.scales, table.rows, table.cols, table.bits, table.group,
                      reinterpret_cast<Address>(tokens), pass.batch, out, model_.dtype, 1);
  for (int64_t b = 0; b < pass.batch; ++b) {
    require(tokens[b] >= 0 && tokens[b] < table.rows,
            "decoder: token " + std::to_string(tokens[b]) + " is outside 0 .. " + std::to_string(table.rows - 1));
    std::memcpy(reinterpret_cast<void*>(element(out, b * model_.hidden)),
                reinterpret_cast<const void*>(element(table.data, tokens[b] * model_.hidden)),
                static_cast<size_t>(model_.hidden * size_));
  }
}

}  // namespace pio::decoder
