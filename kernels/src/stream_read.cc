// Reads memory and adds it up: the speed no memory-bound kernel can exceed on this machine.
#ifdef PIO_ISA
#include "simd/ahead.inc"
namespace pio::PIO_ISA {

// Sum of the 32-bit words of [p, p + bytes), modulo 2^32; bytes is a multiple of 256. Eight streams, which prefetchers
// follow side by side: Sapphire Rapids reads 26 GB/s in eight where it reads 20 in one and 22 in sixteen.
template <class Ahead>
uint32_t read_ahead(const int32_t* p, int64_t bytes) {
  constexpr int kStreams = 8;
  const int64_t words = bytes / 4, each = words / (kStreams * 16) * 16;
  I32 total[kStreams];
  for (auto& t : total) t = set_i32(0);
  for (int64_t i = 0; i < each; i += 16)
    for (int j = 0; j < kStreams; ++j) {
      Ahead::fetch(p + j * each + i + Ahead::kReadBytes / 4);
      total[j] = add(total[j], load_i32(p + j * each + i));
    }
  for (int64_t i = kStreams * each; i < words; i += 16) total[0] = add(total[0], load_i32(p + i));
  for (int j = 1; j < kStreams; ++j) total[0] = add(total[0], total[j]);
  return static_cast<uint32_t>(sum(total[0]));
}

uint32_t stream_read_words(const int32_t* p, int64_t bytes) {
  return few_ways() ? read_ahead<Far>(p, bytes) : read_ahead<Near>(p, bytes);
}

}  // namespace pio::PIO_ISA
#else
#define PIO_FILE "src/stream_read.cc"
#include <atomic>

#include "caches.h"  // before it: the first half needs it too

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
