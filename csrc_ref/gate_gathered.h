// The bias with a factor from the query where tensors give the positions: a pair's number is the product of its
// query's gate with the column of the table that the pair looks up.
//
//   bias_ij = <gate_i, T[column(i, j)]>     dgate_i = sum over j of dS_ij T[column(i, j)]
//   dT[c] = sum of dS_ij gate_i over the pairs with column(i, j) = c
//
// A column of T is contiguous, in whole vectors, and in bits; gate_sums.h takes that out of dgate. Pairs beyond the
// table, and neighbours with equal positions, look up one column. A vector of such pairs has one product instead of one
// for each pair. Forward and backward begin vectors at the same keys, so they round alike.
#pragma once

#include "gate_table.h"

namespace tob {

// The columns that a row of a tile looks up. They are stored, so that each is read as a number.
template <class Real> class LookedUp {
  using Lanes = Simd<Real>;
  using Int = typename Lanes::Traits::Int;
  using IntVec = typename Lanes::IntVec;
  static constexpr int W = Lanes::kLanes;

 public:
  static constexpr int kMaxColumns = 256;

  // The pairs of a row with the keys from `begin` to `end`, whole vectors.
  TOB_INLINE LookedUp(const GatheredTile<Real> &tile, int row, int begin, int end) {
    for (int j = begin; j < end; j += W) {
      const IntVec seen = tile.columns_of(tile.offsets_of(row, j));
      std::memcpy(columns_ + j, &seen, sizeof seen);
    }
  }

  int64_t operator[](int j) const { return columns_[j]; }
  // Whether the vector of pairs from j on looks up one column.
  TOB_INLINE bool is_one(int j) const {
    IntVec seen;
    std::memcpy(&seen, columns_ + j, sizeof seen);
    return !Lanes::any(seen != columns_[j] - IntVec{});
  }

 private:
  alignas(64) Int columns_[kMaxColumns];
};

// The gate of a row, in whole vectors that follow one another.
template <class Real> struct GateRow {
  alignas(64) Real numbers[kMaxRank + kPanel<Real>];

  TOB_INLINE GateRow(const GateRows<Real> &rows, int row, int depth) {
    constexpr int kPanelWidth = kPanel<Real>, W = Simd<Real>::kLanes;
    const GateRows<Real> from = rows.from(row);
    for (int d = 0; d < depth; d += W)
      Simd<Real>::store(numbers + d,
                        Simd<Real>::load(from.gates + d / kPanelWidth * from.chunk_stride + d % kPanelWidth));
  }
};

// The tables of the heads at work, transposed and in bits.
template <class Real> class GatheredGate {
  using Lanes = Simd<Real>;
  using Vec = typename Lanes::Vec;
  static constexpr int W = Lanes::kLanes;

 public:
  // `slots` heads are at work.
  GatheredGate(const tob_problem &p, int64_t slots)
      : p_(p), depth_(round_up(int(p.rank), W)), tables_(present() ? slots * table_size() : 0) {}

  bool present() const { return p_.query_positions && p_.rank > 1; }
  // The numbers of a column: the rank, and zeros up to a whole vector.
  int depth() const { return depth_; }
  int64_t table_size() const { return p_.bias_columns * depth_; }

  // Makes the table of a head.
  __attribute__((noinline)) void pack(int64_t slot, int64_t b, int64_t h) const {
    if (!present()) return;
    const Real *const nats = gated_tables<Real>(p_, b, h);
    Real *const to = tables_.get() + slot * table_size();
    for (int64_t column = 0; column < p_.bias_columns; column += W)
      for (int r = 0; r < depth_; r += W) {
        Vec square[W];
        for (int e = 0; e < W; ++e)
          square[e] = r + e < p_.rank ? in_bits<Real>(columns_from(nats + (r + e) * p_.bias_columns, column)) : Vec{};
        Lanes::transpose(square);
        for (int e = 0; e < std::min<int64_t>(W, p_.bias_columns - column); ++e)
          Lanes::store(to + (column + e) * depth_ + r, square[e]);
      }
  }

  // Makes the bias of a tile of scores in `products`, and sets it. `rows` are the gates of its `count` rows, `columns`
  // the columns that are needed.
  template <int kRows, int kColumns>
  TOB_INLINE void set_terms(ScoreTerms<Real> &terms, int64_t slot, const GateRows<Real> &rows,
                            const GatheredTile<Real> &tile, int count, Range columns,
                            GateProducts<Real, kRows, kColumns> &products) const {
    static_assert(kColumns <= LookedUp<Real>::kMaxColumns);
    const Real *const table = tables_.get() + slot * table_size();
    for (int row = 0; row < count; ++row) {
      const LookedUp<Real> seen(tile, row, columns.begin, columns.end);
      const GateRow<Real> gate(rows, row, depth_);
      for (int j = columns.begin; j < columns.end; j += W) {
        Vec bias = tile.inside_band(row, j, Vec{});
        if (Lanes::any(bias == Vec{})) bias = tile.inside_band(row, j, numbers(table, gate, seen, j));
        Lanes::store(products.values + row * products.kStride + j, bias);
      }
    }
    terms.gathered = nullptr;
    terms.matrix = products.values;
    terms.matrix_stride = products.kStride;
  }

  // sums[row * stride_of_sums + r] += the gradient of a gate's number r, from `rows` rows of dS that are `width` wide.
  __attribute__((noinline)) void add_dgate(int64_t slot, const GatheredTile<Real> &tile, const Real *dscores,
                                           int64_t stride, int rows, int width, Real *sums,
                                           int64_t stride_of_sums) const {
    const Real *const table = tables_.get() + slot * table_size();
    for (int row = 0; row < rows; ++row, dscores += stride, sums += stride_of_sums) {
      const LookedUp<Real> seen(tile, row, 0, width);
      int d = 0;
      for (; d + 4 * W <= depth_; d += 4 * W) add_columns<4>(table + d, seen, dscores, width, sums + d);
      for (; d + 2 * W <= depth_; d += 2 * W) add_columns<2>(table + d, seen, dscores, width, sums + d);
      for (; d < depth_; d += W) add_columns<1>(table + d, seen, dscores, width, sums + d);
    }
  }

 private:
  // The columns column, column + 1, ... of a row; the last one again where there are no more.
  Vec columns_from(const Real *row, int64_t column) const {
    if (column + W <= p_.bias_columns) return Lanes::load(row + column);
    Real lanes[W];
    for (int i = 0; i < W; ++i) lanes[i] = row[std::min(column + i, p_.bias_columns - 1)];
    return Lanes::load(lanes);
  }

  // The products of a gate with the columns that the vector of pairs from j on looks up.
  TOB_INLINE Vec numbers(const Real *table, const GateRow<Real> &gate, const LookedUp<Real> &seen, int j) const {
    if (seen.is_one(j)) {
      Vec sum{};
      for (int d = 0; d < depth_; d += W)
        sum += Lanes::load(gate.numbers + d) * Lanes::load(table + seen[j] * depth_ + d);
      return Lanes::broadcast(Lanes::sum(sum));
    }
    const Real *from[W];
    for (int lane = 0; lane < W; ++lane) from[lane] = table + seen[j + lane] * depth_;
    Vec sums[W] = {};
    for (int d = 0; d < depth_; d += W) {
      const Vec x = Lanes::load(gate.numbers + d);
      for (int lane = 0; lane < W; ++lane) sums[lane] += x * Lanes::load(from[lane] + d);
    }
    return Lanes::sum_each(sums);
  }

  // sums += dS of a row times a few vectors of the columns that its pairs look up. There are four partial sums, so that
  // products do not wait for one another.
  template <int kVectors>
  TOB_INLINE void add_columns(const Real *table, const LookedUp<Real> &seen, const Real *dscores, int width,
                              Real *sums) const {
    constexpr int kApart = 4 / kVectors;
    Vec partial[kApart][kVectors] = {};
    const auto add = [&](int part, int64_t column, Real dscore) {
      for (int v = 0; v < kVectors; ++v)
        partial[part][v] += Lanes::broadcast(dscore) * Lanes::load(table + column * depth_ + v * W);
    };
    for (int j = 0; j < width; j += W) {
      const Vec dscore = Lanes::load(dscores + j);
      if (!Lanes::any(dscore != Vec{})) continue;
      if (seen.is_one(j)) {
        add(0, seen[j], Lanes::sum(dscore));
        continue;
      }
      for (int lane = 0; lane < W; ++lane) add(lane % kApart, seen[j + lane], dscores[j + lane]);
    }
    for (int v = 0; v < kVectors; ++v) {
      Vec sum = Lanes::load(sums + v * W);
      for (int part = 0; part < kApart; ++part) sum += partial[part][v];
      Lanes::store(sums + v * W, sum);
    }
  }

  const tob_problem &p_;
  const int depth_;
  const Scratch<Real> tables_;
};

// The gradients of the tables: a task's sums -> a head's -> the table's, each in a fixed order, as in DbiasSums.
template <class Real> class GatheredGateSums {
  using Lanes = Simd<Real>;
  using Vec = typename Lanes::Vec;
  static constexpr int W = Lanes::kLanes;

 public:
  GatheredGateSums(const tob_problem &p, const GatheredGate<Real> &gate, bool is_needed, int64_t threads, int64_t slots)
      : p_(p),
        depth_(gate.depth()),
        size_(is_needed && gate.present() ? gate.table_size() : 0),
        tasks_(threads * size_),
        heads_(slots * size_) {}

  bool needed() const { return size_ > 0; }
  void begin_head(int64_t slot) const { std::fill_n(heads_.get() + slot * size_, size_, 0.0); }
  void begin_task(int64_t thread) const { std::fill_n(tasks_.get() + thread * size_, size_, Real(0)); }

  // Adds `rows` rows of dS that are `width` wide. `gates` are those of the rows.
  __attribute__((noinline)) void add_tile(int64_t thread, const GatheredTile<Real> &tile, const Real *dscores,
                                          int64_t stride, int rows, int width, const GateRows<Real> &gates) const {
    Real *const sums = tasks_.get() + thread * size_;
    const int depth = depth_;
    for (int row = 0; row < rows; ++row, dscores += stride) {
      const LookedUp<Real> seen(tile, row, 0, width);
      const GateRow<Real> gate(gates, row, depth);
      const auto add = [&](int64_t column, Real dscore) {
        Real *const to = sums + column * depth;
        for (int d = 0; d < depth; d += W) {
          const Vec product = Lanes::broadcast(dscore) * Lanes::load(gate.numbers + d);
          Lanes::store(to + d, Lanes::load(to + d) + product);
        }
      };
      for (int j = 0; j < width; j += W) {
        const Vec dscore = Lanes::load(dscores + j);
        if (!Lanes::any(dscore != Vec{})) continue;
        if (seen.is_one(j)) {
          add(seen[j], Lanes::sum(dscore));
          continue;
        }
        for (int lane = 0; lane < W; ++lane) add(seen[j + lane], dscores[j + lane]);
      }
    }
  }

  void add_task(int64_t thread, int64_t slot) const {
    const Real *const from = tasks_.get() + thread * size_;
    double *const to = heads_.get() + slot * size_;
    for (int64_t i = 0; i < size_; ++i) to[i] += double(from[i]);
  }

  // Adds a head's sums to those of its tables, (rank, columns).
  template <class Sum> void add_head(int64_t slot, Sum *sums) const {
    const double *from = heads_.get() + slot * size_;
    for (int64_t column = 0; column < p_.bias_columns; ++column, from += depth_)
      for (int64_t r = 0; r < p_.rank; ++r) sums[r * p_.bias_columns + column] += Sum(from[r]);
  }

 private:
  const tob_problem &p_;
  const int depth_;
  const int64_t size_;
  const Scratch<Real> tasks_;
  const Scratch<double> heads_;
};

}  // namespace tob
