// The queries' side of the backward pass: rows of Q and dO with their statistics, and the sums of dQ.
#pragma once

#include "products.h"

namespace tob {

// A query head, and its place in the scratch memory.
struct Head {
  int64_t slot, b, h;
};

// The tensors of the backward pass that have a row for each query. `dlse` may be null, and so may the data of `dquery`.
template <class Real> struct QueryTensors {
  const tob_tensor &out, &dout, &dquery;
  const Real *row_max, *row_sum, *dlse;
};

// Rows of all heads at work: Q and dO as factors, row_max, 1 / row_sum, delta and dlse, and the sums of dQ.
template <class Products> class QueryRows {
  using Real = typename Products::Real;
  static constexpr int kQueries = Products::kBackwardQueries;

 public:
  // `factor` is multiplied with the queries.
  QueryRows(const tob_problem &problem, const QueryTensors<Real> &query_tensors, int64_t heads, Real factor)
      : p(problem),
        tensors(query_tensors),
        query_factor(factor),
        rows_padded(round_up(int(p.len_q), Products::kRows)),
        width(round_up(int(p.dim), kPanel<Real>)),
        dquery_sums(tensors.dquery.data ? heads * rows_padded * width : 0),
        queries(heads, rows_padded, int(p.dim)),
        douts(heads, rows_padded, int(p.dim_v)),
        max(heads * rows_padded),
        inverse_sum(heads * rows_padded),
        delta(heads * rows_padded),
        dlse(tensors.dlse ? heads * rows_padded : 0) {}

  // Packs a block of queries and dO as factors, and copies row_max, 1 / row_sum, delta and dlse. A row that attends to
  // nothing gets P = 0, dO = 0, delta = 0 and dlse = 0, whatever dO and dlse are there: a loss may have no finite slope
  // at an output of 0 and lse = -inf. Rows past the end get the same.
  void prepare(const Head &head, int first) const {
    const tob_sequence &s = p.sequences[head.b];
    if (first >= s.len_q) return;
    const int64_t base = index(head, first), source = first_row(head) + first;
    const int count = std::min(kQueries, int(s.len_q) - first), rows = round_up(count, Products::kTile);
    const Matrix q = matrix_of(p.query, p.dtype, int(p.dim), head.b, head.h, s.first_query);
    const Matrix o = matrix_of(tensors.out, p.dtype, int(p.dim_v), head.b, head.h, s.first_query);
    const Matrix g = matrix_of(tensors.dout, p.dtype, int(p.dim_v), head.b, head.h, s.first_query);
    queries.pack(head.slot, q, first, count, rows, query_factor);
    douts.pack(head.slot, g, first, count, rows, Real(1));
    if (tensors.dquery.data) std::fill_n(dquery_at(head, first), rows * width, Real(0));
    Real *const deltas = delta.get() + base;
    Products::dots(o, g, douts, head.slot, first, count, deltas);
    for (int r = 0; r < rows; ++r) {
      const Real sum = r < count ? tensors.row_sum[source + r] : Real(0);
      const bool empty = sum == 0;
      max.get()[base + r] = empty ? std::numeric_limits<Real>::infinity() : tensors.row_max[source + r];
      inverse_sum.get()[base + r] = empty ? Real(0) : 1 / sum;
      if (empty) deltas[r] = 0;
      if (tensors.dlse) dlse.get()[base + r] = empty ? Real(0) : tensors.dlse[source + r];
      if (empty && r < count) douts.clear(head.slot, first + r);
    }
  }

  // Writes a block of dQ: `before` times what is there, plus the sums times the scale.
  void write_dquery(const Head &head, int first, Real before) const {
    const tob_sequence &s = p.sequences[head.b];
    if (!tensors.dquery.data || first >= s.len_q) return;
    write_rows(result_matrix(p, tensors.dquery, int(p.dim), head.b, head.h, s.first_query), first,
               std::min(kQueries, int(s.len_q) - first), before, Real(p.scale), dquery_at(head, first), width);
  }

  // The index of a row in the statistics.
  int64_t index(const Head &head, int row) const { return head.slot * rows_padded + row; }
  // The sums of dQ from a row on, row-major.
  Real *dquery_at(const Head &head, int row) const { return dquery_sums.get() + index(head, row) * width; }

 private:
  // The index of a head's first query in the tensors of statistics.
  int64_t first_row(const Head &head) const {
    return head.b * p.row_stride_b + head.h * p.row_stride_h + p.sequences[head.b].first_query;
  }

  const tob_problem &p;
  const QueryTensors<Real> tensors;
  const Real query_factor;
  const int rows_padded, width;
  const Scratch<Real> dquery_sums;

 public:
  const typename Products::Factors queries, douts;
  const Scratch<Real> max, inverse_sum, delta, dlse;
};

}  // namespace tob
