// The bias where positions are contiguous: each row of the table laid out by key position - query position, so that a
// query reads its neighbouring keys' biases as neighbouring numbers.
#pragma once

#include "bias_table.h"

namespace tob {

// Fills strip[y - first] for each y = key position - query position in [first, last]. The value is the bias in bits
// that a row of the table, see BiasRow, gives to pairs so far apart, or 0 without a table. Outside the band it is -inf,
// unless the strip is to be without the band.
template <class Real, class Row>
void fill_strip(const tob_problem &p, const Row &row, bool has_band, int64_t first, int64_t last, Real *strip) {
  const auto fill = [&](int64_t from, int64_t to, Real value) {  // from <= y < to
    std::fill(strip + (from - first), strip + (to - first), value);
  };
  const auto inside = [&](int64_t y) { return std::clamp(y, first, last + 1); };
  const int64_t begin = has_band ? inside(-p.max_offset) : first,
                end = has_band ? std::max(begin, inside(-p.min_offset + 1)) : last + 1;
  fill(first, begin, -std::numeric_limits<Real>::infinity());
  fill(end, last + 1, -std::numeric_limits<Real>::infinity());
  if (!p.bias) {
    fill(begin, end, Real(0));
    return;
  }
  const int64_t last_column = p.bias_columns - 1;
  const int64_t left = std::clamp(-(p.bias_first + last_column), begin, end);  // the y of the table's last column
  const int64_t right = std::clamp(-p.bias_first + 1, left, end);              // behind the y of its first column
  fill(begin, left, row.bits(last_column));
  row.reversed(-left - p.bias_first, right - left, strip + (left - first));
  fill(right, end, row.bits(0));
}

// A strip for every row of the table, as fill_strip makes it. With a gate it is without the band. Neighbouring keys of
// a query read neighbouring values, and the next query reads from one value earlier on. Strips have kPad values of
// -inf, or of 0 with a gate, at both ends, because tiles may reach beyond the matrix of pairs on every side.
template <class Real> class BiasStrips {
 public:
  static constexpr int kPad = 256;

  // There is at least one strip, also without a table; there is none if tensors give the positions, or if a gate
  // has several numbers for each query.
  BiasStrips(const tob_problem &p, const BiasTable<Real> &table)
      : p_(p), table_rows_(p.bias ? p.bias_batch * p.bias_heads : 1) {
    if (p.query_positions || p.rank > 1) return;
    for (int64_t b = 0; b < p.batch; ++b) {
      const tob_sequence &s = p.sequences[b];
      first_ = std::min(first_, -(s.query_start + s.len_q - 1));
      last_ = std::max(last_, s.len_k - 1 - s.query_start);
    }
    if (first_ > last_) first_ = last_ = 0;
    length_ = last_ - first_ + 1 + 2 * kPad;
    values_.reset(new Scratch<Real>(table_rows_ * length_));
    const bool has_band = !p.gate.data;
    std::fill_n(values_->get(), table_rows_ * length_, has_band ? -std::numeric_limits<Real>::infinity() : Real(0));
    for (int64_t row = 0; row < table_rows_; ++row)
      fill_strip(p, BiasRow<Real>{table, row}, has_band, first_, last_, values_->get() + row * length_ + kPad);
  }

  // The address in the strip of (b, h) of pairs whose key index minus query index is x; null if there are no strips.
  const Real *at(int64_t b, int64_t h, int64_t x) const {
    if (!values_) return nullptr;
    return values_->get() + bias_row(p_, b, h) * length_ + kPad - first_ - p_.sequences[b].query_start + x;
  }

 private:
  const tob_problem &p_;
  int64_t table_rows_, first_ = Band::kUnlimited, last_ = -Band::kUnlimited, length_ = 0;
  std::unique_ptr<Scratch<Real>> values_;
};

}  // namespace tob
