// AMX: tiles of 16 rows of 64 bytes, and products of bfloat16 numbers by them. Where the processor has none, the same
// operations are done by vectors, slowly, so that tests can run everywhere.
//
// Inline assembly instead of the compilers' macros: these paste their argument as text, so that no template parameter
// can name a tile, and they do not tell the compiler which memory they read.
#pragma once

#include "microkernel.h"

namespace tob {
namespace amx {

inline constexpr int kTileRows = 16, kRowBytes = 64;
inline constexpr int kTileReals = kTileRows * kRowBytes / 4;

#if defined(__AMX_BF16__)

// A thread's tiles while this lives: 8 tiles, each as large as can be. Afterwards the thread's state is small again.
class Session {
 public:
  Session() { asm volatile("ldtilecfg %0" ::"m"(kLayout) : "memory"); }
  ~Session() { asm volatile("tilerelease" ::: "memory"); }
  Session(const Session &) = delete;
  Session &operator=(const Session &) = delete;

 private:
  struct alignas(64) Layout {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static constexpr Layout kLayout{
      1,
      0,
      {},
      {kRowBytes, kRowBytes, kRowBytes, kRowBytes, kRowBytes, kRowBytes, kRowBytes, kRowBytes},
      {kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, kTileRows}};
};

template <int kTile> TOB_INLINE void zero() { asm volatile("tilezero %%tmm%c0" ::"i"(kTile)); }

// Strides count bytes.
template <int kTile> TOB_INLINE void load(const void *from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile> TOB_INLINE void store(void *to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}

// c += a b, where rows of a and columns of b hold pairs of neighbours along the depth.
template <int kC, int kA, int kB> TOB_INLINE void multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

#else

// A thread's emulated tiles. Outside of a session there is none, as on a processor.
struct Tiles {
  bool exist = false;
  Simd<float>::Vec rows[8][kTileRows];

  Simd<float>::Vec (&at(int tile)) [kTileRows] {
    if (!exist) std::abort();
    return rows[tile];
  }
};
inline thread_local Tiles emulated;

class Session {
 public:
  Session() { emulated.exist = true; }
  ~Session() { emulated.exist = false; }
  Session(const Session &) = delete;
  Session &operator=(const Session &) = delete;
};

template <int kTile> inline void zero() {
  for (auto &row : emulated.at(kTile)) row = Simd<float>::Vec{};
}
template <int kTile> inline void load(const void *from, int64_t stride) {
  auto &rows = emulated.at(kTile);
  for (int r = 0; r < kTileRows; ++r) std::memcpy(&rows[r], static_cast<const char *>(from) + r * stride, kRowBytes);
}
template <int kTile> inline void store(void *to, int64_t stride) {
  const auto &rows = emulated.at(kTile);
  for (int r = 0; r < kTileRows; ++r) std::memcpy(static_cast<char *>(to) + r * stride, &rows[r], kRowBytes);
}

// The first numbers of all pairs are added up by themselves, then the second ones, then their sum is added to c.
// Rounding is to nearest even, subnormal numbers count as 0. The product of two bfloat16 numbers needs no rounding.
template <int kC, int kA, int kB> inline void multiply_add() {
  using Lanes = Simd<float>;
  const auto &a = emulated.at(kA), &b = emulated.at(kB);
  auto &c = emulated.at(kC);
  for (int r = 0; r < kTileRows; ++r) {
    Lanes::Vec first{}, second{};
    for (int k = 0; k < Lanes::kLanes; ++k) {
      float cell;
      std::memcpy(&cell, reinterpret_cast<const char *>(&a[r]) + 4 * k, sizeof cell);
      const Lanes::Vec pair = Lanes::broadcast_bits(&cell);
      first += first_of_pairs<float>(pair) * first_of_pairs<float>(b[k]);
      second += second_of_pairs<float>(pair) * second_of_pairs<float>(b[k]);
    }
    c[r] += first + second;
  }
}

#endif

// A factor of a product: a matrix of cells, in which `step` leads to the next 16 cells of the depth. Strides count
// cells. A left factor has a row of cells for each row of the product. A right factor has a row for each cell of the
// depth, with a cell for each column.
struct Factor {
  const float *data;
  int64_t row_stride, step;
};

// What a product is added to: 0, the numbers in its place, or tiles of the bias, of which the tile of (row, column)
// depends on column - row alone.
enum class Start { kZero, kSum, kBias };

// C = start + A B for 32 x 32 numbers and `steps` steps of the depth. `bias` is the tile at C's corner. The tile right
// of a tile follows it, the tile below precedes it.
//
// Half of C at a time is stored as soon as it is done. B is loaded twice, the second time from the L1 cache. This is
// faster than all four tiles at once: few tile registers are renamed, so stores overlap only with the next half.
template <Start kStart>
TOB_INLINE void multiply(Factor a, const Factor &b, float *c, int64_t c_stride, int steps,
                         const float *bias = nullptr) {
  constexpr int64_t kBytes = sizeof(float), kHalf = kRowBytes / kBytes;
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    if constexpr (kStart == Start::kZero) {
      zero<0>();
      zero<1>();
    } else if constexpr (kStart == Start::kSum) {
      load<0>(c, c_stride * kBytes);
      load<1>(c + kHalf, c_stride * kBytes);
    } else {
      load<0>(bias - half * kTileReals, kRowBytes);
      load<1>(bias + (1 - half) * kTileReals, kRowBytes);
    }
    const float *left = a.data, *right = b.data;
    for (int k = 0; k < steps; ++k, left += a.step, right += b.step) {
      load<4>(left, a.row_stride * kBytes);
      load<6>(right, b.row_stride * kBytes);
      multiply_add<0, 4, 6>();
      load<7>(right + kHalf, b.row_stride * kBytes);
      multiply_add<1, 4, 7>();
    }
    store<0>(c, c_stride * kBytes);
    store<1>(c + kHalf, c_stride * kBytes);
    a.data += kTileRows * a.row_stride;
    c += kTileRows * c_stride;
  }
}

}  // namespace amx
}  // namespace tob
