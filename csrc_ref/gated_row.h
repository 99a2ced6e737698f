// The gate of a query, and the row of biases that it makes of its tables.
#pragma once

#include "bias_table.h"

namespace tob {

inline constexpr int kMaxRank = TOB_MAX_RANK;

// One (sequence, head) matrix of a gate or its gradient, from the sequence's first row on. Both hold reals.
template <class Real> Matrix gate_matrix(const tob_problem &p, const tob_tensor &gate, int64_t b, int64_t h) {
  constexpr int64_t kDtype = std::is_same_v<Real, double> ? int64_t(TOB_FLOAT64) : int64_t(TOB_FLOAT32);
  return matrix_of(gate, kDtype, int(p.rank), b, h, p.sequences[b].first_query);
}

// The tables of a head, (rank, columns), in nats.
template <class Real> const Real *gated_tables(const tob_problem &p, int64_t b, int64_t h) {
  return static_cast<const Real *>(p.bias) + bias_row(p, b, h) * p.rank * p.bias_columns;
}

// The sum of one query's gates times its tables, in bits, as a strip is made of it (see BiasRow). Near numbers are
// those of GateTable to the last bit.
template <class Real> class GatedRow {
  using Lanes = Simd<Real>;
  using Vec = typename Lanes::Vec;
  static constexpr int W = Lanes::kLanes;

 public:
  GatedRow(const tob_problem &p, int64_t b, int64_t h, const Real *gates)
      : tables_(gated_tables<Real>(p, b, h)), gates_(gates), columns_(p.bias_columns), rank_(p.rank) {}

  Real bits(int64_t column) const {
    Vec sum{};
    for (int64_t r = 0; r < rank_; ++r)
      sum += Lanes::broadcast(gates_[r]) * in_bits<Real>(Lanes::broadcast(tables_[r * columns_ + column]));
    return sum[0];
  }

  // to[i] = the bias of column last - i, for `count` columns.
  void reversed(int64_t last, int64_t count, Real *to) const {
    int64_t i = 0;
    for (; i + 4 * W <= count; i += 4 * W) store_reversed<4>(last - i, to + i);
    for (; i + W <= count; i += W) store_reversed<1>(last - i, to + i);
    for (; i < count; ++i) to[i] = bits(last - i);
  }

 private:
  template <int kVectors> TOB_INLINE void store_reversed(int64_t last, Real *to) const {
    Vec sums[kVectors] = {};
    const Real *from = tables_ + last - (W - 1);
    for (int64_t r = 0; r < rank_; ++r, from += columns_)
      for (int i = 0; i < kVectors; ++i)
        sums[i] += Lanes::broadcast(gates_[r]) * in_bits<Real>(Lanes::load(from - i * W));
    for (int i = 0; i < kVectors; ++i) Lanes::store(to + i * W, Lanes::reverse(sums[i]));
  }

  const Real *tables_, *gates_;
  int64_t columns_, rank_;
};

}  // namespace tob
