// The matrix products: a register tile of some rows by one panel (two vectors) of columns.
#pragma once

#include "operands.h"

namespace tob {

// Rows of a register tile. Its accumulators, two vectors of a panel and one broadcast take 15 of 16 registers, or 27 of
// 32 with AVX-512.
inline constexpr int kTileRows = TOB_VECTOR_BYTES >= 64 ? 12 : 6;
// Rows of the smaller tiles for what whole tiles leave. With fewer accumulators products would wait for their sums.
inline constexpr int kSmallTileRows = TOB_VECTOR_BYTES >= 64 ? 4 : kTileRows;

// Columns of a panel. A matrix B is stored as panels: B[k][0 .. kPanel) contiguous in k, which counts cells.
template <class Real> inline constexpr int kPanel = 2 * Simd<Real>::kLanes;

inline constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }
inline constexpr int round_down(int n, int multiple) { return n / multiple * multiple; }

template <class Real, int kRows> struct Tile {
  typename Simd<Real>::Vec left[kRows], right[kRows];
};

// Calls visit(row, height) for each register tile of `rows` rows, a multiple of kSmallTileRows. The height is a
// constant.
template <class Visit> TOB_INLINE void visit_tiles(int rows, Visit visit) {
  int row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) visit(row, std::integral_constant<int, kTileRows>());
  if constexpr (kSmallTileRows < kTileRows)
    for (; row < rows; row += kSmallTileRows) visit(row, std::integral_constant<int, kSmallTileRows>());
}

// tile += A B, `depth` cells deep: A[r][k] is a[r * row_stride + k * depth_stride], B one panel, whose right vectors
// lie `right_at` behind its left ones. A half has left vectors only.
template <class Operand, bool kHalf = false, class Real, int kRows>
TOB_INLINE void multiply_add(Tile<Real, kRows> &tile, const Real *a, int64_t row_stride, int64_t depth_stride,
                             const Real *panel, int depth, int64_t right_at = Simd<Real>::kLanes) {
  using Lanes = Simd<Real>;
#pragma GCC unroll 4
  for (int k = 0; k < depth; ++k) {
    const typename Lanes::Vec left = Lanes::load(panel), right = kHalf ? left : Lanes::load(panel + right_at);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const typename Lanes::Vec x = broadcast_cell<Operand>(a + r * row_stride);
      tile.left[r] = add_product<Operand, Real>(tile.left[r], x, left);
      if constexpr (!kHalf) tile.right[r] = add_product<Operand, Real>(tile.right[r], x, right);
    }
    a += depth_stride;
    panel += kPanel<Real>;
  }
}

// C = alpha[row] * C + A B, for `rows` rows (a multiple of kSmallTileRows) and `panels` panels of B; C is row-major.
// For `height` rows from r on the product runs over the depths depth_range(r, height), in operands: outside of them A
// is zero. A half has one panel, of which only the left vectors count, and as many columns of C.
template <bool kScaled, class Operand, bool kHalf = false, class Real, class DepthRange>
TOB_INLINE void accumulate_product(const Real *a, int64_t row_stride, int64_t depth_stride, const Real *b,
                                   int64_t panel_stride, Real *c, int64_t c_stride, int rows, int panels,
                                   const Real *alpha, DepthRange depth_range) {
  using Lanes = Simd<Real>;
  constexpr int kPerCell = kOperandsPerCell<Real, Operand>;
  for (int p = 0; p < panels; ++p)
    visit_tiles(rows, [&](int r0, auto height) {
      const auto [first, last] = depth_range(r0, height);
      const int begin = first / kPerCell, end = (last + kPerCell - 1) / kPerCell;
      if (!kScaled && begin >= end) return;
      constexpr int kRows = decltype(height)::value;
      Tile<Real, kRows> tile{};
      multiply_add<Operand, kHalf>(tile, a + r0 * row_stride + begin * depth_stride, row_stride, depth_stride,
                                   b + p * panel_stride + begin * kPanel<Real>, end - begin);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        Real *row = c + (r0 + r) * c_stride + p * kPanel<Real>;
        const typename Lanes::Vec factor = Lanes::broadcast(kScaled ? alpha[r0 + r] : Real(1));
        Lanes::store(row, factor * Lanes::load(row) + tile.left[r]);
        if constexpr (!kHalf)
          Lanes::store(row + Lanes::kLanes, factor * Lanes::load(row + Lanes::kLanes) + tile.right[r]);
      }
    });
}

}  // namespace tob
