// The bias with a factor from the query: the sum over r of gate[i][r] * table[r][offset(i, j)].
//
// With x = key position - query position, the bias of a block of rows is a product G = gate U, where U[r][x] is the
// table reversed. It is read sheared: row i reads G[i][x] at x = j - i, so rows lie one number less than the stride
// apart. Nothing is copied.
//
// Only the x between the table's ends, the near ones, take part in products. On either side of them U is one column,
// and the bias is one number for each row. Below, x counts from the first near one.
#pragma once

#include <array>

#include "gated_row.h"
#include "scores.h"

namespace tob {

// The gates of some rows, from one row on. Of rank 1 they are a number for each row. Otherwise they are packed as a
// left factor, and `ends` has their products with the columns that pairs left and right of the table see.
template <class Real> struct GateRows {
  const Real *gates;
  int64_t chunk_stride;
  const Real *ends[2];

  GateRows from(int row) const {
    const bool is_column = !ends[0];
    return {gates + (is_column ? row : row * kPanel<Real>),
            chunk_stride,
            {is_column ? nullptr : ends[0] + row, is_column ? nullptr : ends[1] + row}};
  }
};

// Room for G of a tile with so many rows and columns, and vectors that begin before its first column. Rows are an odd
// number of vectors, so that they do not fall on each other in the cache.
template <class Real, int kRows, int kColumns> struct GateProducts {
  static constexpr int W = Simd<Real>::kLanes;
  static constexpr int64_t kStride = round_up(kColumns + kRows - 1 + W - 1, 2 * W) + W;
  alignas(64) Real values[kRows * kStride];
};

// The tables of the heads at work, in bits, as right factors.
template <class Real> class GateTable {
  using Lanes = Simd<Real>;
  using Vec = typename Lanes::Vec;
  static constexpr int kPanelWidth = kPanel<Real>, W = Lanes::kLanes;

 public:
  // `slots` heads are at work. With has_transposed there is U^T as well, for the gate's gradient.
  GateTable(const tob_problem &p, int64_t slots, bool has_transposed)
      : p_(p),
        rank_(int(p.rank)),
        near_begin_(near_of(p).first),
        near_size_(int(near_of(p).second - near_begin_)),
        panels_(round_up(near_size_, kPanelWidth) / kPanelWidth),
        rank_panels_(round_up(rank_, kPanelWidth) / kPanelWidth),
        has_transposed_(has_transposed && rank_ > 1),
        panels_data_(rank_ > 1 ? slots * panels_ * rank_ * kPanelWidth : 0),
        transposed_(has_transposed_ ? slots * rank_panels_ * near_size_ * kPanelWidth : 0),
        ends_(rank_ > 1 ? slots * 2 * rank_panels_ * kPanelWidth : 0) {}

  bool present() const { return p_.gate.data; }
  int rank_panels() const { return rank_panels_; }
  // The number of x between the table's ends, both of them included, that pairs of the band have.
  int near_size() const { return near_size_; }
  // The column of the table of x = 0.
  int64_t first_column() const { return -near_begin_ - p_.bias_first; }

  // The x of the pair (query, key) of a sequence. All far pairs may have the same.
  int x_of(int64_t b, int query, int key) const {
    constexpr int64_t kFar = std::numeric_limits<int>::max() - 4096;
    return int(std::clamp(key - (p_.sequences[b].query_start + query) - near_begin_, -kFar, kFar));
  }

  // Makes U, U^T and the ends of a head.
  __attribute__((noinline)) void pack(int64_t slot, int64_t b, int64_t h) const {
    if (!present() || rank_ == 1) return;
    const Real *const nats = gated_tables<Real>(p_, b, h);
    Real *to = panels_data_.get() + slot * panels_ * rank_ * kPanelWidth;
    for (int x = 0; x < panels_ * kPanelWidth; x += kPanelWidth)
      for (int r = 0; r < rank_; ++r, to += kPanelWidth) {
        const Real *row = nats + r * p_.bias_columns;
        __builtin_prefetch(row + std::max<int64_t>(first_column() - x - 2 * kPanelWidth, 0));
        Lanes::store(to, in_bits<Real>(reversed(row, first_column() - x)));
        Lanes::store(to + W, in_bits<Real>(reversed(row, first_column() - x - W)));
      }
    for (int side = 0; side < 2; ++side) read_end(b, h, side, ends_at(slot, side));
    if (has_transposed_) pack_transposed(slot, nats);
  }

  // Rows that pack_rows has packed.
  GateRows<Real> rows(const Real *gates, int64_t chunk_stride, const Real *left, const Real *right) const {
    return {gates, chunk_stride, {rank_ > 1 ? left : nullptr, rank_ > 1 ? right : nullptr}};
  }

  // U^T as panels of a right factor.
  const Real *transposed(int64_t slot) const { return transposed_.get() + slot * rank_panels_ * transposed_stride(); }
  int64_t transposed_stride() const { return int64_t(near_size_) * kPanelWidth; }

  // The column that pairs left (0) or right (1) of the table see, followed by zeros up to a whole panel.
  const Real *end(int64_t slot, int side) const { return ends_at(slot, side); }

  // Packs the gates of `count` queries, and zeros up to `rows`. `gates` has room for rows * rank, rounded up to panels.
  // The head's table need not be packed yet.
  __attribute__((noinline)) void pack_rows(int64_t b, int64_t h, int first, int count, int rows, Real *gates,
                                           int64_t chunk_stride, std::array<Real *, 2> ends) const {
    const Matrix gate = gate_matrix<Real>(p_, p_.gate, b, h);
    if (rank_ == 1) {
      read_rows(gate, first, count, gates, 1);
      std::fill(gates + count, gates + rows, Real(0));
      return;
    }
    pack_left<Real>(gate, first, count, rows, Real(1), gates, chunk_stride);
    for (int side = 0; side < 2; ++side) dot_end(b, h, side, gates, chunk_stride, rows, ends[size_t(side)]);
  }

  // Sets the bias of a tile of scores whose corner is the pair (query, key). `rows` are its gates, `columns` the
  // columns that are needed. If some are near, G is made in `products`. The last near vector is a product wherever it
  // is needed, so that forward and backward round alike.
  template <int kRows, int kColumns>
  TOB_INLINE void set_terms(ScoreTerms<Real> &terms, int64_t slot, int64_t b, const GateRows<Real> &rows, int query,
                            int key, int count, Range columns, GateProducts<Real, kRows, kColumns> &products) const {
    if (rank_ == 1) {
      terms.gates = rows.gates;
      return;
    }
    const int corner = x_of(b, query, key);
    const Range seen{corner + columns.begin - (count - 1), corner + columns.end};
    if (seen.end <= 0 || seen.begin >= round_up(near_size_, W)) {
      terms.row_biases = rows.ends[seen.end <= 0 ? 0 : 1];
    } else {
      fill(slot, rows, seen, count, products.values, products.kStride);
      terms.matrix = products.values + (corner - int64_t(floor_vector(seen.begin)) * W);
      terms.matrix_stride = products.kStride - 1;
    }
  }

 private:
  // The near pairs' first key position - query position, and the one behind their last.
  static std::pair<int64_t, int64_t> near_of(const tob_problem &p) {
    int64_t first = Band::kUnlimited, last = -Band::kUnlimited;
    for (int64_t b = 0; b < p.batch; ++b) {
      const tob_sequence &s = p.sequences[b];
      first = std::min(first, -(s.query_start + s.len_q - 1));
      last = std::max(last, s.len_k - 1 - s.query_start);
    }
    if (p.rank < 2 || p.query_positions || first > last) return {0, 0};
    first = std::max(first, -p.max_offset);
    last = std::max(first, std::min(last, -p.min_offset));
    const int64_t begin = std::clamp(-(p.bias_first + p.bias_columns - 1), first, last + 1);
    return {begin, std::clamp(-p.bias_first + 1, begin, last + 1)};
  }

  Real *ends_at(int64_t slot, int side) const { return ends_.get() + (2 * slot + side) * rank_panels_ * kPanelWidth; }

  // The number of the vector that holds x.
  static int floor_vector(int x) { return (x >= 0 ? x : x - (W - 1)) / W; }

  // Makes G of `count` rows, in whole vectors that hold the x of `seen`.
  TOB_INLINE void fill(int64_t slot, const GateRows<Real> &rows, Range seen, int count, Real *products,
                       int64_t stride) const {
    const int first = floor_vector(seen.begin), last = floor_vector(seen.end - 1) + 1;
    const int near_end = std::min(last, round_up(near_size_, W) / W);
    for (int x = first; x < last;) {  // counts vectors
      Real *const to = products + int64_t(x - first) * W;
      const bool is_near = x >= 0 && x < near_end, is_pair = is_near && x + 1 < near_end;
      visit_tiles(count, [&](int row, auto height) {
        Real *const g = to + row * stride;
        if (is_pair) {
          fill_tile<false, decltype(height)::value>(slot, x, rows, row, g, stride);
        } else if (is_near) {
          fill_tile<true, decltype(height)::value>(slot, x, rows, row, g, stride);
        } else {
          for (int r = 0; r < height; ++r)
            Lanes::store(g + r * stride, Lanes::broadcast(rows.ends[x < 0 ? 0 : 1][row + r]));
        }
      });
      x += is_pair ? 2 : 1;
    }
  }

  // A register tile of G from the near vector x on. Its right vector may lie in the next panel; a half has none.
  template <bool kHalf, int kRows>
  TOB_INLINE void fill_tile(int64_t slot, int x, const GateRows<Real> &rows, int row, Real *g, int64_t stride) const {
    const Real *const panel = panels_data_.get() + (slot * panels_ + x / 2) * rank_ * kPanelWidth + x % 2 * W;
    const int64_t right = x % 2 ? int64_t(rank_) * kPanelWidth - W : W;
    Tile<Real, kRows> tile{};
    for (int c = 0; c < rank_panels_; ++c)
      multiply_add<Real, kHalf>(tile, rows.gates + row * kPanelWidth + c * rows.chunk_stride, kPanelWidth, 1,
                                panel + c * kPanelWidth * kPanelWidth, std::min(kPanelWidth, rank_ - c * kPanelWidth),
                                right);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      Lanes::store(g + r * stride, tile.left[r]);
      if (!kHalf) Lanes::store(g + r * stride + W, tile.right[r]);
    }
  }

