// What Forward and Backward multiply with, as a policy: the sizes of their steps, the layouts of factors, and the
// products. RegisterProducts serve every processor; AmxProducts (amx_products.h) have the same members.
#pragma once

#include "dscores.h"

namespace tob {

// Scores do not start from their bias: it is added to them.
template <class Real> struct NoBiasTiles {
  NoBiasTiles(const tob_problem &, const BiasStrips<Real> &, int64_t) {}
  static constexpr bool present() { return false; }
  static void make(int64_t, int64_t, int64_t) {}
  static const Real *at(int64_t, int, int) { return nullptr; }
};

// Products by register tiles (microkernel.h).
template <class R, class O> struct RegisterProducts {
  using Real = R;
  using Operand = O;
  using Vec = typename Simd<Real>::Vec;
  using Session = NoSession;  // what a thread holds meanwhile
  using BiasTiles = NoBiasTiles<Real>;
  using Factors = RowFactors<Real, Operand>;

  static constexpr int kTile = kSmallTileRows;        // the rows of all products are multiples of it
  static constexpr int kRows = 12;                    // rows in a step: their scores stay in the L1 cache
  static constexpr int kForwardQueries = 96;          // queries in a task
  static constexpr int kForwardKeys = 192;            // keys in a step
  static constexpr int kBackwardQueries = 96;         // of a tile of P and dS
  static constexpr int kBackwardKeys = 96;            // of it, and of a task
  static constexpr int kKeptRows = kBackwardQueries;  // rows of a tile whose P and dS stay in memory as reals
  static constexpr bool kScoresAhead = false;         // whether a step's scores are made before P V of the last step

  // A vector of scores from what `scores` has made.
  static TOB_INLINE Vec scaled(Vec x, Real) { return x; }

  // Multiplies the rows of a sum with their factors, unless `accumulate` does.
  static void rescale(Real *, int, const Real *, int) {}

  // See score_block and dscore_block.
  template <bool kGated>
  static TOB_INLINE void scores(const Real *a, int64_t chunk_stride, const Real *panels, int chunks, Real *out,
                                int64_t stride, const ScoreTerms<Real> &terms, int rows, Range columns,
                                int valid_columns) {
    score_block<kGated, Operand>(a, chunk_stride, panels, chunks, out, stride, terms, rows, columns, valid_columns);
  }
  template <bool kDropped, bool kDlse, class Kept>
  static void dscores(const Real *a, int64_t chunk_stride, const Real *panels, int chunks,
                      const DscoreTerms<Real> &terms, const Real *probs, Real *out, int64_t stride, int rows,
                      Range columns, Kept kept) {
    dscore_block<kDropped, kDlse, Operand>(a, chunk_stride, panels, chunks, terms, probs, out, stride, rows, columns,
                                           kept);
  }

  // delta of the rows [first, first + count) of a matrix of dO, as dS subtracts it. `douts` are its factors.
  static void dots(const Matrix &out, const Matrix &dout, const Factors &, int64_t, int first, int count, Real *delta) {
    dot_rows<Operand>(out, dout, first, count, delta);
  }

  // See accumulate_product; rows of A are `stride` cells apart.
  template <bool kScaled, class DepthRange>
  static TOB_INLINE void accumulate(const Real *a, int64_t stride, const Real *b, int64_t panel_stride, Real *c,
                                    int64_t c_stride, int rows, int panels, const Real *alpha, DepthRange depth_range) {
    accumulate_product<kScaled, Operand>(a, stride, 1, b, panel_stride, c, c_stride, rows, panels, alpha, depth_range);
  }

  // Adds A^T B to a gradient of `keys` rows, where A is a tile of P or dS, as Tiles has it for this purpose, and B are
  // rows from `first` on of dO or Q. For `count` keys from j on the product runs over the rows row_range(j, count).
  template <class RowRange>
  static void accumulate_columns(const Real *a, int64_t stride, const Factors &b, int64_t matrix, int first,
                                 Real *gradient, int keys, int chunks, RowRange row_range) {
    const Real *none = nullptr;
    accumulate_product<false, Operand>(a, 1, stride, b.right(matrix, first), b.panel_stride, gradient,
                                       chunks * kPanel<Real>, keys, chunks, none, row_range);
  }

  // Writes `count` rows of such a gradient, as write_rows does.
  static void write_gradient(const Matrix &m, int first, int count, Real kept, Real factor, const Real *gradient, int,
                             int chunks) {
    write_rows(m, first, count, kept, factor, gradient, chunks * kPanel<Real>);
  }
};

}  // namespace tob
