// bf16 weights to 12 bits (lossless.h).
#include <algorithm>
#include <array>
#include <vector>

#include "entries.h"
#include "lossless.h"
#include "thread_pool.h"

namespace pio {
namespace {

int exponent_of(uint16_t value) { return value >> 7 & 255; }

// Where a column of a block lies: its byte of signs and mantissas, and the half of a byte of codes. Sixteen bytes of
// signs are eight columns and the eight 32 further on, so that interleaving them with their exponents, quarter by
// quarter of a register, gives 32 columns in order.
int byte_of(int column) {
  const int half = column / 64, in_half = column % 64, eight = in_half % 32 / 8;
  return half * 64 + eight * 16 + in_half / 32 * 8 + in_half % 8;
}

struct PanelCodes {
  std::array<uint8_t, kLosslessExponents> exponents;
  std::array<uint8_t, 256> code;
  std::array<bool, 256> known;
};

// The rows of a panel.
struct PanelRows {
  const uint16_t* first;
  int64_t stride;
  int count;

  const uint16_t* row(int place) const { return first + place * stride; }
};

PanelRows rows_of(const uint16_t* weight, const Lossless& to, int64_t panel) {
  const LosslessGroup group = to.group_of(panel);
  const int64_t first = group.row + panel - group.first, left = to.rows - first;
  return {weight + first * to.cols, group.apart * to.cols,
          static_cast<int>(std::min<int64_t>(kLosslessRows, ceil_div(left, group.apart)))};
}

// The sixteen most frequent exponents, in descending order; among equals the larger is taken.
PanelCodes choose_exponents(const PanelRows& w, int64_t cols) {
  std::array<int64_t, 256> count{};
  for (int r = 0; r < w.count; ++r)
    for (int64_t c = 0; c < cols; ++c) ++count[static_cast<size_t>(exponent_of(w.row(r)[c]))];
  std::array<int, 256> order;
  for (int e = 0; e < 256; ++e) order[static_cast<size_t>(e)] = 255 - e;
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return count[static_cast<size_t>(a)] > count[static_cast<size_t>(b)]; });
  std::sort(order.begin(), order.begin() + kLosslessExponents, std::greater<>());
  PanelCodes out{};
  for (int i = 0; i < kLosslessExponents; ++i) {
    const auto e = static_cast<size_t>(order[static_cast<size_t>(i)]);
    out.exponents[static_cast<size_t>(i)] = static_cast<uint8_t>(e);
    out.code[e] = static_cast<uint8_t>(i);
    out.known[e] = true;
  }
  return out;
}

// One block of one row; what lies beyond the columns, and every value with another exponent, becomes a zero of the
// smallest exponent that there is.
void pack_block(const uint16_t* w, int n, const PanelCodes& codes, uint8_t* out) {
  std::memset(out, 0, kLosslessBlockBytes);
  for (int c = 0; c < kLosslessBlock; ++c) {
    const bool kept = c < n && codes.known[static_cast<size_t>(exponent_of(w[c]))];
    const uint8_t code = kept ? codes.code[static_cast<size_t>(exponent_of(w[c]))] : kLosslessExponents - 1;
    const int byte = byte_of(c);
    out[byte % 64] = static_cast<uint8_t>(out[byte % 64] | code << (byte / 64 * 4));
    out[64 + byte] = kept ? static_cast<uint8_t>((w[c] >> 8 & 128) | (w[c] & 127)) : uint8_t{0};
  }
}

// Panel p without the place of its extras, which are returned.
std::vector<LosslessExtra> pack_panel(const uint16_t* weight, const Lossless& to, int64_t p, uint8_t* data,
                                      uint8_t* marks) {
  const LosslessGroup group = to.group_of(p);
  const PanelRows w = rows_of(weight, to, p);
  const PanelCodes codes = choose_exponents(w, to.cols);
  std::memset(marks, 0, static_cast<size_t>(to.mark_bytes()));
  std::memcpy(marks, codes.exponents.data(), kLosslessExponents);
  std::vector<LosslessExtra> extras;
  for (int64_t b = 0; b < to.blocks(); ++b) {
    const int n = static_cast<int>(std::min<int64_t>(kLosslessBlock, to.cols - b * kLosslessBlock));
    const size_t before = extras.size();
    for (int r = 0; r < kLosslessRows; ++r) {
      const int valid = r < w.count ? n : 0;
      const uint16_t* from = valid ? w.row(r) + b * kLosslessBlock : w.first;
      const int64_t row = group.row + (p - group.first) + r * group.apart;
      pack_block(from, valid, codes, data + row * to.row_bytes() + b * kLosslessBlockBytes);
      for (int c = 0; c < valid; ++c)
        if (!codes.known[static_cast<size_t>(exponent_of(from[c]))])
          extras.push_back({from[c], static_cast<uint8_t>(r), static_cast<uint8_t>(c)});
    }
    const auto count = static_cast<uint16_t>(extras.size() - before);
    std::memcpy(marks + kLosslessExponents + 4 + 2 * b, &count, 2);
  }
  return extras;
}

}  // namespace

Lossless checked_lossless(const char* kernel, Address data, Address index, int64_t rows, int64_t cols) {
  const std::string name = kernel;
  require(rows > 0 && cols > 0,
          name + ": a weight must have rows and columns, got " + std::to_string(rows) + " x " + std::to_string(cols));
  require_address(data, 64, kernel, "data");
  require_address(index, 4, kernel, "index");
  return {reinterpret_cast<const uint8_t*>(data), reinterpret_cast<const uint8_t*>(index), rows, cols};
}

// weight [rows, cols] bf16, dense. Returns how many values have an exponent of their own; where that is more than
// Lossless::most_extras(), they do not fit and what was written is not the weight.
int64_t pack_lossless(Address weight, int64_t rows, int64_t cols, Address data, Address index, int threads) {
  const Lossless to = checked_lossless("pack_lossless", data, index, rows, cols);
  require_address(weight, 2, "pack_lossless", "the weight");
  std::vector<std::vector<LosslessExtra>> extras(static_cast<size_t>(to.panels()));
  parallel_for(to.panels(), 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      extras[static_cast<size_t>(p)] =
          pack_panel(reinterpret_cast<const uint16_t*>(weight), to, p, reinterpret_cast<uint8_t*>(data),
                     reinterpret_cast<uint8_t*>(index) + p * to.mark_bytes());
  });
  int64_t total = 0;
  for (int64_t p = 0; p < to.panels(); ++p) {
    const auto& own = extras[static_cast<size_t>(p)];
    const auto count = static_cast<int64_t>(own.size());
    const auto first = static_cast<uint32_t>(std::min(total, to.most_extras()));
    std::memcpy(reinterpret_cast<uint8_t*>(index) + p * to.mark_bytes() + kLosslessExponents, &first, 4);
    if (count && total + count <= to.most_extras())
      std::memcpy(const_cast<LosslessExtra*>(to.extras(p)), own.data(), own.size() * sizeof own[0]);
    total += count;
  }
  // The rest of the room, so that equal weights are equal bytes.
  if (total < to.most_extras()) {
    auto* end = reinterpret_cast<LosslessExtra*>(reinterpret_cast<uint8_t*>(index) + to.panels() * to.mark_bytes());
    std::memset(static_cast<void*>(end + total), 0,
                static_cast<size_t>(to.most_extras() - total) * sizeof(LosslessExtra));
  }
  return total;
}

}  // namespace pio
