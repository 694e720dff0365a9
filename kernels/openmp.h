// The OpenMP runtime that torch has loaded, if any.
#pragma once

namespace pio {

// GOMP_parallel of libgomp, which libiomp5 and libomp offer too: runs body(context) on `threads` threads, the caller
// among them, and waits for all.
using OpenmpParallel = void (*)(void (*body)(void*), void* context, unsigned threads, unsigned flags);

// The entry of the one runtime in this process, torch's own where there are several; null where that is not
// clear. Does not load anything.
OpenmpParallel find_openmp();

}  // namespace pio
