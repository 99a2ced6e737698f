// Tiles of the scores' gradient: dS = P * (dO V^T - delta + dlse).
#pragma once

#include "dropout.h"
#include "scores.h"

namespace tob {

// The terms that make dS of a tile of dO V^T. Row 0 is the tile's first row.
template <class Real> struct DscoreTerms {
  const Real *delta, *dlse;
  Real kept_scale;
};

// A vector of dS = P * (Z dO V^T - delta + dlse), where x is dO V^T. Z is kept_scale or 0, as the bytes at `kept` tell
// (see KeptWeights); it is 1 without dropout.
//
// A row with one key has dS = P dlse exactly. Without dropout its out is V, so delta equals the product to the last
// bit. With dropout its out is Z V, rounded, and delta only near the product; so the difference is set to 0 where P
// is 1.
template <bool kDropped, bool kDlse, class Real>
TOB_INLINE typename Simd<Real>::Vec dscore(typename Simd<Real>::Vec x, typename Simd<Real>::Vec prob,
                                           const DscoreTerms<Real> &terms, int row, const int8_t *kept) {
  using Lanes = Simd<Real>;
  if constexpr (kDropped) x = where_kept<Real>(kept, terms.kept_scale * x);
  x -= Lanes::broadcast(terms.delta[row]);
  if constexpr (kDropped) x = prob == Lanes::broadcast(1) ? typename Lanes::Vec{} : x;
  if constexpr (kDlse) x += Lanes::broadcast(terms.dlse[row]);
  return prob * x;
}

// dS for rows [0, rows) and some columns. `a` and `panels` hold dO and V in the form in which score_block takes Q and
// K.
template <bool kDropped, bool kDlse, class Operand, class Real, class Kept>
void dscore_block(const Real *a, int64_t chunk_stride, const Real *panels, int chunks, const DscoreTerms<Real> &terms,
                  const Real *probs, Real *dscores, int64_t stride, int rows, Range columns, Kept kept) {
  using Lanes = Simd<Real>;
  constexpr int kPanelWidth = kPanel<Real>, W = Lanes::kLanes;
  for (int column = columns.begin; column < columns.end; column += kPanelWidth)
    visit_tiles(rows, [&](int row, auto height) {
      constexpr int kRows = decltype(height)::value;
      const auto tile = product_tile<Operand, kRows>(a, chunk_stride, panels, chunks, row, column);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const int64_t at = (row + r) * stride + column;
        const typename Lanes::Vec x[2] = {tile.left[r], tile.right[r]};
        for (int half = 0; half < 2; ++half)
          Lanes::store(dscores + at + half * W,
                       dscore<kDropped, kDlse>(x[half], Lanes::load(probs + at + half * W), terms, row + r,
                                               kDropped ? kept(row + r, column + half * W) : nullptr));
      }
    });
}

// Zeroes the dropped elements of a tile.
template <class Real, class Kept> void drop(Real *tile, int64_t stride, int rows, Range columns, Kept kept) {
  using Lanes = Simd<Real>;
  for (int r = 0; r < rows; ++r)
    for (int column = columns.begin; column < columns.end; column += Lanes::kLanes) {
      Real *x = tile + r * stride + column;
      Lanes::store(x, where_kept<Real>(kept(r, column), Lanes::load(x)));
    }
}

// Zeroes the elements of a tile's rows, which are `width` wide, outside of `columns`.
template <class Real> void clear_outside(Real *tile, int64_t stride, int rows, Range columns, int width) {
  if (columns.size() == width) return;
  for (int r = 0; r < rows; ++r, tile += stride) {
    std::fill(tile, tile + columns.begin, Real(0));
    std::fill(tile + columns.end, tile + width, Real(0));
  }
}

}  // namespace tob
