#include "caches.h"

#include <atomic>
#include <cstdint>

#include "isa.h"

#if PIO_X86
#include <cpuid.h>
#endif

namespace pio {
namespace {

constexpr int kUsual = 8;

#if PIO_X86
// Ways of the first-level data cache as described by leaf 4 (Intel) or 0x8000001D (AMD), 0 where that has none.
int ways_by(uint32_t leaf) {
  uint32_t eax, ebx, ecx, edx;
  for (uint32_t i = 0; i < 8 && __get_cpuid_count(leaf, i, &eax, &ebx, &ecx, &edx); ++i) {
    const uint32_t type = eax & 31, level = eax >> 5 & 7;
    if (type == 0) break;
    if (type == 1 && level == 1) return static_cast<int>(ebx >> 22) + 1;
  }
  return 0;
}

int first_level_ways() {
  for (const uint32_t leaf : {0x4u, 0x8000001Du})
    if (const int ways = ways_by(leaf)) return ways;
  return kUsual;
}
#else
int first_level_ways() { return kUsual; }
#endif

std::atomic<bool>& few() {
  static std::atomic<bool> found{first_level_ways() < 12};
  return found;
}

}  // namespace

bool few_ways() { return few().load(std::memory_order_relaxed); }

void set_few_ways(bool value) { few().store(value, std::memory_order_relaxed); }

}  // namespace pio
