// The gradient of the bias table: tiles of dS -> a task's share -> a head's -> the table's, each in a fixed order.
#pragma once

#include "scores.h"

namespace tob {

// With contiguous positions a share is a strip over x = j - i; where tensors give them it is a row of the table.
template <class Real> class DbiasSums {
 public:
  DbiasSums(const tob_problem &p, bool is_needed, int64_t threads, int64_t slots)
      : p_(p),
        is_gathered_(p.query_positions != nullptr),
        length_(!is_needed     ? 0
                : is_gathered_ ? p.bias_columns
                               : p.len_q + p.len_k + 2 * kPad),
        columns_(is_needed ? p.bias_batch * p.bias_heads * p.bias_columns : 0),
        strips_(is_gathered_ ? 0 : threads * length_),
        rows_(is_gathered_ ? threads * length_ : 0),
        heads_(slots * length_),
        table_(columns_) {
    std::fill_n(table_.get(), columns_, 0.0);
  }

  bool needed() const { return length_ > 0; }

  void begin_task(int thread) const {
    if (is_gathered_) std::fill_n(rows_.get() + thread * length_, length_, 0.0);
    else std::fill_n(strips_.get() + thread * length_, length_, Real(0));
  }

  // Adds the tile of dS whose corner is (row, column), with a vector of zeros before and after each of its rows.
  void add_tile(int thread, const Real *dscores, int64_t stride, int row, int column, int rows, int width,
                const Positions<Real> &positions) const {
    if (is_gathered_) add_elements(dscores, stride, rows, width, positions, rows_.get() + thread * length_);
    else add_diagonals(dscores, stride, rows, width, strips_.get() + thread * length_ + kPad + p_.len_q + column - row);
  }

  void begin_head(int64_t slot) const { std::fill_n(heads_.get() + slot * length_, length_, 0.0); }

  void add_task(int thread, int64_t slot) const {
    double *sum = heads_.get() + slot * length_;
    const Real *strip = strips_.get() + thread * length_;
    const double *row = rows_.get() + thread * length_;
    for (int64_t x = 0; x < length_; ++x) sum[x] += is_gathered_ ? row[x] : double(strip[x]);
  }

  void add_head(int64_t slot, int64_t b, int64_t h) const {
    const tob_sequence &s = p_.sequences[b];
    const double *sum = heads_.get() + slot * length_;
    double *row = table_.get() + bias_row(p_, b, h) * p_.bias_columns;
    if (is_gathered_) {
      for (int64_t column = 0; column < p_.bias_columns; ++column) row[column] += sum[column];
      return;
    }
    for (int64_t x = s.len_k - 1; x > -s.len_q; --x)
      row[bias_column(p_, s.query_start - x)] += sum[kPad + p_.len_q + x];
  }

  void write(Real *dbias) const { std::copy_n(table_.get(), columns_, dbias); }

 private:
  static constexpr int kPad = BiasStrips<Real>::kPad;
  const tob_problem &p_;
  const bool is_gathered_;
  const int64_t length_, columns_;
  const Scratch<Real> strips_;
  const Scratch<double> rows_, heads_, table_;
};

}  // namespace tob
