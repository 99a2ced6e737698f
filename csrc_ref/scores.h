// Tiles of scores: S = Q K^T + bias in bits, -inf at every pair that is not attended to.
#pragma once

#include "bias_gathered.h"
#include "bias_strips.h"

namespace tob {

// The place where scores are multiplied with the scale, in bits. Packing multiplies the queries with it, which costs
// nothing for each score. Queries in bfloat16 would be rounded again, so their products are multiplied instead, or the
// scores where these are held as multiples of the scale (see BiasTiles). dK is made from the packed queries, so its
// factor takes out what they hold.
template <class Real, class Operand> struct Scale {
  static constexpr bool kInQueries = std::is_same_v<Operand, Real>;
  Scale(double scale, bool in_scores)
      : query(kInQueries ? Real(scale * kLog2E) : Real(1)),
        products(kInQueries || in_scores ? Real(1) : Real(scale * kLog2E)),
        scores(in_scores ? Real(scale * kLog2E) : Real(1)),
        dkey(kInQueries ? Real(kLn2) : Real(scale)) {}
  Real query, products, scores, dkey;
};

// The terms that make scores of a tile of products: S = scale * Q K^T + bias + mask. Row 0 and column 0 are the tile's
// corner.
template <class Real> struct ScoreTerms {
  Real scale;                          // of the products
  const Real *strip;                   // strip[column - row], or null: no bias, and the whole tile is inside the band
  const GatheredTile<Real> *gathered;  // instead of the strip, or null
  const Real *key_mask;                // key_mask[column], or null
  const Real *bias_tile;               // instead of both, where BiasTiles has the bias, or null
  const Real *gates = nullptr;         // gates[row], factors of the strip or of what is gathered, or null
  const Real *matrix = nullptr;        // matrix[row * matrix_stride + column] instead of the strip, or null
  int64_t matrix_stride = 0;
  const Real *row_biases = nullptr;  // row_biases[row] instead of the strip, or null

  bool has_bias() const { return strip || gathered || matrix || row_biases; }
};

enum class Bias { kNone, kStrip, kGathered, kGatedStrip, kGatedGathered, kMatrix, kRows };

// A register tile of A B at (row, column). pack_left has packed the rows of A, pack_right_transposed the columns of B.
template <class Operand, int kRows, class Real>
TOB_INLINE Tile<Real, kRows> product_tile(const Real *a, int64_t chunk_stride, const Real *panels, int chunks, int row,
                                          int column) {
  constexpr int kPanelWidth = kPanel<Real>, kChunk = kChunkCells<Real, Operand>;
  const Real *panel = panels + int64_t(column) * chunks * kChunk;
  Tile<Real, kRows> tile{};
  for (int c = 0; c < chunks; ++c)
    multiply_add<Operand>(tile, a + row * kChunk + c * chunk_stride, kChunk, 1, panel + c * kChunk * kPanelWidth,
                          kChunk);
  return tile;
}

// The scores of a vector of products at (row, column).
template <Bias kBias, bool kMask, bool kScaled, class Real>
TOB_INLINE typename Simd<Real>::Vec with_terms(typename Simd<Real>::Vec x, const ScoreTerms<Real> &terms, int row,
                                               int column) {
  using Lanes = Simd<Real>;
  if constexpr (kScaled) x *= Lanes::broadcast(terms.scale);
  if constexpr (kBias == Bias::kStrip) x += Lanes::load(terms.strip + (column - row));
  if constexpr (kBias == Bias::kGathered) x += terms.gathered->bias(row, column);
  if constexpr (kBias == Bias::kGatedStrip)
    x += Lanes::broadcast(terms.gates[row]) * Lanes::load(terms.strip + (column - row));
  if constexpr (kBias == Bias::kGatedGathered) x += terms.gathered->bias(row, column, terms.gates[row]);
  if constexpr (kBias == Bias::kMatrix) x += Lanes::load(terms.matrix + row * terms.matrix_stride + column);
  if constexpr (kBias == Bias::kRows) x += Lanes::broadcast(terms.row_biases[row]);
  if constexpr (kMask) x += Lanes::load(terms.key_mask + column);
  return x;
}

// Calls run with the kind of bias and the presence of a key mask as constants. Kinds with a gate are apart from others,
// so that these stay the small loops that compilers make the fastest code of.
template <bool kGated, class Real, class Run> TOB_INLINE void visit_terms(const ScoreTerms<Real> &terms, Run run) {
  const auto run_with = [&](auto bias) {
    if (terms.key_mask) run(bias, std::true_type());
    else run(bias, std::false_type());
  };
  if constexpr (kGated) {
    if (terms.gathered) run_with(std::integral_constant<Bias, Bias::kGatedGathered>());
    else if (terms.strip) run_with(std::integral_constant<Bias, Bias::kGatedStrip>());
    else if (terms.matrix) run_with(std::integral_constant<Bias, Bias::kMatrix>());
    else run_with(std::integral_constant<Bias, Bias::kRows>());
  } else {
    if (terms.gathered) run_with(std::integral_constant<Bias, Bias::kGathered>());
    else if (terms.matrix) run_with(std::integral_constant<Bias, Bias::kMatrix>());
    else if (terms.strip) run_with(std::integral_constant<Bias, Bias::kStrip>());
    else run_with(std::integral_constant<Bias, Bias::kNone>());
  }
}

// Makes the columns [begin, end) of a tile's rows -inf.
template <class Real> TOB_INLINE void forbid(Real *scores, int64_t stride, int rows, int begin, int end) {
  for (int row = 0; begin < end && row < rows; ++row)
    std::fill(scores + row * stride + begin, scores + row * stride + end, -std::numeric_limits<Real>::infinity());
}

// Makes the pairs of a tile that are outside the band -inf. The tile's corner is the pair (query, key). A bias with a
// gate has no -inf in its strip, since 0 * -inf is NaN.
template <class Real>
void forbid_outside(const Band &band, Real *scores, int64_t stride, int query, int key, int rows, Range columns) {
  for (int row = 0; row < rows; ++row, scores += stride) {
    const Range inside = band.keys_of(query + row, query + row + 1).shift(-key).clip(columns.begin, columns.end);
    const int end = inside.empty() ? columns.end : inside.begin;
    forbid(scores, stride, 1, columns.begin, end);
    forbid(scores, stride, 1, std::max(end, inside.end), columns.end);
  }
}

// Forward and backward both make their scores here, so that their roundings are the same.
//
// Scores of rows [0, rows) and the panels of columns [columns.begin, columns.end), multiples of kPanel.
// `panels` are the keys' transposed panels from column 0 on. Columns from `valid_columns` on become -inf.
template <bool kGated, class Operand, class Real>
TOB_INLINE void score_block(const Real *a, int64_t chunk_stride, const Real *panels, int chunks, Real *out,
                            int64_t stride, const ScoreTerms<Real> &terms, int rows, Range columns, int valid_columns) {
  using Lanes = Simd<Real>;
  constexpr int kPanelWidth = kPanel<Real>, W = Lanes::kLanes;
  visit_terms<kGated>(terms, [&](auto bias, auto mask) {
    const auto write = [&](typename Lanes::Vec products, int row, int column) {
      Lanes::store(out + row * stride + column,
                   with_terms<decltype(bias)::value, decltype(mask)::value, !Scale<Real, Operand>::kInQueries>(
                       products, terms, row, column));
    };
    for (int column = columns.begin; column < columns.end; column += kPanelWidth)
      visit_tiles(rows, [&](int row, auto height) {
        constexpr int kRows = decltype(height)::value;
        const auto tile = product_tile<Operand, kRows>(a, chunk_stride, panels, chunks, row, column);
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
          write(tile.left[r], row + r, column);
          write(tile.right[r], row + r, column + W);
        }
      });
  });
  forbid(out, stride, rows, valid_columns, columns.end);
}

}  // namespace tob
