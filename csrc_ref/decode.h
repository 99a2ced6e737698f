// The forward pass for few queries and many keys, as in decoding with a cache. Its cost is to read keys and values from
// memory, so they are read once, as they lie: nothing is packed. Each task takes a part of a head's keys; a last one
// adds up what they found, in the order of the keys.
#pragma once

#include "outputs.h"

namespace tob {

template <class Real> class Decode {
  using S = Simd<Real>;
  using Vec = typename S::Vec;
  static constexpr int W = S::kLanes;
  static constexpr int kMaxRows = 16;  // queries that share a key head: with more, packing pays
  static constexpr int kKeys = 64;     // keys a step: they stay in the L1 cache while the rows pass by
  static constexpr int kKeysPerTask = 512;
  static constexpr Real kNoScore = std::numeric_limits<Real>::lowest();

 public:
  static bool serves(const tob_problem &p) {
    return !p.query_positions && !p.has_dropout && p.heads_kv > 0 && p.heads_q / p.heads_kv * p.len_q <= kMaxRows;
  }

  Decode(const tob_problem &problem, const Outputs<Real> &outputs) : p(problem), outputs(outputs) {}

  void run() {
    if (p.len_q == 0) return;
    const Scratch<Block> scratch(p.num_threads);
    // Task by task the heads of the same keys: they may lie side by side in memory.
    const auto attend_task = [&](int64_t b, int64_t task, int thread) {
      attend(b, task % p.heads_kv, task / p.heads_kv, scratch.get()[thread]);
    };
    run_stages(p.batch, Schedule(p.batch, 2, parts * p.heads_kv, p.num_threads), p.num_threads,
               {{parts * p.heads_kv, attend_task}, {p.heads_kv, [&](int64_t b, int64_t h, int) { combine(b, h); }}});
  }

 private:
  // A task's working set.
  struct Block {
    Real query[kMaxRows * (kMaxDim + W)];  // in bits
    Real keys[kKeys * (kMaxDim + W)], values[kKeys * (kMaxDim + W)];
    Real strip[kKeys + kMaxRows + W];
    Real scores[kKeys + W];
  };

  // Rows in memory, or a copy of them.
  struct Rows {
    const Real *data;
    int64_t stride;
  };

  // Rows that will be read where they lie: their memory is asked for while others are worked on.
  struct Soon {
    Rows rows;
    int count, bytes;  // a row's

    TOB_INLINE void ask(int row) const {
      if (row >= count) return;
      const char *data = reinterpret_cast<const char *>(rows.data + row * rows.stride);
      for (int at = 0; at < bytes; at += 64) __builtin_prefetch(data + at);
    }
  };

  // What a task found for a row: acc holds the sum of exp2(S - max) V behind the two numbers.
  struct Partial {
    Real &max, &sum;
    Real *acc;
  };

  Partial partial(int64_t b, int64_t h, int64_t part, int row) const {
    Real *at = partials.get() + (((b * p.heads_kv + h) * parts + part) * rows + row) * (2 + padded_v);
    return {at[0], at[1], at + 2};
  }

  // All queries of a key head, row g * len_q + i for the g-th of its query heads, against a part of its keys.
  void attend(int64_t b, int64_t h, int64_t part, Block &t) {
    const tob_sequence &s = p.sequences[b];
    const int len_q = int(s.len_q), first = int(part) * kKeysPerTask;
    for (int row = 0; row < int(group) * len_q; ++row) {
      const Matrix q = matrix_of(p.query, p.dtype, int(p.dim), b, h * group + row / len_q, s.first_query);
      read_rows(q, row % len_q, 1, Real(p.scale * kLog2E), t.query + row * padded, padded);
      const Partial sums = partial(b, h, part, row);
      sums.max = kNoScore;
      std::fill(&sums.sum, sums.acc + padded_v, Real(0));
    }

    const Range used = mask.used(b);
    const Range keys =
        Band(p, b).keys_of(0, len_q).clip(std::max(first, used.begin), std::min(first + kKeysPerTask, used.end));
    const Matrix k = matrix_of(p.key, p.dtype, int(p.dim), b, h, s.first_key);
    const Matrix v = matrix_of(p.value, p.dtype, int(p.dim_v), b, h, s.first_key);
    for (int key = keys.begin; key < keys.end; key += kKeys) {
      const int count = std::min(kKeys, keys.end - key);
      const int64_t first_y = key - (s.query_start + len_q - 1);
      const Rows key_rows = rows_of(k, key, count, padded, t.keys);
      const Rows value_rows = rows_of(v, key, count, padded_v, t.values);
      Soon values_soon = soon(v, key, key + count, padded_v);
      Soon keys_soon = soon(k, key + kKeys, std::min(key + 2 * kKeys, keys.end), padded);
      for (int row = 0; row < int(group) * len_q; ++row) {
        if (row % len_q == 0) {
          const int64_t table_row = bias_row(p, b, h * group + row / len_q);
          fill_strip(p, outputs.table, table_row, first_y, first_y + count + len_q - 2, t.strip);
        }
        score(t.query + row * padded, key_rows, count, t.scores, values_soon);
        add(t.scores, t.strip + len_q - 1 - row % len_q, mask.present() ? mask.at(b) + key : nullptr, count);
        accumulate(t.scores, value_rows, count, partial(b, h, part, row), keys_soon);
        values_soon.count = keys_soon.count = 0;
      }
    }
  }

  // Whether rows can be read where they lie, in whole vectors.
  static bool lie_ready(const Matrix &m, int padded_dim) {
    constexpr bool is_double = std::is_same_v<Real, double>;
    return m.dtype == (is_double ? TOB_FLOAT64 : TOB_FLOAT32) && m.stride_d == 1 && m.dim == padded_dim;
  }
  static Rows in_place(const Matrix &m, int first) {
    return {static_cast<const Real *>(m.data) + first * m.stride_l, m.stride_l};
  }

  // The rows [first, first + count) where they lie, if they can be read there, else a copy.
  static Rows rows_of(const Matrix &m, int first, int count, int padded_dim, Real *copy) {
    if (lie_ready(m, padded_dim)) return in_place(m, first);
    read_rows(m, first, count, Real(1), copy, padded_dim);
    return {copy, padded_dim};
  }
  // The rows [first, last), if they will be read where they lie, else none.
  static Soon soon(const Matrix &m, int first, int last, int padded_dim) {
    if (first >= last || !lie_ready(m, padded_dim)) return {};
    return {in_place(m, first), last - first, int(padded_dim * sizeof(Real))};
  }

  // scores[j] = <query, keys[j]>: a vector of partial sums a key, W keys at a time.
  TOB_INLINE void score(const Real *query, Rows keys, int count, Real *scores, const Soon &soon) const {
    for (int j = 0; j < count; j += W) {
      const Real *at[W];
      for (int e = 0; e < W; ++e) at[e] = keys.data + std::min(j + e, count - 1) * keys.stride;
      for (int e = 0; e < W; ++e) soon.ask(j + e);
      Vec sums[W] = {};
      for (int d = 0; d < padded; d += W) {
        const Vec q = S::load(query + d);
        for (int e = 0; e < W; ++e) sums[e] += q * S::load(at[e] + d);
      }
      S::transpose(sums);
      for (int width = W / 2; width > 0; width /= 2)
        for (int e = 0; e < width; ++e) sums[e] += sums[e + width];
      S::store(scores + j, sums[0]);
    }
  }

  // Adds the bias and the mask; -inf up to the next multiple of W.
  TOB_INLINE void add(Real *scores, const Real *strip, const Real *key_mask, int count) const {
    for (int j = 0; j < count; j += W) {
      Vec x = S::load(scores + j) + S::load(strip + j);
      if (key_mask) x += S::load(key_mask + j);
      S::store(scores + j, x);
    }
    std::fill(scores + count, scores + round_up(count, W), -std::numeric_limits<Real>::infinity());
  }

  // A step of the running softmax, and what it weighs.
  TOB_INLINE void accumulate(Real *scores, Rows values, int count, Partial sums, const Soon &soon) const {
    Vec maxima = S::broadcast(sums.max);
    for (int j = 0; j < count; j += W) maxima = S::max(maxima, S::load(scores + j));
    const Real max = S::max_lane(maxima), rescale = std::exp2(sums.max - max);
    Vec exps{};
    for (int j = 0; j < count; j += W) {
      const Vec e = S::exp2(S::load(scores + j) - max);
      S::store(scores + j, e);
      exps += e;
    }
    sums.max = max;
    sums.sum = rescale * sums.sum + S::sum(exps);
    int d = 0;
    for (; d + 8 * W <= padded_v; d += 8 * W) weigh<8>(scores, values, count, rescale, sums.acc, d, soon);
    for (; d + 2 * W <= padded_v; d += 2 * W) weigh<2>(scores, values, count, rescale, sums.acc, d, soon);
    for (; d < padded_v; d += W) weigh<1>(scores, values, count, rescale, sums.acc, d, soon);
  }

  // acc = rescale * acc + weights values, in the kVecs vectors from column d on.
  template <int kVecs>
  TOB_INLINE static void weigh(const Real *weights, Rows values, int count, Real rescale, Real *acc, int d,
                               const Soon &soon) {
    Vec sums[kVecs];
    for (int i = 0; i < kVecs; ++i) sums[i] = rescale * S::load(acc + d + i * W);
    const Real *row = values.data + d;
    for (int j = 0; j < count; ++j, row += values.stride) {
      if (d == 0) soon.ask(j);
      const Vec weight = S::broadcast(weights[j]);
      for (int i = 0; i < kVecs; ++i) sums[i] += weight * S::load(row + i * W);
    }
    for (int i = 0; i < kVecs; ++i) S::store(acc + d + i * W, sums[i]);
  }

  // Adds up what a head's tasks found, and writes its rows.
  void combine(int64_t b, int64_t h) const {
    const int len_q = int(p.sequences[b].len_q);
    for (int row = 0; row < int(group) * len_q; ++row) {
      Real max = kNoScore, sum = 0, acc[kMaxDim + W] = {};
      for (int64_t part = 0; part < parts; ++part) max = std::max(max, partial(b, h, part, row).max);
      for (int64_t part = 0; part < parts; ++part) {
        const Partial sums = partial(b, h, part, row);
        const Real factor = std::exp2(sums.max - max);
        sum += factor * sums.sum;
        for (int d = 0; d < padded_v; ++d) acc[d] += factor * sums.acc[d];
      }
      outputs.write(b, h * group + row / len_q, row % len_q, max, sum, acc);
    }
  }

  const tob_problem &p;
  const Outputs<Real> &outputs;
  const KeyMask<Real> mask{p};
  const int padded = round_up(int(p.dim), W), padded_v = round_up(int(p.dim_v), W);
  const int64_t group = p.heads_q / p.heads_kv;  // query heads a key head
  const int rows = int(group * p.len_q);
  const int64_t parts = std::max<int64_t>((p.len_k + kKeysPerTask - 1) / kKeysPerTask, 1);
  const Scratch<Real> partials{p.batch * p.heads_kv * parts * rows * (2 + padded_v)};
};

}  // namespace tob
