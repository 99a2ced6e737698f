// Forward and Backward by AMX tiles. A step has 32 queries, and blocks of 32 x 32 numbers are multiplied at once.
//
//   S  = Q K^T     A = rows of Q           B = K^T             C starts from tiles of the bias
//   dP = dO V^T    A = rows of dO          B = V^T
//   acc += E V     A = rows of E           B = V
//   dQ += dS K     A = rows of dS          B = K
//   dV^T += dO^T P, dK^T += Q^T dS: A = transposed rows, packed once, B = P or dS in cells of two queries
//
// So dK and dV are transposed, as they are written, but no tile of P or dS is.
#pragma once

#include "amx_bias.h"
#include "amx_factors.h"
#include "products.h"

namespace tob {

struct AmxProducts {
  using Real = float;
  using Operand = BFloat16;
  using Lanes = Simd<float>;
  using Vec = Lanes::Vec;
  using Session = amx::Session;
  using BiasTiles = tob::BiasTiles;
  using Factors = TransposedFactors;

  // A task of the forward pass is a step of queries, so that its sums stay in the L1 cache; keys and values come from
  // L2. Tiles cannot be loaded from where vectors have just been stored, and the other way round. So a step's scores
  // are made between the softmax of the last step and its product with the values.
  static constexpr int kTile = 32, kRows = 32, kForwardQueries = 32, kForwardKeys = 64, kBackwardQueries = 128,
                       kBackwardKeys = 128, kKeptRows = 32;
  static constexpr bool kScoresAhead = true;
  static_assert(kPanel<float> == kTile, "a block has as many columns as a panel");

