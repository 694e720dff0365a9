// What the kernels on AMX share. Include inside the target region, after <immintrin.h>.
#pragma once
#include <cstdint>

namespace pio::amx {

constexpr int kSide = 16;             // rows of a tile, and its 32-bit columns
constexpr int64_t kTileBytes = 1024;  // of a full tile, rows 64 bytes apart

// GCC's tile instructions do not say that they read or write memory.
static inline __attribute__((always_inline)) void memory_is_used(const void* p) {
  __asm__ volatile("" ::"r"(p) : "memory");
}

// Sixteen rows of 64 bytes in every tile until told otherwise.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {kSide, kSide, kSide, kSide, kSide, kSide, kSide, kSide};
};

static inline __attribute__((always_inline)) void load_shapes(const TileShapes& shapes) {
  memory_is_used(&shapes);
  _tile_loadconfig(&shapes);
}

}  // namespace pio::amx
