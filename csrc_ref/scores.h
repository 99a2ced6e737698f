// Tiles of scores: S = Q K^T + bias in bits, -inf at every pair that is not attended to.
#pragma once

#include "bias_gathered.h"
#include "bias_strips.h"

namespace tob {

// The place where scores are multiplied with the scale, in bits. Packing multiplies the queries with it, which costs
// nothing for each score. Queries in bfloat16 would be rounded again, so their products are multiplied instead. dK is
// made from the packed queries, so its factor takes out what they hold.
template <class Real, class Operand> struct Scale {
  static constexpr bool kInQueries = std::is_same_v<Operand, Real>;
  explicit Scale(double scale)
      : query(kInQueries ? Real(scale * kLog2E) : Real(1)),
        products(kInQueries ? Real(1) : Real(scale * kLog2E)),
        dkey(kInQueries ? Real(kLn2) : Real(scale)) {}
  Real query, products, dkey;
};

// What turns a tile of products into scores: scale * Q K^T + bias + mask. Row 0 and column 0 are the tile's corner.
template <class Real> struct ScoreTerms {
  Real scale;                          // of the products
  const Real *strip;                   // strip[column - row], or null: no bias, and the whole tile is inside the band
  const GatheredTile<Real> *gathered;  // instead of the strip, or null
  const Real *key_mask;                // key_mask[column], or null
};

enum class Bias { kNone, kStrip, kGathered };

// A register tile of A B at (row, column). pack_left has packed the rows of A, pack_right_transposed the columns of B.
template <class Operand, class Real>
TOB_INLINE Tile<Real> product_tile(const Real *a, int64_t chunk_stride, const Real *panels, int chunks, int row,
                                   int column) {
  constexpr int kPanelWidth = kPanel<Real>, kChunk = kChunkCells<Real, Operand>;
  const Real *panel = panels + int64_t(column) * chunks * kChunk;
  Tile<Real> tile{};
  for (int c = 0; c < chunks; ++c)
    multiply_add<Operand>(tile, a + row * kChunk + c * chunk_stride, kChunk, 1, panel + c * kChunk * kPanelWidth,
                          kChunk);
  return tile;
}

// The scores of a register tile at (row, column).
template <Bias kBias, bool kMask, bool kScaled, class Real>
TOB_INLINE void write_scores(const Tile<Real> &tile, const ScoreTerms<Real> &terms, Real *out, int64_t stride, int row,
                             int column) {
  using Lanes = Simd<Real>;
  using Vec = typename Lanes::Vec;
  constexpr int W = Lanes::kLanes;
  const Vec scale = Lanes::broadcast(kScaled ? terms.scale : Real(1));
#pragma GCC unroll 12
  for (int r = 0; r < kTileRows; ++r) {
    Vec left = tile.left[r], right = tile.right[r];
    if constexpr (kScaled) {
      left *= scale;
      right *= scale;
    }
    if constexpr (kBias == Bias::kStrip) {
      const Real *bias = terms.strip + (column - row - r);
      left += Lanes::load(bias);
      right += Lanes::load(bias + W);
    }
    if constexpr (kBias == Bias::kGathered) {
      left += terms.gathered->bias(row + r, column);
      right += terms.gathered->bias(row + r, column + W);
    }
    if constexpr (kMask) {
      left += Lanes::load(terms.key_mask + column);
      right += Lanes::load(terms.key_mask + column + W);
    }
    Real *to = out + (row + r) * stride + column;
    Lanes::store(to, left);
    Lanes::store(to + W, right);
  }
}

// Forward and backward both make their scores here, so that their roundings are the same.
//
// Scores of rows [0, rows) and the panels of columns [columns.begin, columns.end), multiples of kPanel.
// `panels` are the keys' transposed panels from column 0 on. Columns from `valid_columns` on become -inf.
template <class Operand, class Real>
TOB_INLINE void score_block(const Real *a, int64_t chunk_stride, const Real *panels, int chunks, Real *out,
                            int64_t stride, const ScoreTerms<Real> &terms, int rows, Range columns, int valid_columns) {
  constexpr int kPanelWidth = kPanel<Real>;
  const auto run = [&](auto bias, auto mask) {
    for (int column = columns.begin; column < columns.end; column += kPanelWidth)
      for (int row = 0; row < rows; row += kTileRows)
        write_scores<decltype(bias)::value, decltype(mask)::value, !Scale<Real, Operand>::kInQueries>(
            product_tile<Operand>(a, chunk_stride, panels, chunks, row, column), terms, out, stride, row, column);
  };
  const auto run_with = [&](auto bias) {
    if (terms.key_mask) run(bias, std::true_type());
    else run(bias, std::false_type());
  };
  if (terms.gathered) run_with(std::integral_constant<Bias, Bias::kGathered>());
  else if (terms.strip) run_with(std::integral_constant<Bias, Bias::kStrip>());
  else run_with(std::integral_constant<Bias, Bias::kNone>());
  for (int row = 0; valid_columns < columns.end && row < rows; ++row)
    for (int column = valid_columns; column < columns.end; ++column)
      out[row * stride + column] = -std::numeric_limits<Real>::infinity();
}

}  // namespace tob
