// Compiles PIO_FILE once per instruction set, each in its own target region and namespace.
//
// A kernel's file has two halves:
//     #ifdef PIO_ISA                      // read once per set: namespace pio::PIO_ISA { ... vocabulary of simd/ ... }
//     #else                               // read once
//     #define PIO_FILE "src/name.cc"
//     #include "foreach_isa.h"
//     namespace pio { PIO_TABLE(function) ... PIO_CALL(function)(arguments) ... }
//     #endif
//
// Standard headers are included here, outside every region: an inline function of theirs compiled for AVX-512 could be
// the copy that the linker keeps for everybody.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "isa.h"
#include "target.h"
#include "thread_pool.h"

#if PIO_X86
#include <immintrin.h>
#elif PIO_NEON
#include <arm_neon.h>
#endif

#define PIO_ISA portable
#include "simd/portable.h"
// The vocabulary first, then what is written in it, then the kernel.
#include "simd/math.inc"
#include PIO_FILE
#undef PIO_ISA

#if PIO_X86
PIO_TARGET_BEGIN("avx2,fma,f16c,bmi2")
#define PIO_ISA avx2
#include "simd/avx2.h"
#include "simd/math.inc"
#include PIO_FILE
#undef PIO_ISA
PIO_TARGET_END

PIO_TARGET_BEGIN(PIO_AVX512)
#define PIO_ISA avx512
#include "simd/avx512.h"
#include "simd/math.inc"
#include PIO_FILE
#undef PIO_ISA
PIO_TARGET_END
#define PIO_TABLE(function)                                                                                  \
  static constexpr decltype(&portable::function) function##_table[] = {&portable::function, &avx2::function, \
                                                                       &avx512::function};
#elif PIO_NEON
#define PIO_ISA neon
#include "simd/math.inc"
#include "simd/neon.h"
#include PIO_FILE
#undef PIO_ISA
#define PIO_TABLE(function) \
  static constexpr decltype(&portable::function) function##_table[] = {&portable::function, &neon::function};
#else
#define PIO_TABLE(function) static constexpr decltype(&portable::function) function##_table[] = {&portable::function};
#endif

#define PIO_CALL(function) (function##_table[::pio::isa_index()])
