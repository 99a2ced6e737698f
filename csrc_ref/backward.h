// The backward pass: for each block of keys, one sweep over the queries with the scores recomputed.
//
//   P = exp2(S - row_max) / row_sum    dP = Z * dO V^T    delta = <dO, O>    dS = P * (dP - delta + dlse)
//   dV = (Z * P)^T dO    dK = scale dS^T Q    dQ = scale dS K    dbias[offset] = sum of dS along the offset's diagonal
//
// A task owns the dK and dV of its block of keys. All tasks of a head add to its dQ and dbias. OrderedSteps makes them
// add in the order of their blocks, so every sum has one order whatever the number of threads.
#pragma once

#include "dbias.h"
#include "gate_sums.h"
#include "tiles.h"

namespace tob {

template <class Products> class Backward {
  using Real = typename Products::Real;
  using Operand = typename Products::Operand;
  using Lanes = Simd<Real>;
  using Vec = typename Lanes::Vec;
  static constexpr int kPanelWidth = kPanel<Real>, W = Lanes::kLanes, kPerCell = kOperandsPerCell<Real, Operand>,
                       kChunk = kChunkCells<Real, Operand>;
  static constexpr int kQueries = Products::kBackwardQueries, kMaxKeys = Products::kBackwardKeys;  // of a tile
  static constexpr int kRows = Products::kRows;
  static constexpr bool kKeepsTile = Products::kKeptRows == kQueries;  // else a step's rows of it
  using TilePair = Tiles<Real, Operand, kQueries, kMaxKeys, Products::kKeptRows>;
  static constexpr int64_t kTileStride = TilePair::kStride;

 public:
  Backward(const tob_problem &problem, const QueryTensors<Real> &tensors, const tob_tensor &key_gradient,
           const tob_tensor &value_gradient, const tob_tensor &gate_gradient, void *bias_gradient)
      : p(problem),
        query_tensors(tensors),
        dkey(key_gradient),
        dvalue(value_gradient),
        dgate(gate_gradient),
        dbias(static_cast<Real *>(bias_gradient)) {}

  void run() {
    const Scratch<Block> blocks(p.num_threads);
    const int64_t row_blocks = group * query_tiles;
    OrderedSteps block_order(heads * key_blocks), head_order(heads);
    run_stages<typename Products::Session>(
        heads, schedule, p.num_threads,
        {{row_blocks,
          [&](int64_t head, int64_t task, int) { prepare(head_of(head, task % group), int(task / group) * kQueries); }},
         {key_blocks,
          [&](int64_t head, int64_t task, int thread) {
            const int first = int(task) * task_keys;
            const int count = std::min(task_keys, int(p.sequences[scorer.key_head(head).b].len_k) - first);
            if (count > 0)
              differentiate({blocks.get()[thread], thread, block_order, head * key_blocks + task, head, first, count});
          }},
         {row_blocks + 1, [&](int64_t head, int64_t task, int) {
            if (task == 0) sum_dbias(head, head_order);
            else write_rows_of(head_of(head, (task - 1) % group), int((task - 1) / group) * kQueries);
          }}});
    if (dbias_sums.needed()) dbias_sums.write(scorer.gathered, dbias);
    else gate_sums.write_table();
  }

 private:
  // A task's working set.
  struct Block {
    alignas(64) Real key_columns[kMaxKeys * (kMaxDim + kPanelWidth)],
        value_columns[kMaxKeys * (kMaxDim + kPanelWidth)];            // right factors, transposed
    alignas(64) Real key_factor[kMaxKeys * (kMaxDim + kPanelWidth)];  // a right factor
    alignas(64) Real dkey[kMaxKeys * (kMaxDim + kPanelWidth)],
        dvalue[kMaxKeys * (kMaxDim + kPanelWidth)];  // row-major, to be scaled
    TilePair tiles;
    KeptWeights<kQueries, kMaxKeys> kept;
    GateProducts<Real, kRows, kMaxKeys> gate_products;
    Real gate_sums[kQueries + W];  // see sum_rows
  };

  // Query head g of the query heads that share a key head.
  Head head_of(int64_t head, int64_t g) const {
    const auto [b, h] = scorer.key_head(head);
    return {head % slots * group + g, b, h * group + g};
  }

  // One task: the keys [first, first + count) of one key head.
  struct Column {
    Block &block;
    int thread;
    OrderedSteps &order;
    int64_t task, head;
    int first, count;
  };

  // Small problems get small tasks, so that every core has work. The size does not depend on the number of threads, so
  // neither do the results.
  int keys_per_task() const {
    int count = kMaxKeys;
    while (count > 24 && p.batch * p.heads_kv * ((p.len_k + count - 1) / count) < 24) count /= 2;
    return round_up(count, kPanelWidth);
  }

  // Pass 1: a block of queries, and at the first block what a head begins with.
  void prepare(const Head &head, int first) {
    if (dbias_sums.needed() && first == 0) dbias_sums.begin_head(head.slot);
    if (first == 0) scorer.make(head.slot, head.b, head.h);
    query_rows.prepare(head, first);
    gate_sums.prepare(head, first);
  }

  // Pass 2: one block of keys with all queries that attend to it, of every query head that shares the keys.
  void differentiate(Column c) {
    const auto [b, h] = scorer.key_head(c.head);
    const int64_t first_key = p.sequences[b].first_key;
    const Matrix k = matrix_of(p.key, p.dtype, int(p.dim), b, h, first_key),
                 v = matrix_of(p.value, p.dtype, int(p.dim_v), b, h, first_key);
    const Band &band = scorer.bands[size_t(b)];
    Block &t = c.block;
    for (int j = 0; j < c.count; j += kPanelWidth) {
      pack_right_transposed<Operand>(k, c.first + j, std::min(kPanelWidth, c.count - j),
                                     t.key_columns + j * chunks * kChunk);
      pack_right_transposed<Operand>(v, c.first + j, std::min(kPanelWidth, c.count - j),
                                     t.value_columns + j * chunks_v * kChunk);
    }
    pack_right<Operand>(k, c.first, c.count, round_up(c.count, kPanelWidth), t.key_factor,
                        int64_t(task_keys) / kPerCell * kPanelWidth);
    t.tiles.clear_margins(round_up(c.count, kPanelWidth));
    const int padded_keys = round_up(c.count, Products::kTile);
    std::fill_n(t.dkey, padded_keys * chunks * kPanelWidth, Real(0));
    std::fill_n(t.dvalue, padded_keys * chunks_v * kPanelWidth, Real(0));

    const Range used = scorer.mask.used(b).clip(c.first, c.first + c.count);
    const Range attending = used.empty() ? Range{0, 0} : band.queries_of(used.begin, used.end);
    for (int64_t g = 0; g < group; ++g) sweep(c, head_of(c.head, g), g, used, attending);

    if (dkey.data)
      Products::write_gradient(result_matrix(p, dkey, int(p.dim), b, h, first_key), c.first, c.count, before,
                               scorer.scale.dkey, t.dkey, padded_keys, chunks);
    if (dvalue.data)
      Products::write_gradient(result_matrix(p, dvalue, int(p.dim_v), b, h, first_key), c.first, c.count, before,
                               kept_scale, t.dvalue, padded_keys, chunks_v);
  }

  // The queries of one query head. Each tile is a step of OrderedSteps, and adding to the head's dbias is one more.
  void sweep(Column &c, const Head &head, int64_t g, Range used, Range attending) {
    const bool is_first = c.first == 0;
    const int64_t len_q = p.sequences[head.b].len_q;
    if (dbias_sums.needed()) dbias_sums.begin_task(c.thread);
    if (gate_sums.gathered_sums.needed()) gate_sums.gathered_sums.begin_task(c.thread);
    for (int first = round_down(attending.begin, kQueries); first < attending.end; first += kQueries) {
      const int rows = round_up(std::min(kQueries, int(len_q) - first), Products::kTile);
      const int64_t step = g * (query_tiles + 1) + first / kQueries;
      // Sums of a gate are the head's. Where few rows of dS are kept, these are added at once.
      if (!kKeepsTile && scorer.gate.present() && !is_first) c.order.wait(c.task - 1, step);
      fill_tiles(c, head, first, rows, used);
      if constexpr (kKeepsTile) add_dbias(c, head, first, 0, rows);
      if (!is_first) c.order.wait(c.task - 1, step);
      if constexpr (kKeepsTile) add_gate(c, head, first, 0, rows);
      accumulate(c, head, first, rows);
      c.order.finish(c.task, step);
    }
    const int64_t last_step = g * (query_tiles + 1) + query_tiles;
    if (dbias_sums.needed() || gate_sums.gathered_sums.needed()) {
      if (!is_first) c.order.wait(c.task - 1, last_step);
      if (dbias_sums.needed()) dbias_sums.add_task(c.thread, head.slot);
      else gate_sums.gathered_sums.add_task(c.thread, head.slot);
    }
    c.order.finish(c.task, last_step);
  }

  // P and dS of the tile at (first, c.first), a few rows at a time so that they stay in the L1 cache.
  void fill_tiles(Column &c, const Head &head, int first, int rows, Range used) {
    Block &t = c.block;
    if (p.has_dropout) t.kept.fill(p, head.b, head.h, first, c.first, rows, c.count);
    for (int row = 0; row < rows; row += kRows) {
      fill_rows(c, head, first, row, std::min(kRows, rows - row), used);
      if constexpr (!kKeepsTile) {
        add_dbias(c, head, first, row, kRows);
        add_gate(c, head, first, row, kRows);
      }
      t.tiles.pack(row, std::min(kRows, rows - row), round_up(c.count, kPanelWidth), dvalue.data, dkey.data,
                   needs_dquery());
    }
  }

  // Adds rows [row, row + rows) of the tile to the task's share of dbias.
  void add_dbias(Column &c, const Head &head, int first, int row, int rows) {
    const int width = round_up(c.count, kPanelWidth);
    if (dbias_sums.needed())
      dbias_sums.add_tile(c.thread, head.slot, c.block.tiles.dscores(row), kTileStride, first + row, c.first, rows,
                          width, scorer.gathered.from(head.b, head.h, first + row, c.first),
                          gate_sums.column(head.slot, first + row));
    if (gate_sums.gathered_sums.needed())
      gate_sums.gathered_sums.add_tile(c.thread, scorer.gathered.from(head.b, head.h, first + row, c.first),
                                       c.block.tiles.dscores(row), kTileStride, rows, width,
                                       gate_sums.rows(head.slot, first + row));
  }

  // Adds rows [row, row + rows) of the tile to the head's sums of a gate.
  void add_gate(Column &c, const Head &head, int first, int row, int rows) {
    gate_sums.add_tile(head, c.block.tiles.dscores(row), kTileStride, first + row, c.first, rows,
                       round_up(c.count, kPanelWidth), c.block.gate_sums + row);
  }

  // Rows [row, row + rows) of the tile.
  void fill_rows(Column &c, const Head &head, int first, int row, int rows, Range used) {
    Block &t = c.block;
    const Band &band = scorer.bands[size_t(head.b)];
    const int query = first + row, width = round_up(c.count, kPanelWidth);
    const Range attended = band.keys_of(query, query + rows).clip(used.begin, used.end);
    const Range columns = attended.empty() ? Range{0, 0}
                                           : Range{round_down(attended.begin - c.first, kPanelWidth),
                                                   round_up(attended.end - c.first, kPanelWidth)};
    Real *probs = t.tiles.probs(row), *dscores = t.tiles.dscores(row);
    clear_outside(probs, kTileStride, rows, columns, width);
    clear_outside(dscores, kTileStride, rows, columns, width);
    std::fill_n(t.gate_sums + row, rows, Real(0));
    if (columns.empty()) return;
    const int64_t base = query_rows.index(head, query);
    const PairTile tile{head.slot, head.b, head.h, query, c.first, rows, columns};
    scorer.scores(tile, query_rows.queries.left(head.slot, query), query_rows.queries.panel_stride, t.key_columns,
                  chunks, probs, kTileStride, gate_sums.rows(head.slot, query), t.gate_products);
    const auto prob = [&](const Real *x, Vec maximum, Vec factor) {
      return factor * Lanes::exp2(Products::scaled(Lanes::load(x), scorer.scale.scores) - maximum);
    };
    for (int r = 0; r < rows; ++r) {
      const Vec maximum = Lanes::broadcast(query_rows.max.get()[base + r]),
                factor = Lanes::broadcast(query_rows.inverse_sum.get()[base + r]);
      for (int j = columns.begin; j < columns.end; j += kPanelWidth) {
        Real *x = probs + r * kTileStride + j;
        Lanes::store(x, prob(x, maximum, factor));
        Lanes::store(x + W, prob(x + W, maximum, factor));
      }
    }
    const auto kept = [&](int r, int column) { return t.kept.at(query + r, c.first + column); };
    const DscoreTerms<Real> dterms{query_rows.delta.get() + base, query_rows.dlse.get() + base, kept_scale};
    const auto make_dscores = [&](auto is_dropped, auto has_dlse) {
      Products::template dscores<decltype(is_dropped)::value, decltype(has_dlse)::value>(
          query_rows.douts.left(head.slot, query), query_rows.douts.panel_stride, t.value_columns, chunks_v, dterms,
          probs, dscores, kTileStride, rows, columns, kept);
    };
    const auto make_with = [&](auto is_dropped) {
      query_tensors.dlse ? make_dscores(is_dropped, std::true_type()) : make_dscores(is_dropped, std::false_type());
    };
    if (needs_dscores()) p.has_dropout ? make_with(std::true_type()) : make_with(std::false_type());
    if (p.has_dropout) drop(probs, kTileStride, rows, columns, kept);
    gate_sums.sum_rows(tile, dscores, kTileStride, t.gate_sums + row);
  }

  // dV += P^T dO, dK += dS^T Q, dQ += dS K
  void accumulate(Column &c, const Head &head, int first, int rows) {
    Block &t = c.block;
    const Band &band = scorer.bands[size_t(head.b)];
    const int padded_keys = round_up(c.count, Products::kTile);
    const auto query_range = [&](int j, int count) {
      return band.queries_of(c.first + j, c.first + j + count).clip(first, first + rows).shift(-first);
    };
    const auto key_range = [&](int r, int count) {
      return band.keys_of(first + r, first + r + count).clip(c.first, c.first + c.count).shift(-c.first);
    };
    if (dvalue.data)
      Products::accumulate_columns(t.tiles.transposed_probs(), kTileStride, query_rows.douts, head.slot, first,
                                   t.dvalue, padded_keys, chunks_v, query_range);
    if (dkey.data)
      Products::accumulate_columns(t.tiles.transposed_dscores(), kTileStride, query_rows.queries, head.slot, first,
                                   t.dkey, padded_keys, chunks, query_range);
    if (needs_dquery())
      Products::template accumulate<false>(
          t.tiles.dscores_factor(), kTileStride, t.key_factor, int64_t(task_keys) / kPerCell * kPanelWidth,
          query_rows.dquery_at(head, first), chunks * kPanelWidth, rows, chunks, nullptr, key_range);
  }

  // Pass 3: writes a block of dQ and of the gate's gradient.
  void write_rows_of(const Head &head, int first) const {
    query_rows.write_dquery(head, first, before);
    gate_sums.write_dgate(head, first);
  }

  // Adds the head's sums of dbias to its row of the table. Heads that may share the row follow one another.
  void sum_dbias(int64_t head, OrderedSteps &order) {
    if (!dbias) return;
    if (const int64_t last = last_sharing(head); last >= 0) order.wait(last, 0);
    for (int64_t g = 0; g < group; ++g) {
      const Head one = head_of(head, g);
      if (dbias_sums.needed()) dbias_sums.add_head(one.slot, one.b, one.h);
      else gate_sums.add_head(one);
    }
    order.finish(head, 0);
  }

  // The last head before a head that may add to its row of the table; below 0 if there is none.
  int64_t last_sharing(int64_t head) const {
    if (p.bias_heads == 1) return head - 1;
    if (p.bias_batch > 1) return -1;
    if (scorer.recurring.fills_cache()) return head % p.batch ? head - 1 : -1;
    return head - p.heads_kv;
  }

  bool needs_dquery() const { return query_tensors.dquery.data; }
  bool needs_dscores() const { return needs_dquery() || dkey.data || dbias || dgate.data; }

  const tob_problem &p;
  const QueryTensors<Real> query_tensors;
  const tob_tensor &dkey, &dvalue, &dgate;
  Real *dbias;
  // Members are initialised in this order, so each may read only the members above it.
  const BiasTable<Real> table{p};
  const Real kept_scale = p.has_dropout ? Real(p.kept_scale) : Real(1);
  const Real before = p.is_part ? Real(1) : Real(0);  // factor on the gradients that other parts have left
  const int chunks = round_up(int(p.dim), kPanelWidth) / kPanelWidth,
            chunks_v = round_up(int(p.dim_v), kPanelWidth) / kPanelWidth;  // dims, counted in panels
  const int task_keys = keys_per_task();                                   // keys in a task
  const int64_t key_blocks = (p.len_k + task_keys - 1) / task_keys;        // tasks for each key head
  const int64_t query_tiles = (p.len_q + kQueries - 1) / kQueries;
  const int64_t group = p.heads_kv ? p.heads_q / p.heads_kv : 1;  // query heads for each key head
  const int64_t heads = p.batch * p.heads_kv;                     // key heads
  const Schedule schedule{heads, 3, key_blocks, p.num_threads};
  const int64_t slots = schedule.slots, slots_q = slots * group;  // heads at work
  const Scorer<Products> scorer{p, table, slots_q, dgate.data != nullptr};
  const QueryRows<Products> query_rows{p, query_tensors, slots_q, scorer.scale.query};
  const DbiasSums<Real> dbias_sums{p, scorer.recurring, dbias != nullptr && p.rank == 1, p.num_threads, slots_q};
  const GateSums<Products> gate_sums{p, scorer, dgate, dbias, slots_q};
};

}  // namespace tob
