// Tiles of scores, in bits: S = Q K^T + bias, with -inf at every pair that is not attended to.
#pragma once

#include "band.h"

namespace tob {

// Where a tile of scores takes its addends from; the tile's corner is row 0, column 0 of each.
template <class Real> struct ScoreAddends {
  const Real *strip;        // strip[column - row], or null: no bias, and the whole tile is inside the band
  const Real *key_mask;     // key_mask[column], or null
  const Real *row_max;      // null, or subtracted from row r:
  const Real *row_log_sum;  // row_max[r], then row_log_sum[r]
};

// One register tile of scores, (kTileRows, kPanel), from rows in panels: a[d / kPanel * chunk_stride + row * kPanel].
template <bool kStrip, bool kMask, bool kNormalised, class Real>
TOB_INLINE void score_tile(const Real *a, int64_t chunk_stride, const Real *panel, int chunks, Real *out, int64_t stride,
                           const ScoreAddends<Real> &add, int row, int column) {
  using S = Simd<Real>;
  using Vec = typename S::Vec;
  constexpr int P = kPanel<Real>, W = S::kLanes;
  Tile<Real> tile{};
  for (int c = 0; c < chunks; ++c) multiply_add(tile, a + c * chunk_stride, P, 1, panel + c * P * P, P);
#pragma GCC unroll 12
  for (int r = 0; r < kTileRows; ++r) {
    Vec left = tile.left[r], right = tile.right[r];
    if constexpr (kStrip) {
      const Real *bias = add.strip + (column - row - r);
      left += S::load(bias);
      right += S::load(bias + W);
    }
    if constexpr (kMask) {
      left += S::load(add.key_mask + column);
      right += S::load(add.key_mask + column + W);
    }
    if constexpr (kNormalised) {
      const Vec max = S::broadcast(add.row_max[row + r]), log_sum = S::broadcast(add.row_log_sum[row + r]);
      left = left - max - log_sum;
      right = right - max - log_sum;
    }
    Real *to = out + (row + r) * stride + column;
    S::store(to, left);
    S::store(to + W, right);
  }
}

// Scores of rows [0, rows) and the panels of columns [columns.begin, columns.end), multiples of kPanel.
// `panels` are the keys' transposed panels from column 0; `valid_columns` of the columns exist, the rest become -inf.
template <bool kNormalised, class Real>
void score_block(const Real *a, int64_t chunk_stride, const Real *panels, int chunks, Real *out, int64_t stride,
                 const ScoreAddends<Real> &add, int rows, Range columns, int valid_columns) {
  constexpr int P = kPanel<Real>;
  const auto run = [&](auto strip, auto mask) {
    for (int column = columns.begin; column < columns.end; column += P)
      for (int row = 0; row < rows; row += kTileRows)
        score_tile<decltype(strip)::value, decltype(mask)::value, kNormalised>(
            a + row * P, chunk_stride, panels + int64_t(column) * chunks * P, chunks, out, stride, add, row, column);
  };
  constexpr std::true_type yes;
  constexpr std::false_type no;
  if (add.key_mask) add.strip ? run(yes, yes) : run(no, yes);
  else add.strip ? run(yes, no) : run(no, no);
  for (int row = 0; valid_columns < columns.end && row < rows; ++row)
    for (int column = valid_columns; column < columns.end; ++column)
      out[row * stride + column] = -std::numeric_limits<Real>::infinity();
}

}  // namespace tob
