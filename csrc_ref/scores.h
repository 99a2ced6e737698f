// Tiles of scores and of their gradient: S = Q K^T + bias in bits, -inf at every pair that is not attended to, and
// dS = P * (dO V^T - delta + dlse), with its diagonal sums.
#pragma once

#include "bias.h"
#include "dropout.h"

namespace tob {

// Where the scale, in bits, meets the scores: in the queries as they are packed, which costs nothing for each score, or
// in the products, where bfloat16 queries would be rounded. dK has to make up for what the queries hold.
template <class Real, class Operand> struct Scale {
  static constexpr bool kInQueries = std::is_same_v<Operand, Real>;
  explicit Scale(double scale)
      : queries(kInQueries ? Real(scale * kLog2E) : Real(1)),
        products(kInQueries ? Real(1) : Real(scale * kLog2E)),
        dkey(kInQueries ? Real(kLn2) : Real(scale)) {}
  Real queries, products, dkey;
};

// What makes scores of products: scale * Q K^T + addends; the tile's corner is row 0, column 0 of each.
template <class Real> struct ScoreTerms {
  Real scale;                        // of the products
  const Real *strip;                 // strip[column - row], or null: no bias, and the whole tile is inside the band
  const Positions<Real> *positions;  // instead of the strip, or null
  const Real *key_mask;              // key_mask[column], or null
};

enum class Bias { kNone, kStrip, kGathered };

// A register tile of A B, where pack_left and pack_right_transposed have put its rows and its columns.
template <class Operand, class Real>
TOB_INLINE Tile<Real> product_tile(const Real *a, int64_t chunk_stride, const Real *panels, int chunks, int row,
                                   int column) {
  constexpr int P = kPanel<Real>, kChunk = kChunkCells<Real, Operand>;
  const Real *panel = panels + int64_t(column) * chunks * kChunk;
  Tile<Real> tile{};
  for (int c = 0; c < chunks; ++c)
    multiply_add<Operand>(tile, a + row * kChunk + c * chunk_stride, kChunk, 1, panel + c * kChunk * P, kChunk);
  return tile;
}

// The scores of a register tile at (row, column).
template <Bias kBias, bool kMask, bool kScaled, class Real>
TOB_INLINE void write_scores(const Tile<Real> &tile, const ScoreTerms<Real> &terms, Real *out, int64_t stride, int row,
                             int column) {
  using S = Simd<Real>;
  using Vec = typename S::Vec;
  constexpr int W = S::kLanes;
  const Vec scale = S::broadcast(kScaled ? terms.scale : Real(1));
#pragma GCC unroll 12
  for (int r = 0; r < kTileRows; ++r) {
    Vec left = tile.left[r], right = tile.right[r];
    if constexpr (kScaled) {
      left *= scale;
      right *= scale;
    }
    if constexpr (kBias == Bias::kStrip) {
      const Real *bias = terms.strip + (column - row - r);
      left += S::load(bias);
      right += S::load(bias + W);
    }
    if constexpr (kBias == Bias::kGathered) {
      left += terms.positions->bias(row + r, column);
      right += terms.positions->bias(row + r, column + W);
    }
    if constexpr (kMask) {
      left += S::load(terms.key_mask + column);
      right += S::load(terms.key_mask + column + W);
    }
    Real *to = out + (row + r) * stride + column;
    S::store(to, left);
    S::store(to + W, right);
  }
}

// Forward and backward both make their scores here, so that their roundings are the same.
//
// Scores of rows [0, rows) and the panels of columns [columns.begin, columns.end), multiples of kPanel.
// `panels` are the keys' transposed panels from column 0; `valid_columns` of the columns exist, the rest become -inf.
template <class Operand, class Real>
TOB_INLINE void score_block(const Real *a, int64_t chunk_stride, const Real *panels, int chunks, Real *out,
                            int64_t stride, const ScoreTerms<Real> &terms, int rows, Range columns, int valid_columns) {
  constexpr int P = kPanel<Real>;
  const auto run = [&](auto bias, auto mask) {
    for (int column = columns.begin; column < columns.end; column += P)
      for (int row = 0; row < rows; row += kTileRows)
        write_scores<decltype(bias)::value, decltype(mask)::value, !Scale<Real, Operand>::kInQueries>(
            product_tile<Operand>(a, chunk_stride, panels, chunks, row, column), terms, out, stride, row, column);
  };
  const auto run_with = [&](auto bias) {
    if (terms.key_mask) run(bias, std::true_type());
    else run(bias, std::false_type());
  };
  if (terms.positions) run_with(std::integral_constant<Bias, Bias::kGathered>());
  else if (terms.strip) run_with(std::integral_constant<Bias, Bias::kStrip>());
  else run_with(std::integral_constant<Bias, Bias::kNone>());
  for (int row = 0; valid_columns < columns.end && row < rows; ++row)
    for (int column = valid_columns; column < columns.end; ++column)
      out[row * stride + column] = -std::numeric_limits<Real>::infinity();
}

// dS = P * (Z dO V^T - delta + dlse) for the same rows and columns; `a` and `panels` hold dO and V as score_block's
// hold Q and K. Z is kept_scale where kept(row, column) says so, in bytes as KeptWeights gives them; it is 1 without
// dropout.
//
// Where a row has one key, out is V and delta is the product to the last bit, so dS is P dlse. Under dropout out is Z
// V, rounded, and delta near the product: there dS is P dlse wherever P is 1.
template <bool kDropped, bool kDlse, class Operand, class Real, class Kept>
void dscore_block(const Real *a, int64_t chunk_stride, const Real *panels, int chunks, const Real *delta,
                  const Real *dlse, const Real *probs, Real *dscores, int64_t stride, int rows, Range columns,
                  Real kept_scale, Kept kept) {
  using S = Simd<Real>;
  using Vec = typename S::Vec;
  constexpr int P = kPanel<Real>, W = S::kLanes;
  for (int column = columns.begin; column < columns.end; column += P)
    for (int row = 0; row < rows; row += kTileRows) {
      const Tile<Real> tile = product_tile<Operand>(a, chunk_stride, panels, chunks, row, column);
#pragma GCC unroll 12
      for (int r = 0; r < kTileRows; ++r) {
        const int64_t at = (row + r) * stride + column;
        const Vec d = S::broadcast(delta[row + r]);
        const Vec prob[2] = {S::load(probs + at), S::load(probs + at + W)};
        Vec x[2] = {tile.left[r], tile.right[r]};
        for (int half = 0; half < 2; ++half) {
          if constexpr (kDropped) x[half] = where_kept<Real>(kept(row + r, column + half * W), kept_scale * x[half]);
          x[half] -= d;
          if constexpr (kDropped) x[half] = prob[half] == S::broadcast(1) ? Vec{} : x[half];
          if constexpr (kDlse) x[half] += S::broadcast(dlse[row + r]);
          S::store(dscores + at + half * W, prob[half] * x[half]);
        }
      }
    }
}

// Zeroes the dropped ones of rows and columns.
template <class Real, class Kept> void drop(Real *tile, int64_t stride, int rows, Range columns, Kept kept) {
  using S = Simd<Real>;
  for (int r = 0; r < rows; ++r)
    for (int column = columns.begin; column < columns.end; column += S::kLanes) {
      Real *x = tile + r * stride + column;
      S::store(x, where_kept<Real>(kept(r, column), S::load(x)));
    }
}

// Zeroes what was left out of rows `width` wide.
template <class Real> void clear_outside(Real *tile, int64_t stride, int rows, Range columns, int width) {
  if (columns.size() == width) return;
  for (int r = 0; r < rows; ++r, tile += stride) {
    std::fill(tile, tile + columns.begin, Real(0));
    std::fill(tile + columns.end, tile + width, Real(0));
  }
}

// strip[column - row] += dS, a vector of neighbouring diagonals at a time: the next row's start one column further
// right.
template <class Real> void add_diagonals(const Real *dscores, int64_t stride, int rows, int width, Real *strip) {
  using S = Simd<Real>;
  constexpr int W = S::kLanes;
  const int64_t next = stride + 1;
  for (int x = -round_up(rows, W); x < width; x += W) {
    const int begin = std::max(0, -(W - 1) - x), end = std::min(rows, width - x);
    if (begin >= end) continue;
    typename S::Vec sums[4] = {};
    const Real *at = dscores + begin * next + x;
    int r = begin;
    for (; r + 4 <= end; r += 4, at += 4 * next)
      for (int i = 0; i < 4; ++i) sums[i] += S::load(at + i * next);
    for (; r < end; ++r, at += next) sums[0] += S::load(at);
    S::store(strip + x, S::load(strip + x) + ((sums[0] + sums[1]) + (sums[2] + sums[3])));
  }
}

// table[column] += dS, one after the other.
template <class Real>
void add_elements(const Real *dscores, int64_t stride, int rows, int width, const Positions<Real> &positions,
                  double *table) {
  constexpr int W = Simd<Real>::kLanes;
  for (int r = 0; r < rows; ++r)
    for (int column = 0; column < width; column += W) {
      const auto columns = positions.columns_of(positions.offsets_of(r, column));
      for (int lane = 0; lane < W; ++lane) table[columns[lane]] += double(dscores[r * stride + column + lane]);
    }
}

}  // namespace tob
