// The vocabulary in plain C++ with the compiler's vector types, which it lowers to whatever the base instruction set
// has (SSE2 on x86-64). This file is also the contract: every other set computes the same, up to the rounding of fma.
#pragma once

// Activation rows and weight panels of one tile (src/tile.cc).
#undef PIO_TILE_ROWS
#undef PIO_TILE_PANELS
#define PIO_TILE_ROWS 2
#define PIO_TILE_PANELS 1

// Weight rows and activation rows of one dense tile (src/dense_tile.cc); sums that fit in the registers.
#undef PIO_DENSE_WEIGHTS
#undef PIO_DENSE_ROWS
#undef PIO_SUMS
#define PIO_DENSE_WEIGHTS 4
#define PIO_DENSE_ROWS 1
#define PIO_SUMS 4

namespace pio::portable {

typedef float F32x16 __attribute__((vector_size(64)));
typedef int32_t I32x16 __attribute__((vector_size(64)));
typedef uint32_t U32x16 __attribute__((vector_size(64)));
typedef float F32x4 __attribute__((vector_size(16)));
typedef int32_t I32x4 __attribute__((vector_size(16)));
typedef int16_t I16x32 __attribute__((vector_size(64)));
typedef uint8_t U8x64 __attribute__((vector_size(64)));

struct F32 {
  F32x16 v;
};
struct I32 {
  I32x16 v;
};
struct Bytes {
  U8x64 v;
};
struct Pairs {  // 16 lanes of two bf16, the first in the low half
  I32x16 v;
};

// The compiler fills 64 bytes by sixteen scalar stores, which a wide load cannot be forwarded from; by quarters it is
// fast.
template <class Quarter, class Whole>
PIO_INLINE Whole four_times(Quarter quarter) {
  Whole out;
  for (int i = 0; i < 4; ++i) std::memcpy(reinterpret_cast<char*>(&out) + 16 * i, &quarter, 16);
  return out;
}
PIO_INLINE F32 set(float x) { return {four_times<F32x4, F32x16>(F32x4{x, x, x, x})}; }
PIO_INLINE F32 load(const float* p) {
  F32 out;
  std::memcpy(&out.v, p, sizeof out.v);
  return out;
}
PIO_INLINE void store(float* p, F32 a) { std::memcpy(p, &a.v, sizeof a.v); }
PIO_INLINE F32 load_n(const float* p, int n) {
  F32 out = set(0);
  std::memcpy(&out.v, p, n * sizeof(float));
  return out;
}
PIO_INLINE void store_n(float* p, F32 a, int n) { std::memcpy(p, &a.v, n * sizeof(float)); }
PIO_INLINE F32 load_bf16_n(const uint16_t* p, int n) {
  I32 bits{};
  for (int i = 0; i < n; ++i) bits.v[i] = static_cast<int32_t>(static_cast<uint32_t>(p[i]) << 16);
  return {(F32x16)bits.v};
}
PIO_INLINE F32 load_bf16(const uint16_t* p) { return load_bf16_n(p, 16); }
PIO_INLINE void store_bf16_n(uint16_t* p, F32 a, int n) {
  for (int i = 0; i < n; ++i) {
    const float x = a.v[i];
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    p[i] = x != x ? 0x7FC0 : static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
  }
}
PIO_INLINE void store_bf16(uint16_t* p, F32 a) { store_bf16_n(p, a, 16); }

PIO_INLINE F32 add(F32 a, F32 b) { return {a.v + b.v}; }
PIO_INLINE F32 sub(F32 a, F32 b) { return {a.v - b.v}; }
PIO_INLINE F32 mul(F32 a, F32 b) { return {a.v * b.v}; }
PIO_INLINE F32 div(F32 a, F32 b) { return {a.v / b.v}; }
PIO_INLINE F32 fma(F32 a, F32 b, F32 c) { return {a.v * b.v + c.v}; }
PIO_INLINE F32 max(F32 a, F32 b) { return {a.v > b.v ? a.v : b.v}; }
PIO_INLINE F32 min(F32 a, F32 b) { return {a.v < b.v ? a.v : b.v}; }
PIO_INLINE F32 select_greater(F32 a, F32 b, F32 yes, F32 no) { return {a.v > b.v ? yes.v : no.v}; }
PIO_INLINE F32 abs(F32 a) { return {(F32x16)((I32x16)a.v & 0x7FFFFFFF)}; }
PIO_INLINE F32 sqrt(F32 a) {
  for (int i = 0; i < 16; ++i) a.v[i] = std::sqrt(a.v[i]);
  return a;
}
PIO_INLINE F32 round(F32 a) {
  // Adding 2^23 leaves no bits for a fraction; larger numbers have none. Sixteen calls of nearbyint cost ten times as
  // much.
  const I32x16 sign = (I32x16)a.v & (I32x16{} + INT32_MIN);
  const F32 size = abs(a);
  const F32x16 rounded = (size.v + 8388608.0f) - 8388608.0f;
  const F32x16 whole = size.v < 8388608.0f ? rounded : size.v;
  return {(F32x16)((I32x16)whole | sign)};
}
PIO_INLINE float sum(F32 a) {
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
  return a.v[0];
}
PIO_INLINE float largest(F32 a) {
  float out = a.v[0];
  for (int i = 1; i < 16; ++i) out = a.v[i] > out ? a.v[i] : out;
  return out;
}

PIO_INLINE I32 set_i32(int32_t x) { return {four_times<I32x4, I32x16>(I32x4{x, x, x, x})}; }
PIO_INLINE I32 load_i32(const int32_t* p) {
  I32 out;
  std::memcpy(&out.v, p, sizeof out.v);
  return out;
}
PIO_INLINE void store_i32(int32_t* p, I32 a) { std::memcpy(p, &a.v, sizeof a.v); }
// add and sum are modulo 2^32, hence unsigned: overflow of signed integers is undefined, in vectors too.
PIO_INLINE I32 add(I32 a, I32 b) { return {(I32x16)((U32x16)a.v + (U32x16)b.v)}; }
PIO_INLINE int32_t sum(I32 a) {
  uint32_t out = 0;
  for (int i = 0; i < 16; ++i) out += static_cast<uint32_t>(a.v[i]);
  return static_cast<int32_t>(out);
}
template <int bits>
PIO_INLINE I32 shift_left(I32 a) {
  return {a.v << bits};
}
PIO_INLINE I32 max(I32 a, I32 b) { return {a.v > b.v ? a.v : b.v}; }
PIO_INLINE int32_t largest(I32 a) {
  int32_t out = a.v[0];
  for (int i = 1; i < 16; ++i) out = a.v[i] > out ? a.v[i] : out;
  return out;
}
// Bits of |a|. As integers they order like the magnitudes, with infinity above all numbers and NaN above infinity.
PIO_INLINE I32 magnitude_bits(F32 a) { return {(I32x16)a.v & 0x7FFFFFFF}; }
PIO_INLINE F32 to_f32(I32 a) { return {__builtin_convertvector(a.v, F32x16)}; }
PIO_INLINE I32 to_i32(F32 a) { return {__builtin_convertvector(round(a).v, I32x16)}; }
PIO_INLINE F32 bits_as_f32(I32 a) { return {(F32x16)a.v}; }
PIO_INLINE void store_i8(int8_t* p, I32 a) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}
PIO_INLINE I32 load_i8(const int8_t* p) {
  I32 out{};
  for (int i = 0; i < 16; ++i) out.v[i] = p[i];
  return out;
}
PIO_INLINE I32 load_u8(const uint8_t* p) {
  I32 out{};
  for (int i = 0; i < 16; ++i) out.v[i] = p[i];
  return out;
}

