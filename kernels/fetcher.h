// Memory asked for ahead, a share at a time. Include inside the target region, after <immintrin.h>.
#pragma once
#include <cstdint>

namespace pio::avx512 {

// Evenly, so that the memory always has something to do, and in several streams side by side, each in the order of
// addresses, as the machine's own prefetchers want them (kernels/README.md). To the second-level cache.
struct Fetcher {
  static constexpr int kStreams = 4;  // of one memory, a line of each at a time
  struct Run {
    const char* p;
    int64_t stream, stride, rows, bytes;  // from stream to stream, from row to row; rows of a stream, bytes of a row
  };
  Run runs[12];  // the most: two tiles of two key parts and values, codes and scales each (int8 attention)
  int count = 0, now = 0;
  int64_t at = 0, lines = 0, owed = 0;

  void start() { count = now = 0, at = lines = owed = 0; }

  // The last stream may go on behind the end: nothing is read there.
  void add(const void* memory, int64_t stride, int64_t rows, int64_t bytes) {
    lines += rows * ((bytes + 63) / 64);
    rows = (rows + kStreams - 1) / kStreams;
    const int64_t stream = rows * stride;
    if (stride == bytes) bytes *= rows, rows = 1;
    runs[count++] = {static_cast<const char*>(memory), stream, stride, rows, bytes};
  }

  // All that is left, and what rounding rows up to whole streams added.
  void fetch_rest() { fetch(2 * lines + 64 * kStreams); }

  // Lines of each of `events`, which get `percent` of all.
  int64_t share(int percent, int64_t events) const { return (lines * percent + 100 * events - 1) / (100 * events); }

  void fetch(int64_t n) {
    for (owed += n; owed >= kStreams && now < count; owed -= kStreams) {
      Run& run = runs[now];
      for (int i = 0; i < kStreams; ++i) _mm_prefetch(run.p + at + i * run.stream, _MM_HINT_T1);
      at += 64;
      if (at < run.bytes) continue;
      at = 0;
      run.p += run.stride;
      if (--run.rows == 0) ++now;
    }
  }
};

}  // namespace pio::avx512
