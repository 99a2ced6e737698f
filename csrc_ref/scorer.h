// The scores of tiles, with everything that they depend on besides queries and keys: band, bias, gate, masks and scale.
#pragma once

#include "gate_gathered.h"
#include "products.h"
#include "recurring.h"

namespace tob {

// A sequence, and a key head of it.
struct KeyHead {
  int64_t b, h;
};

// A tile of pairs of a query head, whose place in the scratch memory is the slot. Its corner is (query, key); of its
// columns some are needed.
struct PairTile {
  int64_t slot, b, h;
  int query, key, rows;
  Range columns;
};

// Forward and backward both make their scores here, so that their roundings are the same.
template <class Products> class Scorer {
  using Real = typename Products::Real;

 public:
  // `slots` heads are at work. A gate needs its transposed table for its gradient.
  Scorer(const tob_problem &problem, const BiasTable<Real> &table, int64_t slots, bool has_transposed)
      : bands(bands_of(problem)),
        strips(problem, table),
        gathered(problem, table),
        recurring(problem, Products::kTile, kPanel<Real>),
        recurring_bias(problem, recurring, gathered),
        mask(problem),
        bias_tiles(problem, strips, slots),
        gate(problem, slots, has_transposed),
        gathered_gate(problem, slots),
        scale(problem.scale, bias_tiles.present()),
        p(problem) {}

  // The key head with a number, in the order in which passes take them. Heads of a sequence follow one another, because
  // they may lie side by side in memory. But matrices of the bias that fill a cache are used up one by one.
  KeyHead key_head(int64_t number) const {
    if (recurring.fills_cache()) return {number % p.batch, number / p.batch};
    return {number / p.heads_kv, number % p.heads_kv};
  }

  // Makes what scores of a head need.
  void make(int64_t slot, int64_t b, int64_t h) const {
    bias_tiles.make(slot, b, h);
    gate.pack(slot, b, h);
    gathered_gate.pack(slot, b, h);
  }

  // See score_block for the factors and for `out`. `gates` are those of the tile's rows, and `products` has room for G.
  template <int kRows, int kColumns>
  TOB_INLINE void scores(const PairTile &tile, const Real *a, int64_t chunk_stride, const Real *panels, int chunks,
                         Real *out, int64_t stride, const GateRows<Real> &gates,
                         GateProducts<Real, kRows, kColumns> &products) const {
    if (gate.present()) {
      gated_scores(tile, a, chunk_stride, panels, chunks, out, stride, gates, products);
      return;
    }
    const GatheredTile<Real> gathered_tile = gathered.from(tile.b, tile.h, tile.query, tile.key);
    const bool biased = p.bias || !is_inside(tile);
    ScoreTerms<Real> terms = terms_of(tile, biased && !bias_tiles.present(), gathered_tile);
    if (recurring.present()) {
      terms.gathered = nullptr;
      terms.matrix = recurring_bias.at(tile.b, tile.h, tile.query, tile.key);
      terms.matrix_stride = recurring.stride();
    }
    terms.bias_tile = biased ? bias_tiles.at(tile.slot, tile.query, tile.key) : nullptr;
    Products::template scores<false>(a, chunk_stride, panels, chunks, out, stride, terms, tile.rows, tile.columns,
                                     bands[size_t(tile.b)].len_k - tile.key);
  }

  // Members are initialised in this order, so each may read only the members above it.
  const std::vector<Band> bands;
  const BiasStrips<Real> strips;
  const GatheredBias<Real> gathered;
  const RecurringPairs recurring;
  const RecurringBias<Real> recurring_bias;
  const KeyMask<Real> mask;
  const typename Products::BiasTiles bias_tiles;
  const GateTable<Real> gate;
  const GatheredGate<Real> gathered_gate;
  const Scale<Real, typename Products::Operand> scale;

 private:
  // A function of its own: its code would get into the way of calls without a gate.
  template <int kRows, int kColumns>
  __attribute__((noinline)) void gated_scores(const PairTile &tile, const Real *a, int64_t chunk_stride,
                                              const Real *panels, int chunks, Real *out, int64_t stride,
                                              const GateRows<Real> &gates,
                                              GateProducts<Real, kRows, kColumns> &products) const {
    const Band &band = bands[size_t(tile.b)];
    const GatheredTile<Real> gathered_tile = gathered.from(tile.b, tile.h, tile.query, tile.key);
    ScoreTerms<Real> terms = terms_of(tile, true, gathered_tile);
    if (gathered_gate.present())
      gathered_gate.set_terms(terms, tile.slot, gates, gathered_tile, tile.rows, tile.columns, products);
    else gate.set_terms(terms, tile.slot, tile.b, gates, tile.query, tile.key, tile.rows, tile.columns, products);
    Products::template scores<true>(a, chunk_stride, panels, chunks, out, stride, terms, tile.rows, tile.columns,
                                    band.len_k - tile.key);
    if (!gathered.present() && !is_inside(tile))
      forbid_outside(band, out, stride, tile.query, tile.key, tile.rows, tile.columns);
  }

  TOB_INLINE bool is_inside(const PairTile &tile) const {
    return bands[size_t(tile.b)].covers(tile.query, tile.query + tile.rows, tile.key + tile.columns.begin,
                                        tile.key + tile.columns.end);
  }

  TOB_INLINE ScoreTerms<Real> terms_of(const PairTile &tile, bool has_strip,
                                       const GatheredTile<Real> &gathered_tile) const {
    return {scale.products, has_strip ? strips.at(tile.b, tile.h, tile.key - tile.query) : nullptr,
            gathered.present() ? &gathered_tile : nullptr, mask.present() ? mask.at(tile.b) + tile.key : nullptr,
            nullptr};
  }

  const tob_problem &p;
};

}  // namespace tob