  // dots[i] = <gate i, the table's column at an end>.
  void dot_end(int64_t b, int64_t h, int side, const Real *gates, int64_t chunk_stride, int rows, Real *dots) const {
    alignas(64) Real end[kMaxRank + kPanelWidth];
    read_end(b, h, side, end);
    for (int i = 0; i < rows; i += W) {
      const int count = std::min(W, rows - i);
      Vec sums[W] = {};
      for (int r = 0; r < rank_panels_ * kPanelWidth; r += W) {
        const Vec column = Lanes::load(end + r);
        const Real *from = gates + r / kPanelWidth * chunk_stride + i * kPanelWidth + r % kPanelWidth;
        for (int e = 0; e < count; ++e) sums[e] += Lanes::load(from + e * kPanelWidth) * column;
      }
      Real lanes[W];
      Lanes::store(lanes, Lanes::sum_each(sums));
      std::copy_n(lanes, count, dots + i);
    }
  }

  void read_end(int64_t b, int64_t h, int side, Real *to) const {
    const Real *const column = gated_tables<Real>(p_, b, h) + (side ? 0 : p_.bias_columns - 1);
    std::fill_n(to, rank_panels_ * kPanelWidth, Real(0));
    for (int r = 0; r < rank_; ++r) to[r] = in_bits<Real>(Lanes::broadcast(column[r * p_.bias_columns]))[0];
  }

