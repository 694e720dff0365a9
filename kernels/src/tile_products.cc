// Products of AMX tiles on registers alone: the speed no matrix product can exceed on a machine that has them.
#include <cstdint>

#include "check.h"
#include "isa.h"
#include "target.h"
#include "thread_pool.h"

#if PIO_X86
#include <immintrin.h>

PIO_TARGET_BEGIN(PIO_AMX)
#include "amx.h"

namespace pio::amx {
namespace {

constexpr int kSums = 4;  // of 16 cycles each: more than the latency of 52

void multiply_tiles(const void* bytes, int64_t rounds, bool bf16) {
  load_shapes({});
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, bytes, 64);
  _tile_loadd(5, bytes, 64);
  for (int64_t r = 0; r < rounds; ++r) {
    memory_is_used(bytes);  // or the loop would be one product
    if (bf16) {
      _tile_dpbf16ps(0, 4, 5);
      _tile_dpbf16ps(1, 4, 5);
      _tile_dpbf16ps(2, 4, 5);
      _tile_dpbf16ps(3, 4, 5);
    } else {
      _tile_dpbssd(0, 4, 5);
      _tile_dpbssd(1, 4, 5);
      _tile_dpbssd(2, 4, 5);
      _tile_dpbssd(3, 4, 5);
    }
  }
  _tile_release();
}

}  // namespace
}  // namespace pio::amx

PIO_TARGET_END
#endif

namespace pio {

// Multiplies two tiles `rounds` times into each of four on every thread. bytes: 1,024 of them, any values that are
// finite as bf16. Returns how many multiply-adds one thread did, 0 where the set in use has no tiles.
int64_t tile_products(Address bytes, int64_t rounds, bool bf16, int threads) {
  require_address(bytes, 1, "tile_products", "bytes");
  require(rounds > 0, "tile_products: rounds must be positive");
  if (!amx_in_use()) return 0;
#if PIO_X86
  parallel_for(threads, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) amx::multiply_tiles(reinterpret_cast<const void*>(bytes), rounds, bf16);
  });
#endif
  return rounds * 4 * amx::kSide * amx::kSide * (bf16 ? 32 : 64);
}

}  // namespace pio
