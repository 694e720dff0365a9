// Which tiles rows and weights become: wide.h over wide_bf16.h and wide_bytes.h.
#include "wide.h"

#include "wide_bf16.h"
#include "wide_bytes.h"

namespace pio {

int64_t WideRows::memory() const { return bytes ? ByteRows(*this).memory() : Bf16Rows(*this).memory(); }

void pack_wide(const uint16_t* const* rows, int count, int64_t cols, const WideRows& out, int64_t tile) {
  out.bytes ? amx::pack_byte_rows(rows, count, cols, ByteRows(out), tile)
            : amx::pack_bf16_rows(rows, count, cols, Bf16Rows(out), tile);
}

void multiply_wide(const Packed& w, const int64_t* panels, int n_panels, int64_t block, const WideRows& x,
                   int64_t first, int64_t n, float* sums) {
  x.bytes ? amx::multiply_byte_rows(w, panels, n_panels, block, ByteRows(x), first, n, sums)
          : amx::multiply_bf16_rows(w, panels, n_panels, block, Bf16Rows(x), first, n, sums);
}

}  // namespace pio
