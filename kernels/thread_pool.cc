#include "thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "openmp.h"

namespace pio {
namespace {

using Clock = std::chrono::steady_clock;

// A worker spins this long after its last piece, then sleeps in the kernel. Between two linears of one layer a model
// spends 5-30 us in Python; a wake-up costs about that much. Spinning longer takes the core from torch's OpenMP
// threads, which is dearer than the wake-ups.
constexpr auto kSpin = std::chrono::microseconds(40);
// OpenMP's threads inside keep_threads: the caller is between two jobs, mostly for less than 20 us.
constexpr auto kKeptSpin = std::chrono::microseconds(400);

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// 0: look for torch's threads at the next call; 1: own workers; 2: torch's.
std::atomic<int> kind{0};
std::atomic<OpenmpParallel> openmp_parallel{nullptr};

OpenmpParallel borrowed() {
  if (kind.load(std::memory_order_acquire) == 0) {
    openmp_parallel.store(find_openmp());
    kind.store(openmp_parallel.load() ? 2 : 1, std::memory_order_release);
  }
  return kind.load() == 2 ? openmp_parallel.load() : nullptr;
}

class Pool {
 public:
  bool try_run(int64_t count, int64_t grain, int threads, RangeFunction function, void* context);
  bool try_keep(int threads, const std::function<void()>& body);
  int workers() const { return static_cast<int>(threads_.size()); }

 private:
  struct Crew;
  void set_job(int64_t count, int64_t grain, int threads, RangeFunction function, void* context);
  void run_on_workers(int threads);
  void grow(int workers);
  int wait_for_job(int seen, Clock::duration spin);
  void join(int index, bool kept);
  void work(int index);
  void work_in(Crew& crew);
  void drain();
  int choose_lane();

  std::mutex busy_;  // held by the one caller that is using the workers
  std::vector<std::thread> threads_;

  // Neighbouring pieces, for one thread until it has done them, then for any: memory is read in long stretches, and
  // what a thread fetched ahead of itself it mostly needs.
  struct Lane {
    alignas(64) std::atomic<int64_t> next{0};
    int64_t end = 0;
    std::atomic<bool> has_thread{false};

    // Takes up to `grain` pieces from `begin` on. The last ones are handed out by halves, so that threads end together.
    int64_t take(int64_t grain, int64_t& begin) {
      begin = next.load(std::memory_order_relaxed);
      int64_t count;
      do {
        const int64_t left = end - begin;
        if (left <= 0) return 0;
        count = std::min(left, left >= 3 * grain ? grain : (grain + 1) / 2);
      } while (!next.compare_exchange_weak(begin, begin + count, std::memory_order_relaxed));
      return count;
    }
  };
  static constexpr int kMostLanes = 64;
  std::array<Lane, kMostLanes> lanes_;
  // The job, what a waiting worker looks at and what it needs then in one line of the cache. Written only while the job
  // is closed and nobody is inside.
  //
  // A worker first enters (inside_ + 1), then looks whether the job is open; the caller first closes it, then waits
  // for inside_ = 0. All of it sequentially consistent: one of the two sees the other. So nobody waits for a worker
  // that has not woken up in time.
  alignas(64) std::atomic<int> epoch_{0};  // counts jobs; sleeping workers wait on it
  std::atomic<bool> open_{false};
  bool kept_ = false;  // whose job it is: OpenMP's threads inside keep_threads, or our own workers
  int limit_ = 0;      // workers that may join
  int lanes_in_use_ = 0;
  RangeFunction function_ = nullptr;
  void* context_ = nullptr;
  int64_t grain_ = 1;
  alignas(64) std::atomic<int> inside_{0};
};

// The same in every job, where no other thread has it: what a thread read or fetched for the next job is near.
int Pool::choose_lane() {
  static std::atomic<int> threads{0};
  thread_local const int number = threads.fetch_add(1, std::memory_order_relaxed);
  for (int i = 0; i < lanes_in_use_; ++i) {
    const int lane = (number + i) % lanes_in_use_;
    if (!lanes_[static_cast<size_t>(lane)].has_thread.exchange(true, std::memory_order_relaxed)) return lane;
  }
  return number % lanes_in_use_;
}

void Pool::drain() {
  const int own = choose_lane();
  for (int i = 0; i < lanes_in_use_; ++i) {
    Lane& lane = lanes_[static_cast<size_t>((own + i) % lanes_in_use_)];
    int64_t begin;
    while (const int64_t count = lane.take(grain_, begin)) function_(context_, begin, begin + count);
  }
}

int Pool::wait_for_job(int seen, Clock::duration spin) {
  for (auto until = Clock::now() + spin;;) {
    for (int i = 0; i < 64; ++i) {
      const int now = epoch_.load(std::memory_order_acquire);
      if (now != seen) return now;
      pause();
    }
    if (Clock::now() > until) epoch_.wait(seen);
  }
}

void Pool::join(int index, bool kept) {
  inside_.fetch_add(1);
  if (open_.load() && kept_ == kept && index < limit_) drain();
  inside_.fetch_sub(1);
}

void Pool::work(int index) {
  for (int seen = 0;;) {
    seen = wait_for_job(seen, kSpin);
    join(index, false);
  }
}

void Pool::grow(int workers) {
  while (this->workers() < workers) {
    const int index = this->workers();
    threads_.emplace_back([this, index] { work(index); });
    threads_.back().detach();  // they live as long as the process
  }
}

void Pool::set_job(int64_t count, int64_t grain, int threads, RangeFunction function, void* context) {
  function_ = function;
  context_ = context;
  grain_ = grain;
  lanes_in_use_ = static_cast<int>(std::min<int64_t>({threads, kMostLanes, (count + grain - 1) / grain}));
  for (int i = 0; i < lanes_in_use_; ++i) {
    Lane& lane = lanes_[static_cast<size_t>(i)];
    lane.next.store(count * i / lanes_in_use_, std::memory_order_relaxed);
    lane.end = count * (i + 1) / lanes_in_use_;
    lane.has_thread.store(false, std::memory_order_relaxed);
  }
}

void Pool::run_on_workers(int threads) {
  limit_ = threads - 1;
  open_.store(true);
  epoch_.fetch_add(1);
  epoch_.notify_all();
  drain();
  open_.store(false);
  for (int i = 0; inside_.load() != 0; ++i)
    i < 1000 ? pause() : std::this_thread::yield();  // a worker without a core gets this one
}

// The pool that the calling thread keeps threads of.
thread_local const Pool* leads = nullptr;

bool Pool::try_run(int64_t count, int64_t grain, int threads, RangeFunction function, void* context) {
  std::unique_lock<std::mutex> mine(busy_, std::defer_lock);
  const bool kept = leads == this;
  if (!kept && !mine.try_lock()) return false;
  set_job(count, grain, threads, function, context);
  kept_ = kept;
  const OpenmpParallel openmp = kept ? nullptr : borrowed();
  if (openmp) {
    openmp([](void* pool) { static_cast<Pool*>(pool)->drain(); }, this, static_cast<unsigned>(threads), 0);
    return true;
  }
  if (!kept) grow(threads - 1);
  run_on_workers(threads);
  return true;
}

// Threads of one OpenMP region, whose caller hands out jobs until it is over.
struct Pool::Crew {
  Pool& pool;
  const std::function<void()>& body;
  const int epoch;  // before its first job
  std::atomic<int> workers{0};
  std::atomic<bool> over{false};
  std::exception_ptr error = nullptr;

