// The forward pass: for each block of queries, one sweep over the keys with a running softmax (FlashAttention-2,
// algorithm 1).
#pragma once

#include "outputs.h"
#include "scorer.h"

namespace tob {

template <class Products> class Forward {
  using Real = typename Products::Real;
  using Operand = typename Products::Operand;
  using Lanes = Simd<Real>;
  using Vec = typename Lanes::Vec;
  static constexpr int kPanelWidth = kPanel<Real>, W = Lanes::kLanes, kPerCell = kOperandsPerCell<Real, Operand>,
                       kChunk = kChunkCells<Real, Operand>;
  static constexpr int kKeys = Products::kForwardKeys, kMaxQueries = Products::kForwardQueries, kRows = Products::kRows;
  static constexpr int kPackedKeys = 4 * kPanelWidth;  // keys that a task packs
  static constexpr int64_t kScoreStride = kKeys + W;
  // The running maximum before any score. It is finite, so that -inf minus it is -inf, and at most any finite score.
  static constexpr Real kNoScore = std::numeric_limits<Real>::lowest();

 public:
  Forward(const tob_problem &problem, const Outputs<Real> &results) : p(problem), outputs(results) {}

  void run() {
    if (p.len_q == 0) return;
    const Scratch<Block> scratch(p.num_threads);
    run_stages<typename Products::Session>(
        heads, schedule, p.num_threads,
        {{(keys_padded + kPackedKeys - 1) / kPackedKeys + (keys_padded == 0),
          [&](int64_t head, int64_t task, int) { pack(head, int(task) * kPackedKeys); }},
         {blocks, [&](int64_t head, int64_t task, int thread) { attend(head, task, scratch.get()[thread]); }}});
  }

 private:
  // A task's working set.
  struct Block {
    alignas(64) Real query[kMaxQueries * (kMaxDim + kPanelWidth)];  // a left factor
    alignas(64) Real acc[kMaxQueries * (kMaxDim + kPanelWidth)];    // sum of P V, row-major
    alignas(64) Real scores[kRows * kScoreStride];
    alignas(64) Real weights[Products::kScoresAhead ? kRows * kScoreStride : 1];
    Real max[kMaxQueries + W];
    Real sum[kMaxQueries * W];  // for each row a vector of partial sums
    Real rescale[kRows + W];
    KeptWeights<kMaxQueries, kKeys> kept;
    alignas(64) Real gates[kMaxQueries * (kMaxRank + kPanelWidth)];  // see GateRows
    Real gate_ends[2][kMaxQueries + W];
    GateProducts<Real, kRows, kKeys> gate_products;

    // E, as a left factor: in the place of the scores, unless the next step's scores are there already.
    TOB_INLINE Real *exps() { return Products::kScoresAhead ? weights : scores; }
  };

  // One block of queries of a head, whose place in the scratch memory is the slot. Rows are whole tiles.
  struct Task {
    Block &block;
    int64_t head, slot, b, h;
    int first, rows;
  };

  // A step of a task: a few rows, the first of which is that of a query, and the columns of keys that they attend to,
  // counted from a key.
  struct Step {
    int row, rows, query, key;
    Range columns;
  };

  // Small problems get small tasks, so that every core has work. The size does not depend on the number of threads, so
  // neither do the results.
  int queries_per_task() const {
    int count = kMaxQueries;
    while (count > kRows && p.batch * p.heads_q * ((p.len_q + count - 1) / count) < 32) count /= 2;
    return round_up(count, kRows);
  }

  // Pass 1: packs keys and values as right factors. Keys are transposed.
  void pack(int64_t head, int first) {
    const auto [b, h] = scorer.key_head(head);
    const tob_sequence &s = p.sequences[b];
    for (int64_t g = 0; g < group && first == 0; ++g) scorer.make(slot_of(head, g), b, h * group + g);
    const Matrix k = matrix_of(p.key, p.dtype, int(p.dim), b, h, s.first_key);
    const Matrix v = matrix_of(p.value, p.dtype, int(p.dim_v), b, h, s.first_key);
    for (int j = first; j < std::min(first + kPackedKeys, round_up(int(s.len_k), kPanelWidth)); j += kPanelWidth) {
      const int count = std::min(kPanelWidth, int(s.len_k) - j);
      pack_right_transposed<Operand>(k, j, count, key_panels_at(head, j));
      pack_right<Operand>(v, j, count, kPanelWidth, value_panels_at(head, j), value_stride);
    }
  }

  // Pass 2: the attention of one block of queries to all of its keys.
  void attend(int64_t head, int64_t block, Block &t) {
    const auto [b, key_head] = scorer.key_head(head);
    const int64_t h = key_head * group + block % group;
    const int first = int(blocks / group - 1 - block / group) * task_queries;  // under causality the long ones first
    const tob_sequence &s = p.sequences[b];
    if (first >= s.len_q) return;
    const Band &band = scorer.bands[size_t(b)];
    const int count = std::min(task_queries, int(s.len_q) - first);
    const int rows = round_up(count, Products::kTile);
    pack_left<Operand>(matrix_of(p.query, p.dtype, int(p.dim), b, h, s.first_query), first, count, rows,
                       scorer.scale.query, t.query, int64_t(rows) * kChunk);
    if (scorer.gate.present())
      scorer.gate.pack_rows(b, h, first, count, rows, t.gates, int64_t(rows) * kPanelWidth,
                            {t.gate_ends[0], t.gate_ends[1]});
    std::fill(t.acc, t.acc + rows * chunks_v * kPanelWidth, Real(0));
    std::fill(t.max, t.max + rows + W, kNoScore);
    std::fill(t.sum, t.sum + rows * W, Real(0));

    const Task task{t, head, slot_of(head, block % group), b, h, first, rows};
    Step last{};  // a step whose product with the values is still to be added
    const Range used = scorer.mask.used(b), keys = band.keys_of(first, first + count).clip(used.begin, used.end);
    for (int key = round_down(keys.begin, kPanelWidth); key < keys.end; key += kKeys) {
      if (p.has_dropout) t.kept.fill(p, b, h, first, key, count, std::min(kKeys, keys.end - key));
      for (int row = 0; row < rows; row += kRows) {
        const int query = first + row, step_rows = std::min(kRows, rows - row);
        const Range step_keys =
            band.keys_of(query, query + step_rows).clip(std::max(key, keys.begin), std::min(key + kKeys, keys.end));
        if (step_keys.empty()) continue;
        const Range columns{round_down(step_keys.begin - key, kPanelWidth), round_up(step_keys.end - key, kPanelWidth)};
        const Step step{row, step_rows, query, key, columns};
        make_scores(task, step);
        if constexpr (Products::kScoresAhead) add_values(task, last);
        if (p.has_dropout) softmax_step<true>(t, step);
        else softmax_step<false>(t, step);
        if constexpr (Products::kScoresAhead) last = step;
        else add_values(task, step);
      }
    }
    if constexpr (Products::kScoresAhead) add_values(task, last);
    for (int r = 0; r < count; ++r)
      outputs.write(b, h, first + r, t.max[r], Lanes::sum(Lanes::load(t.sum + r * W)),
                    t.acc + r * chunks_v * kPanelWidth);
  }

  TOB_INLINE void make_scores(const Task &task, const Step &step) const {
    const auto &[t, head, slot, b, h, first, rows] = task;
    const GateRows<Real> gates = scorer.gate.rows(t.gates, int64_t(rows) * kPanelWidth, t.gate_ends[0], t.gate_ends[1]);
    scorer.scores({slot, b, h, step.query, step.key, step.rows, step.columns}, t.query + step.row * kChunk,
                  int64_t(rows) * kChunk, key_panels_at(head, step.key), chunks, t.scores, kScoreStride,
                  gates.from(step.row), t.gate_products);
  }

  // acc = t.rescale * acc + E V of a step.
  TOB_INLINE void add_values(const Task &task, const Step &step) const {
    Block &t = task.block;
    const Band &band = scorer.bands[size_t(task.b)];
    const int query = step.query, key = step.key;
    const Range columns = step.columns;
    Products::template accumulate<true>(
        t.exps(), kScoreStride, value_panels_at(task.head, key), value_stride,
        t.acc + step.row * chunks_v * kPanelWidth, chunks_v * kPanelWidth, step.rows, chunks_v, t.rescale,
        [&](int r, int count) {
          return band.keys_of(query + r, query + r + count).clip(key + columns.begin, key + columns.end).shift(-key);
        });
  }

  // Makes E = exp2(S - running maximum) of the scores, which is 0 for dropped weights, and adds E to the rows' sums
  // before dropout. Sets t.rescale to the factor of older sums. The exps of two rows are computed together.
  template <bool kDropped> TOB_INLINE void softmax_step(Block &t, const Step &step) const {
    const auto [row, rows, query, key, columns] = step;
    Real old_max[kRows + W];
    for (int r = 0; r < rows; r += W) Lanes::store(old_max + r, Lanes::load(t.max + row + r));
    raise_maxima(t, step);
    for (int r = 0; r < rows; r += W)
      Lanes::store(t.rescale + r, Lanes::exp2(Lanes::load(old_max + r) - Lanes::load(t.max + row + r)));
    Products::rescale(t.acc + row * chunks_v * kPanelWidth, chunks_v * kPanelWidth, t.rescale, rows);
    const auto score = [&](const Real *at) { return Products::scaled(Lanes::load(at), scorer.scale.scores); };
    for (int r = 0; r < rows; r += 2) {
      const Real *s = t.scores + r * kScoreStride, *next = s + kScoreStride;
      Real *exps = t.exps() + r * kScoreStride, *next_exps = exps + kScoreStride, *sum = t.sum + (row + r) * W;
      const Vec max = Lanes::broadcast(t.max[row + r]), next_max = Lanes::broadcast(t.max[row + r + 1]);
      Vec sums[4] = {Lanes::broadcast(t.rescale[r]) * Lanes::load(sum),
                     Lanes::broadcast(t.rescale[r + 1]) * Lanes::load(sum + W)};
      for (int j = columns.begin; j < columns.end; j += kPanelWidth) {
        Vec e[4] = {score(s + j) - max, score(next + j) - next_max, score(s + j + W) - max,
                    score(next + j + W) - next_max};
        Lanes::exp2(e);
        for (int i = 0; i < 4; ++i) {
          sums[i] += e[i];
          if constexpr (kDropped) e[i] = where_kept<Real>(t.kept.at(query + r + i % 2, key + j + i / 2 * W), e[i]);
        }
        store_operands<Operand>(exps + j / kPerCell, e[0], e[2]);
        store_operands<Operand>(next_exps + j / kPerCell, e[1], e[3]);
      }
      Lanes::store(sum, sums[0] + sums[2]);
      Lanes::store(sum + W, sums[1] + sums[3]);
    }
  }

  // Raises the running maxima of a step's rows to the rows' largest scores. Where scores are multiples of the scale, as
  // many rows as a vector has lanes are reduced together.
  TOB_INLINE void raise_maxima(Block &t, const Step &step) const {
    Real *const max = t.max + step.row;
    const auto largest = [&](int r, Vec from) {
      const Real *s = t.scores + r * kScoreStride;
      Vec m0 = from, m1 = from;
      for (int j = step.columns.begin; j < step.columns.end; j += kPanelWidth) {
        m0 = Lanes::max(m0, Lanes::load(s + j));
        m1 = Lanes::max(m1, Lanes::load(s + j + W));
      }
      return Lanes::max(m0, m1);
    };
    if constexpr (Products::kScoresAhead) {
      static_assert(kRows % W == 0);
      for (int r = 0; r < step.rows; r += W) {
        Vec maxima[W];
        for (int i = 0; i < W; ++i)
          maxima[i] = largest(r + i, Lanes::broadcast(-std::numeric_limits<Real>::infinity()));
        const Vec scores = Products::scaled(Lanes::max_each(maxima), scorer.scale.scores);
        Lanes::store(max + r, Lanes::max(Lanes::load(max + r), scores));
      }
    } else {
      for (int r = 0; r < step.rows; ++r) max[r] = Lanes::max_lane(largest(r, Lanes::broadcast(max[r])));
    }
  }

  // The place of a query head in the scratch memory: the g-th of those that share a key head.
  int64_t slot_of(int64_t head, int64_t g) const { return head % slots * group + g; }

  // The packed keys and values, from a key on.
  Real *key_panels_at(int64_t head, int64_t key) const {
    return key_panels.get() + (head % slots * keys_padded + key) * chunks * kChunk;
  }
  Real *value_panels_at(int64_t head, int64_t key) const {
    return value_panels.get() + head % slots * chunks_v * value_stride + key / kPerCell * kPanelWidth;
  }

  const tob_problem &p;
  const Outputs<Real> &outputs;
  // Members are initialised in this order, so each may read only the members above it.
  const int chunks = round_up(int(p.dim), kPanelWidth) / kPanelWidth,
            chunks_v = round_up(int(p.dim_v), kPanelWidth) / kPanelWidth;  // dims, counted in panels
  const int keys_padded = round_up(int(p.len_k), kPanelWidth);
  const int task_queries = queries_per_task();
  const int64_t group = p.heads_kv ? p.heads_q / p.heads_kv : 1;                 // query heads for each key head
  const int64_t blocks = group * ((p.len_q + task_queries - 1) / task_queries);  // tasks for each key head
  const int64_t heads = p.batch * p.heads_kv;                                    // key heads
  const Schedule schedule{heads, 2, blocks, p.num_threads};
  const int64_t slots = schedule.slots;
  const Scorer<Products> scorer{p, outputs.table, slots * group, false};
  const int64_t value_stride = int64_t(keys_padded) / kPerCell * kPanelWidth;  // from one panel of values to the next
  const Scratch<Real> key_panels{slots * keys_padded * chunks * kChunk}, value_panels{slots * chunks_v * value_stride};
};

}  // namespace tob