  // The columns column, column - 1, ... of a row. There are none before the first, where a panel's end may lie.
  Vec reversed(const Real *row, int64_t column) const {
    if (column - (W - 1) >= 0 && column < p_.bias_columns) return Lanes::reverse(Lanes::load(row + column - (W - 1)));
    Real lanes[W];
    for (int i = 0; i < W; ++i) lanes[i] = row[std::clamp<int64_t>(column - i, 0, p_.bias_columns - 1)];
    return Lanes::load(lanes);
  }

  void pack_transposed(int64_t slot, const Real *nats) const {
    Real *const to = transposed_.get() + slot * rank_panels_ * transposed_stride();
    for (int r = 0; r < rank_panels_ * kPanelWidth; r += W) {
      Real *const panel = to + r / kPanelWidth * transposed_stride() + r % kPanelWidth;
      for (int x = 0; x < near_size_; x += W) {
        Vec square[W];
        for (int e = 0; e < W; ++e)
          square[e] =
              r + e < rank_ ? in_bits<Real>(reversed(nats + (r + e) * p_.bias_columns, first_column() - x)) : Vec{};
        Lanes::transpose(square);
        for (int e = 0; e < std::min(W, near_size_ - x); ++e) Lanes::store(panel + (x + e) * kPanelWidth, square[e]);
      }
    }
  }

  const tob_problem &p_;
  const int rank_;
  const int64_t near_begin_;
  const int near_size_;
  const int panels_, rank_panels_;
  const bool has_transposed_;
  const Scratch<Real> panels_data_, transposed_, ends_;
};

}  // namespace tob