PIO_INLINE Bytes load_bytes(const uint8_t* p) {
  Bytes out;
  std::memcpy(&out.v, p, 64);
  return out;
}
PIO_INLINE Bytes low_nibbles(Bytes a) { return {a.v & 15}; }
PIO_INLINE Bytes high_nibbles(Bytes a) { return {a.v >> 4}; }
PIO_INLINE Bytes repeat4(const void* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return {(U8x64)set_i32(four).v};
}
// Products of signed bytes in 16-bit lanes, even and odd bytes apart and then added: at most 2 * 127 * 127 = 32258. A
// loop over bytes in 32 bits ran at 4 GFLOP/s on Zen 4.
PIO_INLINE I32x16 dot_signed(I16x32 w, I16x32 a) {
  const I16x32 pairs = ((w << 8) >> 8) * ((a << 8) >> 8) + (w >> 8) * (a >> 8);
  return (((I32x16)pairs << 16) >> 16) + ((I32x16)pairs >> 16);
}
// dot_bytes takes 128 - kByteZero from every w: here all of it, the weights being signed bytes stored + 128.
constexpr int kByteZero = 0;
PIO_INLINE I32 dot_nibbles(I32 acc, Bytes w, Bytes a) { return {acc.v + dot_signed((I16x32)w.v, (I16x32)a.v)}; }
PIO_INLINE I32 dot_bytes(I32 acc, Bytes w, Bytes a) { return {acc.v + dot_signed((I16x32)(w.v ^ 128), (I16x32)a.v)}; }

