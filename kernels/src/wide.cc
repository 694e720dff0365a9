// What rows and weights become: wide.h over wide_bf16.h, wide_bytes.h and wide_integers.h.
#include "wide.h"

#include "wide_bf16.h"
#include "wide_bytes.h"
#include "wide_integers.h"

namespace pio {
namespace {

// int8 weights have no bytes coarser than their own, and bf16 without tiles would be slower than groups.
bool on_vectors(int bits) { return bits == 4 && isa() == "avx512"; }

}  // namespace

bool wide_in_use(Dtype dtype, int64_t rows, int bits) {
  return dtype == Dtype::bf16 && rows >= kWideRows && (amx_in_use() || on_vectors(bits));
}

WideRows wide_rows(const Packed& w, int64_t rows) {
  const WideForm form = !amx_in_use() ? WideForm::integers : w.bits == 4 ? WideForm::byte_tiles : WideForm::bf16_tiles;
  return {nullptr, ceil_div(rows, kWideTile), w.groups() * w.group, form};
}

int64_t WideRows::memory() const {
  switch (form) {
    case WideForm::integers:
      return IntegerRows(*this).memory();
    case WideForm::byte_tiles:
      return ByteRows(*this).memory();
    default:
      return Bf16Rows(*this).memory();
  }
}

void pack_wide(const uint16_t* const* rows, int count, int64_t cols, const WideRows& out, int64_t tile) {
  switch (out.form) {
    case WideForm::integers:
      return vectors::pack_integer_rows(rows, count, cols, IntegerRows(out), tile);
    case WideForm::byte_tiles:
      return amx::pack_byte_rows(rows, count, cols, ByteRows(out), tile);
    default:
      return amx::pack_bf16_rows(rows, count, cols, Bf16Rows(out), tile);
  }
}

// Tiles do not ask for what is next: whether it helps them has not been measured.
void multiply_wide(const WideWeights& w, const std::optional<WideWeights>& next, const WideRows& x, int64_t first,
                   int64_t n, float* sums) {
  switch (x.form) {
    case WideForm::integers:
      return vectors::multiply_integer_rows(w, next ? &*next : nullptr, IntegerRows(x), first, n, sums);
    case WideForm::byte_tiles:
      return amx::multiply_byte_rows(*w.weight, w.panels, w.n_panels, w.block, ByteRows(x), first, n, sums);
    default:
      return amx::multiply_bf16_rows(*w.weight, w.panels, w.n_panels, w.block, Bf16Rows(x), first, n, sums);
  }
}

}  // namespace pio
