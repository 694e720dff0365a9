// Integer dot products on registers alone: the speed no quantized matrix product can exceed on this machine.
#ifdef PIO_ISA
namespace pio::PIO_ISA {

constexpr int kChains = 12;  // more than latency times throughput (4 x 1 on Zen 4, 5 x 2 on Golden Cove)

// The sum over all lanes of `rounds` dot products in each chain, modulo 2^32.
uint32_t dot_rounds(const uint8_t* w, int64_t rounds) {
  const Bytes weights = low_nibbles(load_bytes(w)), four = repeat4(w);
  I32 acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = set_i32(i);
  for (int64_t r = 0; r < rounds; ++r)
    for (int i = 0; i < kChains; ++i) acc[i] = dot_nibbles(acc[i], weights, four);
  for (int i = 1; i < kChains; ++i) acc[0] = add(acc[0], acc[i]);
  return static_cast<uint32_t>(sum(acc[0]));
}

int dot_chains() { return kChains; }

}  // namespace pio::PIO_ISA
#else
#define PIO_FILE "src/dot_products.cc"
#include "foreach_isa.h"

#include <atomic>

namespace pio {

PIO_TABLE(dot_rounds)
PIO_TABLE(dot_chains)

// Multiplies and adds `rounds` times per chain on each thread. bytes: 64 of them, any. Returns how many multiply-adds
// one thread did.
int64_t dot_products(Address bytes, int64_t rounds, int threads) {
  require_address(bytes, 1, "dot_products", "bytes");
  require(rounds > 0, "dot_products: rounds must be positive");
  static std::atomic<uint32_t> total{0};  // keeps the compiler from dropping the work
  parallel_for(threads, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      total += PIO_CALL(dot_rounds)(reinterpret_cast<const uint8_t*>(bytes), rounds);
  });
  return rounds * PIO_CALL(dot_chains)() * 64;
}

}  // namespace pio
#endif
