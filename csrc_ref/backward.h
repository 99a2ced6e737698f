// The backward pass: for each block of keys, one sweep over the queries with the scores recomputed.
//
//   P = exp2(S - row_max - row_log_sum)      dP = dO V^T      delta = <dO, O> - dlse      dS = P * (dP - delta)
//   dV = P^T dO      dK = scale dS^T Q      dQ = scale dS K      dbias[offset] = sum of dS along the offset's diagonal
//
// A task owns its block's dK and dV. dQ and dbias are shared by the tasks of a head: they add to them in the order of their
// blocks, held by OrderedSteps, so every sum has one order whatever the number of threads.
#pragma once

#include "scores.h"

namespace tob {

template <class Real> class Backward {
  using S = Simd<Real>;
  using Vec = typename S::Vec;
  static constexpr int P = kPanel<Real>, W = S::kLanes;
  static constexpr int kQueries = 96, kMaxKeys = 96;  // a tile
  static constexpr int kRows = 12;                    // rows a step
  static constexpr int64_t kTileStride = kMaxKeys + 2 * W;
  static constexpr int64_t kBiasColumns = 512;        // columns of dbias summed at a time

 public:
  Backward(const tob_problem &problem, const tob_tensor &out, const tob_row_stats &stats, const tob_tensor &dout,
           const void *dlse, const tob_tensor &dquery, const tob_tensor &dkey, const tob_tensor &dvalue, void *dbias)
      : p(problem), out(out), dout(dout), dquery(dquery), dkey(dkey), dvalue(dvalue),
        row_max(static_cast<const Real *>(stats.row_max)), row_log_sum(static_cast<const Real *>(stats.row_log_sum)),
        dlse(static_cast<const Real *>(dlse)), dbias(static_cast<Real *>(dbias)), band(p), strips(p), mask(p),
        chunks(round_up(int(p.dim), P) / P), chunks_v(round_up(int(p.dim_v), P) / P), keys(keys_per_task()),
        rows_padded(round_up(int(p.len_q), kQueries)), heads(p.batch * p.heads_q),
        strip_length(p.len_q + p.len_k + 2 * BiasStrips<Real>::kPad), query_panels(heads * rows_padded * chunks * P),
        dout_panels(heads * rows_padded * chunks_v * P), dquery_acc(dquery.data ? heads * rows_padded * chunks * P : 0),
        max(heads * rows_padded), log_sum(heads * rows_padded), delta(heads * rows_padded),
        dbias_strips(dbias ? heads * strip_length : 0) {}

  void run() {
    const int64_t row_blocks = rows_padded / kQueries, columns = (p.len_k + keys - 1) / keys;
    parallel_for(heads * row_blocks, p.num_threads, [&](int64_t task, int) { prepare(task / row_blocks, int(task % row_blocks) * kQueries); });

    const int64_t tasks = p.batch * p.heads_kv * columns;
    OrderedSteps order(tasks);
    const int64_t threads = std::min(p.num_threads, tasks);
    const Scratch<Block> blocks(threads);
    const Scratch<Real> local_strips(dbias ? threads * strip_length : 0);
    parallel_for(tasks, p.num_threads, [&](int64_t task, int thread) {
      Column c{blocks.get()[thread], local_strips.get() + (dbias ? thread * strip_length : 0), order, task, task / columns, int(task % columns) * keys, 0};
      c.count = std::min(keys, int(p.len_k) - c.first);
      differentiate(c);
    });

    if (dquery.data)
      parallel_for(heads * row_blocks, p.num_threads, [&](int64_t task, int) { write_dquery(task / row_blocks, int(task % row_blocks) * kQueries); });
    const int64_t pieces = dbias ? (bias_columns() + kBiasColumns - 1) / kBiasColumns : 0;
    parallel_for(p.bias_batch * p.bias_heads * pieces, p.num_threads, [&](int64_t task, int) { write_dbias(task / pieces, task % pieces * kBiasColumns); });
  }

 private:
  // A task's working set.
  struct Block {
    Real key_columns[kMaxKeys * (kMaxDim + P)], value_columns[kMaxKeys * (kMaxDim + P)];  // transposed panels
    Real key_rows[kMaxKeys * (kMaxDim + P)];                                              // panels of rows, times scale
    Real dkey[kMaxKeys * (kMaxDim + P)], dvalue[kMaxKeys * (kMaxDim + P)];                // row-major
    // Tiles of P and dS, with a vector of zeros before and after each row of dS.
    Real probs[kQueries * kTileStride], dscores[(kQueries + 1) * kTileStride];
  };

  // One task: the keys [first, first + count) of one (batch, key head).
  struct Column {
    Block &block;
    Real *strip;  // this task's share of a head's dbias, as BiasStrips is laid out
    OrderedSteps &order;
    int64_t task, head_kv;
    int first, count;
  };

  // Small problems get small tasks, so that every core has work. Not a matter of the thread count: results are the same.
  int keys_per_task() const {
    int keys = kMaxKeys;
    while (keys > 24 && p.batch * p.heads_kv * ((p.len_k + keys - 1) / keys) < 24) keys /= 2;
    return round_up(keys, P);
  }

  // Pass 1: queries and dO as panels of rows; the rows' statistics and delta. Rows past the end get P = 0.
  void prepare(int64_t head, int first) {
    const int64_t b = head / p.heads_q, h = head % p.heads_q, base = head * rows_padded + first;
    const int count = std::clamp(int(p.len_q) - first, 0, kQueries);
    const Matrix o = matrix_of(out, p.dtype, int(p.dim_v), b, h), g = matrix_of(dout, p.dtype, int(p.dim_v), b, h);
    pack_rows(matrix_of(p.query, p.dtype, int(p.dim), b, h), first, count, kQueries, Real(p.scale * kLog2E),
              queries_of(head) + int64_t(first) * P, int64_t(rows_padded) * P);
    pack_rows(g, first, count, kQueries, Real(1), douts_of(head) + int64_t(first) * P, int64_t(rows_padded) * P);
    if (dquery.data) std::fill_n(dquery_acc.get() + base * chunks * P, kQueries * chunks * P, Real(0));
    if (dbias && first == 0) std::fill_n(dbias_strips.get() + head * strip_length, strip_length, Real(0));
    alignas(64) Real o_row[kMaxDim + P], g_row[kMaxDim + P];
    for (int r = 0; r < kQueries; ++r) {
      max.get()[base + r] = r < count ? row_max[head * p.len_q + first + r] : std::numeric_limits<Real>::infinity();
      log_sum.get()[base + r] = r < count ? row_log_sum[head * p.len_q + first + r] : Real(0);
      delta.get()[base + r] = 0;
      if (r >= count) continue;
      read_row(o, first + r, Real(1), o_row, chunks_v * P);
      read_row(g, first + r, Real(1), g_row, chunks_v * P);
      Vec dot{};
      for (int d = 0; d < chunks_v * P; d += W) dot += S::load(o_row + d) * S::load(g_row + d);
      delta.get()[base + r] = S::sum(dot) - (dlse ? dlse[head * p.len_q + first + r] : Real(0));
    }
  }

  // Pass 2: one block of keys against all of its queries, of every query head that shares the keys.
  void differentiate(Column &c) {
    const int64_t b = c.head_kv / p.heads_kv, h_kv = c.head_kv % p.heads_kv, group = p.heads_q / p.heads_kv;
    const Matrix k = matrix_of(p.key, p.dtype, int(p.dim), b, h_kv), v = matrix_of(p.value, p.dtype, int(p.dim_v), b, h_kv);
    Block &t = c.block;
    for (int j = 0; j < c.count; j += P) {
      pack_transposed(k, c.first + j, std::min(P, c.count - j), Real(1), t.key_columns + j * chunks * P);
      pack_transposed(v, c.first + j, std::min(P, c.count - j), Real(1), t.value_columns + j * chunks_v * P);
    }
    pack_rows(k, c.first, c.count, keys, Real(p.scale), t.key_rows, int64_t(keys) * P);
    std::fill_n(t.dkey, kMaxKeys * chunks * P, Real(0));
    std::fill_n(t.dvalue, kMaxKeys * chunks_v * P, Real(0));

    const Range used = mask.used(b).clip(c.first, c.first + c.count);
    const Range queries = used.empty() ? Range{0, 0} : band.queries_of(used.begin, used.end);
    for (int64_t g = 0; g < group; ++g) sweep(c, b, h_kv * group + g, g, used, queries);

    for (int j = 0; j < c.count && dkey.data; ++j)
      write_row(matrix_of(dkey, p.dtype, int(p.dim), b, h_kv), c.first + j, Real(kLn2), t.dkey + j * chunks * P);
    for (int j = 0; j < c.count && dvalue.data; ++j)
      write_row(matrix_of(dvalue, p.dtype, int(p.dim_v), b, h_kv), c.first + j, Real(1), t.dvalue + j * chunks_v * P);
  }

  // The queries of one head. In OrderedSteps every tile is a step, and adding up dbias one more.
  void sweep(Column &c, int64_t b, int64_t h, int64_t g, Range used, Range queries) {
    const int64_t head = b * p.heads_q + h, tiles = rows_padded / kQueries;
    const bool is_first = c.first == 0;
    if (dbias) std::fill_n(c.strip, strip_length, Real(0));
    for (int first = round_down(queries.begin, kQueries); first < queries.end; first += kQueries) {
      const int rows = round_up(std::min(kQueries, int(p.len_q) - first), kTileRows);
      const int64_t step = g * (tiles + 1) + first / kQueries;
      fill_tiles(c, b, h, head, first, rows, used);
      if (dbias) add_diagonals(c, first, rows);
      if (!is_first) c.order.wait(c.task - 1, step);
      accumulate(c, head, first, rows);
      c.order.finish(c.task, step);
    }
    const int64_t last_step = g * (tiles + 1) + tiles;
    if (dbias) {
      if (!is_first) c.order.wait(c.task - 1, last_step);
      Real *sum = dbias_strips.get() + head * strip_length;
      for (int64_t x = 0; x < strip_length; ++x) sum[x] += c.strip[x];
    }
    c.order.finish(c.task, last_step);
  }

  // P and dS of the tile at (first, c.first), a few rows at a time so that they stay in the L1 cache.
  void fill_tiles(Column &c, int64_t b, int64_t h, int64_t head, int first, int rows, Range used) {
    Block &t = c.block;
    const int width = round_up(c.count, P);
    for (int row = 0; row < rows; row += kRows) {
      const int step = std::min(kRows, rows - row);
      const Range attended = band.keys_of(first + row, first + row + step).clip(used.begin, used.end);
      const Range columns = attended.empty() ? Range{0, 0} : Range{round_down(attended.begin - c.first, P), round_up(attended.end - c.first, P)};
      Real *probs = t.probs + row * kTileStride, *dscores = t.dscores + W + row * kTileStride;
      clear_outside(probs, dscores, step, columns, width);
      if (columns.empty()) continue;
      const int64_t base = head * rows_padded + first + row;
      const bool inside = band.covers(first + row, first + row + step, c.first + columns.begin, c.first + columns.end);
      const ScoreAddends<Real> add{p.bias || !inside ? strips.at(b, h) + c.first - (first + row) : nullptr,
                                   mask.present() ? mask.at(b) + c.first : nullptr, max.get() + base, log_sum.get() + base};
      score_block<true>(queries_of(head) + int64_t(first + row) * P, int64_t(rows_padded) * P, t.key_columns, chunks, probs, kTileStride, add, step,
                        columns, c.count);
      for (int r = 0; r < step; ++r)
        for (int j = columns.begin; j < columns.end; j += P) {
          Real *x = probs + r * kTileStride + j;
          S::store(x, S::exp2(S::load(x)));
          S::store(x + W, S::exp2(S::load(x + W)));
        }
      if (needs_dscores()) dscore_block(c, head, first + row, step, columns, probs, dscores);
    }
  }

  // Columns that were not computed are zero, and so is a vector's width on both sides of dS.
  void clear_outside(Real *probs, Real *dscores, int rows, Range columns, int width) const {
    for (int r = 0; r < rows; ++r) {
      Real *pr = probs + r * kTileStride, *ds = dscores + r * kTileStride;
      std::fill(pr, pr + columns.begin, Real(0));
      std::fill(pr + columns.end, pr + width, Real(0));
      std::fill(ds - W, ds + columns.begin, Real(0));
      std::fill(ds + columns.end, ds + width + W, Real(0));
    }
  }

  // dS = P * (dO V^T - delta)
  void dscore_block(Column &c, int64_t head, int row, int rows, Range columns, const Real *probs, Real *dscores) const {
    const Real *g = douts_of(head) + int64_t(row) * P, *row_delta = delta.get() + head * rows_padded + row;
    for (int column = columns.begin; column < columns.end; column += P) {
      const Real *panel = c.block.value_columns + column * chunks_v * P;
      for (int r0 = 0; r0 < rows; r0 += kTileRows) {
        Tile<Real> tile{};
        for (int chunk = 0; chunk < chunks_v; ++chunk)
          multiply_add(tile, g + r0 * P + int64_t(chunk) * rows_padded * P, P, 1, panel + chunk * P * P, P);
#pragma GCC unroll 12
        for (int r = 0; r < kTileRows; ++r) {
          const int64_t at = (r0 + r) * kTileStride + column;
          const Vec d = S::broadcast(row_delta[r0 + r]);
          S::store(dscores + at, S::load(probs + at) * (tile.left[r] - d));
          S::store(dscores + at + W, S::load(probs + at + W) * (tile.right[r] - d));
        }
      }
    }
  }

  // Sums dS along its diagonals, a vector of neighbouring offsets at a time, into the task's strip.
  void add_diagonals(Column &c, int first, int rows) const {
    const int width = round_up(c.count, P);
    const Real *tile = c.block.dscores + W;
    Real *strip = c.strip + BiasStrips<Real>::kPad + p.len_q + c.first - first;  // at x = 0 of this tile
    for (int x = -round_up(rows, W); x < width; x += W) {
      const int begin = std::max(0, -(W - 1) - x), end = std::min(rows, width - x);
      Vec sums[4] = {};
      const Real *at = tile + begin * (kTileStride + 1) + x;
      int r = begin;
      for (; r + 4 <= end; r += 4, at += 4 * (kTileStride + 1))
        for (int i = 0; i < 4; ++i) sums[i] += S::load(at + i * (kTileStride + 1));
      for (; r < end; ++r, at += kTileStride + 1) sums[0] += S::load(at);
      if (begin < end) S::store(strip + x, S::load(strip + x) + ((sums[0] + sums[1]) + (sums[2] + sums[3])));
    }
  }

  // dV += P^T dO, dK += dS^T Q, dQ += dS K
  void accumulate(Column &c, int64_t head, int first, int rows) {
    Block &t = c.block;
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
      accumulate_product<false>(t.probs, 1, kTileStride, douts_of(head) + int64_t(first) * P, panel_stride, t.dvalue,
                                chunks_v * P, key_rows, chunks_v, none, queries);
    if (dkey.data)
      accumulate_product<false>(dscores, 1, kTileStride, queries_of(head) + int64_t(first) * P, panel_stride, t.dkey,
                                chunks * P, key_rows, chunks, none, queries);
    if (dquery.data)
      accumulate_product<false>(dscores, kTileStride, 1, t.key_rows, int64_t(keys) * P,
                                dquery_acc.get() + (head * rows_padded + first) * chunks * P, chunks * P, rows, chunks, none,
                                key_range);
  }

  // Pass 3.
  void write_dquery(int64_t head, int first) const {
    const Matrix dq = matrix_of(dquery, p.dtype, int(p.dim), head / p.heads_q, head % p.heads_q);
    for (int i = first; i < std::min(first + kQueries, int(p.len_q)); ++i)
      write_row(dq, i, Real(1), dquery_acc.get() + (head * rows_padded + i) * chunks * P);
  }

  // Pass 4: a row of dbias is the sum over the batch entries and heads that share it.
  void write_dbias(int64_t row, int64_t first) const {
    const int64_t count = std::min<int64_t>(kBiasColumns, bias_columns() - first);
    const int64_t row_b = row / p.bias_heads, row_h = row % p.bias_heads;
    double sum[kBiasColumns] = {};
    for (int64_t b = p.bias_batch == 1 ? 0 : row_b; b < (p.bias_batch == 1 ? p.batch : row_b + 1); ++b)
      for (int64_t h = p.bias_heads == 1 ? 0 : row_h; h < (p.bias_heads == 1 ? p.heads_q : row_h + 1); ++h) {
        const Real *strip = dbias_strips.get() + (b * p.heads_q + h) * strip_length + BiasStrips<Real>::kPad + p.len_q;
        for (int64_t i = 0; i < count; ++i) sum[i] += double(strip[p.len_k - 1 - first - i]);
      }
    for (int64_t i = 0; i < count; ++i) dbias[row * bias_columns() + first + i] = Real(sum[i]);
  }

  int64_t bias_columns() const { return p.len_q + p.len_k - 1; }
  bool needs_dscores() const { return dquery.data || dkey.data || dbias; }
  Real *queries_of(int64_t head) const { return query_panels.get() + head * rows_padded * chunks * P; }
  Real *douts_of(int64_t head) const { return dout_panels.get() + head * rows_padded * chunks_v * P; }

  const tob_problem &p;
  const tob_tensor &out, &dout, &dquery, &dkey, &dvalue;
  const Real *row_max, *row_log_sum, *dlse;
  Real *dbias;
  Band band;
  BiasStrips<Real> strips;
  KeyMask<Real> mask;
  int chunks, chunks_v, keys, rows_padded;  // dim and dim_v in panels; keys a task; len_q in whole tiles
  int64_t heads, strip_length;
  Scratch<Real> query_panels, dout_panels, dquery_acc, max, log_sum, delta, dbias_strips;
};

}  // namespace tob
