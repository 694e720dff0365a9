// Rows of x and out that belong to heads, wherever they lie.
#pragma once
#include <cstdint>
#include <vector>

#include "check.h"

namespace pio {

struct HeadRows {
  const char* x;
  char* out;
  int64_t x_batch, x_head, x_token, out_batch, out_head, out_token;  // bytes
  int64_t batch, heads, tokens;
  Dtype dtype;

  int64_t count() const { return batch * tokens; }  // rows of one head
  const char* x_row(int64_t head, int64_t i) const {
    return x + i / tokens * x_batch + head * x_head + i % tokens * x_token;
  }
  char* out_row(int64_t head, int64_t i) const {
    return out + i / tokens * out_batch + head * out_head + i % tokens * out_token;
  }
};

// x, out: {address, batch, head, token strides in elements}. With no rows the addresses may be anything.
inline HeadRows head_rows(const char* kernel, const std::vector<int64_t>& x, const std::vector<int64_t>& out,
                          int64_t batch, int64_t heads, int64_t tokens, Dtype dtype) {
  require(x.size() == 4 && out.size() == 4, std::string(kernel) + ": x and out are described by 4 numbers each");
  require(batch >= 0 && heads > 0 && tokens >= 0, std::string(kernel) + ": counts must be positive");
  if (batch * tokens > 0) {
    require_address(static_cast<Address>(x[0]), size_of(dtype), kernel, "x");
    require_address(static_cast<Address>(out[0]), size_of(dtype), kernel, "out");
  }
  const auto size = static_cast<int64_t>(size_of(dtype));
  return {reinterpret_cast<const char*>(x[0]),
          reinterpret_cast<char*>(out[0]),
          x[1] * size,
          x[2] * size,
          x[3] * size,
          out[1] * size,
          out[2] * size,
          out[3] * size,
          batch,
          heads,
          tokens,
          dtype};
}

}  // namespace pio
