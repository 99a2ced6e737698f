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
// Sequences are of one kind if they have the same positions, and causality by index, if any, begins alike.
class RecurringPairs {
 public:
  // Matrices hold whole tiles, whose rows and columns are multiples of these two. There are matrices if on average two
  // heads or more share one, and if together they are no larger than query and key, so that memory stays linear in the
  // length.
  RecurringPairs(const tob_problem &p, int tile_rows, int tile_columns)
      : p_(p),
        stride_(round_up(int(p.len_k), tile_columns)),
        size_(round_up(int(p.len_q), tile_rows) * stride_),
        table_rows_(p.bias ? p.bias_heads : 1) {
    if (!p.query_positions || p.gate.data || p.bias_batch > 1) return;
    std::map<std::tuple<std::string_view, std::string_view, int64_t>, int64_t> known;
    for (int64_t b = 0; b < p.batch; ++b) {
      const auto [kind, is_new] =
          known.try_emplace({bytes(p.query_positions + b * p.position_stride_q, p.len_q),
                             bytes(p.key_positions + b * p.position_stride_k, p.len_k), p.sequences[b].query_start},
                            int64_t(firsts_.size()));
      kinds_.push_back(kind->second);
      if (is_new) firsts_.push_back(b);
    }
    const int64_t heads = p.batch * p.heads_q, numbers = (heads * p.len_q + p.batch * p.heads_kv * p.len_k) * p.dim;
    present_ = 2 * count() <= heads && count() <= numbers / std::max<int64_t>(size_, 1);
  }

  bool present() const { return present_; }
  // Whether the matrices are together too large for a cache of a core.
  bool fills_cache() const { return present_ && count() * size_ > kCachedNumbers; }

  // The matrices of a row of the table follow one another.
  int64_t table_rows() const { return table_rows_; }
  int64_t kinds() const { return int64_t(firsts_.size()); }
  int64_t count() const { return table_rows_ * kinds(); }
  int64_t index(int64_t b, int64_t h) const { return bias_row(p_, b, h) * kinds() + kinds_[size_t(b)]; }
  // A sequence of a kind.
  int64_t sequence_of(int64_t kind) const { return firsts_[size_t(kind)]; }

  // The numbers of a matrix, of a row of it, and of all rows that belong to queries.
  int64_t size() const { return size_; }
  int64_t stride() const { return stride_; }
  int64_t used() const { return p_.len_q * stride_; }

 private:
  static constexpr int64_t kCachedNumbers = 1 << 17;  // half a megabyte of floats

  static std::string_view bytes(const int32_t *positions, int64_t count) {
    return {reinterpret_cast<const char *>(positions), size_t(count) * sizeof *positions};
  }

  const tob_problem &p_;
  const int64_t stride_, size_, table_rows_;
  std::vector<int64_t> kinds_, firsts_;  // of each sequence its kind, of each kind its first sequence
  bool present_ = false;
};

// The matrices of the bias in bits, -inf outside the band.
template <class Real> class RecurringBias {
  static constexpr int W = Simd<Real>::kLanes;

 public:
  RecurringBias(const tob_problem &p, const RecurringPairs &pairs, const GatheredBias<Real> &gathered)
      : pairs_(pairs), values_(pairs.present() ? pairs.count() * pairs.size() : 0) {
    for_each_in_parallel(pairs.present() ? pairs.count() : 0, p.num_threads, [&](int64_t index) {
      const int64_t b = pairs.sequence_of(index % pairs.kinds()), h = index / pairs.kinds();
      const GatheredTile<Real> tile = gathered.from(b, h, 0, 0);
      Real *to = values_.get() + index * pairs.size();
      for (int row = 0; row * pairs.stride() < pairs.size(); ++row, to += pairs.stride())
        for (int column = 0; column < pairs.stride(); column += W)
          Simd<Real>::store(to + column, tile.bias(row, column));
    });
  }

  // The bias of the pair (query, key), for the tile whose corner it is.
  const Real *at(int64_t b, int64_t h, int query, int key) const {
    return values_.get() + pairs_.index(b, h) * pairs_.size() + query * pairs_.stride() + key;
  }

 private:
  const RecurringPairs &pairs_;
  const Scratch<Real> values_;
};

// Sums of dS: a matrix for each head at work, and one for each shared matrix.
template <class Real> class RecurringSums {
 public:
  RecurringSums(const RecurringPairs &pairs, bool is_needed, int64_t slots)
      : pairs_(pairs),
        is_needed_(is_needed && pairs.present()),
        heads_(is_needed_ ? slots * pairs.size() : 0),
        sums_(is_needed_ ? pairs.count() * pairs.size() : 0) {
    if (is_needed_) std::fill_n(sums_.get(), pairs.count() * pairs.size(), 0.0);
  }

  bool needed() const { return is_needed_; }

  void begin_head(int64_t slot) const { std::fill_n(heads_.get() + slot * pairs_.size(), pairs_.used(), Real(0)); }

  // Takes the tile of dS whose corner is (row, column) over. Tiles of a head do not overlap.
  void add_tile(int64_t slot, const Real *dscores, int64_t stride, int row, int column, int rows, int width) const {
    Real *to = heads_.get() + slot * pairs_.size() + row * pairs_.stride() + column;
    for (int r = 0; r < rows; ++r, to += pairs_.stride()) std::copy_n(dscores + r * stride, width, to);
  }

  void add_head(int64_t slot, int64_t b, int64_t h) const {
    const Real *const head = heads_.get() + slot * pairs_.size();
    double *const sum = sums_.get() + pairs_.index(b, h) * pairs_.size();
    for (int64_t i = 0; i < pairs_.used(); ++i) sum[i] += double(head[i]);
  }

  // The sums of a matrix.
  const double *at(int64_t index) const { return sums_.get() + index * pairs_.size(); }

 private:
  const RecurringPairs &pairs_;
  const bool is_needed_;
  const Scratch<Real> heads_;
  const Scratch<double> sums_;
};

}  // namespace tob