  // Rounded before the maximum is subtracted, so that the largest score minus itself is 0: without it compilers fuse
  // the two.
  static TOB_INLINE Vec scaled(Vec x, float scale) {
#if defined(__AVX512F__)
    return (Vec)_mm512_mul_round_ps((__m512)x, _mm512_set1_ps(scale), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    return x * Lanes::broadcast(scale);
#endif
  }

  static TOB_INLINE void rescale(float *sums, int width, const float *factors, int rows) {
    for (int r = 0; r < rows; ++r, sums += width)
      for (int d = 0; d < width && factors[r] != 1; d += W) Lanes::store(sums + d, factors[r] * Lanes::load(sums + d));
  }

  template <bool kGated>
  static void scores(const float *a, int64_t chunk_stride, const float *panels, int chunks, float *out, int64_t stride,
                     const ScoreTerms<float> &terms, int rows, Range columns, int valid_columns) {
    for (int column = columns.begin; column < columns.end; column += kTile) {
      const amx::Factor queries = rows_of(a, chunk_stride), keys = columns_of(panels, column, chunks);
      if (!terms.bias_tile) amx::multiply<amx::Start::kZero>(queries, keys, out + column, stride, chunks);
      else
        amx::multiply<amx::Start::kBias>(queries, keys, out + column, stride, chunks,
                                         terms.bias_tile + column / amx::kTileRows * amx::kTileReals);
    }
    if (terms.has_bias() || terms.key_mask || terms.scale != 1)
      visit_terms<kGated>(terms, [&](auto bias, auto mask) {
        for (int r = 0; r < rows; ++r)
          for (int j = columns.begin; j < columns.end; j += W) {
            float *x = out + r * stride + j;
            Lanes::store(x,
                         with_terms<decltype(bias)::value, decltype(mask)::value, true>(Lanes::load(x), terms, r, j));
          }
      });
    forbid(out, stride, rows, valid_columns, columns.end);
  }

  template <bool kDropped, bool kDlse, class Kept>
  static void dscores(const float *a, int64_t chunk_stride, const float *panels, int chunks,
                      const DscoreTerms<float> &terms, const float *probs, float *out, int64_t stride, int rows,
                      Range columns, Kept kept) {
    for (int column = columns.begin; column < columns.end; column += kTile)
      amx::multiply<amx::Start::kZero>(rows_of(a, chunk_stride), columns_of(panels, column, chunks), out + column,
                                       stride, chunks);
    for (int r = 0; r < rows; ++r)
      for (int j = columns.begin; j < columns.end; j += W) {
        const int64_t at = r * stride + j;
        Lanes::store(out + at, dscore<kDropped, kDlse>(Lanes::load(out + at), Lanes::load(probs + at), terms, r,
                                                       kDropped ? kept(r, j) : nullptr));
      }
  }

  // The diagonal of dO O^T, so that a row that attends to one key has the delta that is its dP to the last bit.
  static void dots(const Matrix &out, [[maybe_unused]] const Matrix &dout, const Factors &douts, int64_t matrix,
                   int first, int count, float *delta) {
    const int chunks = round_up(out.dim, kTile) / kTile;
    alignas(64) float panel[kTile * (kMaxDim + kTile) / 2], products[kTile * kTile];
    for (int i = 0; i < count; i += kTile) {
      pack_right_transposed<BFloat16>(out, first + i, std::min(kTile, count - i), panel);
      amx::multiply<amx::Start::kZero>(rows_of(douts.left(matrix, first + i), douts.panel_stride),
                                       columns_of(panel, 0, chunks), products, kTile, chunks);
      for (int r = 0; r < std::min(kTile, count - i); ++r) delta[i + r] = products[r * (kTile + 1)];
    }
  }

  template <bool kScaled, class DepthRange>
  static void accumulate(const float *a, int64_t stride, const float *b, int64_t panel_stride, float *c,
                         int64_t c_stride, int rows, int panels, const float *, DepthRange depth_range) {
    for (int row = 0; row < rows; row += kTile) {
      const auto [begin, end] = whole(depth_range(row, kTile));
      for (int p = 0; p < panels && begin < end; ++p)
        amx::multiply<amx::Start::kSum>({a + row * stride + begin / 2, stride, kCells},
                                        {b + p * panel_stride + begin / 2 * kTile, kTile, kCells * kTile},
                                        c + row * c_stride + p * kTile, c_stride, (end - begin) / kTile);
    }
  }

  // The gradient is transposed: it has `keys` columns.
  template <class RowRange>
  static void accumulate_columns(const float *a, int64_t stride, const Factors &b, int64_t matrix, int first,
                                 float *gradient, int keys, int chunks, RowRange row_range) {
    for (int key = 0; key < keys; key += kTile) {
      const auto [begin, end] = whole(row_range(key, kTile));
      for (int d = 0; d < chunks * kTile && begin < end; d += kTile)
        amx::multiply<amx::Start::kSum>(
            {b.transposed(matrix, first + begin) + d * kCells, kCells, int64_t(chunks) * kTile * kCells},
            {a + begin / 2 * stride + key, stride, kCells * stride}, gradient + d * keys + key, keys,
            (end - begin) / kTile);
    }
  }

  static void write_gradient(const Matrix &m, int first, int count, float kept, float factor, const float *gradient,
                             int keys, int chunks) {
    const int width = chunks * kTile;
    alignas(64) float rows[W * (kMaxDim + kTile)];
    for (int key = 0; key < count; key += W) {
      for (int d = 0; d < width; d += W) {
        Vec square[W];
        for (int e = 0; e < W; ++e) square[e] = Lanes::load(gradient + (d + e) * keys + key);
        Lanes::transpose(square);
        for (int e = 0; e < W; ++e) Lanes::store(rows + e * width + d, square[e]);
      }
      write_rows(m, first + key, std::min(W, count - key), kept, factor, rows, width);
    }
  }

 private:
  static constexpr int W = Lanes::kLanes, kCells = kTile / 2;  // cells of a row of a tile

  // Factors as pack_left and pack_right_transposed pack them.
  static amx::Factor rows_of(const float *a, int64_t chunk_stride) { return {a, kCells, chunk_stride}; }
  static amx::Factor columns_of(const float *panels, int column, int chunks) {
    return {panels + int64_t(column) * chunks * kCells, kTile, kCells * kTile};
  }

  // The whole steps of the depth that hold a range. What is outside of the range is 0 in one factor.
  static Range whole(Range range) {
    return range.empty() ? Range{0, 0} : Range{round_down(range.begin, kTile), round_up(range.end, kTile)};
  }
};

}  // namespace tob
