// The bias where tensors give the positions and sequences have the same ones, as the windows of an image do. It is
// looked up once for all of them, as matrices of pairs. Sums of dS are such matrices too, and are added to the table's
// gradient at the end.
#pragma once

#include <map>
#include <string_view>
#include <tuple>

#include "bias_gathered.h"

namespace tob {

// Which sequences and heads share a matrix of pairs. There is one for each row of the table and each kind of sequence.
// Sequences are of one kind if they have the same positions.
class RecurringPairs {
 public:
  // A head of a sequence, and the number of its matrix.
  struct Member {
    int64_t index, b, h;
  };

  // There are matrices if on average two heads or more share one, and if together they are no larger than query and
  // key. So memory stays linear in the length.
  explicit RecurringPairs(const tob_problem &p) : p_(p), stride_(padded(p.len_k)), size_(padded(p.len_q) * stride_) {
    if (!p.query_positions || p.gate.data || p.bias_batch > 1) return;
    std::vector<int64_t> firsts;  // of each kind the first sequence
    std::map<std::tuple<std::string_view, std::string_view, int64_t>, int64_t> known;
    for (int64_t b = 0; b < p.batch; ++b) {
      const auto [kind, is_new] =
          known.try_emplace({bytes(p.query_positions + b * p.position_stride_q, p.len_q),
                             bytes(p.key_positions + b * p.position_stride_k, p.len_k), p.sequences[b].query_start},
                            int64_t(firsts.size()));
      kinds_.push_back(kind->second);
      if (is_new) firsts.push_back(b);
    }
    num_kinds_ = int64_t(firsts.size());
    const int64_t rows = p.bias ? p.bias_heads : 1, heads = p.batch * p.heads_q, count = rows * num_kinds_;
    if (2 * count > heads || count * size_ > (heads * p.len_q + p.batch * p.heads_kv * p.len_k) * p.dim) return;
    for (int64_t h = 0; h < rows; ++h)
      for (const int64_t b : firsts) members_.push_back({index(b, h), b, h});
  }

  bool present() const { return !members_.empty(); }
  // Whether the matrices are together too large for a cache of a core.
  bool fills_cache() const { return int64_t(members_.size()) * size_ > kCachedNumbers; }
  // A member of each matrix.
  const std::vector<Member> &members() const { return members_; }
  int64_t index(int64_t b, int64_t h) const { return bias_row(p_, b, h) * num_kinds_ + kinds_[size_t(b)]; }
  // The numbers of a matrix, and of a row of it. Both hold whole tiles.
  int64_t size() const { return size_; }
  int64_t stride() const { return stride_; }
  int64_t num_queries() const { return p_.len_q; }

 private:
  static constexpr int64_t kCachedNumbers = 1 << 17;

  static int64_t padded(int64_t length) { return (length + 31) / 32 * 32; }

  const tob_problem &p_;
  const int64_t stride_, size_;
  int64_t num_kinds_ = 0;
  std::vector<int64_t> kinds_;  // of each sequence
  std::vector<Member> members_;

  static std::string_view bytes(const int32_t *positions, int64_t count) {
    return {reinterpret_cast<const char *>(positions), size_t(count) * sizeof *positions};
  }
};

// The matrices of the bias in bits, -inf outside the band.
template <class Real> class RecurringBias {
  static constexpr int W = Simd<Real>::kLanes;

 public:
  RecurringBias(const RecurringPairs &pairs, const GatheredBias<Real> &gathered)
      : pairs_(pairs), values_(int64_t(pairs.members().size()) * pairs.size()) {
    for (const auto &[index, b, h] : pairs.members()) {
      const GatheredTile<Real> tile = gathered.from(b, h, 0, 0);
      Real *to = values_.get() + index * pairs.size();
      for (int row = 0; row < pairs.size() / pairs.stride(); ++row, to += pairs.stride())
        for (int column = 0; column < pairs.stride(); column += W)
          Simd<Real>::store(to + column, tile.bias(row, column));
    }
  }

  // The bias of the pair (query, key), for the tile whose corner it is.
  const Real *at(int64_t b, int64_t h, int query, int key) const {
    return values_.get() + pairs_.index(b, h) * pairs_.size() + query * pairs_.stride() + key;
  }

 private:
  const RecurringPairs &pairs_;
  const Scratch<Real> values_;
};

// The sums of dS: of each head at work its dS, and of each matrix the sum of its heads' dS.
template <class Real> class RecurringSums {
 public:
  RecurringSums(const RecurringPairs &pairs, bool is_needed, int64_t slots)
      : pairs_(pairs),
        is_needed_(is_needed && pairs.present()),
        heads_(is_needed_ ? slots * pairs.size() : 0),
        sums_(is_needed_ ? int64_t(pairs.members().size()) * pairs.size() : 0) {
    if (is_needed_) std::fill_n(sums_.get(), int64_t(pairs.members().size()) * pairs.size(), 0.0);
  }

  bool needed() const { return is_needed_; }

  void begin_head(int64_t slot) const { std::fill_n(heads_.get() + slot * pairs_.size(), used(), Real(0)); }

  // Takes the tile of dS whose corner is (row, column) over. Tiles of a head do not overlap.
  void add_tile(int64_t slot, const Real *dscores, int64_t stride, int row, int column, int rows, int width) const {
    Real *to = heads_.get() + slot * pairs_.size() + row * pairs_.stride() + column;
    for (int r = 0; r < rows; ++r, to += pairs_.stride()) std::copy_n(dscores + r * stride, width, to);
  }

  void add_head(int64_t slot, int64_t b, int64_t h) const {
    const Real *const head = heads_.get() + slot * pairs_.size();
    double *const sum = sums_.get() + pairs_.index(b, h) * pairs_.size();
    for (int64_t i = 0; i < used(); ++i) sum[i] += double(head[i]);
  }

  // Calls run(sums, b, h) for every matrix of sums, with a sequence and a head that it belongs to.
  template <class Run> void for_each(Run run) const {
    for (const auto &[index, b, h] : pairs_.members())
      if (is_needed_) run(sums_.get() + index * pairs_.size(), b, h);
  }

 private:
  // The numbers of the rows that are queries.
  int64_t used() const { return pairs_.num_queries() * pairs_.stride(); }

  const RecurringPairs &pairs_;
  const bool is_needed_;
  const Scratch<Real> heads_;
  const Scratch<double> sums_;
};

}  // namespace tob
