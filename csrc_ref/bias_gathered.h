// The bias where tensors give the positions: every pair looks its column of the table up.
#pragma once

#include "bias_table.h"

namespace tob {

// The positions and the table that a tile looks its bias up with. Row 0 and column 0 are the tile's first query and
// key.
template <class Real> struct GatheredTile {
  using Int = typename Simd<Real>::Traits::Int;
  const Int *query_positions, *key_positions;
  const Real *table;
  Int first, last_column, min_offset, max_offset;
  Int ahead;  // the number of keys of the tile that its row 0 may attend to, less one, as far as indices go

  // The columns of the table that belong to some offsets.
  TOB_INLINE typename Simd<Real>::IntVec columns_of(typename Simd<Real>::IntVec offsets) const {
    using IntVec = typename Simd<Real>::IntVec;
    const IntVec none{}, last = last_column - none;
    IntVec columns = offsets - first;
    columns = columns < none ? none : columns;
    return columns > last ? last : columns;
  }

  TOB_INLINE typename Simd<Real>::IntVec offsets_of(int row, int column) const {
    typename Simd<Real>::IntVec keys_of_vector;
    std::memcpy(&keys_of_vector, key_positions + column, sizeof keys_of_vector);
    return query_positions[row] - keys_of_vector;
  }

  // The numbers of the table in bits, whether pairs are in the band or not.
  TOB_INLINE typename Simd<Real>::Vec numbers(int row, int column) const {
    const auto columns = columns_of(offsets_of(row, column));
    typename Simd<Real>::Vec values;
    for (int lane = 0; lane < Simd<Real>::kLanes; ++lane) values[lane] = table[columns[lane]];
    return values;
  }

  // The bias in bits, -inf outside the band; with a gate its factor for the row is given.
  TOB_INLINE typename Simd<Real>::Vec bias(int row, int column) const {
    return inside_band(row, column, numbers(row, column));
  }
  TOB_INLINE typename Simd<Real>::Vec bias(int row, int column, Real gate) const {
    return inside_band(row, column, Simd<Real>::broadcast(gate) * numbers(row, column));
  }

  // The values, and -inf outside the band.
  TOB_INLINE typename Simd<Real>::Vec inside_band(int row, int column, typename Simd<Real>::Vec values) const {
    using Lanes = Simd<Real>;
    const auto offsets = offsets_of(row, column);
    typename Simd<Real>::IntVec columns_ahead;
    for (int lane = 0; lane < Lanes::kLanes; ++lane) columns_ahead[lane] = column + lane - row;
    const typename Lanes::Vec forbidden = Lanes::broadcast(-std::numeric_limits<Real>::infinity());
    const auto outside = (offsets < min_offset) | (offsets > max_offset) | (columns_ahead > ahead);
    return outside ? forbidden : values;
  }
};

// Copies of the positions, as integers as wide as Real, and of the table, in bits. Positions are followed by kPad
// zeros, because tiles may reach beyond the last query and key.
template <class Real> class GatheredBias {
 public:
  using Int = typename Simd<Real>::Traits::Int;

  GatheredBias(const tob_problem &p, const BiasTable<Real> &table)
      : p_(p),
        length_q_(p.len_q + kPad),
        length_k_(p.len_k + kPad),
        query_positions_(copies(p.query_positions, p.position_stride_q, p.len_q, length_q_)),
        key_positions_(copies(p.key_positions, p.position_stride_k, p.len_k, length_k_)),
        table_(present() && p.bias ? p.bias_batch * p.bias_heads * p.bias_columns : 1) {
    table_.get()[0] = 0;
    if (!present() || !p.bias) return;
    for (int64_t row = 0; row < p.bias_batch * p.bias_heads; ++row)
      for (int64_t column = 0; column < p.bias_columns; ++column)
        table_.get()[row * p.bias_columns + column] = table.bits(row, column);
  }

  bool present() const { return p_.query_positions != nullptr; }
  // For the tile of (b, h) that begins at a query and a key.
  GatheredTile<Real> from(int64_t b, int64_t h, int64_t query, int64_t key) const {
    if (!present()) return {};
    return {query_positions_->get() + (p_.position_stride_q ? b * length_q_ : 0) + query,
            key_positions_->get() + (p_.position_stride_k ? b * length_k_ : 0) + key,
            table_.get() + bias_row(p_, b, h) * p_.bias_columns,
            saturated(p_.bias_first),
            saturated(p_.bias ? p_.bias_columns - 1 : 0),
            saturated(p_.min_offset),
            saturated(p_.max_offset),
            saturated(p_.is_causal_by_index ? p_.sequences[b].query_start + query - key : Band::kUnlimited)};
  }

 private:
  static constexpr int64_t kPad = 256, kFar = 2 * TOB_MAX_SPREAD - 1;
  static Int saturated(int64_t x) { return Int(std::clamp(x, -kFar, kFar)); }

  std::unique_ptr<Scratch<Int>> copies(const int32_t *positions, int64_t stride, int64_t count, int64_t length) const {
    if (!positions) return nullptr;
    const int64_t sequences = stride ? p_.batch : 1;
    std::unique_ptr<Scratch<Int>> copy(new Scratch<Int>(sequences * length));
    std::fill_n(copy->get(), sequences * length, Int(0));
    for (int64_t b = 0; b < sequences; ++b) std::copy_n(positions + b * stride, count, copy->get() + b * length);
    return copy;
  }

  const tob_problem &p_;
  int64_t length_q_, length_k_;
  std::unique_ptr<Scratch<Int>> query_positions_, key_positions_;
  Scratch<Real> table_;
};

}  // namespace tob
