// The pairs that are attended to, as ranges of queries and keys: the band of allowed offsets, and the key mask.
#pragma once

#include <algorithm>
#include <vector>

#include "packing.h"
#include "runtime.h"

namespace tob {

struct Range {
  int begin, end;
  bool empty() const { return begin >= end; }
  int size() const { return end - begin; }
  Range shift(int by) const { return {begin + by, end + by}; }
  Range clip(int lo, int hi) const { return {std::max(begin, lo), std::min(end, hi)}; }
};

// The pairs with min_offset <= query_start + i - j <= max_offset form a diagonal band. Each row and each column of the
// matrix of pairs cuts a range out of it.
struct Band {
  static constexpr int64_t kUnlimited = TOB_UNLIMITED;
  int64_t query_start, min_offset, max_offset;
  int len_q, len_k;

  // The band of sequence b. If tensors give the positions, the band holds all pairs that their indices allow.
  Band(const tob_problem &p, int64_t b)
      : query_start(p.sequences[b].query_start),
        min_offset(!p.query_positions     ? p.min_offset
                   : p.is_causal_by_index ? 0
                                          : -kUnlimited),
        max_offset(p.query_positions ? kUnlimited : p.max_offset),
        len_q(int(p.sequences[b].len_q)),
        len_k(int(p.sequences[b].len_k)) {}

  // Keys that some query of [first, last) attends to.
  Range keys_of(int first, int last) const {
    return {clamp(query_start + first - max_offset, len_k), clamp(query_start + (last - 1) - min_offset + 1, len_k)};
  }
  // Queries that attend to some key of [first, last).
  Range queries_of(int first, int last) const {
    return {clamp(first - query_start + min_offset, len_q), clamp((last - 1) - query_start + max_offset + 1, len_q)};
  }
  // Whether all queries of [q, q_end) attend to all keys of [k, k_end), as far as offsets go.
  bool covers(int q, int q_end, int k, int k_end) const {
    return query_start + q - (k_end - 1) >= min_offset && query_start + (q_end - 1) - k <= max_offset;
  }

 private:
  static int clamp(int64_t index, int length) { return int(std::clamp<int64_t>(index, 0, length)); }
};

// The key mask of every sequence as a number to add to scores: 0, or -inf for a key that is masked or past the last.
// Also the range from the first key to the last key that the mask leaves.
template <class Real> class KeyMask {
 public:
  explicit KeyMask(const tob_problem &p)
      : length_(p.key_mask ? round_up(int(p.len_k), kPanel<Real>) + 256 : 0), values_(length_ * p.batch) {
    constexpr Real kForbidden = -std::numeric_limits<Real>::infinity();
    for (int64_t b = 0; b < p.batch; ++b) {
      Range used{0, int(p.sequences[b].len_k)};
      if (p.key_mask) {
        const uint8_t *mask = p.key_mask + b * p.len_k;
        Real *values = values_.get() + b * length_;
        for (int64_t j = 0; j < length_; ++j) values[j] = j < p.len_k && mask[j] ? Real(0) : kForbidden;
        while (used.begin < used.end && !mask[used.begin]) ++used.begin;
        while (used.begin < used.end && !mask[used.end - 1]) --used.end;
      }
      used_.push_back(used);
    }
  }

  bool present() const { return length_ > 0; }
  Range used(int64_t b) const { return used_[size_t(b)]; }
  const Real *at(int64_t b) const { return present() ? values_.get() + b * length_ : nullptr; }

 private:
  int64_t length_;
  Scratch<Real> values_;
  std::vector<Range> used_;
};

inline std::vector<Band> bands_of(const tob_problem &p) {
  std::vector<Band> bands;
  for (int64_t b = 0; b < p.batch; ++b) bands.emplace_back(p, b);
  return bands;
}

}  // namespace tob
