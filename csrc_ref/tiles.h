// The tiles of P and dS that the backward pass works on, and their forms as factors. The products with P^T and dS^T sum
// over queries, the product with dS sums over keys.
#pragma once

#include <algorithm>

#include "microkernel.h"

namespace tob {

// Of kQueries rows, kKeptRows at a time are there as reals; factors that are packed have all of them.
template <class Real, class Operand, int kQueries, int kKeys, int kKeptRows> class Tiles {
  using Lanes = Simd<Real>;
  static constexpr int kPanelWidth = kPanel<Real>, W = Lanes::kLanes, kPerCell = kOperandsPerCell<Real, Operand>;

 public:
  // A register tile that reads dS sheared overhangs it by as many columns as it has rows, less one.
  static constexpr int kMargin = round_up(kTileRows - 1, W);
  static constexpr int64_t kStride = kKeys + std::max(2 * W, kMargin);  // from one row to the next, of reals or cells
  static_assert(kQueries % kPerCell == 0 && kSmallTileRows % kPerCell == 0);
  static_assert(kKeptRows == kQueries || (kPerCell > 1 && kQueries % kKeptRows == 0));

  // Puts kMargin zeros before and after each row of dS, which is `width` wide. Neighbouring rows share some of them.
  void clear_margins(int width) {
    for (int row = 0; row < kKeptRows; ++row) {
      std::fill_n(dscores(row) - kMargin, kMargin, Real(0));
      std::fill_n(dscores(row) + width, kMargin, Real(0));
    }
  }

  Real *probs(int row) { return probs_ + row % kKeptRows * kStride; }
  Real *dscores(int row) { return dscores_ + kMargin + row % kKeptRows * kStride; }

  // The factors. Reals are multiplied as they lie in the tiles; `pack` makes the factors of bfloat16 numbers.
  const Real *transposed_probs() const { return kPerCell == 1 ? probs_ : cells_[0]; }
  const Real *transposed_dscores() const { return kPerCell == 1 ? dscores_ + kMargin : cells_[1]; }
  const Real *dscores_factor() const { return kPerCell == 1 ? dscores_ + kMargin : cells_[2]; }

  // Makes the factors that are needed from rows [row, row + rows) and `width` columns, which are whole cells and
  // panels.
  void pack(int row, int rows, int width, bool for_dvalue, bool for_dkey, bool for_dquery) {
    if constexpr (kPerCell == 2) {
      for (int r = row; r < row + rows; r += 2)
        for (int j = 0; j < width; j += W) {
          if (for_dvalue) store_pairs(rows_below(probs(r) + j), cells_[0] + r / 2 * kStride + j);
          if (!for_dkey && !for_dquery) continue;
          const Halves::Vec both = rows_below(dscores(r) + j);
          if (for_dkey) store_pairs(both, cells_[1] + r / 2 * kStride + j);
          if (for_dquery)
            Halves::store_halves(cells_[2] + r * kStride + j / 2, cells_[2] + (r + 1) * kStride + j / 2, both);
        }
    }
  }

 private:
  // A vector of a row and the vector below it, as operands.
  static TOB_INLINE Halves::Vec rows_below(const Real *from) {
    return Halves::narrowed(Lanes::load(from), Lanes::load(from + kStride));
  }
  // Stores them as cells: each holds a number of the row and the number below it.
  static TOB_INLINE void store_pairs(Halves::Vec rows, Real *cells) {
    Halves::store(cells, Halves::interleaved_halves(rows));
  }

  alignas(64) Real probs_[kKeptRows * kStride], dscores_[(kKeptRows + 1) * kStride];
  alignas(64) Real cells_[3][kPerCell == 1 ? 1 : kQueries * kStride];
};

}  // namespace tob
