// Which pairs are attended to, and what bias they see: index ranges, and the reversed bias strips.
#pragma once

#include <algorithm>
#include <vector>

#include "runtime.h"
#include "tensor_io.h"

namespace tob {

inline constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

struct Range {
  int begin, end;
  bool empty() const { return begin >= end; }
  int size() const { return end - begin; }
  Range shift(int by) const { return {begin + by, end + by}; }
  Range clip(int lo, int hi) const { return {std::max(begin, lo), std::min(end, hi)}; }
};

// The pairs with min_offset <= query_start + i - j <= max_offset form a diagonal band; rows and columns cut it in
// ranges.
struct Band {
  int64_t query_start, min_offset, max_offset;
  int len_q, len_k;

  explicit Band(const tob_problem &p)
      : query_start(p.query_start),
        min_offset(p.min_offset),
        max_offset(p.max_offset),
        len_q(int(p.len_q)),
        len_k(int(p.len_k)) {}

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

// One head's bias over x = j - i, in bits, -inf outside the band: 8 neighbouring keys of a query read 8 neighbouring
// values, and the next query's start one before. Padded so that tiles may overhang the matrix on every side.
template <class Real> class BiasStrips {
 public:
  static constexpr int kPad = 256;

  // At least one strip; without a bias it is 0 inside the band.
  explicit BiasStrips(const tob_problem &p)
      : batch_(p.bias ? p.bias_batch : 1),
        heads_(p.bias ? p.bias_heads : 1),
        len_q_(int(p.len_q)),
        length_(p.len_q + p.len_k + 2 * kPad),
        values_(batch_ * heads_ * length_) {
    for (int64_t row = 0; row < batch_ * heads_; ++row) fill(p, row);
  }

  // Points at x = 0 of the strip of (b, h).
  const Real *at(int64_t b, int64_t h) const {
    return values_.get() + ((batch_ == 1 ? 0 : b) * heads_ + (heads_ == 1 ? 0 : h)) * length_ + kPad + len_q_;
  }

 private:
  // Finite numbers stay finite: only -inf forbids.
  static Real in_bits(Real nats) {
    constexpr Real kLargest = std::numeric_limits<Real>::max();
    return std::isinf(nats) ? nats : std::clamp(nats * Real(kLog2E), -kLargest, kLargest);
  }

  void fill(const tob_problem &p, int64_t row) {
    constexpr Real kForbidden = -std::numeric_limits<Real>::infinity();
    const int64_t columns = p.len_q + p.len_k - 1;
    const Real *bias = p.bias ? static_cast<const Real *>(p.bias) + row * columns : nullptr;
    Real *strip = values_.get() + row * length_;
    std::fill(strip, strip + length_, kForbidden);
    Real *zero = strip + kPad + len_q_;
    const int64_t first = std::max(-(p.len_q - 1), p.query_start - p.max_offset);
    const int64_t last = std::min(p.len_k - 1, p.query_start - p.min_offset);
    for (int64_t x = first; x <= last; ++x) zero[x] = bias ? in_bits(bias[p.len_k - 1 - x]) : Real(0);
  }

  int64_t batch_, heads_;
  int len_q_;
  int64_t length_;
  Scratch<Real> values_;
};

// The key mask of every sequence as an addend, 0 or -inf, -inf past the last key too; and the range of keys it leaves.
template <class Real> class KeyMask {
 public:
  explicit KeyMask(const tob_problem &p)
      : length_(p.key_mask ? round_up(int(p.len_k), kPanel<Real>) + 256 : 0), values_(length_ * p.batch) {
    constexpr Real kForbidden = -std::numeric_limits<Real>::infinity();
    for (int64_t b = 0; b < p.batch; ++b) {
      Range used{0, int(p.len_k)};
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

}  // namespace tob
