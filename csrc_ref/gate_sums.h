// The gradients of a gate and of its table. With dS read sheared, E[i][x] = dS[i][x + i],
//
//   dgate = E U^T          dU = gate^T E
//
// where U is the table reversed (gate_table.h). E is dS itself, with rows one number more than the stride apart. Far
// pairs need the sums of their dS alone, one for each row and side. With a gate of one number for each query the
// table's gradient is a sum along diagonals as without a gate (dbias.h), and the gate's is a sum along rows. Where
// tensors give the positions, gate_gathered.h has both gradients.
#pragma once

#include "query_rows.h"
#include "scorer.h"

namespace tob {

// The gates of all heads at work and the sums of both gradients, to which the tasks of a head add one after another.
template <class Products> class GateSums {
  using Real = typename Products::Real;
  using Lanes = Simd<Real>;
  using Vec = typename Lanes::Vec;
  static constexpr int kPanelWidth = kPanel<Real>, W = Lanes::kLanes, kQueries = Products::kBackwardQueries;

 public:
  GateSums(const tob_problem &p, const Scorer<Products> &scorer, const tob_tensor &dgate, Real *dbias, int64_t slots)
      : p_(p),
        scorer_(scorer),
        table_(scorer.gate),
        dgate_(dgate),
        is_column_(p.rank == 1),
        dbias_(table_.present() && !is_column_ ? dbias : nullptr),
        rows_padded_(table_.present() ? round_up(int(p.len_q), Products::kRows) : 0),
        width_(is_column_ ? 1 : table_.rank_panels() * kPanelWidth),
        gates_(slots * rows_padded_ * width_),
        ends_(is_column_ ? 0 : slots * 2 * rows_padded_),
        dgate_sums_(dgate.data ? slots * rows_padded_ * width_ : 0),
        far_sums_(is_column_ ? 0 : slots * 2 * rows_padded_),
        image_size_(dbias_ ? int64_t(table_.near_size()) * width_ : 0),
        image_(slots * image_size_),
        table_sums_(dbias_ && is_shared(p) ? table_size() : 0),
        gathered_sums(p, scorer.gathered_gate, dbias_, p.num_threads, slots) {
    if (dbias_ && is_shared(p)) std::fill_n(table_sums_.get(), table_size(), 0.0);
  }

  // Prepares a block of rows, and at the first block what a head begins with.
  __attribute__((noinline)) void prepare(const Head &head, int first) const {
    if (!table_.present()) return;
    if (first == 0) {
      std::fill_n(image_.get() + head.slot * image_size_, image_size_, Real(0));
      gathered_sums.begin_head(head.slot);
    }
    const int count = std::min(kQueries, int(p_.sequences[head.b].len_q) - first);
    if (count <= 0) return;
    const int rows = round_up(count, Products::kTile);
    table_.pack_rows(head.b, head.h, first, count, rows, gates_at(head.slot, first), chunk_stride(),
                     {ends_at(head.slot, 0, first), ends_at(head.slot, 1, first)});
    if (dgate_.data) std::fill_n(dgate_at(head.slot, first), rows * width_, Real(0));
    for (int side = 0; side < 2 && !is_column_; ++side) std::fill_n(far_at(head.slot, side) + first, rows, Real(0));
  }

  // The gates of a head's rows, from one row on.
  GateRows<Real> rows(int64_t slot, int row) const {
    return table_.rows(gates_at(slot, row), chunk_stride(), ends_at(slot, 0, row), ends_at(slot, 1, row));
  }
  // The factors of the rows, if the gate has one number for each; else null.
  const Real *column(int64_t slot, int row) const {
    return table_.present() && is_column_ ? gates_at(slot, row) : nullptr;
  }

  // sums[row] = the sum of dS times the table's number, for a gate with one number for each query.
  __attribute__((noinline)) void sum_rows(const PairTile &tile, const Real *dscores, int64_t stride, Real *sums) const {
    if (!dgate_.data || !is_column_) return;
    const auto sum_with = [&](auto number) {
      for (int row = 0; row < tile.rows; row += W) {
        Vec totals[W] = {};
        for (int e = 0; e < std::min(W, tile.rows - row); ++e)
          for (int j = tile.columns.begin; j < tile.columns.end; j += W)
            totals[e] += Lanes::load(dscores + (row + e) * stride + j) * number(row + e, j);
        Lanes::store(sums + row, Lanes::sum_each(totals));
      }
    };
    const GatheredTile<Real> gathered = scorer_.gathered.from(tile.b, tile.h, tile.query, tile.key);
    const Real *const strip = scorer_.strips.at(tile.b, tile.h, tile.key - tile.query);
    if (scorer_.gathered.present()) sum_with([&](int row, int j) { return gathered.numbers(row, j); });
    else sum_with([&](int row, int j) { return Lanes::load(strip + (j - row)); });
  }

  // Adds a tile of dS whose corner is (row, column), with zeros before and after each of its rows (see Tiles). `sums`
  // are those of sum_rows.
  __attribute__((noinline)) void add_tile(const Head &head, const Real *dscores, int64_t stride, int row, int column,
                                          int rows, int width, const Real *sums) const {
    if (!table_.present()) return;
    if (is_column_) {
      for (int r = 0; r < rows && dgate_.data; ++r) dgate_at(head.slot, row)[r] += sums[r];
      return;
    }
    if (scorer_.gathered_gate.present()) {
      if (dgate_.data)
        scorer_.gathered_gate.add_dgate(head.slot, scorer_.gathered.from(head.b, head.h, row, column), dscores, stride,
                                        rows, width, dgate_at(head.slot, row), width_);
      return;
    }
    if (!dgate_.data && !dbias_) return;
    const int corner = table_.x_of(head.b, row, column), near_size = table_.near_size();
    const Range seen = Range{corner - (rows - 1), corner + width}.clip(0, near_size);
    if (!seen.empty()) add_near(head, dscores + (seen.begin - corner), stride, row, rows, width, corner, seen);
    if (corner - (rows - 1) < 0)
      add_far(far_at(head.slot, 0) + row, dscores, stride, rows,
              [&](int r) { return Range{0, r - corner}.clip(0, width); });
    if (corner + width > near_size)
      add_far(far_at(head.slot, 1) + row, dscores, stride, rows,
              [&](int r) { return Range{near_size - corner + r, width}.clip(0, width); });
  }

  // Writes a block of the gate's gradient.
  __attribute__((noinline)) void write_dgate(const Head &head, int first) const {
    const int count = std::min(kQueries, int(p_.sequences[head.b].len_q) - first);
    if (!dgate_.data || count <= 0) return;
    Real *const sums = dgate_at(head.slot, first);
    for (int side = 0; side < 2 && !is_column_; ++side)
      for (int r = 0; r < count; ++r) {
        const Vec far = Lanes::broadcast(far_at(head.slot, side)[first + r]);
        for (int d = 0; d < width_; d += W) {
          Real *const to = sums + r * width_ + d;
          Lanes::store(to, Lanes::load(to) + far * Lanes::load(table_.end(head.slot, side) + d));
        }
      }
    const Real before = p_.is_part ? Real(1) : Real(0);  // factor on the gradients that other parts have left
    write_rows(gate_matrix<Real>(p_, dgate_, head.b, head.h), first, count, before, Real(kLn2), sums, width_);
  }

  // Adds a head's sums to its tables' gradient. A head that shares its tables with no other writes the gradient itself.
  __attribute__((noinline)) void add_head(const Head &head) const {
    if (!dbias_) return;
    const int64_t size = p_.rank * p_.bias_columns, first = bias_row(p_, head.b, head.h) * size;
    if (!is_shared(p_)) std::fill_n(dbias_ + first, size, Real(0));
    if (is_shared(p_)) add_sums(head, table_sums_.get() + first);
    else add_sums(head, dbias_ + first);
  }

  // Writes the tables' gradient.
  void write_table() const {
    if (dbias_ && is_shared(p_)) std::copy_n(table_sums_.get(), table_size(), dbias_);
  }

 private:
  // Whether several heads, or sequences, add to one row of the table.
  static bool is_shared(const tob_problem &p) {
    return (p.bias_batch == 1 && p.batch > 1) || (p.bias_heads == 1 && p.heads_q > 1);
  }

  // Adds a head's sums to those of its tables.
  template <class Sum> void add_sums(const Head &head, Sum *sums) const {
    if (gathered_sums.needed()) {
      gathered_sums.add_head(head.slot, sums);
      return;
    }
    const Real *const image = image_.get() + head.slot * image_size_;
    for (int x = 0; x < table_.near_size(); x += W)
      for (int d = 0; d < p_.rank; d += W) {
        const int count = std::min(W, table_.near_size() - x);
        Vec square[W] = {};
        for (int e = 0; e < count; ++e) square[e] = Lanes::load(image + (x + e) * width_ + d);
        Lanes::transpose(square);
        for (int e = 0; e < std::min(W, int(p_.rank) - d); ++e)
          add_backwards(square[e], count, sums + (d + e) * p_.bias_columns + table_.first_column() - x);
      }
    const int len_q = int(p_.sequences[head.b].len_q);
    for (int side = 0; side < 2; ++side)
      for (int d = 0; d < width_; d += W) {
        Vec total{};
        const Real *const gates = gates_at(head.slot, 0) + d / kPanelWidth * chunk_stride() + d % kPanelWidth;
        for (int i = 0; i < len_q; ++i)
          total += Lanes::broadcast(far_at(head.slot, side)[i]) * Lanes::load(gates + i * kPanelWidth);
        for (int e = 0; e < std::min(W, int(p_.rank) - d); ++e)
          sums[(d + e) * p_.bias_columns + (side ? 0 : p_.bias_columns - 1)] += Sum(total[e]);
      }
  }

  // Adds the first lanes of x to `to` and what lies before it.
  template <class Sum> static void add_backwards(Vec x, int count, Sum *to) {
    if constexpr (std::is_same_v<Sum, Real>)
      if (count == W) {
        Lanes::store(to - (W - 1), Lanes::load(to - (W - 1)) + Lanes::reverse(x));
        return;
      }
    for (int i = 0; i < count; ++i) to[-i] += Sum(x[i]);
  }

  // The products of the near x that a tile sees. `dscores` is dS at row 0 and the first of them.
  void add_near(const Head &head, const Real *dscores, int64_t stride, int row, int rows, int width, int corner,
                Range seen) const {
    if (dgate_.data)  // A[r][k] = dS[r] at x = seen.begin + k
      accumulate(dscores, stride + 1, 1, table_.transposed(head.slot) + int64_t(seen.begin) * kPanelWidth,
                 table_.transposed_stride(), dgate_at(head.slot, row), rows, [&](int r, int height) {
                   const Range x{corner - (r + height - 1), corner - r + width};
                   return x.clip(seen.begin, seen.end).shift(-seen.begin);
                 });
    if (!dbias_) return;
    // The image's rows behind `seen` may be another task's at this time. So what remains after whole register tiles
    // goes through a copy.
    alignas(64) Real last[kSmallTileRows * (kMaxRank + kPanelWidth)];
    const auto add_from = [&](int first, int count, Real *image) {  // A[k][r]
      accumulate(dscores + first, 1, stride + 1, gates_at(head.slot, row), chunk_stride(), image, count,
                 [&](int k, int height) {
                   const int x = seen.begin + first + k;
                   return Range{corner - (x + height - 1), corner - x + width}.clip(0, rows);
                 });
    };
    const int whole = round_down(seen.size(), kSmallTileRows), rest = seen.size() - whole;
    Real *const image = image_.get() + head.slot * image_size_ + int64_t(seen.begin) * width_;
    add_from(0, whole, image);
    if (rest == 0) return;
    std::fill_n(last, kSmallTileRows * width_, Real(0));
    add_from(whole, kSmallTileRows, last);
    for (int i = 0; i < rest * width_; i += W) {
      Real *const to = image + int64_t(whole) * width_ + i;
      Lanes::store(to, Lanes::load(to) + Lanes::load(last + i));
    }
  }

  // C += A B, where C has a column for each number of a gate. A last vector of columns is half a panel.
  template <class DepthRange>
  void accumulate(const Real *a, int64_t row_stride, int64_t depth_stride, const Real *b, int64_t panel_stride, Real *c,
                  int rows, DepthRange depths) const {
    const int whole = (int(p_.rank) + kPanelWidth - 1 - W) / kPanelWidth;  // panels with two vectors
    const Real *const none = nullptr;
    accumulate_product<false, Real>(a, row_stride, depth_stride, b, panel_stride, c, width_, rows, whole, none, depths);
    if (whole < table_.rank_panels())
      accumulate_product<false, Real, true>(a, row_stride, depth_stride, b + whole * panel_stride, panel_stride,
                                            c + whole * kPanelWidth, width_, rows, 1, none, depths);
  }

  // sums[row] += dS of the columns of each row, from where the table ends to the tile's edge, with zeros behind it.
  template <class Columns>
  static void add_far(Real *sums, const Real *dscores, int64_t stride, int rows, Columns columns_of) {
    for (int row = 0; row < rows; row += W) {
      const int count = std::min(W, rows - row);
      Vec totals[W] = {};
      for (int e = 0; e < count; ++e) {
        const Range columns = columns_of(row + e);
        const Real *const from = dscores + (row + e) * stride;
        if (columns.begin == 0)
          for (int j = columns.end - W; j > -W; j -= W) totals[e] += Lanes::load(from + j);
        else
          for (int j = columns.begin; j < columns.end; j += W) totals[e] += Lanes::load(from + j);
      }
      Real lanes[W];
      Lanes::store(lanes, Lanes::sum_each(totals));
      for (int e = 0; e < count; ++e) sums[row + e] += lanes[e];
    }
  }

  int64_t table_size() const { return p_.bias_batch * p_.bias_heads * p_.rank * p_.bias_columns; }
  int64_t chunk_stride() const { return int64_t(rows_padded_) * kPanelWidth; }
  Real *gates_at(int64_t slot, int row) const {
    return gates_.get() + slot * rows_padded_ * width_ + int64_t(row) * std::min(width_, kPanelWidth);
  }
  Real *ends_at(int64_t slot, int side, int row) const {
    return is_column_ ? nullptr : ends_.get() + (2 * slot + side) * rows_padded_ + row;
  }
  Real *far_at(int64_t slot, int side) const { return far_sums_.get() + (2 * slot + side) * rows_padded_; }
  Real *dgate_at(int64_t slot, int row) const { return dgate_sums_.get() + (slot * rows_padded_ + row) * width_; }

  const tob_problem &p_;
  const Scorer<Products> &scorer_;
  const GateTable<Real> &table_;
  const tob_tensor &dgate_;
  const bool is_column_;
  Real *const dbias_;  // null if it is not needed here
  const int rows_padded_, width_;
  const Scratch<Real> gates_, ends_, dgate_sums_, far_sums_;
  const int64_t image_size_;
  const Scratch<Real> image_;
  const Scratch<double> table_sums_;

 public:
  const GatheredGateSums<Real> gathered_sums;  // where tensors give the positions
};

}  // namespace tob
