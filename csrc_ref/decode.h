// The forward pass for few queries and many keys, as in decoding with a cache. Its cost is to read keys and values from
// memory. So they are read once and where they lie: nothing is packed. Each task takes a part of a head's keys. A last
// task adds up the partial results in the order of the keys.
#pragma once

#include "bias_strips.h"
#include "gated_row.h"
#include "outputs.h"

namespace tob {

template <class Real, class Operand> class Decode {
  using Lanes = Simd<Real>;
  using Vec = typename Lanes::Vec;
  static constexpr int W = Lanes::kLanes, kPanelWidth = kPanel<Real>, kPerCell = kOperandsPerCell<Real, Operand>;
  static constexpr int kMaxRows = 16;                     // queries that share a key head: with more, packing pays
  static constexpr int kSharing = W < 4 ? W : 4;          // rows that share loaded keys and values
  static constexpr int kMaxKeys = 2048, kMinKeys = 512;   // keys in a task
  static constexpr int kCopied = 64;                      // keys that are copied at a time, if they have to be
  static constexpr int kScores = kMaxKeys + kPanelWidth;  // room for the scores of a row
  static constexpr Real kNoScore = std::numeric_limits<Real>::lowest();

 public:
  static bool serves(const tob_problem &p) {
    return !p.query_positions && !p.has_dropout && p.heads_kv > 0 && p.heads_q / p.heads_kv * p.len_q <= kMaxRows;
  }

  Decode(const tob_problem &problem, const Outputs<Real> &results) : p(problem), outputs(results) {}

  void run() {
    if (p.len_q == 0) return;
    const Scratch<Block> scratch(p.num_threads);
    // Neighbouring tasks take the same keys of different heads, which may lie side by side in memory.
    const auto attend_task = [&](int64_t b, int64_t task, int thread) {
      attend(b, task % p.heads_kv, task / p.heads_kv, scratch.get()[thread]);
    };
    run_stages(p.batch, Schedule(p.batch, 2, parts * p.heads_kv, p.num_threads), p.num_threads,
               {{parts * p.heads_kv, attend_task}, {p.heads_kv, [&](int64_t b, int64_t h, int) { combine(b, h); }}});
  }

 private:
  // A task's working set.
  struct Block {
    Operand query[kMaxRows * kMaxDim], copy[kCopied * kMaxDim];
    Real strip[kMaxKeys + kMaxRows + W];
    Real gates[kMaxRank];
    Real scores[kMaxRows * kScores];  // later E, as a left factor, in the same place
  };

  // The partial result of a task for a row: the largest score, the sum of exp2(S - max), and in acc the sum of
  // exp2(S - max) V.
  struct Partial {
    Real &max, &sum;
    Real *acc;
  };

  // Reading starts anew with each task, which takes time, so tasks are large where there are many. The size does not
  // depend on the number of threads, so neither do the results.
  int keys_per_task() const {
    constexpr int64_t kManyTasks = 64;
    int count = kMaxKeys;
    while (count > kMinKeys && p.batch * p.heads_kv * ((p.len_k + count - 1) / count) < kManyTasks) count /= 2;
    return count;
  }

  Partial partial(int64_t b, int64_t h, int64_t part, int row) const {
    Real *at = partials.get() + (((b * p.heads_kv + h) * parts + part) * head_rows + row) * (2 + padded_v);
    return {at[0], at[1], at + 2};
  }

  // All queries of a key head, row g * len_q + i for the g-th of its query heads, against a part of its keys.
  void attend(int64_t b, int64_t h, int64_t part, Block &t) {
    const tob_sequence &s = p.sequences[b];
    const int len_q = int(s.len_q), first = int(part) * task_keys, used_rows = int(group) * len_q;
    if (used_rows == 0) return;
    for (int row = 0; row < used_rows; ++row) {
      const Matrix q = matrix_of(p.query, p.dtype, int(p.dim), b, h * group + row / len_q, s.first_query);
      read_rows(q, row % len_q, 1, t.query + row * padded, padded);
      const Partial sums = partial(b, h, part, row);
      sums.max = kNoScore;
      std::fill(&sums.sum, sums.acc + padded_v, Real(0));
    }

    const Range used = mask.used(b);
    const Range keys =
        Band(p, b).keys_of(0, len_q).clip(std::max(first, used.begin), std::min(first + task_keys, used.end));
    const int count = keys.end - keys.begin;
    if (count <= 0) return;
    visit_rows(matrix_of(p.key, p.dtype, int(p.dim), b, h, s.first_key), keys, padded, t.copy, [&](int at, auto found) {
      int row = 0;
      for (; row + kSharing <= used_rows; row += kSharing) score<kSharing>(t.query, row, found, t.scores + at);
      for (; row < used_rows; ++row) score<1>(t.query, row, found, t.scores + at);
    });
    const int64_t first_y = keys.begin - (s.query_start + len_q - 1);
    for (int row = 0; row < used_rows; ++row) {
      const int64_t head = h * group + row / len_q, last_y = first_y + count + len_q - 2;
      if (p.gate.data) {
        read_rows(gate_matrix<Real>(p, p.gate, b, head), row % len_q, 1, t.gates, int(p.rank));
        fill_strip(p, GatedRow<Real>(p, b, head, t.gates), true, first_y, last_y, t.strip);
      } else if (row % len_q == 0) {
        fill_strip(p, BiasRow<Real>{outputs.table, bias_row(p, b, head)}, true, first_y, last_y, t.strip);
      }
      Real *scores = t.scores + row * kScores;
      make_scores(scores, t.strip + len_q - 1 - row % len_q, mask.present() ? mask.at(b) + keys.begin : nullptr, count);
      softmax(scores, count, partial(b, h, part, row));
    }
    const Matrix v = matrix_of(p.value, p.dtype, int(p.dim_v), b, h, s.first_key);
    visit_rows(v, keys, padded_v, t.copy, [&](int at, auto found) {
      const auto sums_of = [&](int row) { return partial(b, h, part, row).acc; };
      int row = 0;
      const Real *exps = t.scores + at / kPerCell;
      for (; row + kSharing <= used_rows; row += kSharing) accumulate<kSharing>(exps, row, found, sums_of);
      for (; row < used_rows; ++row) accumulate<1>(exps, row, found, sums_of);
    });
  }

  // Rows in memory, or a copy of them.
  template <class Stored> struct Rows {
    const Stored *data;
    int64_t stride;
    int count;

    TOB_INLINE const Stored *at(int row) const { return data + row * stride; }
  };

  // Calls visit(index of the first row, Rows) for the rows of a range, up to kCopied rows at a time. Rows points at the
  // matrix if whole vectors can be read there, else at a copy.
  template <class Visit>
  void visit_rows(const Matrix &m, Range range, int padded_dim, Operand *copy, Visit visit) const {
    for (int first = range.begin; first < range.end; first += kCopied) {
      const int count = std::min(kCopied, range.end - first), at = first - range.begin;
      if (m.stride_d == 1 && m.dim == padded_dim) {
        visit_stored<Operand>(m, [&](const auto *data) {
          using Stored = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
          visit(at, Rows<Stored>{data + first * m.stride_l, m.stride_l, count});
        });
      } else {
        read_rows(m, first, count, copy, padded_dim);
        visit(at, Rows<Operand>{copy, padded_dim, count});
      }
    }
  }

  // Brings the element kRowsAhead rows ahead into the caches. Processors with AVX-512 prefetch well by themselves, so
  // it would only cost time there.
  template <class Stored> TOB_INLINE static void look_ahead(const Stored *p, int64_t stride) {
    if constexpr (TOB_VECTOR_BYTES < 64) prefetch(p, kRowsAhead, stride);
  }

  // scores[j] = <query, keys[j]> for kRows rows of queries. W dot products are computed at a time, each in a vector of
  // partial sums. The keys are read in the order in which they lie, as the processor expects.
  template <int kRows, class Stored>
  TOB_INLINE void score(const Operand *query, int first_row, Rows<Stored> keys, Real *scores) const {
    constexpr int kTile = W / kRows;                   // keys
    constexpr int kTogether = kRows == 1 ? 1 : kTile;  // keys that share a load of the queries
    query += first_row * padded;
    scores += first_row * kScores;
    for (int j = 0; j < keys.count; j += kTile) {
      Vec sums[W];
      for (int e = 0; e < kTile; e += kTogether) {
        const Stored *key[kTogether];
        for (int i = 0; i < kTogether; ++i) key[i] = keys.at(std::min(j + e + i, keys.count - 1));
        Vec products[kTogether][kRows] = {};
        for (int d = 0; d < padded; d += W * kPerCell) {
          Vec x[kTogether];
          for (int i = 0; i < kTogether; ++i) {
            look_ahead(key[i] + d, keys.stride);
            x[i] = load_cells<Operand, Real>(key[i] + d);
          }
          for (int r = 0; r < kRows; ++r) {
            const Vec q = load_cells<Operand, Real>(query + r * padded + d);
            for (int i = 0; i < kTogether; ++i) products[i][r] = add_product<Operand, Real>(products[i][r], q, x[i]);
          }
        }
        for (int i = 0; i < kTogether; ++i)
          for (int r = 0; r < kRows; ++r) sums[r * kTile + e + i] = products[i][r];
      }
      Real lanes[W];
      Lanes::store(lanes, Lanes::sum_each(sums));
      for (int r = 0; r < kRows; ++r) std::memcpy(scores + r * kScores + j, lanes + r * kTile, sizeof(Real) * kTile);
    }
  }

  // Scales products and adds the bias and the mask; -inf up to the next multiple of kPanelWidth.
  TOB_INLINE void make_scores(Real *scores, const Real *strip, const Real *key_mask, int count) const {
    for (int j = 0; j < count; j += W) {
      Vec x = Real(p.scale * kLog2E) * Lanes::load(scores + j) + Lanes::load(strip + j);
      if (key_mask) x += Lanes::load(key_mask + j);
      Lanes::store(scores + j, x);
    }
    std::fill(scores + count, scores + round_up(count, kPanelWidth), -std::numeric_limits<Real>::infinity());
  }

  // Replaces scores by E = exp2(S - max), and stores their maximum and the sum of E.
  TOB_INLINE void softmax(Real *scores, int count, Partial found) const {
    Vec maxima = Lanes::broadcast(kNoScore), sums{};
    for (int j = 0; j < count; j += W) maxima = Lanes::max(maxima, Lanes::load(scores + j));
    const Real max = Lanes::max_lane(maxima);
    for (int j = 0; j < count; j += kPanelWidth) {
      const Vec e0 = Lanes::exp2(Lanes::load(scores + j) - max), e1 = Lanes::exp2(Lanes::load(scores + j + W) - max);
      store_operands<Operand>(scores + j / kPerCell, e0, e1);
      sums += e0 + e1;
    }
    found.max = max;
    found.sum = Lanes::sum(sums);
  }

  // Adds the weighted values to the sums of kRows rows: as many columns at once as registers hold.
  template <int kRows, class Stored, class SumsOf>
  TOB_INLINE void accumulate(const Real *weights, int first_row, Rows<Stored> values, SumsOf sums_of) const {
    constexpr int kWidest = kRows == 1 ? 8 : TOB_VECTOR_BYTES == 64 ? 4 : 2;
    weights += first_row * kScores;
    Real *sums[kRows];
    for (int r = 0; r < kRows; ++r) sums[r] = sums_of(first_row + r);
    int d = 0;
    for (; d + kWidest * W <= padded_v; d += kWidest * W) weigh<kRows, kWidest>(weights, values, sums, d);
    if constexpr (kWidest > 4)
      for (; d + 4 * W <= padded_v; d += 4 * W) weigh<kRows, 4>(weights, values, sums, d);
    for (; d + 2 * W <= padded_v; d += 2 * W) weigh<kRows, 2>(weights, values, sums, d);
    if constexpr (kPerCell == 1)
      for (; d < padded_v; d += W) weigh<kRows, 1>(weights, values, sums, d);
  }

  // Adds them in the kVecs vectors of columns from column d on.
  template <int kRows, int kVecs, class Stored>
  TOB_INLINE static void weigh(const Real *weights, Rows<Stored> values, Real *const (&sums)[kRows], int d) {
    Vec acc[kRows][kVecs];
    for (int r = 0; r < kRows; ++r)
      for (int i = 0; i < kVecs; ++i) acc[r][i] = Lanes::load(sums[r] + d + i * W);
    for (int j = 0; j < values.count; j += kPerCell) {
      Vec x[kVecs];
      load_values(values, j, d, x);
      for (int i = 0; i < kVecs; ++i)
        for (int r = 0; r < kRows; ++r)
          acc[r][i] = add_product<Operand, Real>(acc[r][i],
                                                 broadcast_cell<Operand>(weights + r * kScores + j / kPerCell), x[i]);
    }
    for (int r = 0; r < kRows; ++r)
      for (int i = 0; i < kVecs; ++i) Lanes::store(sums[r] + d + i * W, acc[r][i]);
  }

  // Loads kVecs vectors of cells from column d on: of row j, or of rows j and j + 1 if a cell holds two operands.
  template <int kVecs, class Stored>
  TOB_INLINE static void load_values(Rows<Stored> values, int j, int d, Vec (&cells)[kVecs]) {
    if constexpr (kPerCell == 1) {
      for (int i = 0; i < kVecs; ++i) {
        look_ahead(values.at(j) + d + i * W, values.stride);
        cells[i] = load_stored<Real>(values.at(j) + d + i * W);
      }
    } else {
      alignas(64) static constexpr Stored kNone[kMaxDim] = {};
      const Stored *first = values.at(j), *second = j + 1 < values.count ? values.at(j + 1) : kNone;
      for (int i = 0; i < kVecs; i += 2) {
        for (const Stored *row : {first, second}) look_ahead(row + d + i * W, values.stride);
        const auto upper = Halves::load(first + d + i * W), lower = Halves::load(second + d + i * W);
        cells[i] = (Vec)Halves::interleaved_first(upper, lower);
        cells[i + 1] = (Vec)Halves::interleaved_second(upper, lower);
      }
    }
  }

  // Adds the partial results of a head to the first of them, and writes the head's rows.
  void combine(int64_t b, int64_t h) const {
    const int len_q = int(p.sequences[b].len_q);
    for (int row = 0; row < int(group) * len_q; ++row) {
      const Partial all = partial(b, h, 0, row);
      for (int64_t part = 1; part < parts; ++part) {
        const Partial next = partial(b, h, part, row);
        const Real max = std::max(all.max, next.max);
        const Real rescale = std::exp2(all.max - max), factor = std::exp2(next.max - max);
        all.max = max;
        all.sum = rescale * all.sum + factor * next.sum;
        for (int d = 0; d < padded_v; ++d) all.acc[d] = rescale * all.acc[d] + factor * next.acc[d];
      }
      outputs.write(b, h * group + row / len_q, row % len_q, all.max, all.sum, all.acc);
    }
  }

  const tob_problem &p;
  const Outputs<Real> &outputs;
  // Members are initialised in this order, so each may read only the members above it.
  const KeyMask<Real> mask{p};
  const int padded = round_up(int(p.dim), W *kPerCell), padded_v = round_up(int(p.dim_v), W *kPerCell);
  const int64_t group = p.heads_q / p.heads_kv;  // query heads for each key head
  const int head_rows = int(group * p.len_q);
  const int task_keys = keys_per_task();
  const int64_t parts = std::max<int64_t>((p.len_k + task_keys - 1) / task_keys, 1);
  const Scratch<Real> partials{p.batch * p.heads_kv * parts * head_rows * (2 + padded_v)};
};

}  // namespace tob
