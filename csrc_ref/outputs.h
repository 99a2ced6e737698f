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
    const Real kept_scale = p.has_dropout ? Real(p.kept_scale) : Real(1);
    const Matrix to = result_matrix(p, out, int(p.dim_v), b, h, first);
    const bool empty = sum == 0;
    const Real *const values = empty ? kZeros : acc;
    if (p.is_part) {
      add(to, i, index, max, sum, kept_scale, values);
      return;
    }
    write_rows(to, i, 1, Real(0), kept_scale / (empty ? Real(1) : sum), values, 0);
    row_max[index] = empty ? kNothing : max;
    row_sum[index] = sum;
    lse[index] = Real(kLn2) * (max + std::log2(sum)) + table.constant(bias_row(p, b, h));
  }

 private:
  static constexpr Real kZeros[kMaxDim]{}, kNothing = std::numeric_limits<Real>::infinity();

  // Adds a row of a part to what other parts have left there.
  void add(const Matrix &to, int64_t i, int64_t index, Real max, Real sum, Real kept_scale, const Real *values) const {
    const bool is_first = row_sum[index] == 0, empty = sum == 0;
    if (empty && !is_first) return;
    const Real largest = is_first ? max : std::max(max, row_max[index]);
    const Real kept = is_first ? Real(0) : std::exp2(row_max[index] - largest), factor = std::exp2(max - largest);
    write_rows(to, i, 1, kept, kept_scale * factor, values, 0);
    row_max[index] = empty ? kNothing : largest;
    row_sum[index] = kept * row_sum[index] + factor * sum;
  }
};

}  // namespace tob
