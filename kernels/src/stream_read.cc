// Reads memory and adds it up: the speed no memory-bound kernel can exceed on this machine.
#ifdef PIO_ISA
namespace pio::PIO_ISA {

// Sum of the 32-bit words of [p, p + bytes), modulo 2^32; bytes is a multiple of 256. Four chains, because one add per
// 64 bytes would otherwise be a chain of latencies.
uint32_t stream_read_words(const int32_t* p, int64_t bytes) {
  I32 total[4] = {set_i32(0), set_i32(0), set_i32(0), set_i32(0)};
  for (int64_t i = 0; i < bytes / 4; i += 64) {
    prefetch(p + i + 1024);
    for (int j = 0; j < 4; ++j) total[j] = add(total[j], load_i32(p + i + 16 * j));
  }
  return static_cast<uint32_t>(sum(add(add(total[0], total[1]), add(total[2], total[3]))));
}

}  // namespace pio::PIO_ISA
#else
#define PIO_FILE "src/stream_read.cc"
#include <atomic>

#include "foreach_isa.h"

namespace pio {

PIO_TABLE(stream_read_words)

// Sum of the 32-bit words at `data`, modulo 2^32. bytes: a multiple of 256.
uint32_t stream_read(Address data, int64_t bytes, int threads) {
  require_address(data, 4, "stream_read", "data");
  require(bytes >= 0 && bytes % 256 == 0, "stream_read: bytes must be a multiple of 256, got " + std::to_string(bytes));
  const auto* words = reinterpret_cast<const int32_t*>(data);
  const int64_t piece = 1 << 18;
  std::atomic<uint32_t> total{0};
  parallel_for((bytes + piece - 1) / piece, 1, threads, [&](int64_t begin, int64_t end) {
    const int64_t from = begin * piece, to = std::min(end * piece, bytes);
    total += PIO_CALL(stream_read_words)(words + from / 4, to - from);
  });
  return total;
}

}  // namespace pio
#endif