// Four by four bytes of each 128-bit quarter transposed: byte 4 i + j of a quarter becomes its byte 4 j + i.
PIO_INLINE Bytes transpose_quarters(Bytes a) {
  Bytes out;
  for (int q = 0; q < 64; q += 16)
    for (int i = 0; i < 16; ++i) out.v[q + i] = a.v[q + 4 * (i % 4) + i / 4];
  return out;
}
PIO_INLINE Bytes spread_low_bytes(I32 a) {  // the low bytes of each quarter's four lanes, in all of these
  Bytes out;
  for (int i = 0; i < 64; ++i) out.v[i] = static_cast<uint8_t>(a.v[i / 16 * 4 + i % 4]);
  return out;
}
PIO_INLINE Bytes repeat_quarter(const uint8_t* p) {  // 16 bytes, in every quarter
  Bytes out;
  for (int q = 0; q < 64; q += 16) std::memcpy(reinterpret_cast<char*>(&out.v) + q, p, 16);
  return out;
}
// 64 bf16 from their signs and mantissas and the codes of their exponents, whose bytes are looked up in every quarter:
// out[0] from the first eight bytes of each quarter, out[1] from the others.
PIO_INLINE void join_exponents(Bytes kept, Bytes codes, Bytes high_table, Bytes low_table, Pairs* out) {
  uint8_t signs[64], code[64], high[64], low[64], both[2][64];
  std::memcpy(signs, &kept.v, 64);
  std::memcpy(code, &codes.v, 64);
  std::memcpy(high, &high_table.v, 64);
  std::memcpy(low, &low_table.v, 64);
  for (int i = 0; i < 64; ++i) {
    uint8_t* to = both[i % 16 / 8] + i / 16 * 16 + i % 8 * 2;
    to[0] = static_cast<uint8_t>(low[code[i]] | (signs[i] & 127));
    to[1] = static_cast<uint8_t>(high[code[i]] | (signs[i] & 128));
  }
  std::memcpy(&out[0].v, both[0], 64);
  std::memcpy(&out[1].v, both[1], 64);
}
PIO_INLINE void store_bytes(uint8_t* p, Bytes a) { std::memcpy(p, &a.v, 64); }
PIO_INLINE void store_quarter_sums(int32_t* p, I32 a) {  // p[i] = sum of lane i of the four quarters
  for (int i = 0; i < 4; ++i) p[i] = a.v[i] + a.v[i + 4] + a.v[i + 8] + a.v[i + 12];
}
PIO_INLINE I32 quarter_sums(const I32* a) {  // lane 4 i + j: the sum of lane j of the four quarters of a[i]
  I32 out;
  for (int i = 0; i < 16; ++i) {
    const I32x16 x = a[i / 4].v;
    out.v[i] = x[i % 4] + x[i % 4 + 4] + x[i % 4 + 8] + x[i % 4 + 12];
  }
  return out;
}

PIO_INLINE Pairs load_pairs_n(const uint16_t* p, int n) {  // n <= 32 bf16, zeros beyond
  Pairs out{};
  std::memcpy(&out.v, p, n * sizeof(uint16_t));
  return out;
}
PIO_INLINE Pairs load_pairs(const uint16_t* p) { return load_pairs_n(p, 32); }
PIO_INLINE void store_pairs_n(uint16_t* p, Pairs a, int n) { std::memcpy(p, &a.v, n * sizeof(uint16_t)); }
PIO_INLINE Pairs repeat_pair(const void* p) {  // two bf16, in every lane
  int32_t two;
  std::memcpy(&two, p, 4);
  return {set_i32(two).v};
}
PIO_INLINE F32 even(Pairs a) { return {(F32x16)(a.v << 16)}; }                // the first of each pair
PIO_INLINE F32 odd(Pairs a) { return {(F32x16)(a.v & (I32x16{} - 65536))}; }  // the second
PIO_INLINE Pairs narrow_pairs(F32 first, F32 second) {                        // rounded to nearest even
  alignas(64) uint16_t both[2][16];
  store_bf16(both[0], first);
  store_bf16(both[1], second);
  Pairs out;
  for (int i = 0; i < 16; ++i) out.v[i] = static_cast<int32_t>(both[1][i] * 65536u + both[0][i]);
  return out;
}
// acc + both products of each lane. Order and rounding of the two additions are the set's own.
PIO_INLINE F32 dot_pairs(F32 acc, Pairs a, Pairs b) { return fma(odd(a), odd(b), fma(even(a), even(b), acc)); }
PIO_INLINE Pairs as_pairs(F32 a) { return {(I32x16)a.v}; }
PIO_INLINE F32 as_lanes(Pairs a) { return {(F32x16)a.v}; }
// p[i] = sum of the lanes of a[i], i < 4, each in the same order.
PIO_INLINE void store_sums4(float* p, const F32* a) {
  for (int i = 0; i < 4; ++i) p[i] = sum(a[i]);
}
PIO_INLINE void transpose_lanes(F32 (&a)[16]) {  // lane j of a[i] becomes lane i of a[j]
  float all[16][16];
  for (int i = 0; i < 16; ++i) store(all[i], a[i]);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) a[i].v[j] = all[j][i];
}

PIO_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
PIO_INLINE void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace pio::portable