  static void enter(void* context) {
    Crew& crew = *static_cast<Crew*>(context);
    leads == &crew.pool ? crew.lead() : crew.pool.work_in(crew);
  }

  void lead() {
    try {
      body();
    } catch (...) {
      error = std::current_exception();  // the region ends in order, then try_keep throws it
    }
    over.store(true);
    pool.epoch_.fetch_add(1);
    pool.epoch_.notify_all();
  }
};

void Pool::work_in(Crew& crew) {
  const int index = crew.workers.fetch_add(1);
  for (int seen = crew.epoch;;) {
    seen = wait_for_job(seen, kKeptSpin);
    if (crew.over.load()) return;
    join(index, true);
  }
}

bool Pool::try_keep(int threads, const std::function<void()>& body) {
  std::unique_lock<std::mutex> mine(busy_, std::try_to_lock);
  const OpenmpParallel openmp = mine.owns_lock() ? borrowed() : nullptr;
  if (!openmp) return false;
  Crew crew{*this, body, epoch_.load()};
  leads = this;
  openmp(Crew::enter, &crew, static_cast<unsigned>(threads), 0);
  leads = nullptr;
  if (crew.error) std::rethrow_exception(crew.error);
  return true;
}

// Never destroyed: workers may outlive static destructors. After fork() the child has none of the threads, and the
// parent's locks in an unknown state, so it starts with a new pool and leaves the old one alone. OpenMP's threads do
// not come back in a child either (libgomp hangs), so there the workers are our own.
std::atomic<Pool*> pool{nullptr};
thread_local bool inside_piece = false;

[[maybe_unused]] const int watched = pthread_atfork(nullptr, nullptr, [] {
  pool.store(nullptr);
  kind.store(1);
});

Pool& the_pool() {
  Pool* now = pool.load(std::memory_order_acquire);
  if (now) return *now;
  Pool* fresh = new Pool;
  if (pool.compare_exchange_strong(now, fresh)) return *fresh;
  delete fresh;  // another thread was first; nobody has used this one
  return *now;
}

struct Marked {
  RangeFunction function;
  void* context;
};

void run_marked(void* context, int64_t begin, int64_t end) {
  const auto& marked = *static_cast<Marked*>(context);
  inside_piece = true;
  marked.function(marked.context, begin, end);
  inside_piece = false;
}

}  // namespace

void parallel_for_range(int64_t count, int64_t grain, int threads, RangeFunction function, void* context) {
  if (count <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  if (threads > 1 && count > grain && !inside_piece) {
    Marked marked{function, context};
    if (the_pool().try_run(count, grain, threads, run_marked, &marked)) return;
  }
  function(context, 0, count);
}

void keep_threads(int threads, const std::function<void()>& body) {
  if (threads < 2 || inside_piece || leads || !the_pool().try_keep(threads, body)) body();
}

int pool_workers() {
  Pool* now = pool.load();
  return now ? now->workers() : 0;
}

std::string thread_source() { return borrowed() ? "torch" : "own"; }

void set_thread_source(const std::string& source) {
  if (source == "own") return kind.store(1);
  if (source != "torch") throw std::invalid_argument("set_thread_source: 'torch' or 'own', got '" + source + "'");
  kind.store(0);
  if (!borrowed())
    throw std::invalid_argument("set_thread_source: no OpenMP runtime of torch is loaded to borrow threads from");
}

}  // namespace pio
