#include "isa.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#if PIO_X86
#include <cpuid.h>
#endif
#if PIO_X86 && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pio {
namespace {

#if PIO_X86
struct Cpuid {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  Cpuid(uint32_t leaf, uint32_t sub) { __get_cpuid_count(leaf, sub, &eax, &ebx, &ecx, &edx); }
};

bool bit(uint32_t word, int i) { return (word >> i) & 1; }

// What the operating system saves on a context switch. Without this check a kernel under an old hypervisor or
// with AVX-512 switched off at boot dies of SIGILL although CPUID promises the instruction.
uint64_t saved_state() {
  if (!bit(Cpuid(1, 0).ecx, 27)) return 0;  // OSXSAVE
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (static_cast<uint64_t>(hi) << 32) | lo;
}

bool has_avx2() {
  const uint64_t ymm = 0x6;  // XMM and YMM state
  const Cpuid one(1, 0), seven(7, 0);
  return (saved_state() & ymm) == ymm && bit(one.ecx, 12) && bit(one.ecx, 28) && bit(one.ecx, 29) &&
         bit(seven.ebx, 5);  // FMA, AVX, F16C; AVX2
}

bool has_avx512() {
  const uint64_t zmm = 0xE6;  // XMM, YMM, opmask and both ZMM states
  const Cpuid seven(7, 0), more(7, 1);
  const bool base = bit(seven.ebx, 16) && bit(seven.ebx, 17) && bit(seven.ebx, 30) && bit(seven.ebx, 31);
  return has_avx2() && (saved_state() & zmm) == zmm && base && bit(seven.ecx, 11) && bit(more.eax, 5);
}

bool has_amx() {
  const uint64_t tiles = 0x60000;  // tile configuration and tile data
  const Cpuid seven(7, 0);
  if (!has_avx512() || (saved_state() & tiles) != tiles || !bit(seven.edx, 22) || !bit(seven.edx, 23) ||
      !bit(seven.edx, 24) || !bit(seven.edx, 25))
    return false;  // AMX-BF16, AVX512-FP16 (every processor with AMX has it), AMX-TILE, AMX-INT8
#if defined(__linux__)
  // Tile data is 8 KB more to save per thread, so the kernel wants to be asked (ARCH_REQ_XCOMP_PERM,
  // XFEATURE_XTILEDATA); it says no where a thread's signal stack is too small for them.
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}
#endif

std::vector<std::string> find() {
  std::vector<std::string> found = {"portable"};
#if PIO_X86
  if (has_avx2()) found.push_back("avx2");
  if (has_avx512()) found.push_back("avx512");
  if (has_amx()) found.push_back("amx");
#elif PIO_NEON
  found.push_back("neon");
#endif
  return found;
}

const std::vector<std::string>& usable() {
  static const std::vector<std::string> names = find();
  return names;
}

std::string joined() {
  std::string out;
  for (const auto& name : usable()) out += (out.empty() ? "" : ", ") + name;
  return out;
}

int index_of(const std::string& name, const std::string& who) {
  if (name == "auto") return static_cast<int>(usable().size()) - 1;
  for (size_t i = 0; i < usable().size(); ++i)
    if (usable()[i] == name) return static_cast<int>(i);
  throw std::invalid_argument(who + "'" + name + "' is not an instruction set this machine can run; there is: " +
                              joined() + ", auto (the best of them).");
}

int from_environment() {
  const char* forced = std::getenv("PIO_ISA");
  return index_of(forced && *forced ? forced : "auto", "PIO_ISA=");
}

std::atomic<int> current{-1};

int index_in_use() {
  int now = current.load(std::memory_order_relaxed);
  if (now < 0) current.store(now = from_environment(), std::memory_order_relaxed);
  return now;
}

#if PIO_X86
constexpr int kTables = static_cast<int>(Isa::amx);  // amx has no tables: it uses those of avx512, and a tile
#else
constexpr int kTables = 1 << 30;
#endif

}  // namespace

std::vector<std::string> available_isas() { return usable(); }

int isa_index() {
  const int now = index_in_use();
  return now < kTables ? now : kTables - 1;
}

bool amx_in_use() { return index_in_use() >= kTables; }

std::string isa() { return usable()[static_cast<size_t>(index_in_use())]; }

void set_isa(const std::string& name) { current.store(index_of(name, "set_isa: "), std::memory_order_relaxed); }

}  // namespace pio
