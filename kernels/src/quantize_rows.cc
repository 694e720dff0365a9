// Activations to int8 in groups, once per call and shared by every weight that reads them.
#ifdef PIO_ISA
namespace pio::PIO_ISA {

template <class T>
PIO_INLINE void quantize_row_of(const T* x, int64_t cols, char* out, int group) {
  const int64_t groups = ceil_div(cols, group);
  for (int64_t g = 0; g < groups; ++g, out += group + 8) {
    F32 v[8];
    I32 most = set_i32(0);  // as bits, so that a NaN is the largest of all
    for (int i = 0; i < group / 16; ++i) {
      const int64_t from = g * group + i * 16;
      const int n = static_cast<int>(std::clamp<int64_t>(cols - from, 0, 16));
      v[i] = n == 16 ? load_as(x + from) : load_as_n(x + from, n);
      most = max(most, magnitude_bits(v[i]));
    }
    const int32_t bits = largest(most);
    float m;
    std::memcpy(&m, &bits, 4);
    const float scale = m / 127.0f;
    // Below 2^-120 the inverse would overflow; such a group counts as zero.
    const bool usable = m > 1e-36f && m < 3e38f;
    const F32 inverse = set(usable ? 127.0f / m : 0.0f);
    I32 total = set_i32(0);
    for (int i = 0; i < group / 16; ++i) {
      const I32 rounded = to_i32(usable ? mul(v[i], inverse) : set(0.0f));
      store_i8(reinterpret_cast<int8_t*>(out) + i * 16, rounded);
      total = add(total, rounded);
    }
    const int32_t minus_sum = -sum(total);
    std::memcpy(out + group, &scale, 4);
    std::memcpy(out + group + 4, &minus_sum, 4);
  }
}

void quantize_row(const void* x, Dtype dtype, int64_t cols, char* out, int group) {
  if (dtype == Dtype::f32) return quantize_row_of(static_cast<const float*>(x), cols, out, group);
  return quantize_row_of(static_cast<const uint16_t*>(x), cols, out, group);
}

}  // namespace pio::PIO_ISA
#else
#define PIO_FILE "src/quantize_rows.cc"
#include <cstdlib>
#include <memory>

#include "quant.h"  // before it: the first half needs it too

#include "foreach_isa.h"

namespace pio {

PIO_TABLE(quantize_row)

namespace {

// Memory that only grows and is kept for the thread's next call: an allocation per layer and token would cost page
// faults as long as the multiplication itself.
class Scratch {
 public:
  void* at_least(size_t bytes) {
    if (bytes > size_) {
      size_ = (bytes + bytes / 4 + 4095) / 4096 * 4096;
      memory_.reset(static_cast<char*>(std::aligned_alloc(64, size_)));
      if (!memory_) throw std::bad_alloc();
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> memory_;
  size_t size_ = 0;
};

}  // namespace

Activations scratch_activations(int slot, int64_t rows, int64_t cols, int group) {
  thread_local Scratch scratch[2];
  const int64_t groups = ceil_div(cols, group);
  auto* data = static_cast<char*>(scratch[slot].at_least(static_cast<size_t>(rows * groups * (group + 8))));
  return {data, groups, group};
}

float* scratch_floats(int slot, int64_t count) {
  thread_local Scratch scratch[6];
  return static_cast<float*>(scratch[slot].at_least(static_cast<size_t>(count) * sizeof(float)));
}

void quantize_rows(const void* x, Dtype dtype, int64_t cols, int64_t begin, int64_t end, const Activations& out,
                   int threads) {
  // One row of 4096 takes about a microsecond; a wake-up takes ten.
  const int64_t grain = std::max<int64_t>(1, 65536 / cols);
  parallel_for(end - begin, grain, threads, [&](int64_t from, int64_t to) {
    for (int64_t r = begin + from; r < begin + to; ++r)
      PIO_CALL(quantize_row)(static_cast<const char*>(x) + r * cols * size_of(dtype), dtype, cols,
                             out.data + r * out.stride(), out.group);
  });
}

}  // namespace pio
#endif
