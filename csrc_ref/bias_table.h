// The rows of the bias table, in bits, and which of them a pair sees.
#pragma once

#include "band.h"

namespace tob {

inline constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// Nats as bits. Finite numbers stay finite, because -inf means that a pair is not attended to.
template <class Real> TOB_INLINE typename Simd<Real>::Vec in_bits(typename Simd<Real>::Vec nats) {
  using Lanes = Simd<Real>;
  const typename Lanes::Vec largest = Lanes::broadcast(std::numeric_limits<Real>::max()), bits = nats * Real(kLog2E);
  const typename Lanes::Vec clamped = bits > largest ? largest : bits < -largest ? -largest : bits;
  return ((nats > largest) | (nats < -largest)) ? nats : clamped;
}

// The row of the table, and of its gradient, that a sequence and a head use; 0 without a table.
inline int64_t bias_row(const tob_problem &p, int64_t b, int64_t h) {
  if (!p.bias) return 0;
  return (p.bias_batch == 1 ? 0 : b) * p.bias_heads + (p.bias_heads == 1 ? 0 : h);
}

inline int64_t bias_column(const tob_problem &p, int64_t offset) {
  return std::clamp<int64_t>(offset - p.bias_first, 0, p.bias_columns - 1);
}

// The rows of the table. A constant is subtracted from each row, and added to the log-sum-exp again at the end: the
// softmax does not change, and the scores keep the digits that a large bias would take from them. The constant is the
// row's finite number of least magnitude, if all finite numbers of the row have one sign and lie within a factor 2 of
// one another, since the subtraction is exact then (Sterbenz 1974). It is 0 otherwise, and for 16-bit queries, whose
// scores do not have such digits. It is 0 for parts, whose tables are cut to what they reach, and with gates.
template <class Real> class BiasTable {
 public:
  explicit BiasTable(const tob_problem &p)
      : columns_(p.bias ? p.bias_columns : 0),
        nats_(static_cast<const Real *>(p.bias)),
        constants_(size_t(p.bias ? p.bias_batch * p.bias_heads : 1)) {
    const bool has_digits = !p.is_part && !p.gate.data && (p.dtype == TOB_FLOAT32 || p.dtype == TOB_FLOAT64);
    for (size_t row = 0; p.bias && has_digits && row < constants_.size(); ++row)
      constants_[row] = constant_of(nats_ + int64_t(row) * columns_);
  }

  Real constant(int64_t row) const { return constants_[size_t(row)]; }

  Real bits(int64_t row, int64_t column) const {
    return in_bits<Real>(Lanes::broadcast(nats_[row * columns_ + column] - constant(row)))[0];
  }

  // bits[i] = the bias in bits of column last - i, for `count` columns.
  void reversed(int64_t row, int64_t last, int64_t count, Real *bits) const {
    const int64_t column = row * columns_ + last;  // the column of bits[0]
    int64_t i = 0;
    for (; i + W <= count; i += W)
      Lanes::store(bits + i,
                   in_bits<Real>(Lanes::reverse(Lanes::load(nats_ + (column - i - (W - 1)))) - constant(row)));
    for (; i < count; ++i) bits[i] = this->bits(row, last - i);
  }

 private:
  using Lanes = Simd<Real>;
  static constexpr int W = Lanes::kLanes;

  Real constant_of(const Real *row) const {
    using Vec = typename Lanes::Vec;
    const Vec none = Lanes::broadcast(-std::numeric_limits<Real>::infinity());
    Vec highest = none, lowest_negated = none;
    const auto add = [&](Vec x) {
      const auto is_finite = x - x == Vec{};
      highest = Lanes::max(is_finite ? x : none, highest);
      lowest_negated = Lanes::max(is_finite ? -x : none, lowest_negated);
    };
    int64_t column = 0;
    for (; column + W <= columns_; column += W) add(Lanes::load(row + column));
    for (; column < columns_; ++column) add(Lanes::broadcast(row[column]));
    const Real low = -Lanes::max_lane(lowest_negated), high = Lanes::max_lane(highest);
    if (low > 0 && low <= high && high <= 2 * low) return low;
    if (high < 0 && low <= high && low >= 2 * high) return high;
    return 0;
  }

  int64_t columns_;
  const Real *nats_;
  std::vector<Real> constants_;
};

// A row of the table, as a strip is made of it.
template <class Real> struct BiasRow {
  const BiasTable<Real> &table;
  int64_t row;

  Real bits(int64_t column) const { return table.bits(row, column); }
  void reversed(int64_t last, int64_t count, Real *bits) const { table.reversed(row, last, count, bits); }
};

}  // namespace tob
