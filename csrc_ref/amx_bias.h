// The bias where scores are products of AMX tiles: tiles that a product starts from, so that no vector adds the bias.
#pragma once

#include "amx.h"
#include "bias_strips.h"

namespace tob {

// For each head at work, the 16 x 16 tiles whose number at (r, c) is the bias of key - query = x + c - r, divided by
// the scale, for every multiple x of 16 that a tile of scores needs; -inf outside the band. Scores that start from them
// are multiples of the scale.
class BiasTiles {
  using Lanes = Simd<float>;
  static constexpr int kSide = amx::kTileRows, kBlock = 2 * kSide;  // rows of a tile, and of a block of scores

 public:
  BiasTiles(const tob_problem &p, const BiasStrips<float> &strips, int64_t slots)
      : p_(p),
        strips_(strips),
        inverse_scale_(1 / float(p.scale * kLog2E)),
        present_(can_divide(p, inverse_scale_)),
        rows_(round_up(int(p.len_q), kBlock)),
        count_((rows_ + round_up(int(p.len_k), kBlock)) / kSide),
        tiles_(present_ ? slots * count_ * amx::kTileReals : 0) {}

  // Whether scores start from tiles. Otherwise the bias is added to them, as for tensors of positions.
  bool present() const { return present_; }

  // Makes the tiles of a head.
  void make(int64_t slot, int64_t b, int64_t h) const {
    const int rows = round_up(int(p_.sequences[b].len_q), kBlock), keys = round_up(int(p_.sequences[b].len_k), kBlock);
    if (!present_ || (!p_.bias && Band(p_, b).covers(0, rows, 0, keys))) return;
    float *to = tile(slot, kSide - rows);
    for (int x = kSide - rows; x < keys; x += kSide)
      for (int r = 0; r < kSide; ++r, to += kSide)
        Lanes::store(to, inverse_scale_ * Lanes::load(strips_.at(b, h, x) - r));
  }

  // The tile whose corner is (query, key), multiples of 16; null if there are no tiles. The tile of the next 16 keys
  // follows it, the tile of the next 16 queries precedes it.
  const float *at(int64_t slot, int query, int key) const { return present_ ? tile(slot, key - query) : nullptr; }

 private:
  // Whether all biases stay finite when they are divided by the scale, and the scale is so far from 0 that neither it
  // nor its inverse loses digits. A gate multiplies the biases of each row. Maxima of scores are those of their
  // multiples if it is positive.
  static bool can_divide(const tob_problem &p, float inverse_scale) {
    if (p.query_positions || p.gate.data || !(inverse_scale > 1e-6f && inverse_scale < 1e6f)) return false;
    const float *bias = static_cast<const float *>(p.bias);
    const int64_t count = p.bias ? p.bias_batch * p.bias_heads * p.bias_columns : 0;
    constexpr float kLargest = std::numeric_limits<float>::max();
    const float bound = kLargest / 4 / std::max(inverse_scale, 1.f);
    int num_large = 0;
    for (int64_t i = 0; i < count; ++i) num_large += std::fabs(bias[i]) > bound && std::fabs(bias[i]) <= kLargest;
    return num_large == 0;
  }

  float *tile(int64_t slot, int x) const {
    return tiles_.get() + (slot * count_ + (x + rows_) / kSide) * amx::kTileReals;
  }

  const tob_problem &p_;
  const BiasStrips<float> &strips_;
  const float inverse_scale_;
  const bool present_;
  const int rows_;
  const int64_t count_;
  const Scratch<float> tiles_;
};

}  // namespace tob
