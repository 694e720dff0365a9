// A region of a file that is compiled for one instruction set.
#pragma once

#define PIO_INLINE static inline __attribute__((always_inline))
// A loop with registers of its own: inlined, GCC 12 keeps what is live around it and sends the loop's sums through
// memory.
#define PIO_APART __attribute__((noinline))
#define PIO_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define PIO_TARGET_BEGIN(features) \
  PIO_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define PIO_TARGET_END PIO_PRAGMA(clang attribute pop)
#else
#define PIO_TARGET_BEGIN(features) PIO_PRAGMA(GCC push_options) PIO_PRAGMA(GCC target(features))
#define PIO_TARGET_END PIO_PRAGMA(GCC pop_options)
#endif

#define PIO_AVX512 "avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16"
#define PIO_AMX PIO_AVX512 ",amx-tile,amx-int8,amx-bf16"
