// The gradient of the bias table: tiles of dS -> a task's share -> a head's -> the table's, each in a fixed order.
#pragma once

#include "bias_strips.h"
#include "recurring.h"

namespace tob {

// strip[column - row] += dS for every element of a tile, times gates[row] if there are any. Each step adds up a vector
// of neighbouring diagonals, which begin one column further right in each row.
template <bool kGated, class Real>
void add_diagonals(const Real *dscores, int64_t stride, int rows, int width, const Real *gates, Real *strip) {
  using Lanes = Simd<Real>;
  constexpr int W = Lanes::kLanes;
  const int64_t next = stride + 1;
  for (int x = -round_up(rows, W); x < width; x += W) {
    const int begin = std::max(0, -(W - 1) - x), end = std::min(rows, width - x);
    if (begin >= end) continue;
    typename Lanes::Vec sums[4] = {};
    const Real *at = dscores + begin * next + x;
    const auto term = [&](int row, const Real *from) {
      if constexpr (kGated) return Lanes::broadcast(gates[row]) * Lanes::load(from);
      else return Lanes::load(from);
    };
    int r = begin;
    for (; r + 4 <= end; r += 4, at += 4 * next)
      for (int i = 0; i < 4; ++i) sums[i] += term(r + i, at + i * next);
    for (; r < end; ++r, at += next) sums[0] += term(r, at);
    Lanes::store(strip + x, Lanes::load(strip + x) + ((sums[0] + sums[1]) + (sums[2] + sums[3])));
  }
}

// table[column of the offset] += dS for every element of a tile, times gates[row] if there are any, one after another.
template <class Real, class Sum>
void add_elements(const Sum *dscores, int64_t stride, int rows, int width, const GatheredTile<Real> &gathered,
                  const Real *gates, double *table) {
  constexpr int W = Simd<Real>::kLanes;
  for (int r = 0; r < rows; ++r) {
    const double gate = gates ? double(gates[r]) : 1;
    for (int column = 0; column < width; column += W) {
      const auto columns = gathered.columns_of(gathered.offsets_of(r, column));
      for (int lane = 0; lane < W; ++lane) table[columns[lane]] += gate * double(dscores[r * stride + column + lane]);
    }
  }
}

// The sum of a task, and of a head, is a strip over x = j - i if positions are contiguous. If tensors give the
// positions it is a row of the table, unless they recur.
template <class Real> class DbiasSums {
 public:
  DbiasSums(const tob_problem &p, const RecurringPairs &pairs, bool is_needed, int64_t threads, int64_t slots)
      : p_(p),
        is_gathered_(p.query_positions != nullptr),
        pairs_(pairs),
        recurring_(pairs, is_needed, slots),
        length_(!is_needed || recurring_.needed() ? 0
                : is_gathered_                    ? p.bias_columns
                                                  : p.len_q + p.len_k + 2 * kPad),
        columns_(is_needed ? p.bias_batch * p.bias_heads * p.bias_columns : 0),
        strips_(is_gathered_ ? 0 : threads * length_),
        table_rows_(is_gathered_ ? threads * length_ : 0),
        heads_(slots * length_),
        table_(columns_) {
    std::fill_n(table_.get(), columns_, 0.0);
  }

  bool needed() const { return columns_ > 0; }

  void begin_task(int thread) const {
    if (is_gathered_) std::fill_n(table_rows_.get() + thread * length_, length_, 0.0);
    else std::fill_n(strips_.get() + thread * length_, length_, Real(0));
  }

  // Adds the tile of dS whose corner is (row, column), with a vector of zeros before and after each of its rows.
  // `gates` are factors of the rows, or null.
  void add_tile(int thread, int64_t slot, const Real *dscores, int64_t stride, int row, int column, int rows, int width,
                const GatheredTile<Real> &gathered, const Real *gates) const {
    Real *const strip = strips_.get() + thread * length_ + kPad + p_.len_q + column - row;
    if (recurring_.needed()) recurring_.add_tile(slot, dscores, stride, row, column, rows, width);
    else if (is_gathered_)
      add_elements(dscores, stride, rows, width, gathered, gates, table_rows_.get() + thread * length_);
    else if (gates) add_diagonals<true>(dscores, stride, rows, width, gates, strip);
    else add_diagonals<false>(dscores, stride, rows, width, gates, strip);
  }

  void begin_head(int64_t slot) const {
    if (recurring_.needed()) recurring_.begin_head(slot);
    std::fill_n(heads_.get() + slot * length_, length_, 0.0);
  }

  void add_task(int thread, int64_t slot) const {
    double *sum = heads_.get() + slot * length_;
    const Real *strip = strips_.get() + thread * length_;
    const double *row = table_rows_.get() + thread * length_;
    for (int64_t x = 0; x < length_; ++x) sum[x] += is_gathered_ ? row[x] : double(strip[x]);
  }

  void add_head(int64_t slot, int64_t b, int64_t h) const {
    const tob_sequence &s = p_.sequences[b];
    const double *sum = heads_.get() + slot * length_;
    double *row = table_row(b, h);
    if (recurring_.needed()) {
      recurring_.add_head(slot, b, h);
    } else if (is_gathered_) {
      for (int64_t column = 0; column < p_.bias_columns; ++column) row[column] += sum[column];
    } else {
      for (int64_t x = s.len_k - 1; x > -s.len_q; --x)
        row[bias_column(p_, s.query_start - x)] += sum[kPad + p_.len_q + x];
    }
  }

  // Writes the table's gradient, when all heads are added.
  void write(const GatheredBias<Real> &gathered, Real *dbias) const {
    const Real *const none = nullptr;
    for_each_in_parallel(recurring_.needed() ? pairs_.table_rows() : 0, p_.num_threads, [&](int64_t h) {
      for (int64_t kind = 0; kind < pairs_.kinds(); ++kind) {
        const int64_t b = pairs_.sequence_of(kind);
        add_elements(recurring_.at(pairs_.index(b, h)), pairs_.stride(), int(p_.len_q), int(pairs_.stride()),
                     gathered.from(b, h, 0, 0), none, table_row(b, h));
      }
    });
    std::copy_n(table_.get(), columns_, dbias);
  }

 private:
  static constexpr int kPad = BiasStrips<Real>::kPad;

  double *table_row(int64_t b, int64_t h) const { return table_.get() + bias_row(p_, b, h) * p_.bias_columns; }

  const tob_problem &p_;
  const bool is_gathered_;
  const RecurringPairs &pairs_;
  const RecurringSums<Real> recurring_;
  const int64_t length_, columns_;
  const Scratch<Real> strips_;
  const Scratch<double> table_rows_, heads_, table_;
};

}  // namespace tob
