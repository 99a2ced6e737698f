// What bias a pair of a query and a key sees: reversed strips where positions are contiguous, else a table to gather
// from; and how the gradient of either becomes the table's.
#pragma once

#include "band.h"

namespace tob {

inline constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// Finite numbers stay finite: only -inf forbids.
template <class Real> TOB_INLINE typename Simd<Real>::Vec in_bits(typename Simd<Real>::Vec nats) {
  using S = Simd<Real>;
  const typename S::Vec largest = S::broadcast(std::numeric_limits<Real>::max()), bits = nats * Real(kLog2E);
  const typename S::Vec clamped = bits > largest ? largest : bits < -largest ? -largest : bits;
  return (nats > largest) | (nats < -largest) ? nats : clamped;
}

// The row of the table, and of its gradient, that a sequence and a head share with others; 0 without a table.
inline int64_t bias_row(const tob_problem &p, int64_t b, int64_t h) {
  if (!p.bias) return 0;
  return (p.bias_batch == 1 ? 0 : b) * p.bias_heads + (p.bias_heads == 1 ? 0 : h);
}

inline int64_t bias_column(const tob_problem &p, int64_t offset) {
  return std::clamp<int64_t>(offset - p.bias_first, 0, p.bias_columns - 1);
}

// The rows of the table, each counted from a constant that its log-sum-exp gets back. Where the finite numbers of a row
// have one sign and lie within a factor 2 of one another it is one of them: subtracting that is exact (Sterbenz 1974),
// and scores keep the digits that its size would take. Elsewhere it is 0, and where queries of 16 bits have no such
// digits.
template <class Real> class BiasTable {
 public:
  explicit BiasTable(const tob_problem &p)
      : columns_(p.bias ? p.bias_columns : 0),
        nats_(static_cast<const Real *>(p.bias)),
        constants_(size_t(p.bias ? p.bias_batch * p.bias_heads : 1)) {
    const bool has_digits = p.dtype == TOB_FLOAT32 || p.dtype == TOB_FLOAT64;
    for (size_t row = 0; p.bias && has_digits && row < constants_.size(); ++row)
      constants_[row] = constant_of(nats_ + int64_t(row) * columns_);
  }

  Real constant(int64_t row) const { return constants_[size_t(row)]; }

  Real bits(int64_t row, int64_t column) const {
    return in_bits<Real>(S::broadcast(nats_[row * columns_ + column] - constant(row)))[0];
  }

  // bits[i] = that of column last - i, for `count` columns.
  void reversed(int64_t row, int64_t last, int64_t count, Real *bits) const {
    const int64_t column = row * columns_ + last;  // of the first
    int64_t i = 0;
    for (; i + W <= count; i += W)
      S::store(bits + i, in_bits<Real>(S::reverse(S::load(nats_ + (column - i - (W - 1)))) - constant(row)));
    for (; i < count; ++i) bits[i] = this->bits(row, last - i);
  }

 private:
  using S = Simd<Real>;
  static constexpr int W = S::kLanes;

  Real constant_of(const Real *row) const {
    using Vec = typename S::Vec;
    const Vec none = S::broadcast(-std::numeric_limits<Real>::infinity());
    Vec highest = none, lowest_negated = none;
    const auto add = [&](Vec x) {
      const auto is_finite = x - x == Vec{};
      highest = S::max(is_finite ? x : none, highest);
      lowest_negated = S::max(is_finite ? -x : none, lowest_negated);
    };
    int64_t column = 0;
    for (; column + W <= columns_; column += W) add(S::load(row + column));
    for (; column < columns_; ++column) add(S::broadcast(row[column]));
    const Real low = -S::max_lane(lowest_negated), high = S::max_lane(highest);
    if (low > 0 && low <= high && high <= 2 * low) return low;
    if (high < 0 && low <= high && low >= 2 * high) return high;
    return 0;
  }

  int64_t columns_;
  const Real *nats_;
  std::vector<Real> constants_;
};

// strip[y - first] for y = key position - query position in [first, last]: the bias in bits that pairs so far apart see
// in a row of the table, -inf outside the band; 0 inside of it without a bias.
template <class Real>
void fill_strip(const tob_problem &p, const BiasTable<Real> &table, int64_t row, int64_t first, int64_t last,
                Real *strip) {
  const auto fill = [&](int64_t from, int64_t to, Real value) {  // from <= y < to
    std::fill(strip + (from - first), strip + (to - first), value);
  };
  const auto inside = [&](int64_t y) { return std::clamp(y, first, last + 1); };
  const int64_t begin = inside(-p.max_offset), end = std::max(begin, inside(-p.min_offset + 1));
  fill(first, begin, -std::numeric_limits<Real>::infinity());
  fill(end, last + 1, -std::numeric_limits<Real>::infinity());
  if (!p.bias) {
    fill(begin, end, Real(0));
    return;
  }
  const int64_t last_column = p.bias_columns - 1;
  const int64_t left = std::clamp(-(p.bias_first + last_column), begin, end);  // where the table begins, reversed
  const int64_t right = std::clamp(-p.bias_first + 1, left, end);              // and where it has ended
  fill(begin, left, table.bits(row, last_column));
  table.reversed(row, -left - p.bias_first, right - left, strip + (left - first));
  fill(right, end, table.bits(row, 0));
}

// The bias of every row of the table over y = key position - query position, in bits, -inf outside the band: 8
// neighbouring keys of a query read 8 neighbouring values, and the next query's start one before. Padded so that tiles
// may overhang the matrix on every side.
template <class Real> class BiasStrips {
 public:
  static constexpr int kPad = 256;

  // At least one strip, which is 0 inside the band without a bias; none where tensors give the positions.
  BiasStrips(const tob_problem &p, const BiasTable<Real> &table)
      : p_(p), rows_(p.bias ? p.bias_batch * p.bias_heads : 1) {
    if (p.query_positions) return;
    for (int64_t b = 0; b < p.batch; ++b) {
      const tob_sequence &s = p.sequences[b];
      first_ = std::min(first_, -(s.query_start + s.len_q - 1));
      last_ = std::max(last_, s.len_k - 1 - s.query_start);
    }
    if (first_ > last_) first_ = last_ = 0;
    length_ = last_ - first_ + 1 + 2 * kPad;
    values_.reset(new Scratch<Real>(rows_ * length_));
    std::fill_n(values_->get(), rows_ * length_, -std::numeric_limits<Real>::infinity());
    for (int64_t row = 0; row < rows_; ++row)
      fill_strip(p, table, row, first_, last_, values_->get() + row * length_ + kPad);
  }

  // Points at the key x behind the query of sequence b, counted from its first ones; null where there is no strip.
  const Real *at(int64_t b, int64_t h, int64_t x) const {
    if (!values_) return nullptr;
    return values_->get() + bias_row(p_, b, h) * length_ + kPad - first_ - p_.sequences[b].query_start + x;
  }

 private:
  const tob_problem &p_;
  int64_t rows_, first_ = Band::kUnlimited, last_ = -Band::kUnlimited, length_ = 0;
  std::unique_ptr<Scratch<Real>> values_;
};

// What a tile gathers its bias by; its corner is the first query and the first key.
template <class Real> struct Positions {
  using Int = typename Simd<Real>::Traits::Int;
  const Int *queries, *keys;
  const Real *table;
  Int first, last_column, min_offset, max_offset;

  // The columns that a query sees at neighbouring keys.
  TOB_INLINE typename Simd<Real>::IntVec columns_of(typename Simd<Real>::IntVec offsets) const {
    using IntVec = typename Simd<Real>::IntVec;
    const IntVec none{}, last = last_column - none;
    IntVec columns = offsets - first;
    columns = columns < none ? none : columns;
    return columns > last ? last : columns;
  }

  TOB_INLINE typename Simd<Real>::IntVec offsets_of(int row, int column) const {
    typename Simd<Real>::IntVec keys_of_vector;
    std::memcpy(&keys_of_vector, keys + column, sizeof keys_of_vector);
    return queries[row] - keys_of_vector;
  }

  // The bias in bits, -inf outside the band.
  TOB_INLINE typename Simd<Real>::Vec bias(int row, int column) const {
    using S = Simd<Real>;
    const auto offsets = offsets_of(row, column), columns = columns_of(offsets);
    typename S::Vec values;
    for (int lane = 0; lane < S::kLanes; ++lane) values[lane] = table[columns[lane]];
    const typename S::Vec forbidden = S::broadcast(-std::numeric_limits<Real>::infinity());
    return (offsets < min_offset) | (offsets > max_offset) ? forbidden : values;
  }
};

// Positions by tensors, as integers as wide as Real, and the table in bits. Padded as the strips are.
template <class Real> class Gathered {
 public:
  using Int = typename Simd<Real>::Traits::Int;

  Gathered(const tob_problem &p, const BiasTable<Real> &table)
      : p_(p),
        length_q_(p.len_q + kPad),
        length_k_(p.len_k + kPad),
        queries_(copies(p.query_positions, p.position_stride_q, p.len_q, length_q_)),
        keys_(copies(p.key_positions, p.position_stride_k, p.len_k, length_k_)),
        table_(present() && p.bias ? p.bias_batch * p.bias_heads * p.bias_columns : 1) {
    table_.get()[0] = 0;
    if (!present() || !p.bias) return;
    for (int64_t row = 0; row < p.bias_batch * p.bias_heads; ++row)
      for (int64_t column = 0; column < p.bias_columns; ++column)
        table_.get()[row * p.bias_columns + column] = table.bits(row, column);
  }

  bool present() const { return p_.query_positions != nullptr; }
  // What a tile of a head gathers by, from its first query and key on.
  Positions<Real> from(int64_t b, int64_t h, int64_t query, int64_t key) const {
    if (!present()) return {};
    return {queries_->get() + (p_.position_stride_q ? b * length_q_ : 0) + query,
            keys_->get() + (p_.position_stride_k ? b * length_k_ : 0) + key,
            table_.get() + bias_row(p_, b, h) * p_.bias_columns,
            saturated(p_.bias_first),
            saturated(p_.bias ? p_.bias_columns - 1 : 0),
            saturated(p_.min_offset),
            saturated(p_.max_offset)};
  }

 private:
  static constexpr int64_t kPad = 256, kFar = 2 * TOB_MAX_SPREAD - 1;
  static Int saturated(int64_t x) { return Int(std::clamp(x, -kFar, kFar)); }

  std::unique_ptr<Scratch<Int>> copies(const int32_t *positions, int64_t stride, int64_t count, int64_t length) const {
    if (!positions) return nullptr;
    const int64_t rows = stride ? p_.batch : 1;
    std::unique_ptr<Scratch<Int>> copy(new Scratch<Int>(rows * length));
    std::fill_n(copy->get(), rows * length, Int(0));
    for (int64_t row = 0; row < rows; ++row) std::copy_n(positions + row * stride, count, copy->get() + row * length);
    return copy;
  }

  const tob_problem &p_;
  int64_t length_q_, length_k_;
  std::unique_ptr<Scratch<Int>> queries_, keys_;
  Scratch<Real> table_;
};

}  // namespace tob
