// The one pool of threads. The caller works too, so `threads` = 2 means one worker.
//
// Where torch has loaded an OpenMP runtime its threads are borrowed: they spin for milliseconds after each of torch's
// operators, and workers of our own would share their cores. Without one, the workers are our own, and park after 40
// us.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <type_traits>

namespace pio {

using RangeFunction = void (*)(void* context, int64_t begin, int64_t end);

// Calls function(context, begin, end) over [0, count) in pieces of at most `grain`, on at most `threads` threads, and
// returns when all of it is done. Each thread begins with a stretch of its own and then takes from those of others, so
// a thread that the system took away holds up one piece only; which thread runs a piece, and where pieces begin, is not
// determined, so what is computed must not depend on it. A call from inside a piece, or while another thread of the
// process is in here, runs on the calling thread alone. Safe after fork().
void parallel_for_range(int64_t count, int64_t grain, int threads, RangeFunction function, void* context);

// The same with any callable (begin, end).
template <class Body>
void parallel_for(int64_t count, int64_t grain, int threads, Body&& body) {
  using Plain = std::remove_reference_t<Body>;
  parallel_for_range(
      count, grain, threads,
      [](void* context, int64_t begin, int64_t end) { (*static_cast<Plain*>(context))(begin, end); }, &body);
}

// Calls body() with up to `threads` threads that wait for its calls of parallel_for: one OpenMP region around all of
// them in place of one each, 0.4 us a call in place of 1.1 to 1.9 (Zen 4, two threads), and nobody waits for a thread
// that the system took away. What body throws comes out here. Own workers wait anyway; there, inside a piece, and while
// another thread of the process is in here, it is body() alone.
void keep_threads(int threads, const std::function<void()>& body);

// Where threads come from: "torch" (its OpenMP runtime) or "own".
std::string thread_source();
void set_thread_source(const std::string& source);

// Own worker threads that exist now, without the caller.
int pool_workers();

}  // namespace pio
