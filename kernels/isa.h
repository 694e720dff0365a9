// Which instruction set the kernels use: found from CPUID and XCR0 when the module loads, forced by the
// environment variable PIO_ISA, switched by set_isa(). Every kernel has one entry per compiled set.
#pragma once
#include <string>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#define PIO_X86 1
#elif defined(__aarch64__) && __has_include("simd/neon.h")
#define PIO_NEON 1
#endif

namespace pio {

// The order is the preference, worst first, and the index into every kernel's table.
enum class Isa : int {
  portable,
#if PIO_X86
  avx2,    // AVX2, FMA
  avx512,  // AVX-512 F BW VL DQ, VNNI, BF16 (Zen 4, Sapphire Rapids, Cooper Lake and later)
  amx,     // the same with AMX tiles, bf16 and int8 (Sapphire Rapids and later); kernels without tiles are avx512's
#elif PIO_NEON
  neon,
#endif
};

// Names of the sets that are both compiled in and usable on this processor and system, worst first.
std::vector<std::string> available_isas();
// Name of the set in use. Throws if PIO_ISA names one that is unknown or not usable.
std::string isa();
// Uses the set of that name from now on; "auto" is the best. Throws std::invalid_argument naming what there is.
void set_isa(const std::string& name);
// Index of the set in use, for the kernels' tables; avx512's where the set is amx.
int isa_index();
// Whether the set in use is amx.
bool amx_in_use();

}  // namespace pio
