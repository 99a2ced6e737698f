// The backward pass: for each block of keys, one sweep over the queries with the scores recomputed.
//
//   E = exp2(S - row_max)    P = E / row_sum    dP = Z * dO V^T    delta = <dO, O> - dlse    dS = P * (dP - delta)
//   dV = (Z * P)^T dO    dK = scale dS^T Q    dQ = scale dS K    dbias[offset] = sum of dS along the offset's diagonal
//
// The division by row_sum is done once a row, on dO and delta: dV = E^T (dO / row_sum), dS = E * (dP - delta) /
// row_sum. So is the multiplication by dropout's kept_scale, on dO: tiles see a Z of 0 and 1.
//
// A task owns its block's dK and dV. dQ and dbias are shared by the tasks of a head: they add to them in the order of
// their blocks, held by OrderedSteps, so every sum has one order whatever the number of threads.
#pragma once

#include "dbias.h"

namespace tob {

template <class Real> class Backward {
  using S = Simd<Real>;
  using Vec = typename S::Vec;
  static constexpr int P = kPanel<Real>, W = S::kLanes;
  static constexpr int kQueries = 96, kMaxKeys = 96;  // a tile
  static constexpr int kRows = 12;                    // rows a step
  static constexpr int64_t kTileStride = kMaxKeys + 2 * W;

 public:
  Backward(const tob_problem &problem, const tob_tensor &out, const tob_row_stats &stats, const tob_tensor &dout,
           const void *dlse, const tob_tensor &dquery, const tob_tensor &dkey, const tob_tensor &dvalue, void *dbias)
      : p(problem),
        out(out),
        dout(dout),
        dquery(dquery),
        dkey(dkey),
        dvalue(dvalue),
        row_max(static_cast<const Real *>(stats.row_max)),
        row_sum(static_cast<const Real *>(stats.row_sum)),
        dlse(static_cast<const Real *>(dlse)),
        dbias(static_cast<Real *>(dbias)) {}

  void run() {
    const Scratch<Block> blocks(p.num_threads);
    const int64_t row_blocks = group * query_tiles;
    OrderedSteps column_order(heads * columns), head_order(heads);
    run_stages(
        heads, schedule, p.num_threads,
        {{row_blocks,
          [&](int64_t head, int64_t task, int) { prepare(head_of(head, task % group), int(task / group) * kQueries); }},
         {columns,
          [&](int64_t head, int64_t task, int thread) {
            const int first = int(task) * keys;
            const int count = std::min(keys, int(p.sequences[head / p.heads_kv].len_k) - first);
            if (count > 0)
              differentiate({blocks.get()[thread], thread, column_order, head * columns + task, head, first, count});
          }},
         {row_blocks + 1, [&](int64_t head, int64_t task, int) {
            if (task == 0) sum_dbias(head, head_order);
            else write_dquery(head_of(head, (task - 1) % group), int((task - 1) / group) * kQueries);
          }}});
    if (dbias) dbias_sums.write(dbias);
  }

 private:
  // A task's working set.
  struct Block {
    Real key_columns[kMaxKeys * (kMaxDim + P)], value_columns[kMaxKeys * (kMaxDim + P)];  // transposed panels
    Real key_rows[kMaxKeys * (kMaxDim + P)];                                              // panels of rows, times scale
    Real dkey[kMaxKeys * (kMaxDim + P)], dvalue[kMaxKeys * (kMaxDim + P)];                // row-major
    // Tiles of E and dS, with a vector of zeros before and after each row of dS.
    Real exps[kQueries * kTileStride], dscores[(kQueries + 1) * kTileStride];
    KeptWeights<kQueries, kMaxKeys> kept;
  };

  // A query head, and its place in the scratch memory.
  struct Head {
    int64_t slot, b, h;
  };

  // Query head g of those that share a key head; key heads count b * heads_kv + h.
  Head head_of(int64_t head, int64_t g) const {
    return {head % slots * group + g, head / p.heads_kv, head % p.heads_kv * group + g};
  }

  // One task: the keys [first, first + count) of one key head.
  struct Column {
    Block &block;
    int thread;
    OrderedSteps &order;
    int64_t task, head;
    int first, count;
  };

  // Small problems get small tasks, so that every core has work. Not a matter of the thread count: results are the
  // same.
  int keys_per_task() const {
    int keys = kMaxKeys;
    while (keys > 24 && p.batch * p.heads_kv * ((p.len_k + keys - 1) / keys) < 24) keys /= 2;
    return round_up(keys, P);
  }

  // Pass 1: queries and dO / row_sum as panels of rows, row_max, delta / row_sum. A row that attends to nothing gets E
  // = 0 and delta 0, whatever dlse is there: a loss may well have an infinite slope at lse = -inf. So do rows past the
  // end.
  void prepare(const Head &head, int first) {
    const tob_sequence &s = p.sequences[head.b];
    if (dbias_sums.needed() && first == 0) dbias_sums.begin_head(head.slot);
    if (first >= s.len_q) return;
    const int64_t slot = head.slot, base = slot * rows_padded + first, source = first_row(head) + first;
    const int rows = std::min(kQueries, rows_padded - first), count = std::min(rows, int(s.len_q) - first);
    const Matrix o = matrix_of(out, p.dtype, int(p.dim_v), head.b, head.h, s.first_query);
    const Matrix g = matrix_of(dout, p.dtype, int(p.dim_v), head.b, head.h, s.first_query);
    pack_rows(matrix_of(p.query, p.dtype, int(p.dim), head.b, head.h, s.first_query), first, count, rows,
              Real(p.scale * kLog2E), queries_of(slot) + int64_t(first) * P, int64_t(rows_padded) * P);
    if (dquery.data) std::fill_n(dquery_acc.get() + base * chunks * P, rows * chunks * P, Real(0));
    const Real kept_scale = p.has_dropout ? Real(p.kept_scale) : Real(1);
    alignas(64) Real g_row[kMaxDim + P];
    for (int r = 0; r < rows; ++r) {
      const Real sum = r < count ? row_sum[source + r] : Real(0);
      const bool empty = sum == 0;
      max.get()[base + r] = empty ? std::numeric_limits<Real>::infinity() : row_max[source + r];
      std::fill_n(g_row, chunks_v * P, Real(0));
      if (r < count) read_rows(g, first + r, 1, empty ? Real(1) : 1 / sum, g_row, chunks_v * P);
      delta.get()[base + r] =
          empty ? Real(0) : row_delta(o, first + r, g_row) - (dlse ? dlse[source + r] / sum : Real(0));
      if (p.has_dropout)
        for (int d = 0; d < chunks_v * P; ++d) g_row[d] *= kept_scale;
      scatter_row(g_row, chunks_v, first + r, douts_of(slot), int64_t(rows_padded) * P);
    }
  }

  // <dO, O> of a row, dO as it is given.
  Real row_delta(const Matrix &o, int64_t index, const Real *g_row) const {
    alignas(64) Real o_row[kMaxDim + P];
    read_rows(o, index, 1, Real(1), o_row, chunks_v * P);
    Vec dot{};
    for (int d = 0; d < chunks_v * P; d += W) dot += S::load(o_row + d) * S::load(g_row + d);
    return S::sum(dot);
  }

  // Pass 2: one block of keys against all of its queries, of every query head that shares the keys.
  void differentiate(Column c) {
    const int64_t b = c.head / p.heads_kv, h = c.head % p.heads_kv;
    const int64_t first_key = p.sequences[b].first_key;
    const Matrix k = matrix_of(p.key, p.dtype, int(p.dim), b, h, first_key),
                 v = matrix_of(p.value, p.dtype, int(p.dim_v), b, h, first_key);
    const Band &band = bands[size_t(b)];
    Block &t = c.block;
    for (int j = 0; j < c.count; j += P) {
      pack_transposed(k, c.first + j, std::min(P, c.count - j), t.key_columns + j * chunks * P);
      pack_transposed(v, c.first + j, std::min(P, c.count - j), t.value_columns + j * chunks_v * P);
    }
    pack_rows(k, c.first, c.count, keys, Real(p.scale), t.key_rows, int64_t(keys) * P);
    for (int r = 0; r < kQueries; ++r) {
      std::fill_n(t.dscores + r * kTileStride, W, Real(0));
      std::fill_n(t.dscores + r * kTileStride + W + round_up(c.count, P), W, Real(0));
    }
    const int key_rows = round_up(c.count, kTileRows);
    std::fill_n(t.dkey, key_rows * chunks * P, Real(0));
    std::fill_n(t.dvalue, key_rows * chunks_v * P, Real(0));

    const Range used = mask.used(b).clip(c.first, c.first + c.count);
    const Range queries = used.empty() ? Range{0, 0} : band.queries_of(used.begin, used.end);
    for (int64_t g = 0; g < group; ++g) sweep(c, head_of(c.head, g), g, used, queries);

    for (int j = 0; j < c.count && dkey.data; ++j)
      write_row(matrix_of(dkey, p.dtype, int(p.dim), b, h, first_key), c.first + j, Real(kLn2),
                t.dkey + j * chunks * P);
    for (int j = 0; j < c.count && dvalue.data; ++j)
      write_row(matrix_of(dvalue, p.dtype, int(p.dim_v), b, h, first_key), c.first + j, Real(1),
                t.dvalue + j * chunks_v * P);
  }

  // The queries of one head. In OrderedSteps every tile is a step, and adding up dbias one more.
  void sweep(Column &c, const Head &head, int64_t g, Range used, Range queries) {
    const bool is_first = c.first == 0;
    const int64_t len_q = p.sequences[head.b].len_q;
    if (dbias) dbias_sums.begin_task(c.thread);
    for (int first = round_down(queries.begin, kQueries); first < queries.end; first += kQueries) {
      const int rows = round_up(std::min(kQueries, int(len_q) - first), kTileRows);
      const int64_t step = g * (query_tiles + 1) + first / kQueries;
      fill_tiles(c, head, first, rows, used);
      if (dbias)
        dbias_sums.add_tile(c.thread, c.block.dscores + W, kTileStride, first, c.first, rows, round_up(c.count, P),
                            gathered.from(head.b, head.h, first, c.first));
      if (!is_first) c.order.wait(c.task - 1, step);
      accumulate(c, head, first, rows);
      c.order.finish(c.task, step);
    }
    const int64_t last_step = g * (query_tiles + 1) + query_tiles;
    if (dbias) {
      if (!is_first) c.order.wait(c.task - 1, last_step);
      dbias_sums.add_task(c.thread, head.slot);
    }
    c.order.finish(c.task, last_step);
  }

  // E and dS of the tile at (first, c.first), a few rows at a time so that they stay in the L1 cache.
  void fill_tiles(Column &c, const Head &head, int first, int rows, Range used) {
    Block &t = c.block;
    const Band &band = bands[size_t(head.b)];
    const int width = round_up(c.count, P);
    const auto kept_from = [&](int row) {
      return [&t, first_row = first + row, first_column = c.first](int r, int column) {
        return t.kept.at(first_row + r, first_column + column);
      };
    };
    if (p.has_dropout) t.kept.fill(p, head.b, head.h, first, c.first, rows, c.count);
    for (int row = 0; row < rows; row += kRows) {
      const int step = std::min(kRows, rows - row);
      const Range attended = band.keys_of(first + row, first + row + step).clip(used.begin, used.end);
      const Range columns = attended.empty()
                                ? Range{0, 0}
                                : Range{round_down(attended.begin - c.first, P), round_up(attended.end - c.first, P)};
      Real *exps = t.exps + row * kTileStride, *dscores = t.dscores + W + row * kTileStride;
      clear_outside(exps, kTileStride, step, columns, width);
      clear_outside(dscores, kTileStride, step, columns, width);
      if (columns.empty()) continue;
      const int64_t base = head.slot * rows_padded + first + row;
      const bool inside = band.covers(first + row, first + row + step, c.first + columns.begin, c.first + columns.end);
      const Positions<Real> positions = gathered.from(head.b, head.h, first + row, c.first);
      const ScoreAddends<Real> add{p.bias || !inside ? strips.at(head.b, head.h, c.first - (first + row)) : nullptr,
                                   gathered.present() ? &positions : nullptr,
                                   mask.present() ? mask.at(head.b) + c.first : nullptr, max.get() + base};
      score_block<true>(queries_of(head.slot) + int64_t(first + row) * P, int64_t(rows_padded) * P, t.key_columns,
                        chunks, exps, kTileStride, add, step, columns, c.count);
      for (int r = 0; r < step; ++r)
        for (int j = columns.begin; j < columns.end; j += P) {
          Real *x = exps + r * kTileStride + j;
          S::store(x, S::exp2(S::load(x)));
          S::store(x + W, S::exp2(S::load(x + W)));
        }
      const Real *dout_rows = douts_of(head.slot) + int64_t(first + row) * P;
      const auto dscore = [&](auto is_dropped) {
        dscore_block<decltype(is_dropped)::value>(dout_rows, int64_t(rows_padded) * P, t.value_columns, chunks_v,
                                                  delta.get() + base, exps, dscores, kTileStride, step, columns,
                                                  kept_from(row));
      };
      if (needs_dscores()) p.has_dropout ? dscore(std::true_type()) : dscore(std::false_type());
      if (p.has_dropout) drop(exps, kTileStride, step, columns, kept_from(row));
    }
  }

  // dV += P^T dO, dK += dS^T Q, dQ += dS K
  void accumulate(Column &c, const Head &head, int first, int rows) {
    Block &t = c.block;
    const Band &band = bands[size_t(head.b)];
    const int64_t slot = head.slot;
    const int64_t panel_stride = int64_t(rows_padded) * P;
    const int key_rows = round_up(c.count, kTileRows);
    const Real *dscores = t.dscores + W;
    const auto queries = [&](int j) {
      return band.queries_of(c.first + j, c.first + j + kTileRows).clip(first, first + rows).shift(-first);
    };
    const auto key_range = [&](int r) {
      return band.keys_of(first + r, first + r + kTileRows).clip(c.first, c.first + c.count).shift(-c.first);
    };
    const Real *none = nullptr;
    if (dvalue.data)
      accumulate_product<false>(t.exps, 1, kTileStride, douts_of(slot) + int64_t(first) * P, panel_stride, t.dvalue,
                                chunks_v * P, key_rows, chunks_v, none, queries);
    if (dkey.data)
      accumulate_product<false>(dscores, 1, kTileStride, queries_of(slot) + int64_t(first) * P, panel_stride, t.dkey,
                                chunks * P, key_rows, chunks, none, queries);
    if (dquery.data)
      accumulate_product<false>(dscores, kTileStride, 1, t.key_rows, int64_t(keys) * P,
                                dquery_acc.get() + (slot * rows_padded + first) * chunks * P, chunks * P, rows, chunks,
                                none, key_range);
  }

  // Pass 3: dQ, and the head's diagonals into the rows of dbias that it shares, one head after another.
  void write_dquery(const Head &head, int first) const {
    if (!dquery.data) return;
    const tob_sequence &s = p.sequences[head.b];
    const Matrix dq = matrix_of(dquery, p.dtype, int(p.dim), head.b, head.h, s.first_query);
    for (int i = first; i < std::min(first + kQueries, int(s.len_q)); ++i)
      write_row(dq, i, Real(1), dquery_acc.get() + (head.slot * rows_padded + i) * chunks * P);
  }

  void sum_dbias(int64_t head, OrderedSteps &order) {
    if (!dbias) return;
    if (head > 0) order.wait(head - 1, 0);
    for (int64_t g = 0; g < group; ++g) {
      const auto [slot, b, h] = head_of(head, g);
      dbias_sums.add_head(slot, b, h);
    }
    order.finish(head, 0);
  }

  // Of a head, the index of its first query in row_max and the like.
  int64_t first_row(const Head &head) const {
    return head.b * p.row_stride_b + head.h * p.row_stride_h + p.sequences[head.b].first_query;
  }
  bool needs_dscores() const { return dquery.data || dkey.data || dbias; }
  Real *queries_of(int64_t slot) const { return query_panels.get() + slot * rows_padded * chunks * P; }
  Real *douts_of(int64_t slot) const { return dout_panels.get() + slot * rows_padded * chunks_v * P; }

  const tob_problem &p;
  const tob_tensor &out, &dout, &dquery, &dkey, &dvalue;
  const Real *row_max, *row_sum, *dlse;
  Real *dbias;
  const std::vector<Band> bands = bands_of(p);
  const BiasTable<Real> table{p};
  const BiasStrips<Real> strips{p, table};
  const Gathered<Real> gathered{p, table};
  const KeyMask<Real> mask{p};
  const int chunks = round_up(int(p.dim), P) / P, chunks_v = round_up(int(p.dim_v), P) / P;  // dims in panels
  const int keys = keys_per_task();                                                          // keys a task
  const int64_t columns = (p.len_k + keys - 1) / keys;                                       // tasks a key head
  const int64_t query_tiles = (p.len_q + kQueries - 1) / kQueries;
  const int rows_padded = round_up(int(p.len_q), kRows);
  const int64_t group = p.heads_kv ? p.heads_q / p.heads_kv : 1;  // query heads a key head
  const int64_t heads = p.batch * p.heads_kv;                     // key heads
  const Schedule schedule{heads, 3, columns, p.num_threads};
  const int64_t slots = schedule.slots, slots_q = slots * group;  // heads at work
  const Scratch<Real> query_panels{slots_q * rows_padded * chunks * P},
      dout_panels{slots_q * rows_padded * chunks_v * P};
  const Scratch<Real> dquery_acc{dquery.data ? slots_q * rows_padded * chunks * P : 0};
  const Scratch<Real> max{slots_q * rows_padded}, delta{slots_q * rows_padded};
  const DbiasSums<Real> dbias_sums{p, dbias != nullptr, p.num_threads, slots_q};
};

}  // namespace tob
