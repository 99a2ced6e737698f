// The results of the forward pass: rows of the output, and the statistics of the softmax.
#pragma once

#include "bias_table.h"

namespace tob {

template <class Real> struct Outputs {
  const tob_problem &p;
  const tob_tensor &out;
  Real *lse, *row_max, *row_sum;
  const BiasTable<Real> table;

  Outputs(const tob_problem &problem, const tob_tensor &output, void *lse_data, const tob_row_stats &stats)
      : p(problem),
        out(output),
        lse(static_cast<Real *>(lse_data)),
        row_max(static_cast<Real *>(stats.row_max)),
        row_sum(static_cast<Real *>(stats.row_sum)),
        table(problem) {}

  // Writes the row of query i. acc is the sum of E V, and sum is the sum of E, where E = exp2(S - max). A row whose sum
  // is 0 attended to nothing, and is 0 whatever the values are.
  void write(int64_t b, int64_t h, int64_t i, Real max, Real sum, const Real *acc) const {
    const int64_t first = p.sequences[b].first_query;
    const int64_t index = b * p.row_stride_b + h * p.row_stride_h + first + i;
    const bool empty = sum == 0;
    const Real kept_scale = p.has_dropout ? Real(p.kept_scale) : Real(1);
    static constexpr Real kZeros[kMaxDim]{};
    write_rows(matrix_of(out, p.dtype, int(p.dim_v), b, h, first), i, 1, kept_scale / (empty ? Real(1) : sum),
               empty ? kZeros : acc, 0);
    row_max[index] = empty ? std::numeric_limits<Real>::infinity() : max;
    row_sum[index] = sum;
    lse[index] = Real(kLn2) * (max + std::log2(sum)) + table.constant(bias_row(p, b, h));
  }
};

}  // namespace tob
